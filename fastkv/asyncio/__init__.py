"""The event-loop twin of `fastkv.Redis`."""

from fastkv.asyncio.client import Redis

__all__ = ["Redis"]
