"""`fastkv.Redis`: redis-py's client, and how to wait for a batch by blocking or by
future.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import redis
from redis.exceptions import ConnectionError

from fastkv._core import Batch
from fastkv.info import TileInfo
from fastkv.node import TileFuture
from fastkv.options import TileOptions, options_of_url, signed_as
from fastkv.pooled import Pooled
from fastkv.registry import info_of_pool, leave_node
from fastkv.tiles import Tiles

if TYPE_CHECKING:
    from redis._parsers.encoders import Encoder
    from typing_extensions import Self


class Redis(Tiles, Pooled, redis.Redis):
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
            round-trip time. Default: 512 KiB, or 256 KiB for loads from a server that
            answers within 0.2 ms, as more would leave the caches of server and client.
        tile_range_bytes: A value of half of this or more is read in ranges of this, by
            several connections if they have nothing else to do; 0: every value is read
            whole, which makes the server build it in one piece. Default: 512 KiB, or at
            most 256 KiB for values of less than 2 MiB if ``INFO memory`` says that the
            server's allocator is the C library's.
    """

    @signed_as(redis.Redis.__init__)
    def __init__(
        self,
        *args: Any,  # redis-py's own, in redis-py's order
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
        super().__init__(*args, **kwargs)

    @classmethod
    def from_url(cls, url: str, **kwargs: Any) -> Self:
        """As redis-py's; ``tile_*`` arguments may stand in the query too."""
        url, options, kwargs = options_of_url(url, kwargs)
        client = super().from_url(url, **kwargs)
        assert isinstance(client, cls)
        client._tile_options = client._tile_options.overridden(options)
        return client

    @classmethod
    def from_pool(cls, connection_pool: redis.ConnectionPool) -> Self:
        """As redis-py's: the client closes the pool when it is closed."""
        client = super().from_pool(connection_pool)
        assert isinstance(client, cls)
        return client

    def client(self) -> Self:
        """As redis-py's: one of the same pool, which keeps a connection to itself."""
        client: object = super().client()  # type: ignore[no-untyped-call]  # redis-py's
        assert isinstance(client, type(self))
        client._tile_options = self._tile_options
        return client

    def tile_info(self) -> TileInfo:
        """Say what the ``batch_tile_*`` calls came to since the pool was made.

        Clients of one pool share their connections, and these numbers. Counters only
        grow, whatever is closed or reconnected; a forked child counts from zero. Needs
        no connection and waits for nothing: any thread, any event loop, any time.

        Returns:
            A plain dict:

            ``address``: of the server.

            ``bytes_read``, ``bytes_written``: of values in full, as they were loaded
            and stored.

            ``retries``: keys that were sent again, or wait for it, because their
            connection was lost. ``reconnects``: connections made in place of earlier
            ones. ``socket_timeouts``: connections given up because no byte moved for
            ``socket_timeout``.

            ``connections``: open now. ``queued``: keys that no connection has taken
            yet: ``lookups``, ``loads``, ``stores`` (with deletes).

            ``commands``: for ``get``, ``set``, ``exists`` and ``delete``
            ``batches`` by result: ``ok`` (the server has answered for each key),
            ``timed_out``, ``cancelled`` or ``failed``; ``keys`` by outcome, such as
            ``hit`` and ``miss``; and ``seconds`` from submission to completion: their
            ``count`` and ``sum``, and ``buckets`` with the number of batches that took
            up to so many seconds.
        """
        return info_of_pool(self.connection_pool)

    def close(self) -> None:
        """As redis-py's. Ends the native connections if no other client of the pool
        uses them: what they still had to do fails with
        `redis.exceptions.ConnectionError`. The client can be used again.
        """
        # redis-py calls this for a half-made client too.
        if hasattr(self, "connection_pool"):
            for node in self._nodes_to_leave():
                leave_node(self, node)
        super().close()

    def __del__(self) -> None:
        # May run in the middle of anything, in any thread: no lock, no join.
        self._drop_nodes()
        super().__del__()  # type: ignore[no-untyped-call]  # redis-py's

    def _tile_encoder(self) -> Encoder:
        encoder: Encoder = self.get_encoder()
        return encoder

    def _tile_run(self, batch: Batch, timeout: float | None) -> list[bool]:
        node = self._node()
        try:
            return node.run(batch, timeout)
        except ConnectionError:
            if not self._was_ended(node, batch):
                raise
        return self._node().run(batch, timeout)

    def _tile_submit(self, batch: Batch, timeout: float | None) -> TileFuture:
        node = self._node()
        try:
            return node.submit(batch, timeout, self)
        except ConnectionError:
            if not self._was_ended(node, batch):
                raise
        return self._node().submit(batch, timeout, self)
