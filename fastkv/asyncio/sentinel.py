"""`fastkv.asyncio.Sentinel`: redis-py's, whose clients are `fastkv.asyncio.Redis`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import redis.asyncio.sentinel
from redis.asyncio.sentinel import SentinelConnectionPool

from fastkv.asyncio.client import Redis
from fastkv.options import signed_as, take_options


class Sentinel(redis.asyncio.sentinel.Sentinel):
    """redis-py's `redis.asyncio.sentinel.Sentinel`, giving `fastkv.asyncio.Redis`.

    See `fastkv.Sentinel`. A client's event loop must run for it to connect: Sentinel is
    asked there.
    """

    @signed_as(redis.asyncio.sentinel.Sentinel.__init__)
    def __init__(
        self, sentinels: list[tuple[str, int]], *args: Any, **kwargs: Any
    ) -> None:
        self._tile_options, kwargs = take_options(kwargs)
        super().__init__(sentinels, *args, **kwargs)  # type: ignore[no-untyped-call]  # redis-py's

    def master_for(  # type: ignore[override]  # others have no tile_* options
        self,
        service_name: str,
        redis_class: type[Redis] = Redis,
        connection_pool_class: type[SentinelConnectionPool] = SentinelConnectionPool,
        **kwargs: Any,
    ) -> Redis:
        """As redis-py's: a client of the service's master."""
        options, kwargs = take_options(kwargs, self._tile_options)
        client: Redis = super().master_for(
            service_name, redis_class, connection_pool_class, **kwargs
        )
        client._tile_options = options
        return client

    def slave_for(  # type: ignore[override]  # others have no tile_* options
        self,
        service_name: str,
        redis_class: type[Redis] = Redis,
        connection_pool_class: type[SentinelConnectionPool] = SentinelConnectionPool,
        **kwargs: Any,
    ) -> Redis:
        """As redis-py's: a client of one of the replicas. Values are read whole, unless
        ``tile_range_bytes`` is given here: a key that expires while replication lags
        could otherwise be read in two versions.
        """
        # What was given for the master's values does not hold here.
        base = replace(self._tile_options, range_bytes=None)
        options, kwargs = take_options(kwargs, base)
        client: Redis = super().slave_for(
            service_name, redis_class, connection_pool_class, **kwargs
        )
        client._tile_options = options.on_replica()
        return client

    def replica_for(  # type: ignore[override]  # others have no tile_* options
        self,
        service_name: str,
        redis_class: type[Redis] = Redis,
        connection_pool_class: type[SentinelConnectionPool] = SentinelConnectionPool,
        **kwargs: Any,
    ) -> Redis:
        """`slave_for`."""
        return self.slave_for(
            service_name, redis_class, connection_pool_class, **kwargs
        )
