"""``make bench``: fastkv beside its peers and the raw ceiling, on private servers.

Writes a JSON report with every round, plots, and tables in Markdown.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from bench import plots, scenarios, tables
from bench.peers import PEERS, Endpoint
from bench.throughput import MIB, Throughput
from fastkv.cli.private_server import PrivateServer, find_servers
from fastkv.cli.terminal import size_label

KIB = 1024
SIZES = [s * KIB for s in (64, 256, 1024, 4096, 8192, 16384, 32768, 40960)]
SHORT_SIZES = [s * KIB for s in (64, 1024, 32768)]
_FOLDER = Path(__file__).parent


def compile_program(name: str, folder: Path) -> Path:
    """Compile ``ceiling`` or ``link``."""
    program = folder / name
    subprocess.run(
        [
            os.environ.get("CXX", "g++"),
            *("-std=c++20", "-O2", "-pthread"),
            str(_FOLDER / f"{name}.cpp"),
            *("-o", str(program), "-lssl", "-lcrypto"),
        ],
        check=True,
    )
    return program


def tls_arguments(folder: Path) -> tuple[int, list[str]]:
    """A free port, and what a server needs to speak TLS on it to clients that ask for
    no proof.
    """
    certificate, key = str(folder / "server.crt"), str(folder / "server.key")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-nodes", "-subj", "/CN=x"),
            *("-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-out", certificate, "-keyout", key),
        ],
        check=True,
        capture_output=True,
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port, [
        *("--tls-port", str(port), "--tls-auth-clients", "no"),
        *("--tls-cert-file", certificate, "--tls-key-file", key),
        *("--tls-ca-cert-file", certificate),
    ]


def machine() -> dict[str, Any]:
    """What somebody must know to compare figures."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    versions = {}
    for package in ("fastkv", "redis", "hiredis", "lmcache", "valkey-glide-sync"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": versions,
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def plan(
    endpoints: list[Endpoint], sizes: list[int], short: bool, ceiling: Path, link: Path
) -> Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    """The steps of a run: what is measured, and how."""
    rounds = 5 if short else 9
    peers = PEERS[:4] if short else PEERS

    def throughput(endpoint: Endpoint, size: int) -> list[dict[str, Any]]:
        bench = Throughput(endpoint, size, 128 * MIB, ceiling, peers)
        try:
            return bench.measure("get", rounds) + bench.measure("set", rounds)
        finally:
            bench.close()

    def connections(endpoint: Endpoint) -> list[dict[str, Any]]:
        rows = []
        for size in (MIB, 32 * MIB):
            bench = Throughput(endpoint, size, 128 * MIB, ceiling, ())
            rows += bench.over_connections([1, 2, 3, 4, 6, 8, 12, 16], rounds)
            bench.close()
        return rows

    def tail(endpoint: Endpoint) -> list[dict[str, Any]]:
        bench = Throughput(endpoint, MIB, 32 * MIB, ceiling, PEERS[:4])
        try:
            rows = bench.measure("get", 200)
        finally:
            bench.close()
        return [{**row, "operation": "tail"} for row in rows]

    for endpoint in endpoints:
        where = f"{endpoint.server}, {endpoint.transport}"
        for size in sizes:
            yield (
                f"{where}, {size_label(size)}",
                partial(throughput, endpoint, size),
            )
    # With TLS only the throughput is measured.
    others = [one for one in endpoints if one.transport != "tls"]
    for endpoint in others[:1] if short else others[:2]:
        where = f"{endpoint.server}, {endpoint.transport}"
        yield (
            f"{where}, lookups",
            partial(scenarios.lookups, endpoint, ceiling, 5 if short else 15),
        )
        yield (
            f"{where}, one key",
            partial(scenarios.latency, endpoint, 300 if short else 2000),
        )
        yield f"{where}, callers", partial(scenarios.callers, endpoint, rounds)
        if short:
            continue
        yield f"{where}, connections", partial(connections, endpoint)
        yield f"{where}, tail", partial(tail, endpoint)
        yield f"{where}, priority", partial(scenarios.priority, endpoint, 4096 * MIB)
        yield f"{where}, memory", partial(scenarios.memory, endpoint)
        if endpoint.transport == "tcp":
            yield f"{where}, long link", partial(scenarios.long_link, endpoint, link, 5)


def main(
    out: Annotated[Path, typer.Option(help="Folder of report and plots.")] = Path(
        "build/bench"
    ),
    short: Annotated[
        bool, typer.Option("--short", help="Three minutes: fewer sizes, one server.")
    ] = False,
    server: Annotated[
        list[str] | None, typer.Option(help="Only servers that begin with this.")
    ] = None,
    transport: Annotated[
        list[str] | None,
        typer.Option(help="tcp, unix, or tls with a server that was built with it."),
    ] = None,
    size: Annotated[list[int] | None, typer.Option(help="Bytes a value.")] = None,
    only: Annotated[str, typer.Option(help="Only steps that contain this.")] = "",
) -> None:
    """Measure fastkv beside its peers and the raw ceiling."""
    console = Console()
    found = find_servers()
    binaries = [b for b in found if not server or str(b).startswith(tuple(server))]
    if not binaries:
        console.print("no such server found; there are:", *map(str, found))
        raise typer.Exit(1)
    # The newest Redis first: figures of one server are its.
    binaries.sort(key=lambda b: (b.name, -int(b.version.split(".")[0])))
    if short and not server:
        binaries = binaries[:1]
    sizes = size or (SHORT_SIZES if short else SIZES)
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine(), "rows": []}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ceiling, link = (compile_program(n, folder) for n in ("ceiling", "link"))
        endpoints = []
        for binary in binaries:
            transports = transport or ["tcp", "unix"]
            tls_port, arguments = 0, list[str]()
            if "tls" in transports:
                tls_port, arguments = tls_arguments(folder)
            one = stack.enter_context(PrivateServer(binary, *arguments))
            endpoints += [
                Endpoint(
                    str(binary),
                    kind,
                    tls_port if kind == "tls" else one.port,
                    one.unix_path,
                )
                for kind in transports
            ]
        steps = [
            s for s in plan(endpoints, sizes, short, ceiling, link) if only in s[0]
        ]
        columns = (
            TextColumn("{task.description:40}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        progress = stack.enter_context(Progress(*columns, console=console))
        task = progress.add_task("", total=len(steps))
        for name, step in steps:
            progress.update(task, description=name)
            rows = step()
            report["rows"] += rows
            for line in tables.summaries(rows):
                console.out(line, highlight=False)
            # After each step, so that Ctrl-C leaves a report of what was done.
            (out / "report.json").write_text(json.dumps(report))
            progress.advance(task)
    (out / "tables.md").write_text(tables.markdown(report))
    for path in plots.draw(report, out):
        console.out(f"wrote {path}", highlight=False)
    console.out(f"wrote {out}/report.json, {out}/tables.md", highlight=False)


if __name__ == "__main__":
    typer.run(main)
