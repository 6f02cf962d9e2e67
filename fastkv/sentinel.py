"""`fastkv.Sentinel`: redis-py's, whose clients are `fastkv.Redis`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import redis.sentinel
from redis.sentinel import SentinelConnectionPool

from fastkv.client import Redis
from fastkv.options import signed_as, take_options


class Sentinel(redis.sentinel.Sentinel):
    """redis-py's `redis.sentinel.Sentinel`, giving `fastkv.Redis` clients.

    Takes the ``tile_*`` arguments of `fastkv.Redis` too, here and in `master_for` and
    `slave_for`, where they win. After a failover the native connections follow to the
    new master, what was in flight included, as far as the ``retry`` of the client
    allows. Pass one, such as ``retry=Retry(ExponentialBackoff(), 10)``: redis-py's
    default for these clients is not to try again.
    """

    @signed_as(redis.sentinel.Sentinel.__init__)
    def __init__(
        self, sentinels: list[tuple[str, int]], *args: Any, **kwargs: Any
    ) -> None:
        self._tile_options, kwargs = take_options(kwargs)
        super().__init__(sentinels, *args, **kwargs)  # type: ignore[no-untyped-call]  # redis-py's

    def master_for(
        self,
        service_name: str,
        redis_class: type[Redis] = Redis,
        connection_pool_class: type[SentinelConnectionPool] = SentinelConnectionPool,
        **kwargs: Any,
    ) -> Redis:
        """As redis-py's: a client of the service's master."""
        options, kwargs = take_options(kwargs, self._tile_options)
        client: Redis = super().master_for(  # type: ignore[no-untyped-call]  # redis-py's
            service_name, redis_class, connection_pool_class, **kwargs
        )
        client._tile_options = options
        return client

    def slave_for(
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
        client: Redis = super().slave_for(  # type: ignore[no-untyped-call]  # redis-py's
            service_name, redis_class, connection_pool_class, **kwargs
        )
        client._tile_options = options.on_replica()
        return client

    def replica_for(
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
