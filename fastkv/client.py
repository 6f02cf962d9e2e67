"""`fastkv.Redis`: redis-py's client, and how to wait for a batch by blocking or by
future.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import redis

from fastkv import commands
from fastkv.commands import Keys, Seconds, When
from fastkv.node import Node, TileFuture
from fastkv.options import TileOptions, options_of_url
from fastkv.registry import drop_node, leave_node, node_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from fastkv.buffers import Buffers


class Redis(redis.Redis):
    """redis-py's `redis.Redis`, with native calls that move many large values at once.

    Takes every argument of redis-py, with redis-py's meaning, and keeps every command.
    The ``batch_tile_*`` calls use connections of their own, which redis-py makes from
    the pool's settings at the first such call; they do not count towards the pool's
    ``max_connections``, but are never more than that. ``socket_timeout`` is the longest
    time in which no byte moves on one of them. All clients of one pool share them, all
    methods may be called from any thread, and a forked child gets its own.

    Args:
        tile_workers: Native threads. Default: half the cores, 4 at most.
        tile_connections: Connections that carry values; one more carries lookups only.
            Default: 4, or ``tile_workers`` if that is more.
        tile_window_bytes: Value bytes that may be on their way on one connection; raise
            it if ``tile_connections * tile_window_bytes`` is less than bandwidth times
            round-trip time. Default: 512 KiB, as more would leave the caches of server
            and client.
        tile_range_bytes: A value of half of this or more is read in ranges of this, by
            several connections if they have nothing else to do; 0: every value is read
            whole, which makes the server build it in one piece. Default: 512 KiB.
    """

    def __init__(
        self,
        *args: Any,  # redis-py's own, in redis-py's order
        tile_workers: int | None = None,
        tile_connections: int | None = None,
        tile_window_bytes: int | None = None,
        tile_range_bytes: int | None = None,
        **kwargs: Any,
    ) -> None:
        self._tile_node: Node | None = None
        self._tile_options = TileOptions(
            tile_workers, tile_connections, tile_window_bytes, tile_range_bytes
        )
        super().__init__(*args, **kwargs)

    @classmethod
    def from_url(cls, url: str, **kwargs: Any) -> Self:
        """As redis-py's; ``tile_*`` arguments may stand in the query too."""
        url, options, kwargs = options_of_url(url, kwargs)
        client = super().from_url(url, **kwargs)
        assert isinstance(client, cls)
        client._tile_options = options
        return client

    @classmethod
    def from_pool(cls, connection_pool: redis.ConnectionPool) -> Self:
        """As redis-py's: the client closes the pool when it is closed."""
        client = super().from_pool(connection_pool)
        assert isinstance(client, cls)
        return client

    def client(self) -> Self:
        client: object = super().client()  # type: ignore[no-untyped-call]  # redis-py's
        assert isinstance(client, type(self))
        client._tile_options = self._tile_options
        return client

    def close(self) -> None:
        """As redis-py's. Ends the native connections if no other client of the pool
        uses
        them: what they still had to do fails with `redis.exceptions.ConnectionError`.
        The client can be used again.
        """
        # redis-py calls this for a half-made client too.
        node = getattr(self, "_tile_node", None)
        if node is not None:
            self._tile_node = None
            leave_node(self, node)
        super().close()

    def __del__(self) -> None:
        # May run in the middle of anything, in any thread: no lock, no join.
        node = getattr(self, "_tile_node", None)
        if node is not None:
            self._tile_node = None
            drop_node(self, node)
        super().__del__()  # type: ignore[no-untyped-call]  # redis-py's

    def _node(self) -> Node:
        node = self._tile_node
        if node is None or not node.usable:
            node = self._tile_node = node_of(self, self._tile_options)
        return node

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
                have exactly its buffer's length in bytes. No two may overlap.
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
            TypeError, ValueError: A buffer cannot be used; nothing was sent.
        """
        batch = commands.get(self.get_encoder(), keys, buffers, immutable)
        return self._node().run(batch, timeout)

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
            As `batch_tile_get`. With ``nx`` or ``xx``, a value that was sent and not
            answered is not sent again: the error says that its outcome is unknown.
        """
        batch = commands.set(
            self.get_encoder(), keys, buffers, ex, px, exat, pxat, keepttl, nx, xx
        )
        return self._node().run(batch, timeout)

    def batch_tile_exists(
        self, keys: Keys, *, timeout: float | None = None
    ) -> list[bool]:
        """Say for each key whether it exists. Raises as `batch_tile_get`."""
        batch = commands.exists(self.get_encoder(), keys)
        return self._node().run(batch, timeout)

    def batch_tile_delete(
        self, keys: Keys, *, timeout: float | None = None
    ) -> list[bool]:
        """UNLINK each key; ``True`` if it existed. Raises as `batch_tile_get`."""
        batch = commands.delete(self.get_encoder(), keys)
        return self._node().run(batch, timeout)

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
        thread can write them any more, which the future does not wait for.
        """
        batch = commands.get(self.get_encoder(), keys, buffers, immutable)
        return self._node().submit(batch, timeout, self)

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
            self.get_encoder(), keys, buffers, ex, px, exat, pxat, keepttl, nx, xx
        )
        return self._node().submit(batch, timeout, self)

    def submit_batch_tile_exists(
        self, keys: Keys, *, timeout: float | None = None
    ) -> TileFuture:
        """`batch_tile_exists`, not waiting. See `submit_batch_tile_get`."""
        batch = commands.exists(self.get_encoder(), keys)
        return self._node().submit(batch, timeout, self)

    def submit_batch_tile_delete(
        self, keys: Keys, *, timeout: float | None = None
    ) -> TileFuture:
        """`batch_tile_delete`, not waiting. See `submit_batch_tile_get`."""
        batch = commands.delete(self.get_encoder(), keys)
        return self._node().submit(batch, timeout, self)
