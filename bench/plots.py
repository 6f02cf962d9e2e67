"""The plots of a report."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

from bench.tables import CEILING, peer_rows
from fastkv.cli.plot import floor_line, size_axis
from fastkv.cli.terminal import percentiles, size_label

mpl.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]
_COLORS = {
    CEILING: "black",
    "fastkv, immutable": "tab:red",
    "fastkv": "tab:orange",
    "LMCache native": "tab:blue",
    "redis-py, hiredis": "tab:green",
    "redis-py, no hiredis": "tab:olive",
    "valkey-glide-sync": "tab:purple",
    "redis-benchmark": "tab:gray",
}


def draw(report: Row, folder: Path) -> list[Path]:
    """Draw what the report has rows for. Returns the files."""
    rows = report["rows"]
    drawn = []
    for name, plot in (
        ("throughput", _throughput),
        ("connections", _connections),
        ("latency", _latency),
        ("cpu", _cpu),
    ):
        figure = plot(rows)
        if figure is None:
            continue
        machine = report["machine"]
        figure.text(
            0.01,
            0.01,
            f"{machine['cpu']}, {machine['cores']} cores that server and client share, "
            f"loopback, batches of 128 MiB, medians of interleaved rounds",
            fontsize=7,
            color="gray",
        )
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        drawn.append(path)
    return drawn


def _places(rows: list[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["server"], row["transport"]) for row in rows))


def _grid(count: int, wide: int) -> Any:
    tall = -(-count // wide)
    figure, axes = plt.subplots(
        tall,
        wide,
        figsize=(6.2 * wide, 3.9 * tall),
        squeeze=False,
    )
    figure.set_layout_engine("constrained", rect=(0, 0.03, 1, 0.97))
    for unused in list(axes.flat)[count:]:
        unused.set_visible(False)
    return figure, list(axes.flat)


def _lines(axis: Any, rows: list[Row], field: str) -> None:
    for name in dict.fromkeys(row["peer"] for row in rows):
        mine = sorted((r for r in rows if r["peer"] == name), key=lambda r: r["size"])
        if not any(statistics.median(row[field]) for row in mine):
            continue
        sizes = [row["size"] for row in mine]
        axis.plot(
            sizes,
            [statistics.median(row[field]) for row in mine],
            label=name,
            color=_COLORS.get(name),
            linestyle="--" if name == CEILING else "-",
            marker=None if name == CEILING else "o",
            markersize=4,
            zorder=3 if name.startswith("fastkv") else 2,
        )
        axis.fill_between(
            sizes,
            [min(row[field]) for row in mine],
            [max(row[field]) for row in mine],
            color=_COLORS.get(name),
            alpha=0.08,
        )
    size_axis(axis, sorted({row["size"] for row in rows}))


def _legend(figure: Any, axes: list[Any]) -> None:
    """One for all panels, outside of them."""
    named = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            named[label] = handle
    figure.legend(
        named.values(), named, loc="outside upper center", ncols=4, fontsize=8
    )


def _throughput(rows: list[Row]) -> Any:
    rows = [row for row in rows if row["operation"] in ("get", "set")]
    panels = [(p, o) for p in _places(rows) for o in ("get", "set")]
    if not panels:
        return None
    figure, axes = _grid(len(panels), 2)
    for axis, ((server, transport), operation) in zip(axes, panels, strict=False):
        here = [r for r in rows if (r["server"], r["transport"]) == (server, transport)]
        _lines(axis, peer_rows(here, operation), "gb_per_second")
        floor_line(axis)
        axis.set_title(f"{operation.upper()}, {server}, {transport}")
        axis.set_ylabel("GB/s")
    _legend(figure, axes)
    return figure


def _cpu(rows: list[Row]) -> Any:
    rows = [row for row in rows if row["operation"] == "get"]
    places = _places(rows)
    if not places:
        return None
    figure, axes = _grid(len(places), 2)
    for axis, place in zip(axes, places, strict=False):
        here = [row for row in rows if (row["server"], row["transport"]) == place]
        _lines(axis, peer_rows(here, "get"), "cpu_seconds_per_gb")
        axis.set_title(f"GET, {place[0]}, {place[1]}")
        axis.set_ylabel("client cpu-seconds per GB")
    _legend(figure, axes)
    return figure


def _connections(rows: list[Row]) -> Any:
    rows = [row for row in rows if row["operation"] == "connections"]
    places = _places(rows)
    if not places:
        return None
    figure, axes = _grid(len(places), 2)
    for axis, place in zip(axes, places, strict=False):
        here = [row for row in rows if (row["server"], row["transport"]) == place]
        for size in sorted({row["size"] for row in here}):
            mine = [row for row in here if row["size"] == size]
            counts = [row["connections"] for row in mine]
            axis.plot(
                counts,
                [statistics.median(row["gb_per_second"]) for row in mine],
                marker="o",
                label=size_label(size),
            )
            axis.fill_between(
                counts,
                [min(row["gb_per_second"]) for row in mine],
                [max(row["gb_per_second"]) for row in mine],
                alpha=0.1,
            )
        floor_line(axis)
        axis.set_title(f"fastkv, immutable GET, {place[0]}, {place[1]}")
        axis.set_xlabel("connections")
        axis.set_ylabel("GB/s")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def _latency(rows: list[Row]) -> Any:
    rows = [row for row in rows if row["operation"] == "tail"]
    places = _places(rows)
    if not places:
        return None
    figure, axes = _grid(len(places), 2)
    parts = (50, 90, 99, 99.9)
    for axis, place in zip(axes, places, strict=False):
        here = [row for row in rows if (row["server"], row["transport"]) == place]
        shown = [r for r in peer_rows(here, "tail") if len(r["milliseconds"]) > 1]
        width = 0.8 / max(1, len(shown))
        for i, row in enumerate(shown):
            axis.bar(
                [x + i * width for x in range(len(parts))],
                percentiles(row["milliseconds"], parts),
                width,
                label=row["peer"],
                color=_COLORS.get(row["peer"]),
            )
        axis.set_xticks(
            [x + 0.4 - width / 2 for x in range(len(parts))], [f"p{p:g}" for p in parts]
        )
        axis.set_title(f"a batch of 32 x 1 MiB, {place[0]}, {place[1]}")
        axis.set_ylabel("milliseconds")
        axis.grid(axis="y", alpha=0.3)
        axis.legend(fontsize=7)
    return figure
