"""`fastkv bench`: loads from the user's own server, over value size, connections,
workers and ways to read.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

import fastkv
from fastkv.cli.clients import Client, FastkvClient, RedisPyClient
from fastkv.cli.plot import check_plot, draw_sweep
from fastkv.cli.target import Target
from fastkv.cli.terminal import (
    FLOOR,
    make_console,
    one_line_errors,
    parse_choices,
    parse_counts,
    parse_size,
    percentiles,
    size_label,
)
from fastkv.cli.workload import Sample, Workload
from fastkv.options import TileOptions

_PERCENTILES = {"p50": 50.0, "p99": 99.0, "p99.9": 99.9}
_LEAST_ROUNDS = 3
_BASELINE = "redis-py"


@dataclass(frozen=True)
class Setting:
    """What a batch is loaded by."""

    client: str
    reads: str
    workers: int
    connections: int


class Sweep:
    """Batches of each size by each setting, in turn.

    Args:
        workload: What is loaded.
        clients: By their settings.

    Attributes:
        samples: What was measured so far, by size and setting.
    """

    def __init__(self, workload: Workload, clients: Mapping[Setting, Client]) -> None:
        self._workload = workload
        self._clients = clients
        self.samples: dict[tuple[int, Setting], list[Sample]] = {
            (size, setting): [] for size in workload.keys for setting in clients
        }

    def run(self, seconds: float, show: Callable[[float, float], object]) -> None:
        """Go round until the time is over, but three times at least.

        Args:
            seconds: To measure for, after a round to warm up.
            show: Called after each batch with the seconds that are left and all.
        """
        for size in self._workload.keys:
            self._workload.store(next(iter(self._clients.values())), size)
        started = time.monotonic()
        for _ in self._round(0):
            show(seconds, seconds)
        warm = time.monotonic()
        seconds = max(seconds, _LEAST_ROUNDS * (warm - started))
        turn = 0
        while turn < _LEAST_ROUNDS or time.monotonic() < warm + seconds:
            turn += 1
            for key, sample in self._round(turn):
                self.samples[key].append(sample)
                show(max(0.0, warm + seconds - time.monotonic()), seconds)

    def _round(self, turn: int) -> Iterator[tuple[tuple[int, Setting], Sample]]:
        order = list(self._clients)
        first = turn % len(order)
        for size in self._workload.keys:
            for setting in order[first:] + order[:first]:
                sample = self._workload.load(self._clients[setting], size)
                yield (size, setting), sample

    def rows(self) -> list[dict[str, Any]]:
        """In the order of sizes and settings; those with a sample."""
        rows = []
        for (size, setting), samples in self.samples.items():
            if not samples:
                continue
            times = [sample.seconds * 1e3 for sample in samples]
            parts = percentiles(times, _PERCENTILES.values())
            cpu = [sample.cpu_seconds for sample in samples]
            octets = sum(sample.octets for sample in samples)
            rows.append(
                {
                    "size": size,
                    **vars(setting),
                    "gb_per_second": statistics.median(
                        sample.gb_per_second for sample in samples
                    ),
                    "cpu_seconds_per_gb": sum(cpu) / octets * 1e9,
                    "milliseconds": dict(zip(_PERCENTILES, parts, strict=True)),
                    "batches": len(samples),
                    "all_milliseconds": [round(one, 4) for one in times],
                }
            )
        return rows


def bench(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="Any URL of redis-py; a cluster's too.")
    ],
    sizes: Annotated[
        str, typer.Option(metavar="LIST", help="Bytes a value.")
    ] = "64K,256K,1M,4M,16M,32M",
    connections: Annotated[
        str, typer.Option(metavar="LIST", help="Values of tile_connections.")
    ] = "1,4,16",
    workers: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Values of tile_workers, or its default."),
    ] = None,
    reads: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="ranged: large values in ranges, as is the default; plain: by GET.",
        ),
    ] = "ranged,plain",
    batch_bytes: Annotated[
        str, typer.Option(metavar="BYTES", help="What one call loads.")
    ] = "64M",
    seconds: Annotated[
        float, typer.Option(min=0.1, max=1800, help="The longer, the less noise.")
    ] = 60.0,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="redis-py", help="Beside it: redis-py, GET by GET."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw it there.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, with every batch.")
    ] = False,
) -> None:
    """Measure loads from a server of yours.

    Values are random bytes under keys of their own, which are deleted at the
    end, whatever ends it; every byte that is loaded is compared. Settings take
    turns, so that noise hits all alike. Nothing is stored if the server lacks
    the memory. Ctrl-C ends it with a report of what was measured so far.

    GB/s is the median of batches. p50, p99 and p99.9 are of the time that a
    batch takes, as a request waits for its last value. cpu-s/GB is what this
    client used.
    """
    with one_line_errors():
        console = make_console(stderr=as_json)
        check_plot(plot)
        value_sizes = [parse_size(size) for size in sizes.split(",")]
        parse_choices(reads, ("ranged", "plain"))
        parse_choices(baseline or _BASELINE, (_BASELINE,))
        batch = parse_size(batch_bytes)
        target = Target.of(url)
        settings = _settings(
            target.options,
            reads.split(","),
            parse_counts(workers, 64) if workers else [None],
            parse_counts(connections, 1024),
        )
        report, status = _measure(
            console, target, value_sizes, batch, settings, bool(baseline), seconds
        )
        if as_json:
            print(json.dumps(report))
        if report["rows"]:
            console.print(_table(report["rows"]))
            console.print(_summary(report))
            if plot is not None:
                draw_sweep(report, plot)
                console.print(f"wrote {plot}", markup=False, soft_wrap=True)
        if status:
            raise typer.Exit(status)


def _settings(
    base: TileOptions,
    reads: Sequence[str],
    workers: Sequence[int | None],
    connections: Sequence[int],
) -> dict[Setting, TileOptions]:
    settings = {}
    for way in reads:
        for threads in workers:
            for count in connections:
                options = replace(base, connections=count)
                if threads is not None:
                    options = replace(options, workers=threads)
                if way == "plain":
                    options = replace(options, range_bytes=0)
                elif not base.range_bytes:
                    options = replace(options, range_bytes=None)
                native, *_ = options.filled(1 << 30)
                settings[Setting("fastkv", way, native, count)] = options
    return settings


def _measure(
    console: Console,
    target: Target,
    sizes: Sequence[int],
    batch_bytes: int,
    settings: Mapping[Setting, TileOptions],
    baseline: bool,
    seconds: float,
) -> tuple[dict[str, Any], int]:
    """The report, and the exit status after an interruption."""
    status = 0
    with Workload(target, sizes, batch_bytes) as workload, contextlib.ExitStack() as s:
        clients: dict[Setting, Client] = {}
        for setting, options in settings.items():
            fast = s.enter_context(contextlib.closing(target.fast(options)))
            clients[setting] = FastkvClient(fast)
        if baseline:
            plain = s.enter_context(contextlib.closing(target.plain()))
            clients[Setting(_BASELINE, "plain", 0, 1)] = RedisPyClient(plain)
        cells = len(sizes) * len(clients)
        console.print(
            f"fastkv {fastkv.__version__}; {target.server} over {target.transport}"
            f"{', a cluster' if target.cluster else ''}; {target.shown}\n"
            f"{cells} settings take turns for {seconds:g} s, loading "
            f"{size_label(batch_bytes)} a batch",
            markup=False,
        )
        if workload.unseen:
            console.print(f"could not look: {workload.unseen}", markup=False)
        sweep = Sweep(workload, clients)
        try:
            with _Screen(console, sweep) as screen:
                sweep.run(seconds, screen.show)
        except (KeyboardInterrupt, SystemExit) as stop:
            status = stop.code if isinstance(stop, SystemExit) else 130  # type: ignore[assignment]  # ours are ints
    report = {
        "fastkv": fastkv.__version__,
        "server": target.server,
        "transport": target.transport,
        "cluster": target.cluster,
        "url": target.shown,
        "cores": len(os.sched_getaffinity(0)),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "batch_bytes": batch_bytes,
        "complete": status == 0,
        "rows": sweep.rows(),
    }
    return report, status


class _Screen:
    """On a terminal: the median of each setting so far, and how long it will take."""

    def __init__(self, console: Console, sweep: Sweep) -> None:
        self._sweep = sweep
        # Drawn between batches, not by a thread that would take part in them.
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._next = 0.0
        self._on = console.is_terminal

    def __enter__(self) -> _Screen:
        if self._on:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._on:
            self._live.stop()

    def show(self, left: float, total: float) -> None:
        if not self._on or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + 0.25
        bar = ProgressBar(total=total, completed=total - left, width=40)
        line = Table.grid(padding=(0, 1))
        what = "warming up" if left == total else f"{left:.0f} s left"
        line.add_row(bar, Text(f"{what}; Ctrl-C ends it with a report"))
        self._live.update(Group(self._rates(), line), refresh=True)

    def _rates(self) -> Table:
        samples = self._sweep.samples
        columns = list(dict.fromkeys(setting.connections for _, setting in samples))
        table = Table("Value", "GB/s", box=box.SIMPLE, padding=(0, 1, 0, 0))
        for count in columns:
            table.add_column(f"{count} conn.", justify="right")
        rows: dict[tuple[str, str], dict[int, str]] = {}
        for (size, setting), got in samples.items():
            threads = f", {setting.workers} workers" if setting.workers else ""
            name = f"{setting.client}, {setting.reads}{threads}"
            if got:
                median = statistics.median(sample.gb_per_second for sample in got)
                cell = f"{median:.2f}"
            else:
                cell = "..."
            rows.setdefault((size_label(size), name), {})[setting.connections] = cell
        for (label, name), cells in rows.items():
            table.add_row(label, name, *(cells.get(count, "") for count in columns))
        return table


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("Value", "Client", "Reads", box=box.SIMPLE, padding=(0, 1, 0, 0))
    titles = ("Work.", "Conn.", "GB/s", "cpu-s/GB", "p50 ms", "p99", "p99.9", "Batches")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    last = None
    for row in rows:
        if last is not None and row["size"] != last:
            table.add_section()
        last = row["size"]
        rate = f"{row['gb_per_second']:.2f}"
        table.add_row(
            size_label(row["size"]),
            row["client"],
            row["reads"],
            str(row["workers"] or ""),
            str(row["connections"]),
            rate if row["gb_per_second"] >= FLOOR else f"[red]{rate}[/]",
            f"{row['cpu_seconds_per_gb']:.2f}",
            *(f"{row['milliseconds'][part]:.1f}" for part in _PERCENTILES),
            str(row["batches"]),
        )
    return table


def _summary(report: Mapping[str, Any]) -> str:
    ours = [row for row in report["rows"] if row["client"] == "fastkv"]
    lines = []
    if not report["complete"]:
        lines.append("Interrupted: this is what was measured so far.")
    lines.append("Every byte was right.")
    if min(row["batches"] for row in report["rows"]) < 1000:
        lines.append("Of less than 1,000 batches, p99.9 is hardly more than the worst.")
    if ours:
        best = max(ours, key=lambda row: float(row["gb_per_second"]))
        met = sum(row["gb_per_second"] >= FLOOR for row in ours)
        lines.append(
            f"Fastest: {best['gb_per_second']:.2f} GB/s, values of "
            f"{size_label(best['size'])}, {best['reads']} reads, connections: "
            f"{best['connections']}. {met} of {len(ours)} reach the {FLOOR:g} GB/s "
            "below which loading does not outrun prefill."
        )
    return " ".join(lines)
