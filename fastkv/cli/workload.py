"""Random values in a server under keys of their own: stored, loaded, compared, and
deleted whatever happens.
"""

from __future__ import annotations

import resource
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from redis.exceptions import RedisError

from fastkv.cli.clients import Chunks, Client, Memory
from fastkv.cli.room import check_room
from fastkv.cli.target import Plain, Target
from fastkv.cli.terminal import Failure


@dataclass(frozen=True)
class Sample:
    """One batch."""

    octets: int
    seconds: float
    cpu_seconds: float  # this process'

    @property
    def gb_per_second(self) -> float:
        return self.octets / self.seconds / 1e9


class Workload:
    """Batches of values of some sizes. In a ``with`` block, whose end deletes them.

    Args:
        target: Where they are stored.
        sizes: Bytes a value.
        batch_bytes: Of each size there are so many bytes, or one value if that is more.

    Raises:
        Failure: The server has no room for them; nothing was stored.
    """

    def __init__(self, target: Target, sizes: Sequence[int], batch_bytes: int) -> None:
        self.prefix = f"fastkv-bench:{uuid.uuid4().hex}"
        self.keys = {
            size: [f"{self.prefix}:{size}:{i}" for i in range(count)]
            for size in sizes
            for count in [max(1, batch_bytes // size)]
        }
        largest = max(size * len(keys) for size, keys in self.keys.items())
        self._plain = target.plain()
        try:
            #: What could not be looked at, in words.
            self.unseen = check_room(target, self._plain, self.keys, largest)
        except BaseException:
            self._plain.close()
            raise
        self._values = random_bytes(largest)
        self._memory = np.empty_like(self._values)

    def __enter__(self) -> Workload:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        names = [name for keys in self.keys.values() for name in keys]
        try:
            delete_keys(self._plain, names)
        except (KeyboardInterrupt, SystemExit, RedisError) as why:
            raise Failure(
                f"keys {self.prefix}:* may be left; they expire within an hour"
                + (f" ({why})" if isinstance(why, RedisError) else "")
            ) from None

    def store(self, client: Client, size: int) -> Sample:
        keys = self.keys[size]
        return timed(client.store, keys, self._chunks(self._values, size))

    def load(self, client: Client, size: int) -> Sample:
        """One batch; raises `Failure` at the first wrong byte."""
        keys, sent = self.keys[size], self._chunks(self._values, size)
        return timed_load(client, keys, sent, self._chunks(self._memory, size))

    def _chunks(self, memory: Memory, size: int) -> Chunks:
        count = len(self.keys[size])
        rows = memory[: count * size].reshape(count, size)
        return Chunks(rows, rows)


def random_bytes(count: int) -> Memory:
    """What nothing can compress, and nobody else has."""
    words = np.random.default_rng().integers(0, 2**64, -(-count // 8), np.uint64)
    return words.view(np.uint8)[:count]


def timed(
    call: Callable[..., list[bool]],
    keys: Sequence[str],
    *chunks: Chunks,
    there: Sequence[bool] | None = None,
) -> Sample:
    """Call a client's method; checks its answers, by default that all are true."""
    cpu, started = cpu_seconds(), time.perf_counter()
    answers = call(keys, *chunks)
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    expected = there or [True] * len(keys)
    for key, answer, right in zip(keys, answers, expected, strict=True):
        if answer != right:
            raise Failure(f"{call.__qualname__}: {key}: expected {right}, got {answer}")
    return Sample(sum(c.octets.nbytes for c in chunks), seconds, cpu)


def timed_load(
    client: Client, keys: Sequence[str], sent: Chunks, memory: Chunks
) -> Sample:
    """Load what was sent, and compare every byte. Raises `Failure`."""
    memory.octets.fill(0xA5)  # so that what is right, the client has written
    sample = timed(client.retrieve, keys, memory)
    if not _same(sent.octets.reshape(-1), memory.octets.reshape(-1)):
        for key, wanted, came in zip(keys, sent.octets, memory.octets, strict=True):
            if not _same(wanted, came):
                at = int(np.argmax(wanted != came))
                raise Failure(
                    f"{client.retrieve.__qualname__}: {key}: wrong byte at offset {at}"
                )
    return sample


def _same(one: Memory, other: Memory) -> bool:
    whole = one.nbytes // 8 * 8  # by words it takes a fifth of the time
    return np.array_equal(
        one[:whole].view(np.uint64), other[:whole].view(np.uint64)
    ) and np.array_equal(one[whole:], other[whole:])


def cpu_seconds() -> float:
    """Of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def delete_keys(plain: Plain, names: Sequence[str]) -> None:
    """Delete keys that were being stored when something ended it."""
    plain.close()  # its reply may not have been read
    # Again, as a store that was interrupted may still be in the server's socket
    # buffers, and make its key after we have deleted it.
    while plain.unlink(*names):
        time.sleep(0.1)
    plain.close()
