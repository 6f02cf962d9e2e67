"""`fastkv doctor`: looks at both ends of a link and says what costs throughput or
safety.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from typing import Annotated
from urllib.parse import urlsplit

import redis
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import fastkv
from fastkv.cli.facts import MachineFacts, Refused, ServerFacts, round_trips
from fastkv.cli.findings import (
    GOOD,
    NOTE,
    PROBLEM,
    UNSEEN,
    WARNING,
    Finding,
    check_cluster,
    check_servers,
)
from fastkv.cli.link import Cost, LinkFacts, measure_link
from fastkv.cli.target import Target, members
from fastkv.cli.terminal import (
    FLOOR,
    Failure,
    make_console,
    one_line_errors,
    size_label,
)

_STYLES = {
    GOOD: "green",
    NOTE: "cyan",
    WARNING: "yellow",
    PROBLEM: "red",
    UNSEEN: "dim",
}
_FAULTS = 100  # page faults a MiB; all anew are 256
_CLIFF_CPU, _CLIFF_RATE = 1.7, 0.6  # of what GETs below the cliff take and reach
_NEAR_RAW = 0.8
_LAN_RTT = 1e-3
_NO_CLIFF = {"oversize_threshold": "0", "dirty_decay_ms": "-1"}
_JEMALLOC = ",".join(f"{name}:{value}" for name, value in _NO_CLIFF.items())


def doctor(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="Any URL of redis-py; a cluster's too.")
    ],
    seconds: Annotated[
        float,
        typer.Option(
            min=0, max=600, help="To measure the link for; 0: look only, store nothing."
        ),
    ] = 5.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the findings as JSON.")
    ] = False,
) -> None:
    """Look at both ends, and say what costs throughput or safety.

    Each line has evidence and a remedy. To measure the link, 32 MiB of random
    bytes are stored under keys of their own for some seconds, if there is room
    for them.

    Exit status: 0, nothing to do; 1, warnings or problems; 2, the server could
    not be reached. What the server refuses to say, or a managed service hides,
    is "unseen", and changes no status.
    """
    with one_line_errors(2):
        target = Target.of(url)
        with make_console(stderr=True).status("looking at both ends"):
            findings = list(_examine(target, seconds))
        bad = any(finding.level in (WARNING, PROBLEM) for finding in findings)
        if as_json:
            report = {
                "fastkv": fastkv.__version__,
                "server": target.server,
                "url": target.shown,
                "cluster": target.cluster,
                "findings": [vars(finding) for finding in findings],
                "status": int(bad),
            }
            print(json.dumps(report))
        else:
            _print(make_console(), target, findings)
        if bad:
            raise typer.Exit(1)


def _examine(target: Target, seconds: float) -> Iterator[Finding]:
    machine = MachineFacts()
    with contextlib.closing(target.plain()) as plain:
        all_members = list(members(plain))
        servers = [ServerFacts.of(member) for member in all_members]
        trips = [round_trips(member.client) for member in all_members if member.primary]
        slots: dict[str, int] = {}
        if isinstance(plain, redis.RedisCluster):
            for owners in plain.nodes_manager.slots_cache.values():
                slots[owners[0].name] = slots.get(owners[0].name, 0) + 1
    yield _client(machine)
    yield from check_servers(servers)
    yield _huge_pages(servers[0], machine.huge_pages if target.local else None)
    if target.cluster:
        yield from check_cluster(servers, slots)
    yield from _link_settings(target, machine)
    yield _round_trip(target, machine, max(trips))
    link: LinkFacts | Refused = Refused("--seconds 0")
    if seconds > 0:
        try:
            link = measure_link(target, seconds)
        except (Failure, OSError, redis.exceptions.RedisError) as error:
            link = Refused(str(error))
    yield _allocator(servers[0], link)
    if isinstance(link, Refused):
        yield Finding.unseen("throughput", link)
    else:
        yield _throughput(link)


def _client(machine: MachineFacts) -> Finding:
    parts = [f"fastkv {fastkv.__version__}", f"redis-py {redis.__version__}"]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        parts.append(f"hiredis {importlib.metadata.version('hiredis')}")
    parts.append(f"{machine.cores} cores, {machine.files:,} files")
    evidence = ", ".join(parts)
    if machine.files < 1024:
        return Finding(WARNING, "client", evidence, "raise ulimit -n to 1024 or more")
    if machine.cores < 2:
        remedy = "give it two: one receives while another computes"
        return Finding(NOTE, "client", evidence, remedy)
    return Finding(GOOD, "client", evidence)


def _huge_pages(server: ServerFacts, machine: str | Refused | None) -> Finding:
    """``machine``: the setting of the server's machine, if it is this one."""
    topic = "huge pages"
    evidence = []
    own = None if isinstance(server.config, Refused) else server.config["disable-thp"]
    if own is not None:
        evidence.append(f"disable-thp {own}")
    if isinstance(machine, str):
        evidence.append(f"transparent_hugepage {machine} on its machine")
    said = ", ".join(evidence)
    if own == "yes":
        return Finding(GOOD, topic, f"{said}: the server switches them off for itself")
    if machine in ("madvise", "never"):
        return Finding(GOOD, topic, said)
    remedy = (
        "on its machine: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, "
        "or start it with --disable-thp yes"
    )
    if own == "no" or machine == "always":
        costs = "a snapshot copies 2 MiB for each change, memory is given back late"
        return Finding(WARNING, topic, f"{said}: {costs}", remedy)
    assert isinstance(server.config, Refused)
    return Finding.unseen(topic, server.config)


def _link_settings(target: Target, machine: MachineFacts) -> Iterator[Finding]:
    yield _encryption(target)
    if target.transport == "unix":
        yield Finding(GOOD, "socket buffers", "a unix socket: no TCP in between")
        return
    _, _, window, _ = target.options.filled(1 << 30)
    ends = "both ends" if target.local else "client"
    if isinstance(machine.rmem, Refused) or isinstance(machine.wmem, Refused):
        refused = machine.rmem if isinstance(machine.rmem, Refused) else machine.wmem
        assert isinstance(refused, Refused)
        yield Finding.unseen("socket buffers", refused)
    else:
        evidence = (
            f"{ends}: tcp_rmem up to {size_label(machine.rmem)}, tcp_wmem up to "
            f"{size_label(machine.wmem)}; {size_label(window)} are on their way on a "
            "connection"
        )
        if min(machine.rmem, machine.wmem) < window:
            yield Finding(
                WARNING,
                "socket buffers",
                evidence,
                f'sysctl -w net.ipv4.tcp_rmem="4096 131072 {8 * window}" '
                f'net.ipv4.tcp_wmem="4096 16384 {8 * window}"',
            )
        else:
            yield Finding(GOOD, "socket buffers", evidence)
    if not target.local:
        yield Finding(
            UNSEEN,
            "server's buffers",
            "could not look: it is another machine",
            "there: sysctl net.ipv4.tcp_wmem net.ipv4.tcp_rmem; the last number should "
            f"be {size_label(window)} or more",
        )


def _encryption(target: Target) -> Finding:
    topic = "TLS"
    if target.transport == "TLS":
        if "ssl_cert_reqs=none" in target.url:
            return Finding(
                WARNING,
                topic,
                "on, but ssl_cert_reqs=none: anybody can pose as the server",
                "name the CA with ssl_ca_certs=",
            )
        return Finding(
            NOTE,
            topic,
            "on: one thread of the server encrypts, which takes a third of the "
            "throughput or more",
            "inside a trusted network or one host: plain TCP or a unix socket",
        )
    if target.local:
        return Finding(GOOD, topic, f"off; {target.transport} inside one machine")
    user = urlsplit(target.url).username
    if target.has_password or user:
        evidence = "off: the password and all values cross the network in clear"
    else:
        evidence = (
            "off, and no password: who reaches the port can read and replace KV caches"
        )
    remedy = "rediss://, or a network that only the inference servers are on"
    return Finding(WARNING, topic, evidence, remedy)


def _round_trip(
    target: Target, machine: MachineFacts, trip: tuple[float, float]
) -> Finding:
    median, p99 = trip
    _, connections, window, _ = target.options.filled(target.max_connections)
    flow = window
    if target.transport != "unix" and not isinstance(machine.rmem, Refused):
        flow = min(flow, machine.rmem)
    bound = (connections - 1) * flow / median / 1e9
    evidence = (
        f"p50 {median * 1e3:.2f} ms, p99 {p99 * 1e3:.2f} ms: {connections - 1} "
        f"connections with {size_label(flow)} each carry {bound:.1f} GB/s at most"
    )
    if bound < 2 * FLOOR:
        needed = 1 << int(2 * FLOOR * 1e9 * median / (connections - 1)).bit_length()
        return Finding(
            WARNING,
            "round trip",
            evidence,
            f"tile_window_bytes={needed}, or more tile_connections",
        )
    if median > _LAN_RTT:
        remedy = "a server nearer to its clients; a lookup takes a round trip at least"
        return Finding(NOTE, "round trip", evidence, remedy)
    return Finding(GOOD, "round trip", evidence)


# --- what was measured ---------------------------------------------------------------


def _allocator(server: ServerFacts, link: LinkFacts | Refused) -> Finding:
    topic = "8 MiB cliff"
    options = {} if isinstance(server.allocator, Refused) else server.allocator
    name = "unknown allocator"
    if not isinstance(server.info, Refused):
        name = server.info["mem_allocator"]
    stated = ", ".join(f"{key} {options[key]}" for key in _NO_CLIFF if key in options)
    allocator = f"{name}{', ' + stated if stated else ''}"
    remedy = (
        "keep chunks below 8 MiB, or start the server with MALLOC_CONF and "
        f"JE_MALLOC_CONF both set to {_JEMALLOC} (which one counts depends on the "
        "build)"
    )
    if name == "libc":
        remedy = (
            "start the server with MALLOC_MMAP_THRESHOLD_=1073741824 and "
            "MALLOC_TRIM_THRESHOLD_=17179869184, or use a build with jemalloc"
        )
    costs = "stores pay for it, and GETs of other clients; fastkv's loads avoid it"
    if isinstance(link, Refused):
        if not stated:
            return Finding.unseen(topic, link)
        if all(options.get(key) == value for key, value in _NO_CLIFF.items()):
            return Finding(GOOD, topic, f"none by its settings: {allocator}")
        evidence = f"there is one, by its settings: {allocator}; {costs}"
        return Finding(WARNING, topic, evidence, remedy)
    measured = f"{_cost(link.small)}; {_cost(link.large)}; {allocator}"
    if _has_cliff(link.small, link.large):
        evidence = f"there is one: {measured}; {costs}"
        return Finding(WARNING, topic, evidence, remedy)
    if name == "libc":
        evidence = f"none now: {measured}, where it begins beyond the largest value"
        return Finding(NOTE, topic, f"{evidence} freed so far, or 32 MiB", remedy)
    return Finding(GOOD, topic, f"none: {measured}")


def _has_cliff(small: Cost, large: Cost) -> bool:
    if large.faults is not None:
        return large.faults > _FAULTS
    # A slow link hides it from the clock, but not from the server.
    if small.cpu and large.cpu and large.cpu > _CLIFF_CPU * small.cpu:
        return True
    return large.gb_per_second < _CLIFF_RATE * small.gb_per_second


def _cost(cost: Cost) -> str:
    text = f"GET of {size_label(cost.size)} {cost.gb_per_second:.2f} GB/s"
    if cost.faults is not None:
        text += f", {cost.faults:.0f} page faults a MiB"
    elif cost.cpu is not None:
        text += f", {cost.cpu:.2f} cpu-s/GB of the server"
    return text


def _throughput(link: LinkFacts) -> Finding:
    evidence = (
        f"a raw drain gets {link.raw:.2f} GB/s ({link.shape}), fastkv {link.fast:.2f}, "
        f"{link.fast / link.raw:.0%} of it, with values of 4 MiB"
    )
    if link.fast < _NEAR_RAW * link.raw:
        remedy = f"fastkv tune URL; the best drain was by {link.shape}"
        return Finding(WARNING, "throughput", evidence, remedy)
    if link.fast < FLOOR:
        return Finding(
            WARNING,
            "throughput",
            f"{evidence}: less than the {FLOOR:g} GB/s below which loading does not "
            "outrun prefill",
            "the link or the server is the limit, not the client: a faster network, a "
            "server with cores of its own, a unix socket, several servers (cluster)",
        )
    return Finding(GOOD, "throughput", evidence)


# --- output --------------------------------------------------------------------------


def _print(console: Console, target: Target, findings: Sequence[Finding]) -> None:
    where = ", a cluster" if target.cluster else ""
    console.print(
        f"{target.server} over {target.transport}{where}; {target.shown}\n",
        markup=False,
    )
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    for finding in findings:
        said = Text(finding.evidence)
        if finding.remedy:
            said.append(f"\n-> {finding.remedy}", style="bold")
        level = Text(finding.level, style=_STYLES[finding.level])
        table.add_row(level, finding.topic, said)
    console.print(table)
    counts = dict.fromkeys(_STYLES, 0)
    for finding in findings:
        counts[finding.level] += 1
    console.print("\n" + ", ".join(f"{n} {level}" for level, n in counts.items() if n))
