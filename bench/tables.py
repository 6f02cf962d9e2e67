"""A report in words and tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from fastkv.cli.terminal import percentiles, size_label, spread

Row = dict[str, Any]
CEILING = "ceiling"


def ceiling_of(rows: Iterable[Row], like: Row) -> Row | None:
    """The best ceiling of the same run: server, transport, operation and size."""
    same = ("server", "transport", "operation", "size")
    raw = [
        row
        for row in rows
        if str(row.get("peer", "")).startswith(CEILING)
        and all(row.get(field) == like.get(field) for field in same)
    ]
    return max(
        raw, key=lambda row: statistics.median(row["gb_per_second"]), default=None
    )


def peer_rows(rows: Iterable[Row], operation: str) -> list[Row]:
    """Rows of clients, and of the best ceiling under its short name."""
    rows = [row for row in rows if row["operation"] == operation]
    out: list[Row] = []
    for row in rows:
        best = ceiling_of(rows, row)
        if not str(row["peer"]).startswith(CEILING):
            out.append({**row, "ceiling": best})
        elif row is best:
            out.append({**row, "peer": CEILING, "ceiling": best})
    return out


def summaries(rows: list[Row]) -> Iterable[str]:
    """One line for each row of a step that has just ended."""
    for operation in ("get", "set", "tail"):
        for row in peer_rows(rows, operation):
            line = f"  {operation} {size_label(row['size']):8} {row['peer']:22}"
            line += f" {spread(row['gb_per_second']):20} GB/s"
            best = row["ceiling"]
            if best is not None:
                ratio = statistics.median(row["gb_per_second"]) / statistics.median(
                    best["gb_per_second"]
                )
                line += f"  {ratio:5.2f} of the ceiling"
            cpu = statistics.median(row["cpu_seconds_per_gb"])
            line += f"  {cpu:.3f} cpu-s/GB" if cpu else ""
            if operation == "tail" and len(row["milliseconds"]) > 1:
                p50, p99, p999 = percentiles(row["milliseconds"], (50, 99, 99.9))
                line += f"  p50 {p50:.1f} p99 {p99:.1f} p99.9 {p999:.1f} ms"
            yield line
    for row in rows:
        operation = row["operation"]
        if "keys_per_second" in row:
            rate = statistics.median(row["keys_per_second"]) / 1e6
            yield f"  {operation} {row['peer']:22} {rate:.3f} million keys/s"
        elif operation == "latency":
            p50, p99 = percentiles(row["microseconds"], (50, 99))
            yield f"  {row['peer']:22} p50 {p50:.0f} us  p99 {p99:.0f} us"
        elif operation == "connections":
            yield (
                f"  {size_label(row['size'])}, {row['connections']} connections "
                f"{spread(row['gb_per_second'])} GB/s"
            )
        elif operation == "callers":
            yield f"  {row['peer']:22} {spread(row['gb_per_second'])} GB/s"
        elif operation == "priority":
            p50, p99 = percentiles(row["lookup_milliseconds"], (50, 99))
            yield (
                f"  {row['phase']:8} lookup p50 {p50:.2f} p99 {p99:.2f} ms, retrieve "
                f"{spread(row['retrieve_gb_per_second'])} GB/s, store "
                f"{row.get('store_gb_per_second', 0):.2f} GB/s"
            )
        elif operation == "long link":
            cap = row["cap_gb_per_second"]
            part = statistics.median(row["gb_per_second"]) / cap
            yield (
                f"  {row['batch']} values of {size_label(row['size'])}, immutable "
                f"{row['immutable']}: {spread(row['gb_per_second'])} GB/s, "
                f"{part:.0%} of what the link can carry"
            )
        elif operation.startswith("memory"):
            yield f"  {operation} {row['peer']:10} {row['grown_bytes'] / 2**20:.1f} MiB"


def markdown(report: Row) -> str:
    """GET and SET over size, a table for each server and transport."""
    out = []
    rows = report["rows"]
    places = dict.fromkeys((r["server"], r["transport"]) for r in rows)
    for server, transport in places:
        here = [r for r in rows if (r["server"], r["transport"]) == (server, transport)]
        for operation in ("get", "set"):
            found = peer_rows(here, operation)
            if not found:
                continue
            sizes = sorted({row["size"] for row in found})
            cell = {(r["peer"], r["size"]): r for r in found}
            names = list(dict.fromkeys(row["peer"] for row in found))
            title = f"{operation.upper()}, {server}, {transport}, GB/s"
            out.append(f"| {title} | " + " | ".join(map(size_label, sizes)) + " |")
            out.append("|---" * (len(sizes) + 1) + "|")
            for name in names:
                figures = [
                    f"{statistics.median(cell[name, s]['gb_per_second']):.2f}"
                    if (name, s) in cell
                    else ""
                    for s in sizes
                ]
                out.append(f"| {name} | " + " | ".join(figures) + " |")
            out.append("")
    return "\n".join(out)
