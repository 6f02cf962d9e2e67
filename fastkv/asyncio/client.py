"""`fastkv.asyncio.Redis`: redis-py's asyncio client, and how to await a batch."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import redis.asyncio
from redis.exceptions import ConnectionError

from fastkv._core import Batch
from fastkv.asyncio.tiles import Tiles
from fastkv.info import TileInfo
from fastkv.options import TileOptions, options_of_url, signed_as
from fastkv.pooled import Pooled
from fastkv.registry import info_of_pool, leave_node

if TYPE_CHECKING:
    from redis._parsers.encoders import Encoder
    from typing_extensions import Self


class Redis(Tiles, Pooled, redis.asyncio.Redis):  # type: ignore[misc]  # redis-py's own bases disagree
    """redis-py's `redis.asyncio.Redis` with the calls of `fastkv.Redis` as coroutines.

    One client may be used from several event loops at once, as far as the
    ``batch_tile_*`` calls are concerned. See `fastkv.Redis` for the arguments.
    """

    @signed_as(redis.asyncio.Redis.__init__)
    def __init__(
        self,
        *,
        tile_workers: int | None = None,
        tile_connections: int | None = None,
        tile_window_bytes: int | None = None,
        tile_range_bytes: int | None = None,
        **kwargs: Any,
    ) -> None:
        self._start_pooled(
            TileOptions(
                tile_workers, tile_connections, tile_window_bytes, tile_range_bytes
            )
        )
        super().__init__(**kwargs)

    @classmethod
    def from_url(cls, url: str, *args: Any, **kwargs: Any) -> Self:
        """As redis-py's; ``tile_*`` arguments may stand in the query too."""
        url, options, kwargs = options_of_url(url, kwargs)
        client = super().from_url(url, *args, **kwargs)
        assert isinstance(client, cls)
        client._tile_options = client._tile_options.overridden(options)
        return client

    @classmethod
    def from_pool(cls, connection_pool: redis.asyncio.ConnectionPool) -> Self:
        """As redis-py's: the client closes the pool when it is closed."""
        client = super().from_pool(connection_pool)
        assert isinstance(client, cls)
        return client

    def client(self) -> Self:
        """As redis-py's: one of the same pool, which keeps a connection to itself."""
        client = super().client()
        assert isinstance(client, type(self))
        client._tile_options = self._tile_options
        return client

    def tile_info(self) -> TileInfo:
        """`fastkv.Redis.tile_info`; nothing to await."""
        return info_of_pool(self.connection_pool)

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """As redis-py's. Ends the native connections as `fastkv.Redis.close` does."""
        for node in self._nodes_to_leave():
            # Joins threads, which may take a moment.
            await asyncio.get_running_loop().run_in_executor(
                None, leave_node, self, node
            )
        await super().aclose(close_connection_pool)

    def _tile_encoder(self) -> Encoder:
        encoder: Encoder = self.connection_pool.get_encoder()
        return encoder

    async def _tile_wait(self, batch: Batch, timeout: float | None) -> list[bool]:
        node = self._node()
        try:
            return await node.wait(batch, timeout)
        except ConnectionError:
            if not self._was_ended(node, batch):
                raise
        return await self._node().wait(batch, timeout)
