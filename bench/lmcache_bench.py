"""``make bench-lmcache``: fastkv beside LMCache's own clients, measured by LMCache.

Two ways: LMCache's ``bench l2``, a process of its own for each figure, and
`LMCacheEngine.retrieve` in this one. Backends take turns, every byte is compared, and
LMCache's cost without any server is shown beside.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import torch
import typer
from rich.console import Console
from rich.progress import track

from bench import lmcache_engine
from bench.run import machine
from fastkv.cli.private_server import PrivateServer, find_servers
from fastkv.cli.terminal import size_label, spread

mpl.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]
MIB = 1 << 20
SIZES = [s * MIB for s in (1, 4, 16, 32)]
BATCH = 128 * MIB
_NOTHING = "LMCache alone"  # its mock backend
_CHECKED = "fastkv, checksum"
_COLORS = {
    "fastkv": "tab:red",
    _CHECKED: "tab:orange",
    "resp": "tab:blue",
    "valkey": "tab:purple",
    _NOTHING: "black",
}


# --- LMCache's own benchmark of adapters ---------------------------------------------


def _specs(port: int) -> dict[str, Row]:
    ours = {
        "type": "native_plugin",
        "module_path": "fastkv.lmcache",
        "class_name": "NativeClient",
    }
    url = f"redis://127.0.0.1:{port}"
    return {
        "fastkv": {**ours, "adapter_params": {"url": url}},
        _CHECKED: {**ours, "adapter_params": {"url": url, "checksum": True}},
        "resp": {"type": "resp", "host": "127.0.0.1", "port": port},
        "valkey": {"type": "valkey", "startup_nodes": f"127.0.0.1:{port}"},
        _NOTHING: {"type": "mock", "max_size_gb": 4, "mock_bandwidth_gb": 1e6},
    }


def bench_l2(spec: Row, size: int, keys: int, *arguments: str) -> dict[str, Row]:
    """Run ``lmcache bench l2``. Returns its figures by operation."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        subprocess.run(
            [
                str(Path(sys.executable).parent / "lmcache"),
                *("bench", "l2", "--l2-adapter", json.dumps(spec)),
                *("--data-size-kb", str(size // 1024), "--num-keys", str(keys)),
                *("--lookup-max-hit-rate", "1", "--no-skip-verify"),
                *("--format", "json", "--output", str(report), *arguments),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        metrics = json.loads(report.read_text())["metrics"]
    by_name = {
        figures["operation"].lower(): figures
        for name, figures in metrics.items()
        if name.startswith("op_")
    }
    for figures in by_name.values():
        if figures["operation"] != "Lookup":
            assert figures["total_success"] == figures["total_keys"], figures
    return by_name


def measure_l2(server: PrivateServer, size: int, repeats: int, rounds: int) -> Row:
    """All adapters in turn, ``repeats`` times."""
    figures: Row = {}
    for turn in range(repeats):
        specs = list(_specs(server.port).items())
        for name, spec in specs[turn % len(specs) :] + specs[: turn % len(specs)]:
            with server.client() as client:
                client.flushall()
            got = bench_l2(spec, size, BATCH // size, "--rounds", str(rounds))
            mine = figures.setdefault(name, {"load": [], "store": [], "p50": []})
            for operation in ("load", "store"):
                # LMCache's MB are 2 ** 20 bytes.
                rate = got[operation]["throughput_avg_mbps"] * MIB / 1e9
                mine[operation].append(rate)
            mine["p50"].append(got["load"]["duration_p50_ms"])
            mine.setdefault("p99", []).append(got["load"]["duration_p99_ms"])
    return figures


def measure_lookups(server: PrivateServer, repeats: int) -> Row:
    """Keys a second, in batches of 10,000."""
    rates: Row = {}
    for _ in range(repeats):
        for name, spec in _specs(server.port).items():
            got = bench_l2(spec, 1024, 10_000, "--rounds", "5", "--only", "lookup")
            rates.setdefault(name, []).append(got["lookup"]["ops_per_sec_avg"])
    return rates


# --- LMCache's engine ----------------------------------------------------------------


def _configurations(port: int) -> dict[str, Row]:
    raw = {"extra_config": {"save_chunk_meta": False}}
    mock = "mock://8/?peeking_latency=0&read_throughput=1000&write_throughput=1000"
    plugin, url = lmcache_engine.fastkv_plugin, f"redis://127.0.0.1:{port}"
    return {
        "fastkv": plugin(url),
        _CHECKED: plugin(url, checksum=True, key_prefix="checked:"),
        "resp": {"remote_url": f"resp://127.0.0.1:{port}", **raw},
        "valkey": {"remote_url": f"valkey://127.0.0.1:{port}", **raw},
        _NOTHING: {"remote_url": mock, **raw},
    }


def measure_engine(server: PrivateServer, size: int, rounds: int) -> Row:
    """`LMCacheEngine.retrieve` of a prompt of `BATCH` bytes, all backends in turn, of
    the same chunks; those with checksums lie beside.
    """
    tokens = list(range(BATCH // lmcache_engine.TOKEN_BYTES))
    kv = lmcache_engine.random_kv(len(tokens), size)
    got = torch.zeros_like(kv)
    figures: Row = {}
    with contextlib.ExitStack() as stack:
        with server.client() as client:
            client.flushall()
        engines = {}
        for name, config in _configurations(server.port).items():
            made = stack.enter_context(
                lmcache_engine.engine(
                    size // lmcache_engine.TOKEN_BYTES,
                    BATCH + 2 * size + 64 * MIB,
                    blocking_timeout_secs=60,
                    **config,
                )
            )
            engines[name] = made
            made.store(tokens, kv=kv)
            deadline = time.monotonic() + 60
            while lmcache_engine.allocated(made) > 0:
                assert time.monotonic() < deadline, f"{name} has not stored"
                time.sleep(0.01)
        for turn in range(rounds + 1):
            for name, made in engines.items():
                lmcache_engine.poison(made)
                begin = time.perf_counter()
                mask = made.retrieve(tokens, kv=got)
                seconds = time.perf_counter() - begin
                assert int(mask.sum()) == len(tokens), f"{name}: misses"
                if name != _NOTHING:  # it keeps no bytes
                    right = torch.equal(got.view(torch.uint8), kv.view(torch.uint8))
                    assert right, f"{name}: wrong bytes"
                got.zero_()
                if turn > 0:
                    mine = figures.setdefault(name, {"load": [], "ms": []})
                    mine["load"].append(BATCH / 1e9 / seconds)
                    mine["ms"].append(seconds * 1e3)
    return figures


# --- the report ----------------------------------------------------------------------


def tables(report: Row) -> Iterator[str]:
    """Markdown: medians, and the ratio of fastkv to ``resp``."""
    for way, title in (
        ("l2", "load, GB/s (`lmcache bench l2`)"),
        ("engine", "load, GB/s (`LMCacheEngine.retrieve`)"),
    ):
        rows: dict[str, Row] = report[way]
        labels = [size_label(int(size)) for size in rows]
        yield f"| {title} | {' | '.join(labels)} |"
        yield "|---|" + "---|" * len(rows)
        for name in _COLORS:
            cells = [f"{statistics.median(r[name]['load']):.2f}" for r in rows.values()]
            bold = "**" if name == "fastkv" else ""
            yield f"| {bold}{name}{bold} | {' | '.join(cells)} |"
        ratios = [
            statistics.median(r["fastkv"]["load"])
            / statistics.median(r["resp"]["load"])
            for r in rows.values()
        ]
        yield f"| fastkv / resp | {' | '.join(f'{r:.1f}' for r in ratios)} |"
        yield ""


def plot(report: Row, path: Path) -> None:
    """GB/s over the chunk's size, both ways."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), sharey=True)
    for axis, way, title in (
        (axes[0], "l2", "lmcache bench l2"),
        (axes[1], "engine", "LMCacheEngine.retrieve"),
    ):
        sizes = [int(size) for size in report[way]]
        for name, color in _COLORS.items():
            samples = [report[way][str(size)][name]["load"] for size in sizes]
            axis.plot(
                sizes,
                [statistics.median(s) for s in samples],
                label=name,
                color=color,
                marker="o",
                linestyle="--" if name == _NOTHING else "-",
            )
            axis.fill_between(
                sizes,
                [min(s) for s in samples],
                [max(s) for s in samples],
                color=color,
                alpha=0.1,
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [size_label(size) for size in sizes])
        axis.minorticks_off()
        axis.axhline(2.0, color="gray", linestyle=":", linewidth=1)
        axis.set_title(f"load of 128 MiB, {title}")
        axis.set_xlabel("chunk")
        axis.grid(alpha=0.3)
    top = max(
        max(figures[name]["load"])
        for way in ("l2", "engine")
        for figures in report[way].values()
        for name in figures
        if name != _NOTHING
    )
    axes[0].set_ylim(0, 1.6 * top)  # LMCache alone may be far above
    axes[0].set_ylabel("GB/s")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(
    out: Annotated[Path, typer.Option(help="Folder of report and plot.")] = Path(
        "build/bench-lmcache"
    ),
    short: Annotated[bool, typer.Option("--short", help="Two sizes.")] = False,
    server: Annotated[str, typer.Option(help="The server that begins so.")] = "redis-8",
) -> None:
    """Measure fastkv beside LMCache's own clients."""
    console = Console()
    binary = next((b for b in find_servers() if str(b).startswith(server)), None)
    if binary is None:
        console.print("no such server; there are:", *map(str, find_servers()))
        raise typer.Exit(1)
    out.mkdir(parents=True, exist_ok=True)
    sizes = [MIB, 32 * MIB] if short else SIZES
    repeats, rounds = (1, 3) if short else (4, 8)
    report: Row = {
        "machine": machine(),
        "server": str(binary),
        "l2": {},
        "engine": {},
        "lookups": {},
    }
    with PrivateServer(binary) as private:
        for size in track(sizes, "LMCacheEngine.retrieve", console=console):
            figures = measure_engine(private, size, 5 if short else 25)
            report["engine"][str(size)] = figures
            _print(console, size, figures)
        for size in track(sizes, "lmcache bench l2", console=console):
            figures = measure_l2(private, size, repeats, rounds)
            report["l2"][str(size)] = figures
            _print(console, size, figures)
        report["lookups"] = measure_lookups(private, repeats)
        for name, rates in report["lookups"].items():
            millions = [rate / 1e6 for rate in rates]
            console.out(f"  lookups {name:14} {spread(millions, 3)} million keys/s")
    (out / "report.json").write_text(json.dumps(report))
    (out / "tables.md").write_text("\n".join(tables(report)))
    plot(report, out / "lmcache.png")
    console.out(f"wrote {out}/report.json, {out}/tables.md, {out}/lmcache.png")


def _print(console: Console, size: int, figures: Row) -> None:
    for name, mine in figures.items():
        line = f"  {size_label(size):7} {name:14} load {spread(mine['load'])} GB/s"
        if "store" in mine:
            line += f", store {spread(mine['store'])} GB/s"
            line += f", load p50 {statistics.median(mine['p50']):.0f}"
            line += f" p99 {statistics.median(mine['p99']):.0f} ms"
        else:
            ordered = sorted(mine["ms"])
            line += f", p50 {statistics.median(ordered):.0f}"
            line += f" p99 {ordered[-(-len(ordered) * 99 // 100) - 1]:.0f} ms"
        console.out(line, highlight=False)


if __name__ == "__main__":
    os.environ.setdefault(
        "PYTHONHASHSEED", "0"
    )  # LMCache's keys are hashes of Python's
    typer.run(main)
