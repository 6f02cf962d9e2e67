"""`fastkv tune`: which `tile_*` settings and which chunk size suit a server and a
model, measured, and what to paste.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

import fastkv
from fastkv.cli.clients import FastkvClient
from fastkv.cli.contest import Gain, find_fastest, take_turns
from fastkv.cli.models import Model, find_model
from fastkv.cli.paste import pastes
from fastkv.cli.target import Target, members
from fastkv.cli.terminal import (
    Failure,
    make_console,
    one_line_errors,
    parse_counts,
    parse_size,
    size_label,
)
from fastkv.cli.workload import Workload
from fastkv.options import TileOptions

_LMCACHE_TOKENS = 256  # its default
_TOKENS = (16, 32, 64, 128, _LMCACHE_TOKENS, 512)  # vLLM's blocks have 16
_SIZES = (64 << 10, 64 << 20)  # chunks that are tried have so many bytes
_CONNECTIONS = (1, 2, 4, 8, 16, 32)
_WORKERS = (1, 2, 4)
_KIB = 1024
# Window and range, in KiB: about one, two and four ranges on their way.
_WINDOWS = (
    *((256, 256), (512, 256), (1024, 512), (1024, 1024)),
    *((2048, 1024), (4096, 1024), (4096, 2048)),
)
# Their defaults fit themselves to the server, so that the same number is not the same.
_FITTED = ("tile_window_bytes", "tile_range_bytes")
_CLOSE = 0.95  # of the best: as good
# For stores, which nobody waits for; small chunks cost LMCache itself more.
_CLOSE_STORES = 0.8
_FINAL_ROUNDS = 12
# Parts of the time.
_CHUNK_LOADS, _CHUNK_STORES, _FIRST, _SECOND, _LAST = 0.15, 0.1, 0.2, 0.2, 0.35


@dataclass(frozen=True)
class Choice:
    """What somebody could set.

    Attributes:
        tokens: Of a chunk.
        options: Of fastkv.
    """

    tokens: int
    options: TileOptions


def tune(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="Any URL of redis-py; a cluster's too.")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Whose KV cache: llama-3.1-8b, deepseek-v3, qwen3-32b ..."),
    ] = None,
    bytes_per_token: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help="Instead: of a token in a chunk. For FP8 half of what the model has; "
            "with tensor parallelism what one GPU has.",
        ),
    ] = None,
    chunk_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="LIST", help="Chunk sizes to try; one, if yours is given."
        ),
    ] = None,
    batch_bytes: Annotated[
        str, typer.Option(metavar="BYTES", help="What one call loads.")
    ] = "64M",
    seconds: Annotated[
        float, typer.Option(min=0.1, max=1800, help="The longer, the less noise.")
    ] = 90.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON.")
    ] = False,
) -> None:
    """Find good settings and a good chunk size, and print what to paste.

    Loads decide, as a request waits for them; between chunk sizes that load
    alike, stores do. The winner is measured again beside the defaults, in turn
    with them, and is only recommended if its gain is more than noise.

    Values are random bytes under keys of their own, which are deleted at the
    end. Run it where LMCache will run, against the server that it will use.
    """
    with one_line_errors():
        console = make_console(stderr=as_json)
        if (model is None) == (bytes_per_token is None):
            raise Failure(
                "expected --model or --bytes-per-token, such as --model llama-3.1-8b"
            )
        if bytes_per_token is not None:
            subject = Model("", parse_size(bytes_per_token), "--bytes-per-token")
        else:
            subject = find_model(model or "")
        tokens = _candidates(subject, chunk_tokens)
        target = Target.of(url)
        batch = parse_size(batch_bytes)
        result = _Tuning(console, target, subject, tokens, batch, seconds).run()
        if as_json:
            print(json.dumps(result))
        _print(console, target, result)


def _candidates(model: Model, given: str | None) -> list[int]:
    if given is not None:
        return parse_counts(given, 1 << 20)
    least, most = _SIZES
    fitting = [n for n in _TOKENS if least <= n * model.token_bytes <= most]
    return fitting if _LMCACHE_TOKENS in fitting else [*fitting, _LMCACHE_TOKENS]


class _Tuning:
    def __init__(
        self,
        console: Console,
        target: Target,
        model: Model,
        tokens: Sequence[int],
        batch_bytes: int,
        seconds: float,
    ) -> None:
        self._console = console
        self._target = target
        self._model = model
        self._tokens = tokens
        self._batch_bytes = batch_bytes
        self._seconds = seconds
        self._base = target.options
        usual = _LMCACHE_TOKENS if _LMCACHE_TOKENS in tokens else tokens[0]
        self._usual = Choice(usual, self._base)
        self._clients: dict[TileOptions, FastkvClient] = {}
        # Drawn between batches, not by a thread that would take part in them.
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[left]:.0f} s left"),
            console=console,
            transient=True,
            auto_refresh=False,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=seconds, left=seconds)
        self._drawn = self._started = time.monotonic()

    def run(self) -> dict[str, Any]:
        """The result, as JSON has it."""
        console, target = self._console, self._target
        sizes = [n * self._model.token_bytes for n in self._tokens]
        console.print(
            f"fastkv {fastkv.__version__}; {target.server} over {target.transport}"
            f"{', a cluster' if target.cluster else ''}; {target.shown}\n"
            f"{self._model.name} {self._model.token_bytes:,} bytes a token "
            f"({self._model.source})\n"
            f"trying chunks of {', '.join(map(str, self._tokens))} tokens for about "
            f"{self._seconds:g} s",
            markup=False,
            soft_wrap=True,
        )
        with Workload(target, sizes, self._batch_bytes) as self._workload:
            try:
                with self._progress:
                    return self._search()
            finally:
                self._close(keep=())

    def _search(self) -> dict[str, Any]:
        for tokens in self._tokens:
            self._store(Choice(tokens, self._base))
        chunks, tokens = self._try_chunks()
        ways = [Choice(tokens, options) for options in self._first_options()]
        self._stage("connections and workers")
        best = find_fastest(ways, self._load, self._seconds * _FIRST)
        self._close(keep=(self._base, best.options))
        ways = [best, *(replace(best, options=o) for o in _windows(best.options))]
        self._stage("window and ranges")
        best = find_fastest(ways, self._load, self._seconds * _SECOND)
        self._close(keep=(self._base, best.options))
        self._stage("the best beside the defaults")
        return {
            "fastkv": fastkv.__version__,
            "server": self._target.server,
            "url": self._target.shown,
            "model": self._model.name,
            "bytes_per_token": self._model.token_bytes,
            "source": self._model.source,
            "chunks": chunks,
            **self._decide(Choice(tokens, self._base), best),
        }

    def _try_chunks(self) -> tuple[list[dict[str, Any]], int]:
        ways = [Choice(tokens, self._base) for tokens in self._tokens]
        loads: dict[Choice, list[float]] = {}
        stores: dict[Choice, list[float]] = {}
        self._stage("chunk sizes, loads")
        take_turns(ways, self._load, self._seconds * _CHUNK_LOADS, loads)
        self._stage("chunk sizes, stores")
        take_turns(ways, self._store, self._seconds * _CHUNK_STORES, stores)
        rows = [
            {
                "tokens": way.tokens,
                "bytes": way.tokens * self._model.token_bytes,
                "load_gb_per_second": statistics.median(loads[way]),
                "store_gb_per_second": statistics.median(stores[way]),
            }
            for way in ways
        ]
        best = _good(rows, "load_gb_per_second", _CLOSE)
        best = _good(best, "store_gb_per_second", _CLOSE_STORES)
        usual = [row for row in best if row["tokens"] == self._usual.tokens]
        # Of those that are as good: the fewest keys.
        chosen = usual or [max(best, key=lambda row: int(row["tokens"]))]
        return rows, chosen[0]["tokens"]

    def _first_options(self) -> list[TileOptions]:
        nodes = 1
        if self._target.cluster:
            with contextlib.closing(self._target.plain()) as plain:
                nodes = sum(member.primary for member in members(plain))
        cores = len(os.sched_getaffinity(0))
        options = [self._base]
        known = {self._base.filled(1 << 30)}
        for connections in _CONNECTIONS:
            for workers in _WORKERS:
                way = replace(
                    self._base, connections=connections * nodes, workers=workers * nodes
                )
                if workers > min(connections, cores) or way.filled(1 << 30) in known:
                    continue
                known.add(way.filled(1 << 30))
                options.append(way)
        return options

    def _decide(self, chunk: Choice, best: Choice) -> dict[str, Any]:
        """Measure them beside what is usual; ``chunk`` has its settings, and ``best``
        the chunk size of ``chunk``.
        """
        ways = list(dict.fromkeys((self._usual, chunk, best)))
        loads: dict[Choice, list[float]] = {}
        stores: dict[Choice, list[float]] = {}
        last = self._seconds * _LAST
        if len(ways) > 1:
            take_turns(ways, self._load, last * 0.7, loads, _FINAL_ROUNDS)
            take_turns(ways, self._store, last * 0.3, stores, _FINAL_ROUNDS)

        def gain(of: Choice, over: Choice, rates: Mapping[Choice, list[float]]) -> Gain:
            if of == over:
                return Gain(1.0, 1.0, 1.0)
            return Gain.of(rates[of], rates[over])

        settings = gain(best, chunk, loads)
        candidate = best if settings.real or chunk == self._usual else chunk
        faster = gain(candidate, self._usual, loads)
        stored = gain(candidate, self._usual, stores)
        better = faster.real or (stored.real and faster.ratio > _CLOSE)
        return {
            "usual": _described(self._usual),
            "candidate": _described(candidate),
            "recommended": better,
            # Over the usual chunk size with the usual settings.
            "loads": vars(faster),
            "stores": vars(stored),
            # Of the candidate's settings alone, at its chunk size.
            "settings": vars(settings) if candidate == best else None,
        }

    # --- one batch -------------------------------------------------------------------

    def _load(self, choice: Choice) -> float:
        self._draw()
        size = choice.tokens * self._model.token_bytes
        return self._workload.load(self._client(choice), size).gb_per_second

    def _store(self, choice: Choice) -> float:
        self._draw()
        size = choice.tokens * self._model.token_bytes
        return self._workload.store(self._client(choice), size).gb_per_second

    def _client(self, choice: Choice) -> FastkvClient:
        options = choice.options
        if options not in self._clients:
            self._clients[options] = FastkvClient(self._target.fast(options))
        return self._clients[options]

    def _close(self, keep: Sequence[TileOptions]) -> None:
        for options in [one for one in self._clients if one not in keep]:
            self._clients.pop(options).redis.close()

    def _stage(self, name: str) -> None:
        self._progress.update(self._task, description=name)

    def _draw(self) -> None:
        now = time.monotonic()
        if now < self._drawn + 0.25:
            return
        self._drawn = now
        elapsed = now - self._started
        left = max(0.0, self._seconds - elapsed)
        self._progress.update(self._task, completed=elapsed, left=left, refresh=True)


def _described(choice: Choice) -> dict[str, Any]:
    """With the settings that differ from the defaults here."""
    default = TileOptions().filled(1 << 30)
    workers, connections, window, size = choice.options.filled(1 << 30)
    settings = {
        "tile_workers": workers,
        "tile_connections": connections - 1,
        "tile_window_bytes": window,
        "tile_range_bytes": size,
    }
    given = {f"tile_{k}" for k, v in vars(choice.options).items() if v is not None}
    usual = (default[0], default[1] - 1, *default[2:])
    return {
        "chunk_tokens": choice.tokens,
        "settings": {
            name: value
            for (name, value), other in zip(settings.items(), usual, strict=True)
            if value != other or (name in _FITTED and name in given)
        },
    }


def _good(
    rows: Sequence[dict[str, Any]], field: str, close: float
) -> list[dict[str, Any]]:
    best = max(row[field] for row in rows)
    return [row for row in rows if row[field] >= close * best]


def _windows(options: TileOptions) -> list[TileOptions]:
    return [
        replace(options, window_bytes=window * _KIB, range_bytes=size * _KIB)
        for window, size in _WINDOWS
    ]


def _print(console: Console, target: Target, result: Mapping[str, Any]) -> None:
    table = Table("Tokens", "Chunk", box=box.SIMPLE, padding=(0, 2, 0, 0))
    for title in ("Loads GB/s", "Stores GB/s"):
        table.add_column(title, justify="right")
    for row in result["chunks"]:
        table.add_row(
            str(row["tokens"]),
            size_label(row["bytes"]),
            f"{row['load_gb_per_second']:.2f}",
            f"{row['store_gb_per_second']:.2f}",
        )
    console.print(table)
    loads, stores = Gain(**result["loads"]), Gain(**result["stores"])
    candidate, usual = result["candidate"], result["usual"]
    measured = f"loads {loads}, stores {stores}"
    words = _words(candidate)
    if result["recommended"]:
        verdict = f"Best here: {words}: {measured} over {_words(usual)}."
    else:
        verdict = "Your settings" if usual["settings"] else "Defaults"
        verdict += " are best here"
        if candidate == usual:
            verdict += ": nothing that was tried is faster."
        else:
            verdict += f". What came nearest, {words}: {measured}"
            verdict += ", which is within the noise." if loads.high > 1 else "."
    console.print(verdict, markup=False)
    console.print(
        "In brackets: what the median gain is between, with 95 % confidence.\n"
    )
    for title, text in pastes(target, result).items():
        console.print(title, style="bold", markup=False)
        for line in text.splitlines():
            # As it is, for whoever pastes it.
            console.print(f"  {line}", markup=False, soft_wrap=True)
    if target.has_arguments:
        console.print(
            "\nUser, password and other arguments of your URL are left out above.",
        )


def _words(choice: Mapping[str, Any]) -> str:
    settings = choice["settings"].items()
    words = [f"chunks of {choice['chunk_tokens']} tokens"]
    words += [f"{name}={value}" for name, value in settings] or ["default settings"]
    return ", ".join(words)
