"""The benchmarks do what they say. What they measure is not tested."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import redis

from bench import plots, run, scaling, scaling_check, scenarios, tables
from bench.link import LongLink
from bench.peers import Ceiling, Endpoint, Fastkv, FastkvImmutable, RedisPyPure
from bench.throughput import Throughput
from fastkv.cli.private_server import PrivateServer, ServerBinary


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run.compile_program("ceiling", tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module", autouse=True)
def _fonts() -> None:
    # matplotlib keeps the files of its fonts open, which is no leak of ours.
    figure = plt.figure()
    figure.text(0, 0, "x")
    figure.savefig(io.BytesIO())
    plt.close(figure)


@pytest.fixture(params=["tcp", "unix"])
def target(request: pytest.FixtureRequest, own_server: PrivateServer) -> Endpoint:
    return Endpoint(
        str(own_server.binary), request.param, own_server.port, own_server.unix_path
    )


@pytest.fixture
def plain(own_server: PrivateServer) -> Iterator[redis.Redis]:
    with own_server.client() as client:
        yield client


def test_the_ceiling_moves_every_byte(
    program: Path, target: Endpoint, plain: redis.Redis
) -> None:
    size, count = 300_001, 8
    ceiling = Ceiling(program, target, "k", count, size)
    try:
        ceiling.run("set", 2, 500_000, 3)
        assert plain.strlen("k0") == plain.strlen("k7") == size

        def sent(*command: object) -> int:
            before: Any = plain.info("stats")
            seconds, cpu = ceiling.run(*command)
            assert seconds > 0 and cpu >= 0
            after: Any = plain.info("stats")
            out = "total_net_output_bytes"
            return int(after[out]) - int(before[out])

        for threads in (1, 2):
            for shape in ((0, 0), (100_000, 0), (100_000, 1), (1 << 20, 1)):
                moved = sent("get", threads, 200_000, *shape, 2)
                assert 2 * count * size < moved < 2 * count * (size + 200) + 50_000
            assert sent("exists", threads, 3, 5) >= 5 * count * 4
    finally:
        ceiling.close()


def test_the_ceiling_moves_every_byte_with_tls(
    program: Path, tls_binary: ServerBinary, tmp_path: Path
) -> None:
    port, arguments = run.tls_arguments(tmp_path)
    with PrivateServer(tls_binary, *arguments) as server, server.client() as plain:
        target = Endpoint(str(tls_binary), "tls", port, server.unix_path)
        ceiling = Ceiling(program, target, "k", 8, 300_001)
        fast = Fastkv(target)
        try:
            ceiling.run("set", 2, 500_000, 3)
            memory = np.empty((8, 300_001), np.uint8)
            fast.get([f"k{i}" for i in range(8)], memory)
            assert plain.get("k7") == memory[7].tobytes()
            for shape in ((0, 0), (100_000, 1)):
                seconds, _ = ceiling.run("get", 2, 200_000, *shape, 2)
                assert seconds > 0
        finally:
            ceiling.close()
            fast.close()


def test_a_round_of_throughput_gives_a_report_tables_and_plots(
    program: Path, target: Endpoint, tmp_path: Path
) -> None:
    rows = []
    for size in (70_001, 1 << 20):
        bench = Throughput(
            target, size, 4 << 20, program, (Fastkv, FastkvImmutable, RedisPyPure)
        )
        try:
            rows += bench.measure("get", 2) + bench.measure("set", 2)
            rows += bench.over_connections([1, 3], 1)
            rows += [{**row, "operation": "tail"} for row in bench.measure("get", 2)]
        finally:
            bench.close()
    report = json.loads(json.dumps({"machine": run.machine(), "rows": rows}))
    table = tables.markdown(report)
    assert "| ceiling |" in table and "| fastkv, immutable |" in table
    lines = list(tables.summaries(rows))
    assert any("of the ceiling" in line for line in lines)
    drawn = plots.draw(report, tmp_path)
    assert [path.stem for path in drawn] == [
        "throughput",
        "connections",
        "latency",
        "cpu",
    ]
    assert all(path.stat().st_size > 5_000 for path in drawn)


def test_wrong_bytes_end_a_benchmark(program: Path, target: Endpoint) -> None:
    class Forgetful(Fastkv):
        def get(self, keys: Any, memory: Any) -> Any:
            super().get(keys[1:], memory[1:])
            return memory

    bench = Throughput(target, 50_000, 1 << 20, program, (Forgetful,))
    try:
        with pytest.raises(AssertionError, match="wrong bytes"):
            bench.measure("get", 1)
    finally:
        bench.close()


def test_every_scenario_runs(
    program: Path, target: Endpoint, plain: redis.Redis
) -> None:
    rows = [
        *scenarios.lookups(target, program, 1),
        *scenarios.latency(target, 3),
        *scenarios.priority(target, 256 << 20),
        *scenarios.callers(target, 1),
    ]
    for line in tables.summaries(rows):
        assert line.strip()
    assert plain.dbsize() == 0  # nothing is left behind


def test_a_long_link_delays_and_caps_but_changes_no_byte(
    own_server: PrivateServer, plain: redis.Redis, tmp_path: Path
) -> None:
    program = run.compile_program("link", tmp_path)
    value = bytes(range(256)) * 8192
    plain.set("k", value)
    with LongLink(program, own_server.port, 0.02, 20e6) as link:
        with redis.Redis(port=link.port) as client:
            client.ping()
            start = time.monotonic()
            client.ping()
            assert time.monotonic() - start >= 0.04
            start = time.monotonic()
            assert client.get("k") == value
            assert time.monotonic() - start >= len(value) / 20e6


def test_scaling_prints_whole_tables(capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main(link=25, cap=10, rtt=1, clients=10, prefill=1e4, trials=50, seed=1)
    tables = capsys.readouterr().out.strip().split("\n\n")[1::2]
    assert len(tables) == 4
    for table in tables:
        assert len({row.count("|") for row in table.splitlines()}) == 1, table


def test_the_scaling_model_foretells_what_a_lost_node_costs(
    own_server: PrivateServer,
) -> None:
    lines = list(scaling_check.run(1, 1, "node_loss"))
    ratios = [float(line.split("|")[-2]) for line in lines[-2:]]
    assert ratios == pytest.approx([1, 1], abs=0.1)
