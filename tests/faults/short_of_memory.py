"""A program in which the n-th allocation fails, for n = 1, 2, 3 ... until none does, as
SQLite's tests do it. Run by test_memory.py::

    python -m tests.faults.short_of_memory LIBRARY KIND PORT STEP FIRST

After each failure the call has ended with MemoryError, redis-py's exception or right
bytes, its memory is free, the next call works, and in the end nothing is left.
"""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import gc
import sys
import time
from collections.abc import Callable
from typing import Any

# Whoever comes first defines `operator new` for all libraries that are loaded later.
SHIM = ctypes.PyDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
SHIM.live.restype = ctypes.c_long

import redis  # noqa: E402
from redis.backoff import ConstantBackoff  # noqa: E402
from redis.exceptions import RedisError, TimeoutError  # noqa: E402
from redis.retry import Retry  # noqa: E402

import fastkv  # noqa: E402
import fastkv.asyncio  # noqa: E402
from tests.conftest import eventually, fastkv_threads, open_fds  # noqa: E402

KINDS = {"one new": (1, 1), "all news": (1, 1 << 40), "one object": (2, 1)}
RANGED = bytes(i * i % 251 for i in range(256 << 10))
PLAIN = bytes(i * i % 253 for i in range(5000))
PATIENCE = 30  # seconds; whoever waits so long is hanging


def client_of(port: int) -> fastkv.Redis:
    return fastkv.Redis(
        port=port,
        tile_workers=2,
        tile_connections=2,
        tile_range_bytes=32 << 10,
        retry=Retry(ConstantBackoff(0.001), 1),
    )


def resizable(memory: bytearray) -> bool:
    try:
        memory.append(0)
        memory.pop()
    except BufferError:
        return False
    return True


class Work:
    """What is done while memory is short, and on which memory."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.client = client_of(port)
        self.plain = bytearray(b"." * len(PLAIN))
        self.ranged = bytearray(b"." * len(RANGED))

    def check(self) -> None:
        """The next call works, and sees its own memory only."""
        try:
            self.client.batch_tile_get(["no"], [bytearray(1)], timeout=PATIENCE)
        except RedisError as error:
            # A worker that nobody waited for; the next call has others.
            if "worker died" not in str(error):
                raise
        for memory, value in ((self.plain, PLAIN), (self.ranged, RANGED)):
            assert eventually(lambda memory=memory: resizable(memory)), "pinned"
            memory[:] = b"." * len(memory)
            for key in ("plain", "ranged"):
                if key == ("plain" if value is PLAIN else "ranged"):
                    got = bytearray(len(value))
                    assert self.client.batch_tile_get([key], [got], timeout=PATIENCE)
                    assert got == value
            assert memory == b"." * len(memory), "written after the end"

    def get(self) -> None:
        hits = self.client.batch_tile_get(
            ["plain", "no", "ranged"], [self.plain, bytearray(3), self.ranged]
        )
        assert hits == [True, False, True]
        assert self.plain == PLAIN
        assert self.ranged == RANGED

    def set(self) -> None:
        keys = [f"k{i}" for i in range(20)]
        values = [PLAIN[i:] for i in range(20)]
        assert self.client.batch_tile_set(keys, values, ex=100) == [True] * 20
        assert self.client.batch_tile_exists([*keys, "no"]) == [True] * 20 + [False]
        got = [bytearray(len(value)) for value in values]
        assert self.client.batch_tile_get(keys, got) == [True] * 20
        assert got == values

    def errors(self) -> None:
        failed = 0
        try:
            self.client.batch_tile_get(
                ["plain", "wrong", "ranged"], [bytearray(9), bytearray(3), bytearray(9)]
            )
        except fastkv.TileError as error:
            failed = len(error.errors)
        assert failed == 3

    def lost(self) -> None:
        try:
            self.client.batch_tile_get(["plain", "lost"], [self.plain, bytearray(3)])
        except redis.exceptions.ConnectionError:
            pass
        else:
            raise AssertionError("a lost value is a hit or a miss")

    def late(self) -> None:
        try:
            self.client.batch_tile_get(["late"], [bytearray(3)], timeout=0.001)
        except TimeoutError:
            pass
        else:
            raise AssertionError("no answer is a hit or a miss")

    def futures(self) -> None:
        futures = [
            self.client.submit_batch_tile_get(["plain"], [bytearray(len(PLAIN))])
            for _ in range(5)
        ]
        futures.append(self.client.submit_batch_tile_get(["ranged"], [self.ranged]))
        futures[0].cancel()
        for future in futures[1:]:
            assert future.result(PATIENCE) == [True]
        assert self.ranged == RANGED

    def tasks(self) -> None:
        async def main() -> None:
            async with fastkv.asyncio.Redis(port=self.port) as client:
                got = [bytearray(len(PLAIN)) for _ in range(3)]
                calls = [client.batch_tile_get(["plain"], [memory]) for memory in got]
                done = await asyncio.wait_for(
                    asyncio.gather(*calls, return_exceptions=True), PATIENCE
                )
                for result, memory in zip(done, got, strict=True):
                    if isinstance(result, BaseException):
                        raise result
                    assert result == [True]
                    assert memory == PLAIN

        asyncio.run(main())

    def retire(self) -> None:
        self.client.connection_pool.disconnect()
        self.get()

    def life(self) -> None:
        self.client.close()
        self.client = client_of(self.port)
        self.get()
        self.client.close()


def main(kind: str, port: int, step: int, at: int) -> None:
    where, count = KINDS[kind]
    work = Work(port)
    things: list[Callable[[], None]] = [
        *(work.get, work.set, work.errors, work.lost, work.late),
        work.retire,
    ]
    if where == 1:  # else it is Python's own futures, loops and files that fail
        things += [work.life, work.futures, work.tasks]
    fds: Any = None
    for thing in [work.check, *things]:
        thing()  # what is only made once is there
    work.client.close()
    assert eventually(lambda: not fastkv_threads())
    gc.collect()
    fds, live = open_fds(), SHIM.live()
    failures = 0
    for thing in things:
        n = at
        while True:
            faulthandler.dump_traceback_later(2 * PATIENCE, exit=True)
            began = time.monotonic()
            try:
                SHIM.arm(where, ctypes.c_long(n), ctypes.c_long(count))
                thing()
            except (MemoryError, RedisError):
                pass
            except SystemError:  # "... without exception set": CPython's own failures
                if where == 1:
                    raise
            finally:
                fired = SHIM.disarm()
            try:
                assert time.monotonic() - began < PATIENCE, "hung"
                work.check()
            except BaseException:
                print(f"{kind}: allocation {n} of {thing.__name__}", file=sys.stderr)
                raise
            if not fired:
                break
            failures += 1
            n += step
        work.client.close()
        gc.collect()
        assert eventually(lambda: not fastkv_threads()), fastkv_threads()
        left = open_fds().keys() - fds.keys()
        assert not left, f"{thing.__name__}: descriptors {left}"
        # Where its own objects fail, CPython leaks some that hold ours.
        assert where == 2 or eventually(lambda: SHIM.live() <= live), (
            f"{thing.__name__}: {SHIM.live() - live} blocks are left"
        )
    print(failures)


if __name__ == "__main__":
    main(sys.argv[2], *map(int, sys.argv[3:]))
