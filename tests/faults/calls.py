"""Every call of fastkv, over a network that may fail, and what must be true then."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import random
import time
from collections.abc import Collection, Sequence
from typing import Any, ClassVar, Protocol

import redis
import redis.asyncio.retry
from redis.backoff import AbstractBackoff, NoBackoff
from redis.exceptions import ConnectionError, RedisClusterException, TimeoutError
from redis.retry import Retry

import fastkv
import fastkv.asyncio

#: Seconds after which a call hangs. A right one takes far less on the slowest machine.
PATIENCE = 30.0

COMMANDS = ("get", "get immutable", "set", "set nx", "exists", "delete")

AT_ONCE = NoBackoff()

_number = itertools.count()


def memory(content: bytes | memoryview) -> bytearray:
    """A buffer that stays where it is when `is_pinned` looks: moved, it would hide who
    writes to it when he must not.
    """
    made = bytearray(content)
    made.append(0)
    made.pop()
    return made


def is_pinned(buffer: bytearray) -> bool:
    try:
        buffer.append(0)
    except BufferError:
        return True
    buffer.pop()
    return False


class Hang(AssertionError):
    """A call has not come back."""


class Caller(Protocol):
    """A client, and a way to wait for its calls."""

    client: Any

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> list[bool]: ...
    def retries(self, count: int, backoff: AbstractBackoff = ...) -> None: ...
    def close(self) -> None: ...


class Futures:
    """The calls that give futures."""

    made_by: ClassVar[Any] = fastkv.Redis

    def __init__(self, **kwargs: Any) -> None:
        self.client = self.made_by(**kwargs)

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> list[bool]:
        future = getattr(self.client, f"submit_{name}")(*args, **kwargs)
        done, _ = concurrent.futures.wait([future], PATIENCE)
        if not done:
            raise Hang(name)
        result: list[bool] = future.result()
        return result

    def retries(self, count: int, backoff: AbstractBackoff = AT_ONCE) -> None:
        self.client.set_retry(Retry(backoff, count))

    def close(self) -> None:
        self.client.close()


class Blocking(Futures):
    """The calls that block, in a thread that can be waited for."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._thread = concurrent.futures.ThreadPoolExecutor(1)

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> list[bool]:
        future = self._thread.submit(getattr(self.client, name), *args, **kwargs)
        done, _ = concurrent.futures.wait([future], PATIENCE)
        if not done:
            raise Hang(name)
        result: list[bool] = future.result()
        return result

    def close(self) -> None:
        self.client.close()  # ends what hangs
        self._thread.shutdown()


class Awaited:
    """The calls that are awaited, on a loop of their own."""

    made_by: ClassVar[Any] = fastkv.asyncio.Redis

    def __init__(self, **kwargs: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self.client = self.made_by(**kwargs)

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> list[bool]:
        async def call() -> list[bool]:
            task = asyncio.ensure_future(getattr(self.client, name)(*args, **kwargs))
            done, _ = await asyncio.wait([task], timeout=PATIENCE)
            if not done:
                raise Hang(name)
            result: list[bool] = task.result()
            return result

        return self._loop.run_until_complete(call())

    def retries(self, count: int, backoff: AbstractBackoff = AT_ONCE) -> None:
        self.client.set_retry(redis.asyncio.retry.Retry(backoff, count))

    def close(self) -> None:
        self._loop.run_until_complete(self.client.aclose())
        self._loop.close()


WAYS: dict[str, type[Futures] | type[Awaited]] = {
    "blocking": Blocking,
    "futures": Futures,
    "asyncio": Awaited,
}


class Store(Protocol):
    """What a trial needs of redis-py's client."""

    def mset(self, mapping: Any, /) -> Any: ...
    def mget(self, keys: Any, /) -> Any: ...
    def unlink(self, *keys: Any) -> Any: ...


class Trial:
    """One call, on keys of its own, and what became of it.

    A value of each of ``sizes``. Every other key exists beforehand; a get finds all but
    the last, if there are several. The keys begin with ``names`` in turn.

    Attributes:
        error: What the call raised, if it did.
        took: Seconds.
    """

    def __init__(
        self,
        plain: Store,
        random_: random.Random,
        command: str,
        sizes: Sequence[int],
        names: Sequence[str] = ("",),
    ) -> None:
        self._plain = plain
        self._command = command
        number = next(_number)
        self.keys = [
            f"{name}trial{number}:{i}"
            for i, name in zip(range(len(sizes)), itertools.cycle(names), strict=False)
        ]
        self._old: list[bytes | None] = [random_.randbytes(size) for size in sizes]
        if command.startswith("get"):
            if len(sizes) > 1:
                self._old[-1] = None
        else:
            self._old[1::2] = [None] * (len(sizes) // 2)
        stored = {
            k: v for k, v in zip(self.keys, self._old, strict=True) if v is not None
        }
        plain.mset(stored)
        self._new = [random_.randbytes(size) for size in sizes]
        # What a get fills, and does not find filled already; what a set sends.
        self.buffers = [memory(value) for value in self._new]
        self._before = list(self._new)
        self._pattern = random_.randrange(256)
        self.hits: list[bool] | None = None
        self.error: Exception | None = None
        self.took = 0.0

    def run(self, caller: Caller, **kwargs: Any) -> Trial:
        """Make the call. What it returned is checked at once, and then the memory is
        the caller's again: see `settle`.
        """
        began = time.monotonic()
        try:
            self.hits = self._call(caller, kwargs)
        except (ConnectionError, TimeoutError, RedisClusterException) as error:
            self.error = error
        self.took = time.monotonic() - began
        if self.hits is not None and self._command.startswith("get"):
            assert self.hits == [value is not None for value in self._old]
            for got, value in zip(self.buffers, self._old, strict=True):
                assert value is None or got == value, "wrong bytes"
        if self._command.startswith("set"):
            assert self.buffers == self._before, "the values themselves were written"
        for buffer in self.buffers:
            assert not is_pinned(buffer)
            buffer[:] = bytes([self._pattern]) * len(buffer)
        return self

    def _call(self, caller: Caller, kwargs: dict[str, Any]) -> list[bool]:
        if self._command in ("get", "get immutable"):
            immutable = self._command == "get immutable"
            return caller(
                *("batch_tile_get", self.keys, self.buffers),
                immutable=immutable,
                **kwargs,
            )
        if self._command in ("set", "set nx"):
            return caller(
                *("batch_tile_set", self.keys, self.buffers),
                nx=self._command == "set nx",
                **kwargs,
            )
        return caller(f"batch_tile_{self._command}", self.keys, **kwargs)

    def settle(self, repeated: bool = False, answered: Collection[int] = ()) -> None:
        """Later, when the network is healed: nobody has written the memory meanwhile,
        and the server has what the call said, or what it may have if the call failed.
        Forgets the keys.

        Args:
            repeated: A connection was lost, so the call may have been sent twice.
            answered: Keys that were done even if the call failed.
        """
        for buffer in self.buffers:
            assert buffer.count(self._pattern) == len(buffer), (
                "written after the return"
            )
        there: Any = self._plain.mget(self.keys)
        for i, (value, old, new) in enumerate(
            zip(there, self._old, self._new, strict=True)
        ):
            hit = None
            if self.hits is not None:
                hit = self.hits[i]
            elif i in answered:
                hit = self._due(old)
            self._settle_key(value, old, new, hit)
            if self.hits is not None and self._command == "delete":
                assert self.hits[i] == (old is not None) or (
                    repeated and not self.hits[i]
                )
        self._plain.unlink(*self.keys)

    def _due(self, old: bytes | None) -> bool:
        if self._command.startswith("set"):
            return self._command == "set" or old is None
        return old is not None

    def _settle_key(
        self, value: bytes | None, old: bytes | None, new: bytes, hit: bool | None
    ) -> None:
        if self._command == "set":
            assert value == new or (hit is None and value == old)
            assert hit is not False
        elif self._command == "set nx":
            if old is not None:
                assert value == old
                assert not hit
            else:
                assert value == new or (hit is None and value is None)
                assert hit is not False
        elif self._command == "delete":
            assert value is None or (hit is None and value == old)
        else:
            assert value == old
            if self._command == "exists":
                assert hit in (None, old is not None)
