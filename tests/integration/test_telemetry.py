"""Batches in redis-py's own OpenTelemetry metrics."""

from __future__ import annotations

import subprocess
import sys

from fastkv.cli.private_server import PrivateServer


def test_redis_pys_own_telemetry_gets_batches_once_it_is_on(
    own_server: PrivateServer,
) -> None:
    # A process has one meter provider, for ever.
    code = """
import sys, fastkv, redis
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from redis.observability import OTelConfig, get_observability_instance
from redis.observability.config import MetricGroup

reader = InMemoryMetricReader()
metrics.set_meter_provider(MeterProvider([reader]))
client = fastkv.Redis(port=int(sys.argv[1]))
client.batch_tile_set(["a"], [b"off"])
groups = [MetricGroup.COMMAND, MetricGroup.RESILIENCY]
get_observability_instance().init(OTelConfig(metric_groups=groups))
client.batch_tile_set(["a", "b"], [b"x", b"y"])
client.batch_tile_set(["a", "b"], [b"x", b"y"])
try:
    client.batch_tile_get(["a"], [bytearray(2)])
except fastkv.TileError:
    pass
client.submit_batch_tile_delete(["a"]).result(5)
client.close()
for resource in reader.get_metrics_data().resource_metrics:
    for scope in resource.scope_metrics:
        for metric in scope.metrics:
            for point in metric.data.data_points:
                said = point.attributes
                count = point.count if hasattr(point, "count") else point.value
                print(metric.name, said.get("db.operation.name"),
                      said.get("error.type"), said["server.port"], count, sep="|")
"""
    said = subprocess.run(
        [sys.executable, "-c", code, str(own_server.port)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert said.returncode == 0, said.stderr
    duration, port = "db.client.operation.duration", own_server.port
    assert sorted(said.stdout.splitlines()) == [
        f"{duration}|BATCH GET|TileError|{port}|1",
        f"{duration}|BATCH SET|None|{port}|2",
        f"{duration}|BATCH UNLINK|None|{port}|1",
        f"redis.client.errors|None|TileError|{port}|1",
    ]
