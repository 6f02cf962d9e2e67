"""The `batch_tile_*` methods of the clients that block or give futures.

Knows no client and no way to wait.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastkv import commands
from fastkv._core import Batch
from fastkv.commands import Keys, Seconds, When
from fastkv.node import TileFuture

if TYPE_CHECKING:
    from redis._parsers.encoders import Encoder

    from fastkv.buffers import Buffers


class Tiles:
    """Mixed into redis-py's clients."""

    def _tile_encoder(self) -> Encoder:
        raise NotImplementedError

    def _tile_run(self, batch: Batch, timeout: float | None) -> list[bool]:
        """Block until each key has its outcome."""
        raise NotImplementedError

    def _tile_submit(self, batch: Batch, timeout: float | None) -> TileFuture:
        """Do not block. The future keeps the client alive."""
        raise NotImplementedError

    def _run(self, batch: Batch, timeout: float | None) -> list[bool]:
        try:
            return self._tile_run(batch, timeout)
        except BaseException:
            batch.unpin()  # the traceback, which may live long, holds the batch
            raise

    def _submit(self, batch: Batch, timeout: float | None) -> TileFuture:
        try:
            return self._tile_submit(batch, timeout)
        except BaseException:
            batch.unpin()
            raise

    # --- blocking --------------------------------------------------------------------

    def batch_tile_get(
        self,
        keys: Keys,
        buffers: Buffers,
        *,
        immutable: bool = False,
        timeout: float | None = None,
    ) -> list[bool]:
        """Read the value of each key straight into its buffer.

        Other threads write the buffers. They stay pinned (cannot be resized or freed)
        until the last such write has ended, which is before this returns or raises.

        Args:
            keys: ``n`` key names, of any type that redis-py takes.
            buffers: ``n`` writable C-contiguous buffers (bytearray, memoryview, numpy
                array, CPU torch tensor of any element type), or one array of shape
                ``(n, ...)``. A tuple of buffers is filled in order. Each value must
                have exactly its buffer's length in bytes. No two may overlap, which is
                not checked.
            immutable: The caller promises that no value changes while it is read, as
                with content-hash keys. Without it, what was read in ranges is checked
                to be of one version, and read again if it was not.
            timeout: Seconds for the whole batch. Default: no limit, but
                ``socket_timeout`` for each stall of a connection.

        Returns:
            One bool a key: ``False`` if the key does not exist (its buffer's content is
            then unspecified).

        Raises:
            fastkv.TileError: A value had another length, or the server refused a key.
                All other keys were still read.
            redis.exceptions.TimeoutError: Not complete in time. No buffer is written
                any more.
            redis.exceptions.ConnectionError: The server could not be reached, or was
                lost more often than the client's ``retry`` allows.
            redis.exceptions.InvalidResponse: The server sent what is no answer.
            redis.exceptions.DataError: redis-py refuses a key; nothing was sent.
            TypeError, ValueError: An argument cannot be used; nothing was sent.
            fastkv.UnsupportedConnection: The client's connections cannot carry batches;
                nothing was sent.
        """
        batch = commands.get(self._tile_encoder(), keys, buffers, immutable)
        return self._run(batch, timeout)

    def batch_tile_set(
        self,
        keys: Keys,
        buffers: Buffers,
        *,
        ex: Seconds | None = None,
        px: Seconds | None = None,
        exat: When | None = None,
        pxat: When | None = None,
        keepttl: bool = False,
        nx: bool = False,
        xx: bool = False,
        timeout: float | None = None,
    ) -> list[bool]:
        """Store each buffer as a plain Redis string, without a copy.

        The buffers are read by other threads and must not change meanwhile; they stay
        pinned as in `batch_tile_get`.

        Args:
            keys: ``n`` key names.
            buffers: As for `batch_tile_get`, but may be read-only (``bytes``, say).
            ex: As for redis-py's ``set``, as are all down to ``xx``.
            px: As above.
            exat: As above.
            pxat: As above.
            keepttl: As above.
            nx: As above.
            xx: As above.
            timeout: Seconds for the whole batch.

        Returns:
            One bool a key: ``False`` if ``nx`` or ``xx`` forbade it.

        Raises:
            As `batch_tile_get`; `redis.exceptions.DataError` also if redis-py refuses
            the options. With ``nx`` or ``xx``, a value that was sent and not
            answered is not sent again: the error says that its outcome is unknown.
        """
        batch = commands.set(
            self._tile_encoder(), keys, buffers, ex, px, exat, pxat, keepttl, nx, xx
        )
        return self._run(batch, timeout)

    def batch_tile_exists(
        self, keys: Keys, *, timeout: float | None = None
    ) -> list[bool]:
        """Say for each key whether it exists. Raises as `batch_tile_get`."""
        batch = commands.exists(self._tile_encoder(), keys)
        return self._run(batch, timeout)

    def batch_tile_delete(
        self, keys: Keys, *, timeout: float | None = None
    ) -> list[bool]:
        """UNLINK each key; ``True`` if it existed. Raises as `batch_tile_get`."""
        batch = commands.delete(self._tile_encoder(), keys)
        return self._run(batch, timeout)

    # --- futures ---------------------------------------------------------------------

    def submit_batch_tile_get(
        self,
        keys: Keys,
        buffers: Buffers,
        *,
        immutable: bool = False,
        timeout: float | None = None,
    ) -> TileFuture:
        """`batch_tile_get`, not waiting. Its result, or what it raises, is the
        future's.

        Cancelling the future takes the batch back; the buffers stay pinned until no
        thread can write them any more, which the future does not wait for. Nor does
        this, if a signal handler raises in it.
        """
        batch = commands.get(self._tile_encoder(), keys, buffers, immutable)
        return self._submit(batch, timeout)

    def submit_batch_tile_set(
        self,
        keys: Keys,
        buffers: Buffers,
        *,
        ex: Seconds | None = None,
        px: Seconds | None = None,
        exat: When | None = None,
        pxat: When | None = None,
        keepttl: bool = False,
        nx: bool = False,
        xx: bool = False,
        timeout: float | None = None,
    ) -> TileFuture:
        """`batch_tile_set`, not waiting. See `submit_batch_tile_get`."""
        batch = commands.set(
            self._tile_encoder(), keys, buffers, ex, px, exat, pxat, keepttl, nx, xx
        )
        return self._submit(batch, timeout)

    def submit_batch_tile_exists(
        self, keys: Keys, *, timeout: float | None = None
    ) -> TileFuture:
        """`batch_tile_exists`, not waiting. See `submit_batch_tile_get`."""
        batch = commands.exists(self._tile_encoder(), keys)
        return self._submit(batch, timeout)

    def submit_batch_tile_delete(
        self, keys: Keys, *, timeout: float | None = None
    ) -> TileFuture:
        """`batch_tile_delete`, not waiting. See `submit_batch_tile_get`."""
        batch = commands.delete(self._tile_encoder(), keys)
        return self._submit(batch, timeout)
