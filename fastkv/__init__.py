"""fastkv: the Redis client for LLM KV caches. `redis.Redis` becomes `fastkv.Redis`."""

from fastkv import asyncio
from fastkv._version import __version__
from fastkv.client import Redis
from fastkv.cluster import RedisCluster
from fastkv.errors import TileError, UnsupportedConnection, ValueSizeError
from fastkv.sentinel import Sentinel

__all__ = [
    "Redis",
    "RedisCluster",
    "Sentinel",
    "TileError",
    "UnsupportedConnection",
    "ValueSizeError",
    "__version__",
    "asyncio",
    "from_url",
]

from_url = Redis.from_url
