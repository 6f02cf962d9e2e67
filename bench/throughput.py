"""GET and SET of batches, size by size: every peer and the raw ceiling interleaved."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import redis

from bench.peers import (
    PEERS,
    Ceiling,
    Endpoint,
    Fastkv,
    FastkvImmutable,
    Memory,
    Peer,
    redis_benchmark,
)
from fastkv.cli.workload import cpu_seconds

MIB = 1 << 20
CEILING = "ceiling"
# Threads and window that the ceiling is tried with; the best take part in the rounds.
_SHAPES = [(t, w * MIB) for t in (1, 2) for w in (0.25, 0.5, 1, 2, 4)]
_FINALISTS = 3


@dataclass(frozen=True)
class Sample:
    """One batch (or for the ceiling two), of one round."""

    gb_per_second: float
    cpu_seconds_per_gb: float
    milliseconds: float


Row = dict[str, Any]


class Throughput:
    """One size on one endpoint.

    Args:
        endpoint: Of the server.
        size: Bytes a value.
        batch_bytes: About so many a batch.
        ceiling: The compiled program.
        peers: Classes of clients.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        size: int,
        batch_bytes: int,
        ceiling: Path,
        peers: tuple[type[Peer], ...] = PEERS,
    ) -> None:
        self.endpoint = endpoint
        self.size = size
        count = max(2, batch_bytes // size)
        prefix = f"bench:{size}:"
        self._keys = [f"{prefix}{i}" for i in range(count)]
        seed = int.from_bytes(os.urandom(4), "little")
        rng = np.random.default_rng(seed)
        self._values = rng.integers(0, 256, (count, size), dtype=np.uint8)
        self._memory = np.zeros_like(self._values)
        self._plain = redis.Redis(unix_socket_path=endpoint.unix_path)
        self._ceiling = Ceiling(ceiling, endpoint, prefix, count, size)
        self._peers = []
        for kind in peers:
            try:
                self._peers.append(kind(endpoint))
            except ImportError:
                continue

    def close(self) -> None:
        for peer in self._peers:
            peer.close()
        self._ceiling.close()
        self._plain.unlink(*self._keys)
        self._plain.close()

    def _store(self) -> None:
        for key, value in zip(self._keys, self._values, strict=True):
            self._plain.set(key, value.data)

    @property
    def _gb(self) -> float:
        return self._values.nbytes / 1e9

    def measure(self, operation: str, rounds: int) -> list[Row]:
        """Run ``get`` or ``set`` by everybody, interleaved.

        Returns:
            One row for each peer, with a sample a round.
        """
        if operation == "get":
            self._store()  # the ceiling stores bytes of its own
        jobs: dict[str, Callable[[], Sample]] = {}
        for shape in self._finalists(operation):
            name = f"{CEILING} {' '.join(map(str, shape))}"
            jobs[name] = partial(self._raw, operation, shape)
        for peer in self._peers:
            if operation in peer.can:
                jobs[peer.name] = partial(self._run, peer, operation)
        samples: dict[str, list[Sample]] = {name: [] for name in jobs}
        order = list(jobs)
        first: dict[str, Sample] = {}
        for turn in range(rounds + 1):
            # Not in turn: each would always find what the one before it left behind.
            random.shuffle(order)
            for name in order:
                if turn == 0:  # connects and warms up
                    first[name] = jobs[name]()
                    continue
                fastest = min(sample.milliseconds for sample in first.values())
                # The slow ones would take most of the time: every third round will do.
                if turn % 3 == 1 or first[name].milliseconds < 4 * fastest:
                    samples[name].append(jobs[name]())
        rows = [self._row(operation, name, got) for name, got in samples.items()]
        if operation == "get":
            total = 4 * self._values.nbytes
            rate = redis_benchmark(self.endpoint, self._keys[0], self.size, total)
            if rate is not None:
                rows.append(
                    self._row(operation, "redis-benchmark", [Sample(rate, 0, 0)])
                )
        return rows

    def over_connections(self, connections: list[int], rounds: int) -> list[Row]:
        """GET by fastkv with other numbers of connections, in turn."""
        self._store()
        clients = {
            n: FastkvImmutable(self.endpoint, tile_connections=n) for n in connections
        }
        samples: dict[int, list[Sample]] = {n: [] for n in connections}
        for turn in range(rounds + 1):
            for n, client in clients.items():
                sample = self._run(client, "get")
                if turn > 0:
                    samples[n].append(sample)
        for client in clients.values():
            client.close()
        return [
            {**self._row("connections", Fastkv.name, got), "connections": n}
            for n, got in samples.items()
        ]

    def _row(self, operation: str, peer: str, samples: list[Sample]) -> Row:
        return {
            "server": self.endpoint.server,
            "transport": self.endpoint.transport,
            "operation": operation,
            "size": self.size,
            "batch": len(self._keys),
            "peer": peer,
            "gb_per_second": [sample.gb_per_second for sample in samples],
            "cpu_seconds_per_gb": [sample.cpu_seconds_per_gb for sample in samples],
            "milliseconds": [sample.milliseconds for sample in samples],
        }

    # --- one batch -------------------------------------------------------------------

    def _finalists(self, operation: str) -> list[tuple[object, ...]]:
        if operation == "set":
            shapes: list[tuple[object, ...]] = [(t, int(w)) for t, w in _SHAPES]
        else:
            shapes = [(t, int(w), 0, 0) for t, w in _SHAPES]
            if self.size >= MIB // 4:
                shapes += [
                    (t, int(w), r, off_grid)
                    for t, w in _SHAPES
                    if w in (MIB // 2, MIB)
                    for r in (MIB // 2, MIB)
                    for off_grid in (0, 1)
                ]
        rate = dict.fromkeys(shapes, 0.0)
        for take in (len(shapes), 3 * _FINALISTS, _FINALISTS):
            for shape in shapes[:take]:
                again = self._raw(operation, shape).gb_per_second
                rate[shape] = max(rate[shape], again)
            shapes.sort(key=lambda shape: -rate[shape])
        return shapes[:_FINALISTS]

    def _raw(self, operation: str, shape: tuple[object, ...]) -> Sample:
        seconds, cpu = self._ceiling.run(operation, *shape, 2)
        gb = 2 * self._gb
        return Sample(gb / seconds, cpu / gb, seconds / 2 * 1e3)

    def _run(self, peer: Peer, operation: str) -> Sample:
        if operation == "get":
            # One byte a page that is wrong, so that what is right was read just now.
            self._memory[:, ::4096] = ~self._values[:, ::4096]
            self._memory[:, -1] = ~self._values[:, -1]
            cpu, start = cpu_seconds(), time.perf_counter()
            got = peer.get(self._keys, self._memory)
            seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
            self._verify(peer, got)
        else:
            cpu, start = cpu_seconds(), time.perf_counter()
            peer.set(self._keys, self._values)
            seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
            where = len(self._keys) // 2
            assert self._plain.get(self._keys[where]) == self._values[where].tobytes()
        return Sample(self._gb / seconds, cpu / self._gb, seconds * 1e3)

    def _verify(self, peer: Peer, got: Any) -> None:
        if got is self._memory:
            right: Memory | bool = np.array_equal(self._memory, self._values)
        else:
            right = all(
                np.array_equal(np.frombuffer(value, np.uint8), expected)
                for value, expected in zip(got, self._values, strict=True)
            )
        if not right:
            raise AssertionError(
                f"{peer.name}: wrong bytes at {self.size} bytes a value"
            )
