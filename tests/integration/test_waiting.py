"""Blocking, futures and event loops; cancelling; many callers at once."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import redis
import uvloop
from redis.exceptions import ConnectionError, TimeoutError

import fastkv
import fastkv.asyncio
from fastkv import commands
from fastkv._core import Code, CompletionQueue
from tests.conftest import Endpoint, eventually
from tests.scripted import OddServer, ScriptedPeer, SilentPeer

SIZE = 300_000


@pytest.fixture
def stored(plain: redis.Redis) -> dict[str, bytes]:
    values = {f"k{i}": os.urandom(SIZE) for i in range(40)}
    plain.mset(values)  # type: ignore[arg-type]  # redis-py's dict is invariant
    return values


@pytest.fixture
def silent() -> Iterator[SilentPeer]:
    with SilentPeer() as peer:
        yield peer


@pytest.fixture
def scripted() -> Iterator[ScriptedPeer]:
    with ScriptedPeer() as peer:
        yield peer


@pytest.fixture(scope="module", autouse=True)
def warm_uvloop() -> None:
    """It keeps a pipe for ever from its first run on."""

    async def nothing() -> None: ...

    uvloop.run(nothing())


def check(stored: dict[str, bytes], hits: list[bool], got: Any) -> None:
    assert hits == [True] * len(stored)
    assert [bytes(b) for b in got] == list(stored.values())


def test_futures_are_those_of_concurrent_futures(
    client: fastkv.Redis, stored: dict[str, bytes]
) -> None:
    got = [[bytearray(SIZE) for _ in stored] for _ in range(3)]
    futures = [client.submit_batch_tile_get(stored, buffers) for buffers in got]
    called = threading.Event()
    futures[0].add_done_callback(lambda _: called.set())
    _, pending = concurrent.futures.wait(futures, timeout=20)
    assert not pending
    assert called.wait(5)
    for future, buffers in zip(futures, got, strict=True):
        assert isinstance(future, concurrent.futures.Future)
        check(stored, future.result(), buffers)
    assert client.submit_batch_tile_set(["a"], [b"x"]).result(5) == [True]
    assert client.submit_batch_tile_exists(["a", "b"]).result(5) == [True, False]
    assert client.submit_batch_tile_delete(["a"]).result(5) == [True]
    with pytest.raises(fastkv.TileError):
        client.submit_batch_tile_get(["k0"], [bytearray(1)]).result(5)


def test_a_future_keeps_its_client_alive(
    endpoint: Endpoint, stored: dict[str, bytes]
) -> None:
    got = [bytearray(SIZE) for _ in stored]
    future = fastkv.Redis(**endpoint.kwargs).submit_batch_tile_get(list(stored), got)
    check(stored, future.result(20), got)


def test_memory_is_pinned_until_the_batch_is_drained(
    make: Any, scripted: ScriptedPeer
) -> None:
    client = make(port=scripted.port)
    gate = threading.Event()
    scripted.expect("GET", "a").reply(b"$3\r\nabc\r\n").when(gate)
    memory = bytearray(3)
    future = client.submit_batch_tile_get(["a"], [memory])
    with pytest.raises(BufferError):
        memory.append(1)
    gate.set()
    assert future.result(5) == [True]
    memory.append(1)
    assert memory == b"abc\x01"


def test_a_cancelled_future_leaves_its_memory_to_nobody(
    make: Any, scripted: ScriptedPeer
) -> None:
    client = make(port=scripted.port)
    gate = threading.Event()
    step = scripted.expect("GET", "a").reply(b"$3\r\nabc\r\n").when(gate)
    scripted.expect("GET", "b").reply(b"$3\r\nxyz\r\n")
    memory = bytearray(b"...")
    future = client.submit_batch_tile_get(["a"], [memory])
    assert step.seen.wait(5)
    assert future.cancel()
    with pytest.raises(concurrent.futures.CancelledError):
        future.result(5)
    # The pin is released when no thread can write any more, without the peer's help.
    deadline = time.monotonic() + 5
    while client._tile_node._engine.batches_in_flight:
        assert time.monotonic() < deadline
        os.sched_yield()
    memory.append(1)
    gate.set()
    got = bytearray(3)
    assert client.batch_tile_get(["b"], [got]) == [True]
    assert got == b"xyz"
    assert memory == b"...\x01"
    assert not future.cancel() or future.cancelled()


class HalfServer(SilentPeer):
    """Answers with half of what it was asked for, and with the rest once it may."""

    VALUE = b"v" + random.Random(7).randbytes(SIZE - 1)

    def __init__(self) -> None:
        self.go_on = threading.Event()
        super().__init__()

    def answer(self, connection: socket.socket, command: list[bytes]) -> bool:
        part = self.VALUE
        if command[0] == b"GETRANGE":
            part = part[int(command[2]) : int(command[3]) + 1]
        half = len(part) // 2
        connection.sendall(b"$%d\r\n%b" % (len(part), part[:half]))
        if part[:1] == b"v":
            self.go_on.wait(20)
        connection.sendall(part[half:] + b"\r\n")
        return True


@pytest.mark.parametrize("range_bytes", [0, 64 << 10])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_value_that_was_given_up_in_the_middle_is_not_written_on(
    make: Any, parts: int, range_bytes: int
) -> None:
    with HalfServer() as peer:
        client = make(port=peer.port, max_connections=1, tile_range_bytes=range_bytes)
        whole = memoryview(bytearray(b"\xa5" * SIZE))
        size = SIZE // parts
        memory = tuple(whole[size * i : size * (i + 1)] for i in range(parts))
        future = client.submit_batch_tile_get(["a"], [memory], immutable=True)
        assert eventually(lambda: whole[0] == peer.VALUE[0])
        assert future.cancel()
        assert eventually(lambda: client._tile_node.idle)
        whole[:] = b"\x5a" * SIZE
        peer.go_on.set()
        got = bytearray(SIZE)
        assert client.batch_tile_get(["b"], [got], immutable=True) == [True]
        assert got == peer.VALUE
        assert whole == b"\x5a" * SIZE
        assert peer.connections == 1


class LateReader(OddServer):
    """Reads the beginning of a SET, and the rest once it may."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        super().__init__()

    def peek(self, connection: socket.socket, data: bytes) -> bool:
        if b"SET\r\n" in data:
            self.begun.set()
            self.go_on.wait(20)
        return True


@pytest.mark.parametrize("how", ["cancel", "timeout"])
def test_a_value_that_was_given_up_in_the_middle_is_not_sent_to_its_end(
    make: Any, how: str
) -> None:
    """The rest would be whatever the caller has put there since."""
    with LateReader() as peer:
        client = make(port=peer.port, max_connections=1)
        memory = bytearray(b"1" * 40_000_000)
        limit = 1.0 if how == "timeout" else None
        future = client.submit_batch_tile_set(["a"], [memory], timeout=limit)
        assert peer.begun.wait(5)
        if how == "cancel":
            assert future.cancel()
        assert eventually(lambda: client._tile_node.idle)
        memory[:] = b"2" * len(memory)
        peer.go_on.set()
        assert client.batch_tile_exists(["a"]) == [False]
    assert peer.data == {}  # all that was sent has been read by now


def test_an_engine_that_was_closed_takes_no_batch(client: fastkv.Redis) -> None:
    """Not even from somebody who holds it still, and would wait for ever."""
    node, queue = client._node(), CompletionQueue()
    policy = node._retry_policy()
    client.close()
    batch = commands.exists(client._tile_encoder(), ["a"])
    assert node._engine.submit(batch, queue, policy, 0) == Code.CLOSED
    queue.close()


def test_a_batch_that_was_taken_back_is_pinned_until_it_is_drained(
    make: Any, silent: SilentPeer
) -> None:
    """Not only until it was cancelled: a worker may be in the middle of a read."""
    client = make(port=silent.port)
    node, queue = client._node(), CompletionQueue()
    memory = bytearray(b"...")
    batch = commands.get(client._tile_encoder(), ["a"], [memory], immutable=False)
    node.submit_to(queue, batch, None)
    assert silent.asked.wait(5)
    node.cancel(batch)
    with pytest.raises(BufferError):
        memory.append(1)
    while not (drained := node.drain(queue)):
        with pytest.raises(BufferError):
            memory.append(1)
        queue.wait()
    assert drained == [batch]
    memory.append(1)
    with pytest.raises(redis.RedisError):
        node.result(batch)
    queue.close()


def test_a_batch_that_is_late_is_redis_pys_time_out(
    make: Any, scripted: ScriptedPeer
) -> None:
    client = make(port=scripted.port)
    gate = threading.Event()
    scripted.expect("GET", "a").reply(b"$3\r\nabc\r\n").when(gate)
    memory = bytearray(b"...")
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match="1 keys were not all answered"):
        client.batch_tile_get(["a"], [memory], timeout=0.2)
    assert 0.2 <= time.monotonic() - begin < 2
    memory.append(1)
    gate.set()
    scripted.expect("EXISTS", "b").reply(b":1\r\n")
    assert client.batch_tile_exists(["b"]) == [True]
    assert memory == b"...\x01"


def test_a_server_that_stalls_is_given_up_after_the_socket_time_out(
    make: Any, scripted: ScriptedPeer
) -> None:
    gate = threading.Event()
    client = make(port=scripted.port, socket_timeout=0.3, retry=None)
    client.set_retry(redis.retry.Retry(redis.backoff.NoBackoff(), 0))
    scripted.expect("GET", "a").reply(b"$3\r\nabc\r\n").when(gate)
    with pytest.raises(TimeoutError, match="Timeout reading from socket"):
        client.batch_tile_get(["a"], [bytearray(3)])
    gate.set()
    client.set_retry(redis.retry.Retry(redis.backoff.NoBackoff(), 1))
    scripted.expect("GET", "b").when(threading.Event())
    scripted.expect("GET", "b").reply(b"$-1\r\n")
    assert client.batch_tile_get(["b"], [bytearray(3)]) == [False]


@pytest.mark.parametrize("timeout", [0, -1, "1", True, float("nan")])
def test_bad_time_outs_are_refused(client: fastkv.Redis, timeout: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="timeout: expected seconds"):
        client.batch_tile_exists(["a"], timeout=timeout)


def test_an_interrupt_gets_through_at_once(make: Any, silent: SilentPeer) -> None:
    client = make(port=silent.port)
    memory = bytearray(b"...")

    def interrupt() -> None:
        silent.asked.wait(5)
        os.kill(os.getpid(), signal.SIGINT)

    # A worker of pytest-xdist ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    begin = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            client.batch_tile_get(["a"], [memory])
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begin < 2
    memory.append(1)  # nothing holds it
    assert memory == b"...\x01"


def test_a_signal_handler_that_returns_disturbs_nothing(
    client: fastkv.Redis, stored: dict[str, bytes]
) -> None:
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        for _ in range(20):
            got = [bytearray(SIZE) for _ in stored]
            check(stored, client.batch_tile_get(list(stored), got), got)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_blocking_call_releases_the_gil(make: Any, scripted: ScriptedPeer) -> None:
    client = make(port=scripted.port)
    gate = threading.Event()
    scripted.expect("EXISTS", "a").reply(b":1\r\n").when(gate)
    # Opens the gate from Python while the call waits: it would wait for ever otherwise.
    opener = threading.Timer(0.05, gate.set)
    opener.start()
    assert client.batch_tile_exists(["a"], timeout=5) == [True]
    opener.join()


def test_close_completes_what_is_pending_with_an_error(
    make: Any, silent: SilentPeer
) -> None:
    client = make(port=silent.port)
    futures = [client.submit_batch_tile_exists(["a"])]
    assert silent.asked.wait(5)
    failed: list[Exception] = []

    def blocked() -> None:
        try:
            client.batch_tile_get(["b"] * 1000, [bytearray(1) for _ in range(1000)])
        except ConnectionError as error:
            failed.append(error)

    thread = threading.Thread(target=blocked)
    thread.start()
    while len(silent.commands) < 2:
        os.sched_yield()
    begin = time.monotonic()
    client.close()
    assert time.monotonic() - begin < 1
    thread.join(5)
    with pytest.raises(ConnectionError, match="client was closed"):
        futures[0].result(1)
    assert "client was closed" in str(failed[0])


def test_close_from_a_callback_does_not_deadlock(client: fastkv.Redis) -> None:
    closed = threading.Event()
    future = client.submit_batch_tile_exists(["a"])

    def close(_: object) -> None:
        client.close()
        closed.set()

    future.add_done_callback(close)
    assert closed.wait(5)


def test_a_callback_that_raises_stops_no_other_future(client: fastkv.Redis) -> None:
    first = client.submit_batch_tile_exists(["a"])
    first.add_done_callback(lambda _: 1 / 0)
    first.add_done_callback(lambda _: sys.exit())
    assert first.result(5) == [False]
    assert client.submit_batch_tile_exists(["a"]).result(5) == [False]


def test_loops_that_ended_leave_no_memory_pinned(endpoint: Endpoint) -> None:
    client = fastkv.asyncio.Redis(**endpoint.kwargs)
    memory = bytearray(10)

    async def leave() -> None:
        asyncio.ensure_future(  # noqa: RUF006  # all_tasks finds it
            client.batch_tile_get(["no"] * 1000, [memory] * 1000)
        )
        await asyncio.sleep(0)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    pending = asyncio.all_tasks(loop)
    loop.close()  # without waiting for its tasks
    assert asyncio.run(client.batch_tile_exists(["no"])) == [False]
    asyncio.run(client.aclose())
    memory.append(1)
    for task in pending:
        task._log_destroy_pending = False  # type: ignore[attr-defined]


def test_threads_and_loops_share_one_server(
    make: Any, endpoint: Endpoint, stored: Any
) -> None:
    """8 threads on one client, and 2 event loops on one asyncio client, all at once."""
    client = make(**endpoint.kwargs)
    async_client = fastkv.asyncio.Redis(**endpoint.kwargs)

    def in_thread(number: int) -> None:
        for round_ in range(8):
            if (number + round_) % 3 == 0:
                assert client.batch_tile_exists([*stored, "no"]) == [True] * 40 + [
                    False
                ]
            else:
                got = [bytearray(SIZE) for _ in stored]
                check(stored, client.batch_tile_get(list(stored), got), got)

    async def in_task() -> None:
        for _ in range(4):
            got = np.zeros((len(stored), SIZE), np.uint8)
            check(stored, await async_client.batch_tile_get(list(stored), got), got)
            assert await async_client.batch_tile_exists(["no"]) == [False]

    async def in_loop() -> None:
        await asyncio.gather(*(in_task() for _ in range(3)))

    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        running = [pool.submit(in_thread, i) for i in range(8)]
        running += [
            pool.submit(asyncio.run, in_loop()),
            pool.submit(uvloop.run, in_loop()),
        ]
        for one in running:
            one.result(60)
    asyncio.run(async_client.aclose())


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_every_call_can_be_awaited(run: Any, endpoint: Endpoint, stored: Any) -> None:
    async def main() -> None:
        async with fastkv.asyncio.Redis(**endpoint.kwargs) as client:
            assert await client.ping()
            got = [bytearray(SIZE) for _ in stored]
            check(stored, await client.batch_tile_get(list(stored), got), got)
            assert await client.batch_tile_set(["a"], [b"x"], ex=10) == [True]
            assert await client.batch_tile_exists(["a", "b"]) == [True, False]
            assert await client.batch_tile_delete(["a"]) == [True]
            assert await client.batch_tile_get([], []) == []
            with pytest.raises(fastkv.TileError):
                await client.batch_tile_get(["k0"], [bytearray(1)])
        async with fastkv.asyncio.Redis.from_url(endpoint.url) as client:
            assert await client.batch_tile_exists(["k0"]) == [True]
        pool = redis.asyncio.ConnectionPool.from_url(endpoint.url)
        async with fastkv.asyncio.Redis.from_pool(pool) as client:
            assert await client.batch_tile_exists(["k0"]) == [True]

    run(main())


def test_a_cancelled_task_leaves_its_memory_to_nobody(scripted: ScriptedPeer) -> None:
    gate = threading.Event()
    step = scripted.expect("GET", "a").reply(b"$3\r\nabc\r\n").when(gate)
    scripted.expect("GET", "b").reply(b"$3\r\nxyz\r\n")
    memory = bytearray(b"...")

    async def main() -> None:
        async with fastkv.asyncio.Redis(port=scripted.port) as client:
            task = asyncio.create_task(client.batch_tile_get(["a"], [memory]))
            await asyncio.to_thread(step.seen.wait, 5)
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()  # impatient
            with pytest.raises(asyncio.CancelledError):
                await task
            memory.append(1)  # at once: no thread can write it
            gate.set()
            got = bytearray(3)
            assert await client.batch_tile_get(["b"], [got]) == [True]
            assert got == b"xyz"

    asyncio.run(main())
    assert memory == b"...\x01"


def test_a_late_batch_times_out_on_a_loop_too(silent: SilentPeer) -> None:
    async def main() -> None:
        async with fastkv.asyncio.Redis(port=silent.port) as client:
            with pytest.raises(TimeoutError):
                await client.batch_tile_exists(["a"], timeout=0.1)

    asyncio.run(main())


def test_aclose_ends_what_another_task_waits_for(silent: SilentPeer) -> None:
    async def main() -> None:
        client = fastkv.asyncio.Redis(port=silent.port)
        task = asyncio.create_task(client.batch_tile_exists(["a"]))
        await asyncio.to_thread(silent.asked.wait, 5)
        await client.aclose()
        with pytest.raises(ConnectionError, match="client was closed"):
            await asyncio.wait_for(task, 5)

    asyncio.run(main())


def test_a_client_survives_its_loop_and_serves_the_next(endpoint: Endpoint) -> None:
    client = fastkv.asyncio.Redis(**endpoint.kwargs)
    for _ in range(3):
        assert asyncio.run(client.batch_tile_exists(["a"])) == [False]
    asyncio.run(client.aclose())


def test_an_asyncio_only_credential_provider_is_awaited_on_the_loop(
    own_server: Any,
) -> None:
    loops = []

    class Provider(redis.CredentialProvider):
        def get_credentials(self) -> tuple[str]:
            raise NotImplementedError

        async def get_credentials_async(self) -> tuple[str]:
            loops.append(asyncio.get_running_loop())
            return ("secret",)

    async def main() -> None:
        async with fastkv.asyncio.Redis(
            port=own_server.port, credential_provider=Provider()
        ) as client:
            assert await client.batch_tile_exists(["a"]) == [False]
            assert loops[-1] is asyncio.get_running_loop()

    with own_server.client() as admin:
        admin.config_set("requirepass", "secret")
        asyncio.run(main())


def test_what_an_event_loop_cannot_carry_is_refused_by_name() -> None:
    async def connect(connection: Any) -> None: ...

    async def main() -> None:
        async with fastkv.asyncio.Redis(redis_connect_func=connect) as client:
            with pytest.raises(fastkv.UnsupportedConnection):
                await client.batch_tile_exists(["a"])

        class Mine(redis.asyncio.SSLConnection):
            pass

        pool = redis.asyncio.ConnectionPool(connection_class=Mine)
        async with fastkv.asyncio.Redis(connection_pool=pool) as client:
            with pytest.raises(fastkv.UnsupportedConnection, match="class Mine"):
                await client.batch_tile_exists(["a"])

    asyncio.run(main())
