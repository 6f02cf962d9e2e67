"""What throughput does not show: lookups, latency, priority, many callers, a long link,
memory.

Each function measures one thing on one endpoint and returns rows for the report.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import redis

import fastkv
import fastkv.asyncio
from bench.link import LongLink
from bench.peers import (
    Ceiling,
    Endpoint,
    Fastkv,
    LMCacheNative,
    Peer,
    RedisPy,
    RedisPyPure,
)

Row = dict[str, Any]
MIB = 1 << 20


def _store(plain: redis.Redis, prefix: str, count: int, size: int) -> list[str]:
    rng = np.random.default_rng(size)
    keys = [f"{prefix}{i}" for i in range(count)]
    for key in keys:
        plain.set(key, rng.bytes(size))
    return keys


def _plain(endpoint: Endpoint) -> redis.Redis:
    return redis.Redis(unix_socket_path=endpoint.unix_path)


def lookups(endpoint: Endpoint, program: Path, rounds: int) -> list[Row]:
    """EXISTS and UNLINK in batches of 10,000 keys; half of them are there."""
    count = 10_000
    keys = [f"bench:lookup:{i}" for i in range(count)]
    there = [i % 2 == 0 for i in range(count)]
    plain = _plain(endpoint)
    ceiling = Ceiling(program, endpoint, "bench:lookup:", count, 1)

    def fill() -> None:
        with plain.pipeline(transaction=False) as pipeline:
            for key in keys[::2]:
                pipeline.set(key, b"")
            pipeline.execute()

    peers: list[Peer] = []
    for kind in (Fastkv, LMCacheNative, RedisPy, RedisPyPure):
        try:
            peers.append(kind(endpoint))
        except ImportError:
            continue
    rates: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds + 1):
        fill()
        for depth in (100, 1000):
            seconds, _ = ceiling.run("exists", 1, depth, 10)
            if turn:
                rates.setdefault(("exists", f"ceiling {depth}"), []).append(
                    10 * count / seconds
                )
        for peer in peers:
            for operation in ("exists", "delete"):
                if operation not in peer.can:
                    continue
                if operation == "delete":
                    fill()
                start = time.perf_counter()
                answers = getattr(peer, operation)(keys)
                seconds = time.perf_counter() - start
                assert answers == there, f"{peer.name}: wrong {operation}"
                if operation == "delete":
                    fill()
                if turn:
                    rates.setdefault((operation, peer.name), []).append(count / seconds)
    for peer in peers:
        peer.close()
    ceiling.close()
    plain.unlink(*keys)
    plain.close()
    return [
        {
            "operation": operation,
            "peer": name,
            "keys_per_second": got,
            "server": endpoint.server,
            "transport": endpoint.transport,
        }
        for (operation, name), got in rates.items()
    ]


def latency(endpoint: Endpoint, calls: int, size: int = 64 << 10) -> list[Row]:
    """One key, warm: a raw send/recv pair in Python, and clients."""
    plain = _plain(endpoint)
    (key,) = _store(plain, "bench:latency:", 1, size)
    expected = plain.get(key)
    assert isinstance(expected, bytes)
    memory = bytearray(size)
    client = fastkv.Redis(**endpoint.kwargs)
    theirs = redis.Redis(**endpoint.kwargs)
    if endpoint.transport == "unix":
        raw = socket.socket(socket.AF_UNIX)
        raw.connect(endpoint.unix_path)
    else:
        raw = socket.create_connection(("127.0.0.1", endpoint.port))
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    request = f"*2\r\n$3\r\nGET\r\n${len(key)}\r\n{key}\r\n".encode()
    reply = bytearray(len(f"${size}\r\n") + size + 2)
    view = memoryview(reply)

    def raw_pair() -> None:
        raw.sendall(request)
        at = 0
        while at < len(reply):
            at += raw.recv_into(view[at:])

    jobs: dict[str, Callable[[], object]] = {
        "raw send and recv": raw_pair,
        "fastkv": lambda: client.batch_tile_get([key], [memory]),
        "redis-py, hiredis": lambda: theirs.get(key),
    }
    times: dict[str, list[float]] = {name: [] for name in [*jobs, "fastkv, asyncio"]}

    async def measure() -> None:
        loop_client = fastkv.asyncio.Redis(**endpoint.kwargs)
        for call in range(calls + 50):
            for name, job in jobs.items():
                start = time.perf_counter()
                job()
                if call >= 50:
                    times[name].append((time.perf_counter() - start) * 1e6)
            start = time.perf_counter()
            await loop_client.batch_tile_get([key], [memory])
            if call >= 50:
                times["fastkv, asyncio"].append((time.perf_counter() - start) * 1e6)
        await loop_client.aclose()

    asyncio.run(measure())
    assert memory == expected == bytes(reply[-size - 2 : -2])
    client.close()
    theirs.close()
    raw.close()
    plain.unlink(key)
    plain.close()
    return [
        {
            "operation": "latency",
            "peer": name,
            "size": size,
            "microseconds": got,
            "server": endpoint.server,
            "transport": endpoint.transport,
        }
        for name, got in times.items()
    ]


def priority(endpoint: Endpoint, store_bytes: int) -> list[Row]:
    """Lookups of 64 keys and retrieves, idle and while a store of many bytes runs."""
    client = fastkv.Redis(**endpoint.kwargs)
    plain = _plain(endpoint)
    size, count = 4 * MIB, 8
    keys = _store(plain, "bench:priority:", count, size)
    memory = np.zeros((count, size), np.uint8)
    looked_up = [f"{keys[i % count]}" for i in range(64)]
    source = np.random.default_rng(1).integers(0, 256, (64, size), dtype=np.uint8)
    stored = [f"bench:store:{i}" for i in range(64)]
    rows: list[Row] = []

    def sample(label: str, still: Callable[[], bool]) -> None:
        lookup_ms, retrieve = [], []
        while still():
            for _ in range(4):
                start = time.perf_counter()
                assert client.batch_tile_exists(looked_up) == [True] * 64
                lookup_ms.append((time.perf_counter() - start) * 1e3)
            start = time.perf_counter()
            assert client.batch_tile_get(keys, memory, immutable=True) == [True] * count
            retrieve.append(memory.nbytes / (time.perf_counter() - start) / 1e9)
        rows.append(
            {
                "operation": "priority",
                "phase": label,
                "lookup_milliseconds": lookup_ms,
                "retrieve_gb_per_second": retrieve,
                "server": endpoint.server,
                "transport": endpoint.transport,
            }
        )

    client.batch_tile_set(stored, source)
    client.batch_tile_get(keys, memory)
    end = time.monotonic() + 2.0
    sample("idle", lambda: time.monotonic() < end)
    batches = max(1, store_bytes // source.nbytes)
    futures = [client.submit_batch_tile_set(stored, source) for _ in range(batches)]
    start = time.monotonic()
    sample("storing", lambda: not futures[-1].done())
    seconds = time.monotonic() - start
    assert all(all(future.result()) for future in futures)
    stored_gb = batches * source.nbytes / 1e9
    rows[-1] = {**rows[-1], "store_gb_per_second": stored_gb / seconds}
    plain.unlink(*stored, *keys)
    plain.close()
    client.close()
    return rows


def callers(endpoint: Endpoint, rounds: int) -> list[Row]:
    """One caller with a large batch, 16 threads, and 16 tasks, with small ones."""
    size, count, many = MIB, 128, 16
    plain = _plain(endpoint)
    keys = _store(plain, "bench:callers:", count, size)
    memory = np.zeros((count, size), np.uint8)
    client = fastkv.Redis(**endpoint.kwargs)
    share = count // many
    parts = [slice(i * share, (i + 1) * share) for i in range(many)]
    rates: dict[str, list[float]] = {}
    start = 0.0

    def note(name: str, turn: int, seconds: float) -> None:
        if turn:
            rates.setdefault(name, []).append(memory.nbytes / seconds / 1e9)

    async def tasks() -> float:
        async with fastkv.asyncio.Redis(**endpoint.kwargs) as on_loop:
            await on_loop.batch_tile_get(keys, memory)  # connects
            start = time.perf_counter()
            await asyncio.gather(
                *(on_loop.batch_tile_get(keys[part], memory[part]) for part in parts)
            )
            return time.perf_counter() - start

    with ThreadPoolExecutor(many) as pool:
        for turn in range(rounds + 1):
            start = time.perf_counter()
            client.batch_tile_get(keys, memory)
            note("one caller, one batch", turn, time.perf_counter() - start)
            start = time.perf_counter()
            list(pool.map(lambda p: client.batch_tile_get(keys[p], memory[p]), parts))
            note("16 threads", turn, time.perf_counter() - start)
            note("16 tasks", turn, asyncio.run(tasks()))
    client.close()
    plain.unlink(*keys)
    plain.close()
    return [
        {
            "operation": "callers",
            "peer": name,
            "gb_per_second": got,
            "server": endpoint.server,
            "transport": endpoint.transport,
        }
        for name, got in rates.items()
    ]


def long_link(endpoint: Endpoint, program: Path, rounds: int) -> list[Row]:
    """1 ms each way and 100 MB/s a connection, over 8 connections, default window."""
    rate, connections = 100e6, 8
    plain = _plain(endpoint)
    rows = []
    with LongLink(program, endpoint.port, 0.001, rate) as link:
        client = fastkv.Redis(port=link.port, tile_connections=connections)
        for size, count in ((MIB, 256), (64 * MIB, 4)):
            keys = _store(plain, f"bench:link:{size}:", count, size)
            memory = np.zeros((count, size), np.uint8)
            for immutable in (True, False):
                client.batch_tile_get(keys, memory, immutable=immutable)
                got = []
                for _ in range(rounds):
                    start = time.perf_counter()
                    client.batch_tile_get(keys, memory, immutable=immutable)
                    got.append(memory.nbytes / (time.perf_counter() - start) / 1e9)
                rows.append(
                    {
                        "operation": "long link",
                        "size": size,
                        "batch": count,
                        "immutable": immutable,
                        "gb_per_second": got,
                        "cap_gb_per_second": rate * connections / 1e9,
                        "server": endpoint.server,
                        "transport": endpoint.transport,
                    }
                )
            plain.unlink(*keys)
        client.close()
    plain.close()
    return rows


_MEMORY_PROGRAM = """
import sys, numpy as np, redis, fastkv
kind, path, direction = sys.argv[1:]
def resident():
    with open("/proc/self/smaps_rollup") as lines:
        for line in lines:
            if line.startswith("Rss:"):
                return int(line.split()[1]) * 1024
def peak():
    with open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
size, count = 32 << 20, 32
memory = np.ones((count, size), np.uint8)
keys = [f"bench:memory:{i}" for i in range(count)]
client = (fastkv.Redis if kind == "fastkv" else redis.Redis)(unix_socket_path=path)
client.ping()
if kind == "fastkv":
    client.batch_tile_exists(keys[:1])
before = resident()
if kind == "fastkv":
    if direction == "write":
        assert all(client.batch_tile_set(keys, memory))
    else:
        assert all(client.batch_tile_get(keys, memory))
elif direction == "write":
    for key, row in zip(keys, memory):
        client.set(key, row.data)
else:
    values = client.mget(keys)
print(peak() - before)
"""


def memory(endpoint: Endpoint) -> list[Row]:
    """How much a process grows while it writes or reads 1 GiB in existing buffers."""
    rows = []
    for kind in ("fastkv", "redis-py"):
        for direction in ("write", "read"):
            said = subprocess.run(
                [
                    sys.executable,
                    "-c",
                    _MEMORY_PROGRAM,
                    kind,
                    endpoint.unix_path,
                    direction,
                ],
                capture_output=True,
                text=True,
            )
            if said.returncode:
                raise RuntimeError(said.stderr[-2000:])
            rows.append(
                {
                    "operation": f"memory, {direction}",
                    "peer": kind,
                    "grown_bytes": int(said.stdout),
                    "server": endpoint.server,
                    "transport": endpoint.transport,
                }
            )
    plain = _plain(endpoint)
    plain.unlink(*(f"bench:memory:{i}" for i in range(32)))
    plain.close()
    return rows
