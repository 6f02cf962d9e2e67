"""The event-loop twins of `fastkv`'s clients."""

from fastkv.asyncio.client import Redis
from fastkv.asyncio.cluster import RedisCluster
from fastkv.asyncio.sentinel import Sentinel

__all__ = ["Redis", "RedisCluster", "Sentinel", "from_url"]

from_url = Redis.from_url
