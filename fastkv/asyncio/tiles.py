"""The `batch_tile_*` methods of the asyncio clients. Knows no client."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastkv import commands
from fastkv._core import Batch
from fastkv.commands import Keys, Seconds, When

if TYPE_CHECKING:
    from redis._parsers.encoders import Encoder

    from fastkv.buffers import Buffers


class Tiles:
    """Mixed into redis-py's clients."""

    def _tile_encoder(self) -> Encoder:
        raise NotImplementedError

    async def _tile_wait(self, batch: Batch, timeout: float | None) -> list[bool]:
        """Await each key's outcome."""
        raise NotImplementedError

    async def _wait(self, batch: Batch, timeout: float | None) -> list[bool]:
        try:
            return await self._tile_wait(batch, timeout)
        except BaseException:
            batch.unpin()  # the traceback, which may live long, holds the batch
            raise

    async def batch_tile_get(
        self,
        keys: Keys,
        buffers: Buffers,
        *,
        immutable: bool = False,
        timeout: float | None = None,
    ) -> list[bool]:
        """`fastkv.Redis.batch_tile_get`, awaited.

        Cancelling the task takes the batch back. `asyncio.CancelledError` is raised
        once no thread can write the buffers any more, which takes moments, not the
        network's time.
        """
        batch = commands.get(self._tile_encoder(), keys, buffers, immutable)
        return await self._wait(batch, timeout)

    async def batch_tile_set(
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
        """`fastkv.Redis.batch_tile_set`, awaited; cancelled as `batch_tile_get` is."""
        batch = commands.set(
            self._tile_encoder(),
            keys,
            buffers,
            ex,
            px,
            exat,
            pxat,
            keepttl,
            nx,
            xx,
        )
        return await self._wait(batch, timeout)

    async def batch_tile_exists(
        self, keys: Keys, *, timeout: float | None = None
    ) -> list[bool]:
        """`fastkv.Redis.batch_tile_exists`, awaited."""
        batch = commands.exists(self._tile_encoder(), keys)
        return await self._wait(batch, timeout)

    async def batch_tile_delete(
        self, keys: Keys, *, timeout: float | None = None
    ) -> list[bool]:
        """`fastkv.Redis.batch_tile_delete`, awaited."""
        batch = commands.delete(self._tile_encoder(), keys)
        return await self._wait(batch, timeout)
