"""Holds `scaling_model` against private servers on this machine, through proxies that
delay and cap each connection as a network would.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import redis
from redis.crc import key_slot

import fastkv
from bench import scaling_model as model
from bench.link import LongLink
from bench.run import compile_program
from bench.scaling_model import KIB, MIB, Fleet
from fastkv.cli.private_server import PrivateServer, find_servers
from fastkv.cli.terminal import spread
from fastkv.cli.workload import cpu_seconds

_NODES = 4
_MB = 1e6
_MS = 1e3


@dataclass(frozen=True)
class Check:
    """One figure.

    Attributes:
        what: In words, with its unit.
        predicted: By the model; None for what the model takes as given.
        measured: In each round.
        bound: The prediction is a bound, which what was measured stays below.
    """

    what: str
    predicted: float | None
    measured: Sequence[float]
    bound: bool = False

    def row(self) -> str:
        """For a table of what, predicted, measured and their ratio."""
        middle = statistics.median(self.measured)
        digits = 0 if middle >= 100 else 1 if middle >= 10 else 2 if middle >= 1 else 3
        measured = spread(list(self.measured), digits)
        if self.predicted is None:
            return f"| {self.what} | given | {measured} | |"
        predicted = f"{'at most ' if self.bound else ''}{self.predicted:,.{digits}f}"
        ratio = middle / self.predicted
        return f"| {self.what} | {predicted} | {measured} | {ratio:.2f} |"


class Lab:
    """Some empty servers, and links to them.

    Args:
        rounds: How often each thing is measured.
        seed: Of all that is random.
    """

    def __init__(self, rounds: int, seed: int) -> None:
        self.rounds = rounds
        self.rng = np.random.default_rng(seed)
        # As in bench.run: the newest Redis.
        binaries = find_servers()
        binaries.sort(key=lambda b: (b.name, -int(b.version.split(".")[0])))
        self.binary = binaries[0]
        self._stack = contextlib.ExitStack()
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        self._link = compile_program("link", Path(folder))
        self.servers = [
            self._stack.enter_context(PrivateServer(self.binary)) for _ in range(_NODES)
        ]

    def close(self) -> None:
        self._stack.close()

    def link(self, server: PrivateServer, delay: float, cap: float) -> LongLink:
        return LongLink(self._link, server.port, delay, cap)

    def store(self, server: PrivateServer, count: int, size: int) -> list[str]:
        """Values of random bytes, alone on the server."""
        keys = [f"{size}:{i}" for i in range(count)]
        with server.client() as plain:
            plain.flushall()
            for key in keys:
                plain.set(key, self.rng.bytes(size))
        return keys

    def seconds(self, job: Callable[[], object]) -> list[float]:
        """Of each round, after one that connects and warms up."""
        job()
        taken = []
        for _ in range(self.rounds):
            start = time.perf_counter()
            job()
            taken.append(time.perf_counter() - start)
        return taken


def round_trip(port: int) -> float:
    """Seconds, median, of a PING."""
    with redis.Redis(port=port) as plain:
        taken = []
        for _ in range(50):
            start = time.perf_counter()
            plain.ping()
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def rates(lab: Lab) -> Iterator[Check]:
    """GET through a link, bound by the caps of its flows or by the window."""
    server = lab.servers[0]
    for delay, cap, connections, window, value, range_bytes in (
        (1e-3, 50 * _MB, 1, 512 * KIB, 8 * MIB, 512 * KIB),
        (1e-3, 50 * _MB, 2, 512 * KIB, 8 * MIB, 512 * KIB),
        (1e-3, 50 * _MB, 4, 512 * KIB, 8 * MIB, 512 * KIB),
        (1e-3, 50 * _MB, 8, 512 * KIB, 8 * MIB, 512 * KIB),
        (5e-3, 400 * _MB, 1, 512 * KIB, 8 * MIB, 512 * KIB),
        (5e-3, 400 * _MB, 2, 512 * KIB, 8 * MIB, 512 * KIB),
        (5e-3, 400 * _MB, 1, 1 * MIB, 8 * MIB, 512 * KIB),
        (5e-3, 400 * _MB, 1, 2 * MIB, 8 * MIB, 512 * KIB),
        (5e-3, 400 * _MB, 1, 512 * KIB, 64 * KIB, 512 * KIB),
        (5e-3, 400 * _MB, 1, 128 * KIB, MIB, 0),
    ):
        count = max(2, int(0.5 * connections * min(cap, 100 * _MB)) // value)
        keys = lab.store(server, count, value)
        memory = np.zeros((count, value), np.uint8)
        with lab.link(server, delay, cap) as link:
            rtt = round_trip(link.port)
            with fastkv.Redis(
                port=link.port,
                tile_connections=connections,
                tile_window_bytes=window,
                tile_range_bytes=range_bytes,
            ) as client:
                get = partial(client.batch_tile_get, keys, memory, immutable=True)
                taken = lab.seconds(get)
        if window < value and not range_bytes:
            rate = model.two_requests_rate(cap, rtt, value)
        else:
            piece = min(value, range_bytes)
            rate = model.connection_rate(cap, rtt, window, piece)
        what = (
            f"GET, {connections} x {cap / _MB:.0f} MB/s, {2 * delay * _MS:.0f} ms, "
            f"window {window // KIB} KiB, values of {value // KIB} KiB"
            f"{'' if range_bytes else ', whole'}: MB/s"
        )
        yield Check(
            what,
            memory.nbytes / (rtt + memory.nbytes / connections / rate) / _MB,
            [memory.nbytes / t / _MB for t in taken],
        )


def one_worker(lab: Lab) -> Iterator[Check]:
    """What a worker and a server cost, and the rate that follows."""
    server = lab.servers[0]
    size = MIB
    keys = lab.store(server, 128, size)
    memory = np.zeros((128, size), np.uint8)
    ours, theirs, got = [], [], []
    with (
        server.client() as plain,
        fastkv.Redis(port=server.port, tile_workers=1) as client,
    ):

        def server_cpu() -> float:
            said = plain.info("cpu")
            return float(said["used_cpu_user"] + said["used_cpu_sys"])

        for turn in range(lab.rounds + 1):
            cpu, their_cpu, start = cpu_seconds(), server_cpu(), time.perf_counter()
            for _ in range(4):
                assert all(client.batch_tile_get(keys, memory, immutable=True))
            seconds = time.perf_counter() - start
            if turn:
                gb = 4 * memory.nbytes / 1e9
                ours.append((cpu_seconds() - cpu) / gb)
                theirs.append((server_cpu() - their_cpu) / gb)
                got.append(gb / seconds)
    yield Check("client, one worker, GET: cpu-s/GB", model.CLIENT_CPU * 1e9, ours)
    yield Check("server, GET: cpu-s/GB", model.SERVER_CPU * 1e9, theirs)
    bound = 1 / max(statistics.median(ours), statistics.median(theirs))
    yield Check("one worker, one server: GB/s", bound, got, bound=True)


def lookups(lab: Lab) -> Iterator[Check]:
    """EXISTS, near and far."""
    server = lab.servers[0]
    lab.store(server, 1, 1)
    keys = [f"lookup:{i}" for i in range(40_000)]
    with fastkv.Redis(port=server.port) as client:
        near = lab.seconds(lambda: client.batch_tile_exists(keys[:10_000]))
    yield Check("lookups, near: million keys/s", None, [0.01 / t for t in near])
    server_rate = len(keys) / 4 / statistics.median(near)
    for delay in (1e-3, 5e-3):
        with lab.link(server, delay, 400 * _MB) as link:
            rtt = round_trip(link.port)
            with fastkv.Redis(port=link.port) as client:
                far = lab.seconds(lambda: client.batch_tile_exists(keys))
        yield Check(
            f"lookups, {2 * delay * _MS:.0f} ms: million keys/s",
            model.lookups(1, rtt, server=server_rate) / 1e6,
            [len(keys) / t / 1e6 for t in far],
        )


def fixed_cost(lab: Lab) -> Iterator[Check]:
    """What it costs to hand a part of a batch to one more server."""
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(fastkv.Redis(port=server.port))
            for server in lab.servers * 2
        ]

        def ask(n: int) -> None:
            waits = [c.submit_batch_tile_exists(["k"]) for c in clients[:n]]
            for wait in waits:
                wait.result()

        def microseconds(n: int) -> float:
            start = time.perf_counter()
            for _ in range(500):
                ask(n)
            return (time.perf_counter() - start) / 500 * 1e6

        ask(len(clients))
        taken = [[microseconds(n) for n in (1, 4, 8)] for _ in range(lab.rounds)]
    one, four, eight = (list(t) for t in zip(*taken, strict=True))
    part = (statistics.median(four) - statistics.median(one)) / 3
    yield Check(
        "a part more: us", None, [(f - o) / 3 for o, f in zip(one, four, strict=True)]
    )
    yield Check(
        "a batch of 8 parts, from those of 1 and 4: us",
        statistics.median(one) + 7 * part,
        eight,
    )


def reply_memory(lab: Lab) -> Iterator[Check]:
    """How much a server grows while it answers."""
    server = lab.servers[0]
    for connections, window in ((4, 512 * KIB), (16, 512 * KIB), (4, 8 * MIB)):
        size = 8 * MIB
        keys = lab.store(server, 16, size)
        memory = np.zeros((16, size), np.uint8)
        grown = []
        with (
            server.client() as plain,
            fastkv.Redis(
                port=server.port,
                tile_connections=connections,
                tile_window_bytes=window,
            ) as client,
        ):
            get = partial(client.batch_tile_get, keys, memory, immutable=True)
            get()
            for _ in range(lab.rounds):
                before = peak = plain.info("memory")["used_memory"]
                reader = threading.Thread(target=lambda get=get: [get(), get(), get()])
                reader.start()
                while reader.is_alive():
                    peak = max(peak, plain.info("memory")["used_memory"])
                grown.append((peak - before) / MIB)
        most = model.unread_memory(connections, window) / MIB
        yield Check(
            f"server grows, {connections} connections, window {window // KIB} KiB: MiB",
            most,
            grown,
            bound=True,
        )


def tails(lab: Lab) -> Iterator[Check]:
    """Batches over several nodes: all well, one slow, one slow that has a replica."""
    keys_of_batch, value, cap, delay, slow = 32, 128 * KIB, 40 * _MB, 1e-3, 4
    batches = 20 * lab.rounds
    keys = [lab.store(server, keys_of_batch, value) for server in lab.servers]
    memory = np.zeros((keys_of_batch, value), np.uint8)
    for label, slowness, replicas in (
        ("all well", 1, 0),
        ("one 4 times slower", slow, 0),
        ("... with a replica each", slow, 1),
    ):
        with contextlib.ExitStack() as stack:
            clients: list[list[fastkv.Redis]] = []
            rtt = 0.0
            for node, server in enumerate(lab.servers):
                clients.append([])
                for copy in range(1 + replicas):
                    ill = slowness if node == copy == 0 else 1
                    link = stack.enter_context(lab.link(server, delay, cap / ill))
                    if ill == 1:
                        rtt = round_trip(link.port)
                    client = fastkv.Redis(port=link.port, tile_connections=1)
                    clients[-1].append(stack.enter_context(client))
            loads = model.random_loads(keys_of_batch, _NODES, batches, lab.rng)
            all_shares = model.split_over_replicas(loads, replicas)
            taken = []
            # The first connects all of them.
            for turn, shares in enumerate([np.ones_like(all_shares[0]), *all_shares]):
                waits = []
                row = 0
                start = time.perf_counter()
                for node, copies in enumerate(clients):
                    for client, count in zip(copies, shares[node], strict=True):
                        if count == 0:
                            continue
                        wait = client.submit_batch_tile_get(
                            keys[node][:count],
                            memory[row : row + count],
                            immutable=True,
                        )
                        waits.append(wait)
                        row += count
                for wait in waits:
                    assert all(wait.result())
                if turn:
                    taken.append((time.perf_counter() - start) * _MS)
        fleet = Fleet(_NODES, cap, rtt, slow=slowness, replicas=replicas)
        # Of the same batches, or chance would be most of the difference at p90.
        simulated = model.times_of_loads(fleet, loads, value, lab.rng) * _MS
        for part in (50, 90):
            # With the spread of that quantile over three thirds of the batches.
            thirds = [float(np.percentile(taken[i::3], part)) for i in range(3)]
            yield Check(
                f"batch over {_NODES} nodes, {label}, p{part}: ms",
                float(np.percentile(simulated, part)),
                thirds,
            )


def node_loss(lab: Lab) -> Iterator[Check]:
    """A server that comes back empty: what is left of prompts."""
    prompts, chunks = 100, 32
    # Hashes, as LMCache's: names that count up are spread more evenly than chance.
    names = [[lab.rng.bytes(16).hex() for _ in range(chunks)] for _ in range(prompts)]
    owners = [[key_slot(n.encode()) * _NODES // 16384 for n in some] for some in names]
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(fastkv.Redis(port=server.port))
            for server in lab.servers
        ]
        for client in clients:
            client.flushall()

        def store(node: int) -> None:
            some = [
                name
                for prompt, on in zip(names, owners, strict=True)
                for name, owner in zip(prompt, on, strict=True)
                if owner == node
            ]
            clients[node].batch_tile_set(some, [b"x"] * len(some))

        def look_up(prompt: list[str], on: list[int]) -> list[bool]:
            found = [False] * chunks
            for node, client in enumerate(clients):
                places = [c for c in range(chunks) if on[c] == node]
                answers = client.batch_tile_exists([prompt[c] for c in places])
                for place, answer in zip(places, answers, strict=True):
                    found[place] = answer
            return found

        for node in range(_NODES):
            store(node)
        missed, prefixes = [], []
        for lost in range(_NODES):
            clients[lost].flushall()
            there = np.array([look_up(*one) for one in zip(names, owners, strict=True)])
            missed.append(100 * float((~there).mean()))
            first = np.where(there.all(axis=1), chunks, there.argmin(axis=1))
            prefixes.append(float(first.mean()))
            store(lost)
    yield Check(f"one of {_NODES} nodes lost, keys missed: %", 100 / _NODES, missed)
    yield Check(
        f"... mean usable prefix of {chunks} chunks: chunks",
        model.usable_prefix(chunks, _NODES),
        prefixes,
    )


CHECKS = (rates, one_worker, lookups, fixed_cost, reply_memory, tails, node_loss)


def run(rounds: int, seed: int, only: str) -> Iterator[str]:
    """Lines of a table in Markdown."""
    lab = Lab(rounds, seed)
    try:
        yield f"{lab.binary}, medians (least to most) of {rounds} rounds"
        yield ""
        yield "| | predicted | measured | ratio |"
        yield "|---|---|---|---|"
        for check in CHECKS:
            if only in check.__name__:
                for one in check(lab):
                    yield one.row()
    finally:
        lab.close()
