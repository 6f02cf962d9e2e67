"""The same KV cache work through fastkv and through redis-py, in turn and byte for
byte.

Uses both clients as their callers do, and deletes what it has stored.
"""

from __future__ import annotations

import importlib
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import redis

import fastkv
from fastkv.options import options_of_url

# Llama 3.1 8B: layers, K and V, KV heads, head size; an element is a bfloat16.
_LAYERS, _KV, _HEADS, _HEAD_SIZE = 32, 2, 8, 128
TOKEN_BYTES = _LAYERS * _KV * _HEADS * _HEAD_SIZE * 2
BATCH_TOKENS = 256  # a multiple of each of them
_MOST_BATCHES = 200
_BATCHES_SECONDS = 12.0  # on a slow machine there are fewer
LOOKUP_KEYS = 10_000
LOOKUP_ROUNDS = 20
_EXPIRE_SECONDS = 3600  # a demo that is killed leaves nothing behind for longer
# For redis-py. Its set() makes an int of it, and if Ctrl-C comes while hiredis (3.5)
# packs an int into a command, the process crashes.
_EXPIRE = ("EX", str(_EXPIRE_SECONDS))
TRANSPORTS = {"redis": "TCP", "unix": "unix"}

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
        octets = memory.reshape(-1, tokens * TOKEN_BYTES)
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
        self.redis = plain_client(url)

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


def plain_client(url: str) -> redis.Redis:
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
        size = f"{tokens * TOKEN_BYTES >> 20} MiB"
        self.label = f"{TRANSPORTS[urlsplit(url).scheme]}, {size}"
        self.samples = Samples(), Samples()  # fastkv's, redis-py's
        self._clients: tuple[Client, Client] = FastkvClient(url), RedisPyClient(url)
        self._plain = plain_client(url)
        self._done = done
        self._prompt = Chunks.cut(prompt, tokens)
        self._memory = Chunks.cut(memory, tokens)
        prefix = f"fastkv-demo:{uuid.uuid4().hex}"
        self._keys = [f"{prefix}:chunk:{i}" for i in range(len(self._prompt.octets))]
        self._few = [f"{prefix}:lookup:{i}" for i in range(LOOKUP_KEYS)]
        self._batch_chunks = BATCH_TOKENS // tokens

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
        there = [True, False] * (LOOKUP_KEYS // 2)
        for turn in range(LOOKUP_ROUNDS):
            for client, samples in self._in_turn(turn):
                seconds = _seconds(client.lookup, self._few, there=there)
                samples.lookups.append(LOOKUP_KEYS / seconds)


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
