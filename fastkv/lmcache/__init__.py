"""What LMCache loads: `NativeClient` for its ``native_plugin`` L2 adapter (MP mode),
and `FastKVAdapter` for ``remote_storage_plugins`` (in-process mode).

Importable without LMCache, which only `FastKVAdapter` needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastkv.lmcache.native_client import NativeClient

if TYPE_CHECKING:
    from fastkv.lmcache.connector import FastKVAdapter, FastKVConnector

__all__ = ["FastKVAdapter", "FastKVConnector", "NativeClient"]


def __getattr__(name: str) -> Any:
    if name in ("FastKVAdapter", "FastKVConnector"):
        from fastkv.lmcache import connector

        return getattr(connector, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
