"""No memory, no descriptors: an error in time, and then it works again."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import random
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from redis.exceptions import RedisError, TimeoutError

import fastkv
import fastkv.asyncio
from fastkv.tls import TlsSocket
from tests.conftest import eventually, fastkv_threads, open_fds
from tests.faults.conftest import LONG
from tests.faults.held import RANGED_BYTES, HeldServer
from tests.faults.native import built
from tests.faults.short_of_memory_shim import SHIM
from tests.faults.test_processes import Child


class Server(HeldServer):
    """Has what tests.faults.short_of_memory asks for."""

    def __init__(self) -> None:
        super().__init__(1)
        self.data |= {
            b"plain": bytes(i * i % 253 for i in range(5000)),
            b"ranged": bytes(i * i % 251 for i in range(RANGED_BYTES)),
        }
        self.errors[b"wrong"] = b"WRONGTYPE of a value"

    def answer(self, connection: socket.socket, command: list[bytes]) -> bool:
        if command[1:2] == [b"lost"]:
            return False
        if command[1:2] == [b"late"]:
            time.sleep(0.01)  # the slow server itself, no wait for something
        return super().answer(connection, command)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["one new", "all news", "one object"])
def test_each_allocation_may_fail(kind: str) -> None:
    step = 1 if LONG else 15
    at = random.randint(1, step)
    with Server() as server:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "tests.faults.short_of_memory", built(SHIM)),
                *(kind, str(server.port), str(step), str(at)),
            ],
            capture_output=True,
            text=True,
            timeout=800,
        )
    assert done.returncode == 0, f"step {step} from {at}\n{done.stderr[-5000:]}"
    assert int(done.stdout) > (300 if LONG else 20)


class NoMemory:
    """An engine that has none for what it is told of connections that carry values."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.refused = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def adopt(self, lane: int, fd: int, *rest: Any) -> None:
        if lane > 0:
            os.close(fd)
            raise MemoryError
        self._engine.adopt(lane, fd, *rest)

    def connect_failed(self, lane: int, *rest: Any) -> None:
        if lane > 0:
            self.refused.set()
            raise MemoryError
        self._engine.connect_failed(lane, *rest)


def test_no_memory_for_one_connection_is_no_matter_of_who_waits_for_another() -> None:
    with Server() as server, fastkv.Redis(port=server.port) as client:
        connector = client._node()._connector
        engine = connector._engine
        connector._engine = short = NoMemory(engine)
        stuck = client.submit_batch_tile_get(["plain"], [bytearray(10_000)])
        assert short.refused.wait(30)
        with pytest.raises(MemoryError):
            client.batch_tile_exists(["plain"], timeout=30)
        connector._engine = engine
        with pytest.raises(MemoryError):
            stuck.result(30)
        assert client.batch_tile_exists(["plain"], timeout=30) == [True]


def short_of_descriptors(room: int) -> Callable[[], None]:
    """Leave that many; returns what lifts the limit."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = open_fds()
    free = (fd for fd in itertools.count() if fd not in taken)
    limit = next(itertools.islice(free, room, None))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("use", ["get", "future", "task", "one client"])
def test_no_descriptors_is_an_error_until_there_are_some(use: str) -> None:
    """However many there are: none for the engine, the connector, a connection ..."""
    with Server() as server:
        settings: dict[str, Any] = {"port": server.port, "tile_workers": 2}
        value = server.data[b"plain"]
        kept = fastkv.Redis(**settings)
        loop = asyncio.new_event_loop()  # asyncio's own leak some

        async def task(memory: bytearray) -> list[bool]:
            async with fastkv.asyncio.Redis(**settings) as client:
                return await client.batch_tile_get(["plain"], [memory], timeout=30)

        def call() -> None:
            memory = bytearray(b"." * len(value))
            if use == "task":
                hits = loop.run_until_complete(task(memory))
            elif use == "one client":
                kept.connection_pool.disconnect()  # it connects anew
                hits = kept.batch_tile_get(["plain"], [memory], timeout=30)
            else:
                with fastkv.Redis(**settings) as client:
                    future = client.submit_batch_tile_get(
                        ["plain"], [memory], timeout=30
                    )
                    hits = future.result(60)
            assert hits == [True]
            assert memory == value

        def work() -> None:
            call()
            kept.close()
            failed = 0
            for room in range(0, 40, 1 if LONG else 3):
                before = open_fds()
                lift = short_of_descriptors(room)
                try:
                    call()
                except (OSError, RuntimeError, RedisError) as error:
                    failed += 1
                    timed_out = isinstance(error, TimeoutError)
                    assert not timed_out  # it was told at once
                finally:
                    lift()
                call()
                kept.close()
                assert eventually(lambda: not fastkv_threads())
                gc.collect()
                assert open_fds().keys() <= before.keys(), room
            assert failed

        child = Child(work)
        child.go_on()
        child.end()
        loop.close()


def test_a_tls_stream_that_cannot_be_made_leaves_no_descriptor() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()) as sock:
            before = open_fds()
            for settings in ({}, {"server_name": "not bytes"}):
                with pytest.raises(TypeError):
                    TlsSocket(sock, dict(settings))
            assert open_fds() == before
