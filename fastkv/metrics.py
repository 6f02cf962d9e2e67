"""`tile_info` for Prometheus: ``REGISTRY.register(TileCollector(cache=client))``.

Needs the package prometheus_client, which the extra ``metrics`` brings.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping
from typing import Protocol

from fastkv.info import Histogram, TileInfo

try:
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
    )
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError(
        "fastkv.metrics: expected the package prometheus_client, as fastkv[metrics] "
        "installs it"
    ) from error


class Client(Protocol):
    """Any of fastkv's clients, blocking or asyncio's, of a server or of a cluster."""

    def tile_info(self) -> TileInfo: ...


class TileCollector(Collector):
    """Exports the `tile_info` of clients. A scrape asks no server and waits for none.

    A registry takes one collector: give it all clients, or `add` them. Clients of one
    pool share their numbers, so give one of them. They are not kept alive; one that is
    gone is not exported any more. The names that are exported are in README.md.

    Args:
        **clients: By what becomes the label ``client``.
    """

    def __init__(self, **clients: Client) -> None:
        self._clients: dict[str, weakref.ref[Client]] = {}
        for name, client in clients.items():
            self.add(name, client)

    def add(self, name: str, client: Client) -> None:
        """Export one more; it takes the place of one with this name."""
        self._clients[name] = weakref.ref(client)

    def clients(self) -> dict[str, Client]:
        """Those that are alive, by name."""
        known = {name: reference() for name, reference in list(self._clients.items())}
        return {name: client for name, client in known.items() if client is not None}

    def describe(self) -> Iterable[Metric]:
        """What `collect` gives, without samples; for the registry."""
        return _families({})

    def collect(self) -> Iterable[Metric]:
        """For the registry, at each scrape."""
        infos = {name: client.tile_info() for name, client in self.clients().items()}
        return _families(infos)


def _families(infos: Mapping[str, TileInfo]) -> list[Metric]:
    call, node = ["client", "command"], ["client", "node"]
    batches = CounterMetricFamily(
        "fastkv_batches", "Batches that are over.", labels=[*call, "result"]
    )
    keys = CounterMetricFamily(
        "fastkv_keys", "Keys of batches that are over.", labels=[*call, "outcome"]
    )
    durations = HistogramMetricFamily(
        "fastkv_batch_duration_seconds",
        "From a batch's submission to its completion.",
        labels=call,
    )
    parts = HistogramMetricFamily(
        "fastkv_node_batch_duration_seconds",
        "The same of the part of a batch that one node of a cluster has.",
        labels=[*node, "command"],
    )
    read = CounterMetricFamily(
        "fastkv_read_bytes", "Bytes of values that were loaded.", labels=node
    )
    written = CounterMetricFamily(
        "fastkv_written_bytes", "Bytes of values that were stored.", labels=node
    )
    retries = CounterMetricFamily(
        "fastkv_retries",
        "Keys sent again because their connection was lost.",
        labels=node,
    )
    reconnects = CounterMetricFamily(
        "fastkv_reconnects", "Connections made in place of earlier ones.", labels=node
    )
    timeouts = CounterMetricFamily(
        "fastkv_socket_timeouts",
        "Connections given up because no byte moved.",
        labels=node,
    )
    connections = GaugeMetricFamily(
        "fastkv_connections", "Connections that are open.", labels=node
    )
    queued = GaugeMetricFamily(
        "fastkv_queued_keys",
        "Keys that no connection has taken yet.",
        labels=[*node, "queue"],
    )
    for client, info in infos.items():
        for command, calls in info["commands"].items():
            for result, count in calls["batches"].items():
                batches.add_metric([client, command, result], count)
            for outcome, count in calls["keys"].items():
                keys.add_metric([client, command, outcome], count)
            _add(durations, [client, command], calls["seconds"])
        for name, part in info.get("nodes", {}).items():
            for command, calls in part["commands"].items():
                _add(parts, [client, name, command], calls["seconds"])
        nodes = info["nodes"] if "nodes" in info else {info["address"]: info}
        for name, one in nodes.items():
            labels = [client, name]
            read.add_metric(labels, one["bytes_read"])
            written.add_metric(labels, one["bytes_written"])
            retries.add_metric(labels, one["retries"])
            reconnects.add_metric(labels, one["reconnects"])
            timeouts.add_metric(labels, one["socket_timeouts"])
            connections.add_metric(labels, one["connections"])
            for queue, count in one["queued"].items():
                queued.add_metric([*labels, queue], count)
    return [
        *(batches, keys, durations, parts, read, written),
        *(retries, reconnects, timeouts, connections, queued),
    ]


def _add(family: HistogramMetricFamily, labels: list[str], seconds: Histogram) -> None:
    buckets = [
        ("+Inf" if math.isinf(le) else str(le), count)
        for le, count in seconds["buckets"].items()
    ]
    family.add_metric(labels, buckets, seconds["sum"])
