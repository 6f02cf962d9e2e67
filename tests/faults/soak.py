"""Mixed load for a long time, with a fault twice a second.

    python -m tests.faults.soak --seconds 600

Every owner has keys of its own and knows what they may hold. Exits with 1 if one of
them has seen what must not be (a wrong byte, a key missing that was stored, memory
written after the return, a call that hangs, an exception that is not redis-py's), or if
memory, descriptors or threads grow. Report and plot land in build/soak.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import concurrent.futures
import contextlib
import ctypes
import itertools
import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis.asyncio.retry
from redis.backoff import ConstantBackoff, NoBackoff
from redis.exceptions import ConnectionError, RedisError, TimeoutError
from redis.retry import Retry

import fastkv
import fastkv.asyncio
from fastkv.cli.private_server import PrivateServer, ServerBinary, find_servers
from tests.conftest import eventually, fastkv_threads, open_fds
from tests.faults.calls import is_pinned, memory
from tests.faults.proxy import Address, Fault, Proxy
from tests.tls import Authority, server_arguments, speaks_tls

PATIENCE = 30.0  # seconds after which a call hangs
SIZES = (1, 100, 5000, 70_000, 300_000, 1 << 20, 3 << 20)
#: Values are stretches of it.
NOISE = random.Random(0).randbytes(16 << 20)
#: Of memory that was given back and is still looked at, an owner.
WATCHED_BYTES = 4 << 20


class World:
    """What has happened so far."""

    def __init__(self, seed: int, server: PrivateServer) -> None:
        self.server = server
        self.plain = server.client(socket_timeout=1.0)
        self.random = random.Random(seed)
        self.running = True
        self.violations: list[str] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.bytes = 0
        self.faults: list[tuple[float, str]] = []
        self.troubles = 0  # faults begun and ended: odd while there is one
        self.restarts = 0  # kills and starts: the server forgets
        self.busy: dict[object, tuple[float, str]] = {}  # calls that are made
        self.began = time.monotonic()

    def violation(self, what: str) -> None:
        self.violations.append(f"{time.monotonic() - self.began:.1f} s: {what}")

    @contextlib.contextmanager
    def trouble(self, what: str) -> Iterator[None]:
        self.faults.append((time.monotonic() - self.began, what))
        self.troubles += 1
        try:
            yield
        finally:
            self.troubles += 1


@dataclass
class Key:
    """What it may hold, by version; None: nothing."""

    name: str
    size: int
    immutable: bool
    now: set[int | None] = field(default_factory=lambda: {None})
    late: set[int | None] = field(default_factory=set)  # what may come on top of it
    versions: int = 0
    restarts: int = 0  # when that was so

    def value(self, version: int) -> memoryview:
        number = 0 if self.immutable else version
        start = random.Random(f"{self.name} {number}").randrange(len(NOISE) - self.size)
        return memoryview(NOISE)[start : start + self.size]


class Owner:
    """Makes one call at a time, on keys of its own."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.random = random.Random(world.random.random())
        self._renewed = 0
        self._keys = [self._new(size, i) for size in SIZES for i in (True, False)]
        self._given: collections.deque[tuple[bytearray, int]] = collections.deque()
        self._given_bytes = 0

    def _new(self, size: int, immutable: bool) -> Key:
        self._renewed += 1
        return Key(f"{self.name}:{self._renewed}", size, immutable)

    def begin(self) -> Call:
        """The next call, to be made and given to its `end`."""
        # More than this is known of no key: too many calls on it have failed.
        for i, key in enumerate(self._keys):
            if len(key.late) > 12:
                with contextlib.suppress(RedisError):
                    self.world.plain.unlink(key.name)
                self._keys[i] = self._new(key.size, key.immutable)
        return Call(self, self.random.sample(self._keys, self.random.randrange(1, 6)))

    def watch(self, buffers: list[bytearray]) -> None:
        """It is ours again: nobody else may write it."""
        for buffer in buffers:
            pattern, size = self.random.randrange(256), len(buffer)
            # What was cancelled may be so for a moment.
            if not eventually(lambda buffer=buffer: not is_pinned(buffer)):
                self.world.violation("memory stays pinned")
                return
            buffer[:] = bytes([pattern]) * size
            self._given.append((buffer, pattern))
            self._given_bytes += size
        while self._given_bytes > WATCHED_BYTES:
            self.look()

    def look(self) -> None:
        buffer, pattern = self._given.popleft()
        self._given_bytes -= len(buffer)
        if buffer.count(pattern) != len(buffer):
            self.world.violation("memory was written after the return")

    def end(self) -> None:
        while self._given:
            self.look()


class Call:
    """What is called, and what may come of it."""

    def __init__(self, owner: Owner, keys: list[Key]) -> None:
        self.owner, self.world, self.keys = owner, owner.world, keys
        random_ = owner.random
        self.command = random_.choices(
            ["get", "set", "exists", "delete"], [5, 4, 2, 1]
        )[0]
        self.arguments: tuple[Any, ...] = ([key.name for key in keys],)
        self.memory: list[bytearray] = []
        options: dict[str, Any] = {}
        if self.command == "set":
            for key in keys:
                key.versions += 1
            self.memory = [memory(key.value(key.versions)) for key in keys]
        elif self.command == "get":
            self.memory = [memory(b"\xa5" * key.size) for key in keys]
            options["immutable"] = all(key.immutable for key in keys)
        if self.memory:
            self.arguments = (*self.arguments, self.memory)
        if random_.random() < 0.1:
            options["timeout"] = random_.choice([0.001, 0.01, 0.1])
        self.options = options
        self.troubles, self.restarts = self.world.troubles, self.world.restarts
        for key in keys:
            if key.restarts != self.restarts:
                key.now.add(None)
        self.began = time.monotonic()
        self.world.busy[self] = (self.began, self.command)

    def make(self, client: Any, prefix: str = "") -> Any:
        return getattr(client, f"{prefix}batch_tile_{self.command}")(
            *self.arguments, **self.options
        )

    def end(self, result: list[bool] | BaseException) -> None:
        """What it returned or raised."""
        took = time.monotonic() - self.began
        if took > PATIENCE:
            self.world.violation(f"{self.command} took {took:.0f} s: {result!r}")
        del self.world.busy[self]
        if self.world.restarts != self.restarts:
            for key in self.keys:
                key.now.add(None)
        # A fault may have had a part of it sent twice.
        quiet = self.world.troubles == self.troubles and self.troubles % 2 == 0
        if isinstance(result, list):
            self.world.counts[self.command] += 1
            self.world.bytes += sum(map(len, self.memory))
            for i, (key, hit) in enumerate(zip(self.keys, result, strict=True)):
                self._returned(key, hit, self.memory[i] if self.memory else None, quiet)
        else:
            self.world.counts[type(result).__name__] += 1
            good = (
                *(ConnectionError, TimeoutError),
                *(asyncio.CancelledError, concurrent.futures.CancelledError),
            )
            if not isinstance(result, good):
                self.world.violation(f"{self.command} raised {result!r}")
            for key in self.keys:
                self._failed(key)
        self.owner.watch(self.memory)
        for key in self.keys:
            key.restarts = self.restarts

    def _returned(
        self, key: Key, hit: bool, got: bytearray | None, quiet: bool
    ) -> None:
        possible = key.now | key.late
        if self.command == "set":
            key.now = {key.versions}
            if not hit:
                self.world.violation(f"{key.name} was not set")
            if not quiet:
                key.late.add(key.versions)
        elif self.command == "delete":
            if hit and possible == {None}:
                self.world.violation(f"{key.name} was deleted and was not there")
            if not hit and None not in possible and quiet:
                self.world.violation(f"{key.name} was stored and is not there")
            key.now = {None}
            if not quiet:
                key.late.add(None)
        elif not hit:
            if None not in possible:
                self.world.violation(f"{key.name} was stored and is missed")
            key.now = {None}
        else:
            there = {version for version in possible if version is not None}
            if got is not None:
                there = {v for v in there if got == key.value(v)}
            if not there:
                self.world.violation(
                    f"{key.name}: wrong bytes, or there and not stored"
                )
            else:
                key.now = set(there)

    def _failed(self, key: Key) -> None:
        """A SET or UNLINK may have been done, or come yet."""
        if self.command in ("set", "delete"):
            key.now |= key.late
            key.late.add(key.versions if self.command == "set" else None)


# --- load ----------------------------------------------------------------------------


def block(world: World, client: Any, number: int) -> None:
    owner = Owner(world, f"blocking{number}")
    while world.running:
        call = owner.begin()
        result: Any
        try:
            result = call.make(client)
        except Exception as error:
            result = error
        call.end(result)
    owner.end()


def wait_for_futures(world: World, client: Any, number: int) -> None:
    """Bursts, some of which are cancelled."""
    owners = [Owner(world, f"futures{number}.{i}") for i in range(6)]
    while world.running:
        calls = []
        for owner in owners:
            call = owner.begin()
            try:
                calls.append((call, call.make(client, "submit_")))
            except Exception as error:
                call.end(error)
        for call, future in calls:
            if owners[0].random.random() < 0.1:
                future.cancel()
            result: Any
            try:
                result = future.result(2 * PATIENCE)
            except (Exception, concurrent.futures.CancelledError) as error:
                result = error
            call.end(result)
    for owner in owners:
        owner.end()


def run_loop(world: World, client: Any, number: int) -> None:
    async def task(owner: Owner) -> None:
        while world.running:
            call = owner.begin()
            running = asyncio.ensure_future(call.make(client))
            patience = owner.random.choice([0.0, 0.002, 0.05]) or 2 * PATIENCE
            done, _ = await asyncio.wait([running], timeout=patience)
            if not done and owner.random.random() < 0.5:
                running.cancel()
            result: Any
            try:
                result = await running
            except (Exception, asyncio.CancelledError) as error:
                result = error
            call.end(result)
        owner.end()

    async def main() -> None:
        owners = [Owner(world, f"asyncio{number}.{i}") for i in range(6)]
        await asyncio.gather(*map(task, owners))
        await client.aclose()

    asyncio.run(main())


# --- faults --------------------------------------------------------------------------


class Faults:
    """One at a time."""

    def __init__(
        self, world: World, server: PrivateServer, proxies: list[Proxy]
    ) -> None:
        self._world, self._server, self._proxies = world, server, proxies
        self._random = random.Random(world.random.random())

    def strike(self) -> None:
        kinds: list[tuple[Callable[[], None], float]] = [
            (self._network, 12),
            (self._kill_clients, 3),
            (self._pause, 1),
            (self._stop, 2),
            (self._restart, 1),
        ]
        self._random.choices(*zip(*kinds, strict=True))[0]()

    def _while(self) -> None:
        time.sleep(self._random.uniform(0.02, 0.35))

    def _network(self) -> None:
        fault = Fault(
            self._random.choice(
                ["cut", "reset", "stall", "delay", "split", "refuse", "slow"]
            ),
            at=self._random.choice([self._random.randrange(300), 100_000]),
            up=self._random.random() < 0.4,
            times=self._random.choice([1, 3, None]),
            seconds=self._random.uniform(0, 0.2),
            length=2000,
        )
        proxy = self._random.choice(self._proxies)
        with self._world.trouble(fault.kind):
            proxy.inject(fault)
            if fault.kind in ("refuse", "slow"):
                proxy.drop_all()
            self._while()
            proxy.heal()

    def _kill_clients(self) -> None:
        with self._world.trouble("CLIENT KILL"), self._server.client() as admin:
            admin.client_kill_filter(_type="normal", skipme=True)

    def _pause(self) -> None:
        with self._world.trouble("CLIENT PAUSE"), self._server.client() as admin:
            admin.client_pause(int(self._random.uniform(20, 300)))
            admin.ping()  # answered when it is over

    def _stop(self) -> None:
        with self._world.trouble("SIGSTOP"):
            os.kill(self._server.pid, signal.SIGSTOP)
            self._while()
            os.kill(self._server.pid, signal.SIGCONT)

    def _restart(self) -> None:
        with self._world.trouble("kill -9"):
            self._world.restarts += 1
            self._server.stop()
            self._world.restarts += 1
            self._while()
            self._server.start()


# --- the whole -----------------------------------------------------------------------


class MallInfo(ctypes.Structure):
    """mallinfo2(3)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    )


def bytes_in_use() -> int:
    """What malloc has given out: memory that is lost, apart from memory that is
    scattered. Python's small objects stand in it in arenas.
    """
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallInfo
    got = mallinfo()
    return int(got.uordblks + got.hblkhd)


def sample(world: World) -> dict[str, float]:
    with open("/proc/self/statm") as statm:
        rss = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "seconds": time.monotonic() - world.began,
        "rss_bytes": rss,
        "bytes_in_use": bytes_in_use(),
        "python_blocks": sys.getallocatedblocks(),
        "fds": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "calls": sum(world.counts.values()),
        "value_bytes": world.bytes,
        "violations": len(world.violations),
    }


def growth(samples: list[dict[str, float]]) -> list[str]:
    """From the second quarter to the last. Faults lower all of these for a while."""
    quarter = len(samples) // 4
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]
    found: list[str] = []
    if quarter < 5:
        return found
    for name, factor, most in (
        ("fds", 1.0, 8.0),
        ("threads", 1.0, 0.0),
        ("rss_bytes", 1.1, 32e6),
    ):
        before, after = (max(one[name] for one in part) for part in (early, late))
        if after > before * factor + most:
            found.append(f"{name}: from {before:.0f} to {after:.0f}")
    return found


def plot(folder: Path, samples: list[dict[str, float]], world: World) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(4, sharex=True, figsize=(10, 9))
    seconds = [s["seconds"] for s in samples]
    for axis, name, scale, label in (
        (axes[0], "rss_bytes", 1e6, "RSS, MB"),
        (axes[1], "fds", 1, "descriptors"),
        (axes[2], "threads", 1, "threads"),
    ):
        axis.plot(seconds, [s[name] / scale for s in samples])
        axis.set_ylim(bottom=0)
        axis.set_ylabel(label)
    rates = [b["calls"] - a["calls"] for a, b in itertools.pairwise(samples)]
    axes[3].plot(seconds[1:], rates)
    axes[3].vlines([at for at, _ in world.faults], 0, max(rates, default=1) / 20, "red")
    axes[3].set_ylabel("calls a second; faults red")
    axes[3].set_xlabel("seconds")
    axes[0].set_title(f"{len(world.violations)} violations, {len(world.faults)} faults")
    figure.savefig(folder / "soak.png", dpi=80)


def soak(seconds: float, seed: int, folder: Path) -> int:
    """Returns what the process shall exit with."""
    before = open_fds()
    binary = next((one for one in find_servers() if speaks_tls(one)), find_servers()[0])
    with contextlib.ExitStack() as stack:
        files = stack.enter_context(tempfile.TemporaryDirectory())
        arguments, tls_port, trusted = tls_of(binary, Path(files))
        server = stack.enter_context(PrivateServer(binary, *arguments))
        world = World(seed, server)
        lines: dict[str, Address] = {
            "tcp": ("127.0.0.1", server.port),
            "unix": server.unix_path,
        }
        if tls_port:
            lines["tls"] = ("127.0.0.1", tls_port)
        proxies = {
            name: stack.enter_context(Proxy(target, files))
            for name, target in lines.items()
        }
        secure = {"ssl": True, "ssl_ca_certs": trusted} if tls_port else {}
        safe = {
            **proxies["tls" if tls_port else "tcp"].kwargs,
            **secure,
            "retry": Retry(ConstantBackoff(0.02), 50),
        }
        once = {**proxies["unix"].kwargs, "retry": Retry(NoBackoff(), 0)}
        often = {**proxies["tcp"].kwargs, "retry": Retry(NoBackoff(), 1000)}
        some = {
            **proxies["tcp"].kwargs,
            "retry": redis.asyncio.retry.Retry(ConstantBackoff(0.02), 3),
            "tile_range_bytes": 20_000,
        }
        clients = [
            fastkv.Redis(**settings, socket_timeout=0.5, tile_workers=3)
            for settings in (safe, once, often)
        ]
        awaited = fastkv.asyncio.Redis(**some, socket_timeout=0.5, tile_workers=3)
        load: list[tuple[Any, ...]] = [
            *((block, clients[0], i) for i in range(2)),
            *((block, clients[1], i) for i in range(2, 4)),
            (wait_for_futures, clients[2], 0),
            (run_loop, awaited, 0),
        ]
        threads = [
            threading.Thread(target=work, args=(world, *arguments_), daemon=True)
            for work, *arguments_ in load
        ]
        for thread in threads:
            thread.start()
        samples = watch(world, Faults(world, server, list(proxies.values())), seconds)
        world.running = False
        deadline = time.monotonic() + PATIENCE
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        hanging = [thread for thread in threads if thread.is_alive()]
        for client in clients:
            client.close()
        if hanging:
            world.violation(f"calls hang: {[what for _, what in world.busy.values()]}")
            for thread in hanging:
                thread.join(5)
        world.plain.close()
    if not eventually(lambda: not fastkv_threads()):
        world.violation(f"threads are left: {fastkv_threads()}")
    left = {fd: what for fd, what in open_fds().items() if fd not in before}
    if left:
        world.violation(f"descriptors are left: {left}")
    return report(world, samples, seed, folder)


def tls_of(binary: ServerBinary, folder: Path) -> tuple[list[str], int, str]:
    """Arguments of a server, its port, and the file of who vouches for it."""
    if not speaks_tls(binary):
        return [], 0, ""
    authority = Authority(folder, "authority")
    assert authority.identity is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    identity = authority.issue("server", ("127.0.0.1",))
    return (
        ["--tls-port", str(port), *server_arguments(identity, authority.identity)],
        port,
        authority.identity.cert_file,
    )


def watch(world: World, faults: Faults, seconds: float) -> list[dict[str, float]]:
    """Strike twice a second, look once a second."""
    samples: list[dict[str, float]] = []
    hanging: set[object] = set()
    while (now := time.monotonic() - world.began) < seconds:
        faults.strike()
        if len(samples) <= now:
            samples.append(sample(world))
            print(
                f"{now:5.0f} s  {samples[-1]['calls']:8.0f} calls  "
                f"{samples[-1]['rss_bytes'] / 1e6:6.0f} MB  "
                f"{samples[-1]['fds']:4.0f} fds  {len(world.violations)} violations",
                flush=True,
            )
        for call, (began, what) in list(world.busy.items()):
            if time.monotonic() - began > PATIENCE and call not in hanging:
                hanging.add(call)
                world.violation(f"{what} hangs")
        time.sleep(max(0.0, now + 0.5 - (time.monotonic() - world.began)))
    return samples


def report(
    world: World, samples: list[dict[str, float]], seed: int, folder: Path
) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    grown = growth(samples)
    kinds = collections.Counter(what for _, what in world.faults)
    summary = {
        "seed": seed,
        "server": str(world.server.binary),
        "seconds": samples[-1]["seconds"],
        "outcomes": dict(world.counts),
        "value_bytes": world.bytes,
        "faults": dict(kinds),
        "violations": world.violations[:100],
        "growth": grown,
    }
    (folder / "soak.json").write_text(
        json.dumps({**summary, "samples": samples}, indent=1)
    )
    plot(folder, samples, world)
    print(json.dumps(summary, indent=1))
    return 1 if world.violations or grown else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--folder", type=Path, default=Path("build/soak"))
    given = parser.parse_args()
    sys.exit(soak(given.seconds, given.seed, given.folder))


if __name__ == "__main__":
    main()
