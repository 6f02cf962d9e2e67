"""fastkv: the Redis client for LLM KV caches. `redis.Redis` becomes `fastkv.Redis`."""

from fastkv._version import __version__
from fastkv.client import Redis
from fastkv.errors import TileError, UnsupportedConnection, ValueSizeError

__all__ = [
    "Redis",
    "TileError",
    "UnsupportedConnection",
    "ValueSizeError",
    "__version__",
]
