"""The same KV cache work through fastkv and through redis-py, in turn and byte for
byte.

Uses both clients as their callers do, and deletes what it has stored.
"""

from __future__ import annotations

import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fastkv.cli.clients import (
    EXPIRE,
    TOKEN_BYTES,
    Chunks,
    Client,
    FastkvClient,
    Memory,
    RedisPyClient,
)
from fastkv.cli.target import Target
from fastkv.cli.terminal import percentiles, size_label
from fastkv.cli.workload import delete_keys, timed, timed_load

BATCH_TOKENS = 256  # a multiple of each number of tokens of a chunk
_MOST_BATCHES = 200
_BATCHES_SECONDS = 12.0  # on a slow machine there are fewer
LOOKUP_KEYS = 10_000
LOOKUP_ROUNDS = 20


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
        p50, p99 = percentiles(self.batches, (50, 99))
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
        target: The server.
        tokens: Of a chunk.
        prompt: What is stored.
        memory: What is retrieved into; as long as ``prompt``.
        done: Called with a part of the work, of 1 in all.
    """

    def __init__(
        self,
        target: Target,
        tokens: int,
        prompt: Memory,
        memory: Memory,
        done: Callable[[float], object],
    ) -> None:
        self.label = f"{target.transport}, {size_label(tokens * TOKEN_BYTES)}"
        self.samples = Samples(), Samples()  # fastkv's, redis-py's
        self._clients: tuple[Client, Client] = (
            FastkvClient(target.fast()),
            RedisPyClient(target.plain()),
        )
        self._plain = target.plain()
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
            delete_keys(self._plain, [*self._keys, *self._few])

    def _in_turn(self, turn: int) -> Sequence[tuple[Client, Samples]]:
        ours, theirs = zip(self._clients, self.samples, strict=True)
        return (theirs, ours) if turn % 2 else (ours, theirs)

    def _measure_rounds(self, rounds: int) -> None:
        for turn in range(rounds + 1):
            for client, samples in self._in_turn(turn):
                # What is retrieved is what this client has stored, as new keys.
                self._plain.delete(*self._keys)
                store = timed(client.store, self._keys, self._prompt)
                timed(client.lookup, self._keys)
                retrieve = timed_load(client, self._keys, self._prompt, self._memory)
                if turn > 0:  # the first one connects and warms up
                    samples.stores.append(store.gb_per_second)
                    samples.retrieves.append(retrieve.gb_per_second)
            self._done(0.5 / (rounds + 1))

    def _measure_batches(self) -> None:
        end = time.monotonic() + _BATCHES_SECONDS
        for turn in range(_MOST_BATCHES):
            first = turn * self._batch_chunks % len(self._keys)
            for client, samples in self._in_turn(turn):
                which = slice(first, first + self._batch_chunks)
                sent, memory = self._prompt.part(which), self._memory.part(which)
                batch = timed_load(client, self._keys[which], sent, memory)
                samples.batches.append(batch.seconds * 1e3)
            self._done(0.5 / _MOST_BATCHES)
            if time.monotonic() > end:
                break

    def _measure_lookups(self) -> None:
        with self._plain.pipeline(transaction=False) as pipeline:
            for key in self._few[::2]:
                pipeline.execute_command("SET", key, b"", *EXPIRE)
            pipeline.execute()
        there = [True, False] * (LOOKUP_KEYS // 2)
        for turn in range(LOOKUP_ROUNDS):
            for client, samples in self._in_turn(turn):
                lookup = timed(client.lookup, self._few, there=there)
                samples.lookups.append(LOOKUP_KEYS / lookup.seconds)
