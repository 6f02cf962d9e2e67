"""A scrape says what `tile_info` says."""

from __future__ import annotations

import asyncio
import gc
import math
from typing import Any

import prometheus_client
import pytest
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

import fastkv
import fastkv.asyncio
from fastkv.metrics import TileCollector
from tests.conftest import Endpoint


def scrape(registry: prometheus_client.CollectorRegistry) -> dict[Any, float]:
    """Parsed by the stricter of prometheus_client's parsers."""
    text = generate_latest(registry).decode()
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_scrape_says_what_tile_info_says(
    client: fastkv.Redis, endpoint: Endpoint
) -> None:
    registry = prometheus_client.CollectorRegistry()
    registry.register(TileCollector(cache=client))
    idle = scrape(registry)
    assert set(idle.values()) == {0}
    client.batch_tile_set(["a", "b"], [b"123", b"45"])
    client.batch_tile_get(["a", "no"], [bytearray(3), bytearray(3)])
    info, samples = client.tile_info(), scrape(registry)
    assert samples.keys() == idle.keys()  # nothing appears late

    def value(name: str, **labels: str) -> float:
        return samples[
            (f"fastkv_{name}", *sorted({"client": "cache", **labels}.items()))
        ]

    node = {"node": str(info["address"])}
    assert node["node"] == (
        endpoint.server.unix_path
        if endpoint.unix
        else f"127.0.0.1:{endpoint.server.port}"
    )
    assert value("read_bytes_total", **node) == 3
    assert value("written_bytes_total", **node) == 5
    assert value("connections", **node) == info["connections"] > 0
    assert value("queued_keys", **node, queue="loads") == 0
    for name in ("retries_total", "reconnects_total", "socket_timeouts_total"):
        assert value(name, **node) == 0
    assert value("batches_total", command="get", result="ok") == 1
    assert value("keys_total", command="get", outcome="hit") == 1
    assert value("keys_total", command="get", outcome="miss") == 1
    assert value("keys_total", command="set", outcome="stored") == 2
    for command, counts in info["commands"].items():
        seconds, labels = counts["seconds"], {"command": command}
        name = "batch_duration_seconds"
        assert value(f"{name}_count", **labels) == seconds["count"]
        assert value(f"{name}_sum", **labels) == seconds["sum"]
        for le, count in seconds["buckets"].items():
            text = "+Inf" if le == math.inf else str(le)
            assert value(f"{name}_bucket", **labels, le=text) == count


def test_a_cluster_is_exported_before_any_node_is_known() -> None:
    async def work() -> dict[Any, float]:
        client = fastkv.asyncio.RedisCluster(host="localhost", port=1)
        registry = prometheus_client.CollectorRegistry()
        registry.register(TileCollector(cache=client))
        samples = scrape(registry)
        await client.aclose()
        return samples

    samples = asyncio.run(work())
    assert set(samples.values()) == {0}
    assert {name for name, *labels in samples if "node" in dict(labels)} == set()


def test_a_collector_has_many_clients_and_keeps_none_alive(
    make: Any, endpoint: Endpoint
) -> None:
    first, second = make(**endpoint.kwargs), fastkv.Redis(**endpoint.kwargs)
    collector = TileCollector(first=first)
    collector.add("second", second)
    registry = prometheus_client.CollectorRegistry()
    registry.register(collector)
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        registry.register(TileCollector())
    second.batch_tile_exists(["a"])

    def lookups() -> dict[str, float]:
        return {
            dict(labels)["client"]: value
            for (name, *labels), value in scrape(registry).items()
            if name == "fastkv_keys_total" and ("outcome", "not_found") in labels
        }

    assert lookups() == {"first": 0, "second": 1}
    second.close()
    assert lookups() == {"first": 0, "second": 1}
    del second
    gc.collect()
    assert lookups() == {"first": 0}
