"""What a link to a server carries: a raw drain beside fastkv, and whether GETs of large
values fall off the allocator's cliff.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import redis

from fastkv.cli.clients import FastkvClient
from fastkv.cli.drain import Drain, Shape
from fastkv.cli.facts import Refused, page_faults
from fastkv.cli.target import Plain, Target, members
from fastkv.cli.workload import Workload

_SMALL, _LARGE = 4 << 20, 16 << 20  # bytes a value, below the cliff and beyond it
# More connections than a client has by default, as networks cap single flows.
_MOST = 16
_SHAPES = [Shape(n, ranged) for n in (1, 4, _MOST) for ranged in (True, False)]
_ONE_GET = Shape(1, False)
_REPEATS = 4  # of 16 MiB in a round, as some counters are coarse
_LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Cost:
    """Of GETs of one size, on one connection.

    Attributes:
        size: Bytes a value.
        gb_per_second: Median.
        cpu: Of the server, in seconds a GB; None if it does not say.
        faults: Of the server, page faults a MiB; None if it is not of this machine.
    """

    size: int
    gb_per_second: float
    cpu: float | None
    faults: float | None


@dataclass(frozen=True)
class LinkFacts:
    """Medians of rounds in turn.

    Attributes:
        raw: GB/s of the best shape of drain.
        shape: That shape.
        fast: GB/s of fastkv with the settings of the URL.
        small: GETs below the cliff.
        large: GETs beyond it.
    """

    raw: float
    shape: Shape
    fast: float
    small: Cost
    large: Cost


def measure_link(target: Target, seconds: float) -> LinkFacts:
    """Store 32 MiB, read them for a while, delete them.

    Raises:
        Failure: The server has no room for them.
        redis.exceptions.RedisError: It refuses something.
        OSError: A connection was lost.
    """
    with contextlib.ExitStack() as stack:
        workload = stack.enter_context(Workload(target, (_SMALL, _LARGE), _LARGE))
        plain = stack.enter_context(contextlib.closing(target.plain()))
        fast = FastkvClient(stack.enter_context(contextlib.closing(target.fast())))
        drains = {}
        for size, most in ((_SMALL, _MOST), (_LARGE, 1)):
            workload.store(fast, size)
            nodes = _by_node(plain, workload.keys[size])
            drain = Drain(nodes, size, most)
            drains[size] = stack.enter_context(contextlib.closing(drain))
        small, large = (
            _Gets(target, plain, drains[size], size) for size in (_SMALL, _LARGE)
        )
        raw: dict[Shape, list[float]] = {shape: [] for shape in _SHAPES}
        ours: list[float] = []
        workload.load(fast, _SMALL)  # connects
        end = time.monotonic() + seconds
        while len(ours) < _LEAST_ROUNDS or time.monotonic() < end:
            for shape, rates in raw.items():
                rates.append(drains[_SMALL].gb_per_second(shape))
            ours.append(workload.load(fast, _SMALL).gb_per_second)
            small.measure()
            large.measure()
        best = max(raw, key=lambda shape: statistics.median(raw[shape]))
        return LinkFacts(
            statistics.median(raw[best]),
            best,
            statistics.median(ours),
            small.cost(),
            large.cost(),
        )


def _by_node(
    plain: Plain, keys: Sequence[str]
) -> list[tuple[redis.Redis, Sequence[str]]]:
    if isinstance(plain, redis.Redis):
        return [(plain, keys)]
    nodes: dict[str, tuple[redis.Redis, list[str]]] = {}
    for key in keys:
        node: Any = plain.get_node_from_key(key)
        client = plain.get_redis_connection(node)
        nodes.setdefault(node.name, (client, []))[1].append(key)
    return list(nodes.values())


class _Gets:
    """Whole values by one connection, and what they cost the server."""

    def __init__(self, target: Target, plain: Plain, drain: Drain, size: int) -> None:
        self._target = target
        self._servers = list(members(plain))
        self._drain = drain
        self._size = size
        self._rates: list[float] = []
        self._octets = 0
        self._cpu: float | None = 0.0
        self._faults: float | None = 0.0
        drain.gb_per_second(_ONE_GET)  # some allocators learn from the first one

    def measure(self) -> None:
        cpu, faults = self._counters()
        for _ in range(_REPEATS):
            self._rates.append(self._drain.gb_per_second(_ONE_GET))
        self._octets += _REPEATS * _LARGE
        cpu_after, faults_after = self._counters()
        self._cpu = _added(self._cpu, cpu, cpu_after)
        self._faults = _added(self._faults, faults, faults_after)

    def cost(self) -> Cost:
        return Cost(
            self._size,
            statistics.median(self._rates),
            None if self._cpu is None else self._cpu / self._octets * 1e9,
            None if self._faults is None else self._faults / self._octets * (1 << 20),
        )

    def _counters(self) -> tuple[float | None, float | None]:
        """CPU seconds and page faults of all servers so far."""
        cpu: float | None = 0.0
        faults: float | None = 0.0
        for server in self._servers:
            try:
                info: Any = server.client.info()
            except redis.exceptions.RedisError as error:
                info = Refused(str(error))
            if isinstance(info, Refused):
                return None, None
            cpu = _added(cpu, 0.0, info["used_cpu_sys"] + info["used_cpu_user"])
            faults = _added(faults, 0.0, page_faults(self._target, info))
        return cpu, faults


def _added(
    total: float | None, before: float | None, after: float | None
) -> float | None:
    if total is None or before is None or after is None:
        return None
    return total + after - before
