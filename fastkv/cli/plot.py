"""`fastkv bench --plot`, and what all our plots over value sizes look like."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastkv.cli.terminal import FLOOR, Failure, size_label

_PERCENTILES = {"p50": "-", "p99": "--", "p99.9": ":"}
_BASELINE = {"color": "tab:gray", "linestyle": "-."}


def size_axis(axis: Any, sizes: Sequence[int]) -> None:
    """Value sizes to the right, by powers of two; something from 0 upwards."""
    axis.set_xscale("log", base=2)
    labels = [size_label(size) for size in sizes]
    axis.set_xticks(sizes, labels, rotation=45, fontsize=8)
    axis.minorticks_off()
    axis.set_xlabel("value")
    axis.grid(alpha=0.3)
    axis.set_ylim(bottom=0)


def floor_line(axis: Any) -> None:
    axis.axhline(FLOOR, color="gray", linestyle=":", linewidth=1)
    axis.annotate(
        f"{FLOOR:g} GB/s floor", (1, FLOOR), xycoords=("axes fraction", "data"),
        ha="right", va="bottom", fontsize=7, color="gray",
    )  # fmt: skip
    axis.set_ylim(top=max(axis.get_ylim()[1], 1.1 * FLOOR))


def check_plot(path: Path | None) -> None:
    """Say before a run, not after it, that nothing could be drawn."""
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise Failure("--plot needs matplotlib: pip install 'fastkv[plot]'")
    if path.suffix.lower() != ".png":
        raise Failure(f"--plot: expected a name that ends in .png, got {path}")
    if not os.access(path.parent, os.W_OK) or path.is_dir():
        raise Failure(f"--plot: cannot write {path}")


def draw_sweep(report: Mapping[str, Any], path: Path) -> None:
    """GB/s over value size, a line for each number of connections, and beside it how
    long a batch takes; a row of panels for each number of workers.

    Args:
        report: Of ``fastkv bench``, with a row at least.
        path: Of the picture.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows = report["rows"]
    ours = [row for row in rows if row["client"] == "fastkv"]
    theirs = [row for row in rows if row["client"] != "fastkv"]
    workers = sorted({row["workers"] for row in ours}) or [0]
    connections = sorted({row["connections"] for row in ours})
    shades = colormaps["viridis"]
    color = {
        count: shades(0.9 * i / max(1, len(connections) - 1))
        for i, count in enumerate(connections)
    }
    figure = Figure(figsize=(13.5, 4.6 * len(workers)), layout="constrained")
    panels = figure.subplots(len(workers), 2, squeeze=False)
    for (rates, latencies), count in zip(panels, workers, strict=True):
        here = [row for row in ours if row["workers"] == count]
        _rates(rates, here, theirs, color)
        _latencies(latencies, here, theirs)
        threads = f"{count} worker{'s' if count > 1 else ''}"
        rates.set_title(f"loads, {threads}", fontsize=10)
    figure.suptitle(
        f"fastkv {report['fastkv']}, {report['server']}, {report['transport']}, "
        f"batches of {size_label(report['batch_bytes'])}, client of "
        f"{report['cores']} cores",
        fontsize=10,
    )
    figure.savefig(path, dpi=110, format="png")


def _rates(
    axis: Any,
    ours: Sequence[Mapping[str, Any]],
    theirs: Sequence[Mapping[str, Any]],
    color: Mapping[int, Any],
) -> None:
    for reads, style in (("ranged", "-"), ("plain", "--")):
        for count in color:
            line = [
                row
                for row in ours
                if (row["reads"], row["connections"]) == (reads, count)
            ]
            _line(
                axis, line, lambda row: row["gb_per_second"], color=color[count],
                linestyle=style, label=f"connections: {count}, {reads}",
            )  # fmt: skip
    _line(axis, theirs, lambda row: row["gb_per_second"], label="redis-py", **_BASELINE)
    size_axis(axis, sorted({row["size"] for row in [*ours, *theirs]}))
    floor_line(axis)
    axis.set_ylabel("GB/s")
    _legend(axis)


def _latencies(
    axis: Any, ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> None:
    """Of the setting that reads fastest over all sizes; all would hide each other."""
    settings = {(row["reads"], row["connections"]) for row in ours}

    def total(setting: tuple[str, int]) -> float:
        return sum(float(r["gb_per_second"]) for r in ours if _setting(r) == setting)

    if settings:
        best = max(sorted(settings), key=total)
        line = [row for row in ours if _setting(row) == best]
        for part, style in _PERCENTILES.items():
            _line(
                axis, line, lambda row, part=part: row["milliseconds"][part],
                color="tab:red", linestyle=style, label=f"fastkv {part}",
            )  # fmt: skip
        title = f"a batch, connections: {best[1]}, {best[0]} reads"
        axis.set_title(title, fontsize=10)
    for part in ("p50", "p99"):
        _line(
            axis, theirs, lambda row, part=part: row["milliseconds"][part],
            label=f"redis-py {part}", alpha=1.0 if part == "p50" else 0.5, **_BASELINE,
        )  # fmt: skip
    size_axis(axis, sorted({row["size"] for row in [*ours, *theirs]}))
    axis.set_ylabel("milliseconds")
    _legend(axis)


def _legend(axis: Any) -> None:
    """Beside the lines, which go everywhere."""
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))


def _setting(row: Mapping[str, Any]) -> tuple[str, int]:
    return row["reads"], row["connections"]


def _line(axis: Any, rows: Sequence[Mapping[str, Any]], of: Any, **how: Any) -> None:
    if rows:
        ordered = sorted(rows, key=lambda row: row["size"])
        sizes = [row["size"] for row in ordered]
        axis.plot(sizes, [of(row) for row in ordered], marker="o", markersize=4, **how)
