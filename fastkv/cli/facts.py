"""What can be learned of a server, a machine and a link by asking.

A question that a server refuses is an answer, too: why it could not be looked at.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from redis.exceptions import RedisError

from fastkv.cli.target import Member, Target, server_name
from fastkv.cli.terminal import percentiles

_CONFIG = (
    *("io-threads", "maxmemory-clients", "proto-max-bulk-len", "maxclients"),
    *("client-output-buffer-limit", "client-query-buffer-limit", "disable-thp"),
    *("save", "appendonly"),
)
_PINGS = 200


@dataclass(frozen=True)
class Refused:
    """Why something could not be looked at."""

    why: str


@dataclass(frozen=True)
class ServerFacts:
    """Of one server.

    Attributes:
        name: Of a cluster's, else nothing.
        primary: It is no replica.
        version: Such as ``Redis 8.2.3``.
        info: All of INFO.
        config: Of some settings.
        allocator: jemalloc's options, as MEMORY MALLOC-STATS has them.
        keys: In its database.
    """

    name: str
    primary: bool
    version: str
    info: Mapping[str, Any] | Refused
    config: Mapping[str, str] | Refused
    allocator: Mapping[str, str] | Refused
    keys: int | Refused

    @classmethod
    def of(cls, member: Member) -> ServerFacts:
        client = member.client
        hello: Any = client.execute_command("HELLO")
        if isinstance(hello, list):  # RESP2
            hello = dict(zip(hello[::2], hello[1::2], strict=True))
        return cls(
            member.name,
            member.primary and hello[b"role"] == b"master",
            server_name(hello),
            _ask(client.info),
            _ask(lambda: _config(client)),
            _ask(lambda: _allocator(client)),
            _ask(client.dbsize),
        )


def _ask(question: Any) -> Any:
    try:
        return question()
    except RedisError as error:
        return Refused(str(error))


def _config(client: redis.Redis) -> dict[str, str]:
    answer: Any = client.config_get(*_CONFIG)
    return {_text(name): _text(value) for name, value in answer.items()}


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _allocator(client: redis.Redis) -> dict[str, str]:
    said = _text(client.execute_command("MEMORY", "MALLOC-STATS"))
    options = {}
    for line in said.splitlines():
        name, colon, value = line.strip().partition(": ")
        if colon and name.startswith("opt."):
            options[name.removeprefix("opt.")] = value.split(" ")[0].strip('"')
    return options


@dataclass(frozen=True)
class MachineFacts:
    """Of this machine, and of the server's if it is the same.

    Attributes:
        cores: That this process may use.
        rmem: Most bytes that TCP lets a socket receive ahead.
        wmem: Most bytes that TCP lets a socket send ahead.
        files: Descriptors that this process may have.
        huge_pages: Such as ``madvise``.
    """

    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    rmem: int | Refused = field(default_factory=lambda: _tcp("tcp_rmem"))
    wmem: int | Refused = field(default_factory=lambda: _tcp("tcp_wmem"))
    files: int = field(
        default_factory=lambda: resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    )
    huge_pages: str | Refused = field(default_factory=lambda: _huge_pages())


def _tcp(name: str) -> int | Refused:
    try:
        return int(Path(f"/proc/sys/net/ipv4/{name}").read_text().split()[2])
    except (OSError, IndexError, ValueError) as error:
        return Refused(str(error))


def _huge_pages() -> str | Refused:
    try:
        said = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        return said.partition("[")[2].partition("]")[0]
    except OSError as error:
        return Refused(str(error))


def page_faults(target: Target, info: Mapping[str, Any] | Refused) -> int | None:
    """Of the server so far, if it is a process of this machine."""
    if isinstance(info, Refused) or not target.local:
        return None
    process = Path(f"/proc/{info['process_id']}")
    try:
        name = (process / "comm").read_text()
        if "redis" not in name and "valkey" not in name:
            return None  # of another namespace of processes
        return int((process / "stat").read_text().rpartition(")")[2].split()[7])
    except (OSError, IndexError, ValueError):
        return None


def round_trips(client: redis.Redis) -> tuple[float, float]:
    """Median and p99 of PING, in seconds."""
    times = []
    for _ in range(_PINGS):
        started = time.perf_counter()
        client.ping()
        times.append(time.perf_counter() - started)
    return statistics.median(times), percentiles(times, [99])[0]
