"""Chunk stores in prometheus_client's default registry, which LMCache serves."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, Metric

from fastkv.lmcache.chunks import ChunkStore
from fastkv.metrics import TileCollector

_lock = threading.Lock()
_stores: _StoreCollector | None = None  # a registry takes one


def export(name: str, store: ChunkStore) -> None:
    """Export a store's `tile_info` and `counts`, the label ``client`` being ``name``.

    It is not kept alive. A later one of this name, such as LMCache makes when it has
    given up an earlier, takes its place.
    """
    global _stores
    with _lock:
        if _stores is None:
            _stores = _StoreCollector()
            REGISTRY.register(_stores)
        _stores.add(name, store)


class _StoreCollector(TileCollector):
    def collect(self) -> Iterable[Metric]:
        yield from super().collect()
        yield _chunks(self)

    def describe(self) -> Iterable[Metric]:
        yield from super().describe()
        yield _chunks(TileCollector())


def _chunks(collector: TileCollector) -> Metric:
    family = CounterMetricFamily(
        "fastkv_chunks", "LMCache's chunks.", labels=["client", "outcome"]
    )
    for name, store in collector.clients().items():
        assert isinstance(store, ChunkStore)
        for outcome, chunks in store.counts().items():
            family.add_metric([name, outcome], chunks)
    return family
