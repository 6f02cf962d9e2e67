"""Callers that give up, break off, raise and share: at every stage of a batch.

Whatever they do, the call ends in time, the memory is theirs again when it has, the
next call works, and (`no_leaks`) nothing is left.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import logging
import os
import random
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import redis
from redis.backoff import ConstantBackoff, NoBackoff
from redis.exceptions import ConnectionError, RedisError, TimeoutError
from redis.retry import Retry

import fastkv
import fastkv.asyncio
from fastkv.node import Node
from tests.conftest import eventually, fastkv_threads, open_fds
from tests.faults.conftest import LONG
from tests.faults.held import (
    PLAIN_BYTES,
    RANGED_BYTES,
    SENT_BYTES,
    STAGES,
    HeldServer,
)
from tests.scripted import ModelServer, SilentPeer

# One value connection, on which a second batch stands behind the first.
ONE = {"tile_workers": 1, "tile_connections": 1, "tile_window_bytes": 1}
BASES = [KeyboardInterrupt, SystemExit, asyncio.CancelledError, GeneratorExit]


class Interrupted(Exception):
    """What a signal handler raises here."""


def interrupt(signal_number: int, frame: FrameType | None) -> None:
    raise Interrupted


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = [
        (number, signal.signal(number, interrupt))
        for number in (signal.SIGUSR1, signal.SIGALRM)
    ]
    yield
    for number, handler in before:
        signal.signal(number, handler)


def resizable(memory: bytearray) -> bool:
    try:
        memory.append(0)
    except BufferError:
        return False
    memory.pop()
    return True


class Held:
    """A client whose first batch is held at a stage.

    Attributes:
        memory: Of that batch, and what it was filled with.
        value: What a get reads.
    """

    def __init__(self, server: HeldServer, stage: str) -> None:
        self.server = server
        size = {"half sent": SENT_BYTES, "ranges": RANGED_BYTES}.get(stage, PLAIN_BYTES)
        self.value = os.urandom(size)
        self.filling = os.urandom(size)
        self.memory = bytearray(self.filling)
        server.data |= {b"v": self.value, b"w": self.value[:9], b"a": b"a", b"b": b"b"}
        self.sets = stage == "half sent"
        self.behind = stage == "queued"
        self.client: Any = fastkv.Redis(**self.kwargs)
        self.first: tuple[list[bytearray], Any] | None = None

    @property
    def kwargs(self) -> dict[str, Any]:
        return {"port": self.server.port, "tile_range_bytes": 32 << 10, **ONE}

    @property
    def call(self) -> tuple[str, list[str], list[bytearray]]:
        return ("set" if self.sets else "get"), ["v"], [self.memory]

    def start(self) -> None:
        """What stands before the batch, if anything does."""
        if self.behind:
            memories = [bytearray(1), bytearray(1)]
            first = self.client.submit_batch_tile_get(["a", "b"], memories)
            assert self.server.reached.wait(30)
            self.first = memories, first

    def submit(self) -> Any:
        self.start()
        name, *arguments = self.call
        return getattr(self.client, f"submit_batch_tile_{name}")(*arguments)

    def run(self, timeout: float | None = None) -> list[bool]:
        self.start()
        name, *arguments = self.call
        call = getattr(self.client, f"batch_tile_{name}")
        hits: list[bool] = call(*arguments, timeout=timeout)
        return hits

    def is_behind(self) -> bool:
        queued: int = self.client.tile_info()["queued"]["loads"]
        return queued > 0

    def check_let_go(self) -> None:
        """The memory is the caller's, now, and stays so when the server goes on."""
        assert resizable(self.memory)
        self.memory[:] = self.filling
        self.server.go_on.set()
        client = self.client
        if self.first is not None:  # it ended as it should, unless with its client
            memories, first = self.first
            error = first.exception(30)
            if error is None:
                assert first.result() == [True, True]
                assert memories == [b"a", b"b"]
            else:
                assert "client was closed" in str(error)
        got = bytearray(9)
        assert client.batch_tile_get(["w"], [got], timeout=30) == [True]
        assert got == self.value[:9]
        client.close()
        assert self.memory == self.filling


@pytest.fixture(params=STAGES)
def held(request: pytest.FixtureRequest) -> Iterator[Held]:
    with HeldServer(random.getrandbits(32), request.param) as server:
        held = Held(server, request.param)
        yield held
        if held.client is not None:
            held.client.close()
        held.first = None


class Meanwhile:
    """Does something, on a thread, once a batch has come to its stage."""

    def __init__(self, held: Held, what: Callable[[], object]) -> None:
        def do() -> None:
            assert held.server.reached.wait(30)
            assert not held.behind or eventually(held.is_behind)
            what()

        self._thread = threading.Thread(target=do)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *details: object) -> None:
        self._thread.join()


def signal_main() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)


# --- ends at every stage -------------------------------------------------------------


def test_a_cancelled_future_lets_go(held: Held) -> None:
    future = held.submit()
    assert held.server.reached.wait(30)
    assert not resizable(held.memory)
    assert future.cancel()
    assert eventually(lambda: resizable(held.memory))
    held.check_let_go()


def test_a_time_out_lets_go(held: Held) -> None:
    with pytest.raises(TimeoutError, match="not all answered"):
        held.run(timeout=0.2)
    held.check_let_go()


def test_a_close_by_another_thread_lets_go(held: Held) -> None:
    with Meanwhile(held, lambda: held.client.close()):
        with pytest.raises(ConnectionError, match="client was closed"):
            held.run()
        assert resizable(held.memory)
    held.check_let_go()


def test_an_interrupt_lets_go(held: Held) -> None:
    with Meanwhile(held, signal_main):
        with pytest.raises(Interrupted):
            held.run()
        assert resizable(held.memory)
    held.check_let_go()


def test_a_dropped_client_ends_with_the_batch_that_it_left(held: Held) -> None:
    future = held.submit()
    assert held.server.reached.wait(30)
    held.client = held.first = None
    del future
    gc.collect()
    assert not resizable(held.memory)  # it is in flight
    held.server.go_on.set()
    assert eventually(lambda: resizable(held.memory))
    assert held.memory == (held.server.data[b"v"] if held.sets else held.value)


# A batch behind another takes the way of one that was asked: threads and loops share
# the queue.
@pytest.mark.parametrize("held", [s for s in STAGES if s != "queued"], indirect=True)
@pytest.mark.parametrize("how", ["cancel", "time out", "aclose", "abandon"])
def test_a_task_that_ends_early_lets_go(held: Held, how: str) -> None:
    async def main() -> None:
        client = fastkv.asyncio.Redis(**held.kwargs)
        name, *arguments = held.call
        call = getattr(client, f"batch_tile_{name}")(
            *arguments, timeout=0.2 if how == "time out" else None
        )
        if how == "abandon":
            # As a loop does with a task that nobody holds any more.
            future = call.send(None)
            await asyncio.to_thread(held.server.reached.wait, 30)
            call.close()
            future.cancel()
        else:
            task = asyncio.ensure_future(call)
            await asyncio.to_thread(held.server.reached.wait, 30)
            if how == "cancel":
                task.cancel()
            if how == "aclose":
                await client.aclose()
            with pytest.raises((asyncio.CancelledError, RedisError)):
                await task
            assert resizable(held.memory)
        while not resizable(held.memory):
            await asyncio.sleep(0)
        await client.aclose()

    asyncio.run(asyncio.wait_for(main(), 60))
    held.check_let_go()


def test_an_interrupt_while_a_cancelled_task_waits_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, interrupted = Node.cancel, threading.Event()

    def cancel(self: Node, batch: Any) -> None:
        before(self, batch)
        if not interrupted.is_set():
            interrupted.set()
            raise Interrupted

    async def main() -> None:
        async with fastkv.asyncio.Redis(port=server.port) as client:
            memory = bytearray(PLAIN_BYTES)
            task = asyncio.ensure_future(client.batch_tile_get(["v"], [memory]))
            await asyncio.to_thread(server.reached.wait, 30)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert interrupted.is_set()
            assert resizable(memory)

    monkeypatch.setattr(Node, "cancel", cancel)
    with HeldServer(1, "half received") as server:
        server.data[b"v"] = os.urandom(PLAIN_BYTES)
        asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.parametrize("how", ["cancel", "close", "time out"])
def test_a_thousand_batches_in_flight_end_at_once(how: str) -> None:
    with HeldServer(1, "asked") as server:
        server.data[b"v"] = value = os.urandom(1000)
        client = fastkv.Redis(port=server.port, tile_workers=2)
        memories = [bytearray(b"." * 1000) for _ in range(1000)]
        futures = [
            client.submit_batch_tile_get(
                ["v"], [memory], timeout=0.3 if how == "time out" else None
            )
            for memory in memories
        ]
        assert server.reached.wait(30)
        if how == "cancel":
            assert all(future.cancel() for future in futures)
        elif how == "close":
            client.close()
        for future in futures:
            if how in ("close", "time out"):
                assert isinstance(future.exception(30), RedisError)
        assert eventually(lambda: all(resizable(memory) for memory in memories))
        server.go_on.set()
        got = bytearray(1000)
        assert client.batch_tile_get(["v"], [got], timeout=30) == [True]
        assert got == value
        client.close()
        assert all(memory == b"." * 1000 for memory in memories)


def test_a_batch_that_is_complete_and_not_drained_can_be_cancelled_or_closed() -> None:
    for how in ("cancel", "close"):
        with ModelServer(1) as server:
            server.data[b"v"] = value = os.urandom(5000)
            client = fastkv.Redis(port=server.port)
            inside, go_on = threading.Event(), threading.Event()

            def hold(
                _: object, inside: Any = inside, go_on: threading.Event = go_on
            ) -> None:
                inside.set()
                go_on.wait(30)

            first = client.submit_batch_tile_exists(["v"])
            first.add_done_callback(hold)
            assert inside.wait(30)
            memory = bytearray(5000)
            future = client.submit_batch_tile_get(["v"], [memory])

            def complete(client: fastkv.Redis = client) -> bool:
                return client.tile_info()["commands"]["get"]["batches"]["ok"] == 1

            assert eventually(complete)
            assert not resizable(memory)
            if how == "cancel":
                assert future.cancel()
            else:
                closing = threading.Thread(target=client.close)
                closing.start()
            go_on.set()
            if how == "close":
                closing.join()
                assert future.result(30) == [True]
            assert eventually(lambda memory=memory: resizable(memory))
            assert memory == value
            client.close()


@pytest.mark.filterwarnings("ignore:.*[Uu]nclosed.*:ResourceWarning")
def test_a_failed_future_and_a_failed_connect_keep_nothing_alive() -> None:
    """Not until the next garbage collection, nor for ever."""
    with ModelServer(1) as server:
        server.data[b"v"] = os.urandom(9)
        gc.disable()
        try:
            client: Any = fastkv.Redis(port=server.port)
            future = client.submit_batch_tile_get(["v"], [bytearray(8)])
            assert isinstance(future.exception(30), RedisError)
            seen = weakref.ref(client), weakref.ref(future)
            del client, future
            assert eventually(lambda: [one() for one in seen] == [None, None])
        finally:
            gc.enable()

        async def main() -> Any:
            client = fastkv.asyncio.Redis(port=1)
            client.connection_pool.connection_kwargs["retry"] = None
            with pytest.raises(ConnectionError):
                await client.batch_tile_exists(["v"])
            client.connection_pool.connection_kwargs["port"] = server.port
            assert await client.batch_tile_exists(["v"]) == [True]
            return weakref.ref(client.connection_pool)

        pool = asyncio.run(main())
        assert eventually(lambda: gc.collect() >= 0 and pool() is None)


# --- shared buffers ------------------------------------------------------------------


def test_a_patient_call_ends_in_time_however_many_others_give_up() -> None:
    over = threading.Event()

    def give_up(client: fastkv.Redis) -> None:
        while not over.is_set():
            with pytest.raises(TimeoutError):
                client.batch_tile_get(["k"], [bytearray(1000)], timeout=1.1)

    with contextlib.ExitStack() as stack:
        peer = stack.enter_context(SilentPeer())
        clients = [
            stack.enter_context(
                fastkv.Redis(
                    port=peer.port,
                    socket_timeout=2,
                    retry=Retry(NoBackoff(), 0),
                    tile_workers=2,
                    tile_connections=3,
                )
            )
            for _ in range(4)  # who waits for whom is a matter of chance
        ]
        crowd = []
        for _ in range(8):
            for client in clients:
                crowd.append(threading.Thread(target=give_up, args=(client,)))
                crowd[-1].start()
            over.wait(0.18)  # not all at once
        try:
            took: list[float] = []
            patient = []
            for _ in range(8):
                for client in clients:
                    future = client.submit_batch_tile_get(["k"], [bytearray(1000)])
                    began = time.monotonic()
                    future.add_done_callback(
                        lambda _, began=began: took.append(time.monotonic() - began)
                    )
                    patient.append(future)
                over.wait(0.3)
            for future in patient:
                with pytest.raises(TimeoutError, match="reading from socket"):
                    future.result(30)
            assert max(took) < 5.5
        finally:
            over.set()
            for thread in crowd:
                thread.join()


def test_memory_of_two_batches_is_pinned_until_the_second_lets_go() -> None:
    with HeldServer(1, "asked") as server:
        server.data |= {b"v": os.urandom(500)}
        client = fastkv.Redis(port=server.port)
        memory = bytearray(500)
        one = client.submit_batch_tile_get(["v"], [memory])
        two = client.submit_batch_tile_set(["w"], [memory])
        assert server.reached.wait(30)
        assert one.cancel()
        node: Any = client._tile_node
        assert eventually(lambda: node._engine.batches_in_flight == 1)
        assert not resizable(memory)
        server.go_on.set()
        assert two.result(30) == [True]
        assert eventually(lambda: resizable(memory))
        client.close()
        assert server.data[b"w"] == bytes(500)


# --- what raises ---------------------------------------------------------------------


@pytest.mark.parametrize("raised", [ZeroDivisionError, *BASES])
@pytest.mark.parametrize("log_raises", [False, True])
def test_a_callback_that_raises_stops_no_other(raised: Any, log_raises: bool) -> None:
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if log_raises:
                raise raised

    def raise_it(_: object) -> None:
        raise raised

    handler = Handler()
    logger = logging.getLogger("fastkv")
    logger.addHandler(handler)
    try:
        with ModelServer(1) as server, fastkv.Redis(port=server.port) as client:
            for _ in range(3):
                future = client.submit_batch_tile_exists(["v"])
                with contextlib.suppress(raised):  # it may be done already
                    future.add_done_callback(raise_it)
                assert future.result(30) == [False]
            assert client.batch_tile_exists(["v"]) == [False]
    finally:
        logger.removeHandler(handler)


class Hook:
    """Raises what it is told to, on the connector's thread, as often as it is told."""

    def __init__(self, raised: Any) -> None:
        self.raised = raised
        self.left = 0

    def __call__(self) -> None:
        ours = threading.current_thread().name == "fastkv-connector"
        if ours and self.left > 0:
            self.left -= 1
            raise self.raised

    def __deepcopy__(self, memo: object) -> Hook:
        return self


def connect_func(hook: Hook) -> dict[str, Any]:
    def connect(connection: Any) -> None:
        hook()
        connection.on_connect()

    return {"redis_connect_func": connect}


def provider(hook: Hook) -> dict[str, Any]:
    class Provider(redis.CredentialProvider):
        def get_credentials(self) -> tuple[str]:
            hook()
            return ("secret",)

    return {"credential_provider": Provider()}


def backoff(hook: Hook) -> dict[str, Any]:
    class Backoff(ConstantBackoff):
        def compute(self, failures: int) -> float:
            hook()
            return 0.0

    return {"retry": Retry(Backoff(0), 1), **connect_func(hook)}


def copied_backoff(hook: Hook) -> dict[str, Any]:
    class Backoff(ConstantBackoff):
        def __deepcopy__(self, memo: object) -> Any:
            hook()
            return self

    return {"retry": Retry(Backoff(0), 1), "retry_on_timeout": True}


def connection_class(hook: Hook) -> dict[str, Any]:
    class Mine(redis.Connection):
        def disconnect(self, *args: Any) -> None:
            super().disconnect(*args)
            hook()

    return {"connection_class": Mine, **connect_func(hook)}


def log_handler(hook: Hook) -> dict[str, Any]:
    return connect_func(hook)


# A connection that is collected disconnects, too.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("raised", [ZeroDivisionError, ConnectionError, *BASES])
@pytest.mark.parametrize(
    "make_kwargs",
    [connect_func, provider, backoff, copied_backoff, connection_class, log_handler],
)
def test_a_hook_of_the_connection_that_raises_is_an_error_and_then_it_works(
    make_kwargs: Callable[[Hook], dict[str, Any]], raised: Any
) -> None:
    hook = Hook(raised)

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            hook()

    handler = Handler()
    if make_kwargs is log_handler:
        logging.getLogger("fastkv").addHandler(handler)
    try:
        with ModelServer(1) as server:
            server.data[b"v"] = value = os.urandom(3000)
            settings = {"retry": Retry(NoBackoff(), 0), **make_kwargs(hook)}
            pool = redis.ConnectionPool(port=server.port, **settings)
            client = fastkv.Redis.from_pool(pool)
            for times in (1, 2, 3):
                hook.left = times
                memory = bytearray(3000)
                for _ in range(times):
                    try:
                        client.batch_tile_get(["v"], [memory], timeout=30)
                        assert memory == value
                    # Not what was not meant for this thread.
                    except (ZeroDivisionError, ConnectionError):
                        pass
                    assert resizable(memory)
                hook.left = 0
                got = bytearray(3000)
                assert client.batch_tile_get(["v"], [got], timeout=30) == [True]
                assert got == value
                client.connection_pool.disconnect()
            client.close()
    finally:
        logging.getLogger("fastkv").removeHandler(handler)


def test_a_failure_of_the_connector_is_no_matter_of_who_comes_after_it() -> None:
    with ModelServer(1) as server, fastkv.Redis(port=server.port) as client:
        assert client.batch_tile_exists(["v"]) == [False]
        node: Any = client._tile_node
        failing, go_on = threading.Event(), threading.Event()
        before = node._connector._check_used

        def check_used() -> None:
            node._connector._check_used = before
            failing.set()
            assert go_on.wait(30)
            raise MemoryError

        node._connector._check_used = check_used
        client.connection_pool.disconnect()
        first = client.submit_batch_tile_exists(["v"])
        assert failing.wait(30)
        later = client.submit_batch_tile_exists(["v"])
        go_on.set()
        assert isinstance(first.exception(30), (MemoryError, type(None)))
        assert later.result(30) == [False]


class OddKey(float):
    """redis-py's encoder asks a number for its repr."""

    raised: type[BaseException]

    def __repr__(self) -> str:
        raise self.raised


def breaks_off(memory: bytearray, raised: type[BaseException]) -> Iterator[bytearray]:
    yield memory
    raise raised


class OddShape(list[bytearray]):
    raised: type[BaseException]

    def __iter__(self) -> Any:
        return breaks_off(self[0], self.raised)


class OddArray:
    raised: type[BaseException]

    @property
    def shape(self) -> tuple[int, ...]:
        raise self.raised


class OddBuffer:
    """Python 3.12 asks it for its memory; before, it is none."""

    raised: type[BaseException]

    def __buffer__(self, flags: int) -> memoryview:
        raise self.raised

    @property
    def __array_interface__(self) -> dict[str, Any]:
        raise self.raised


@pytest.mark.parametrize("raised", [ZeroDivisionError, *BASES])
def test_keys_and_buffers_that_raise_leave_no_pin(raised: Any) -> None:
    with ModelServer(1) as server, fastkv.Redis(port=server.port) as client:
        server.data[b"v"] = value = os.urandom(100)
        for odd in (OddKey, OddShape, OddArray, OddBuffer):
            odd.raised = raised  # type: ignore[attr-defined]  # each of them has one
        released = memoryview(bytearray(100))
        released.release()
        memory = bytearray(100)
        kept: list[object] = []
        cases: list[tuple[Any, Any]] = [
            (["v", OddKey(1)], [memory, memory]),
            (["v", "w"], breaks_off(memory, raised)),
            (["v", "w"], OddShape([memory, memory])),
            (["v", "w"], OddArray()),
            (["v", "w"], [memory, OddBuffer()]),
            (["v", "w"], [memory, (memory, OddBuffer())]),
            (["v", "w"], [memory, released]),
            (["v", "w"], [memory, b"read-only"]),
            (["v", "w"], [memory, memoryview(bytearray(9))[::2]]),
            (["v", "w"], [memory, None]),
            (["v", object()], [memory, memory]),
        ]
        for number, (keys, buffers) in enumerate(cases):
            for call in (client.batch_tile_get, client.submit_batch_tile_get):
                with pytest.raises(
                    (raised, TypeError, ValueError, redis.DataError)
                ) as caught:
                    call(keys, buffers)
                kept.append(caught)  # with the frames, which hold the batch
                assert resizable(memory), number
        assert client.batch_tile_get(["v"], [memory]) == [True]
        assert memory == value


@pytest.mark.parametrize(
    "refuse",
    ["time-out", "options", "policy", "engine", "unsupported"],
)
@pytest.mark.parametrize("call", ["batch_tile_get", "submit_batch_tile_get", "await"])
def test_a_refused_call_pins_nothing_though_its_exception_lives_on(
    refuse: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = bytearray(b"...")
    timeout = -1 if refuse == "time-out" else None
    gc.disable()  # it must not be what lets go
    try:
        with ModelServer(1) as server:
            kwargs: dict[str, Any] = {"port": server.port}
            if refuse == "unsupported" and call == "await":
                kwargs["redis_connect_func"] = asyncio.sleep
            elif refuse == "unsupported":
                kwargs |= {"ssl": True, "ssl_validate_ocsp": True}

            def spoil(client: Any) -> None:
                if refuse in ("policy", "engine"):
                    node = client._node()
                    if refuse == "engine":
                        node._engine.close()
                    else:
                        monkeypatch.setattr(node, "_retry_policy", lambda: 1 / 0)
                if refuse == "options":
                    client._node()
                    client._tile_node = None
                    client._tile_options = fastkv.Redis(tile_workers=7)._tile_options

            async def wait() -> None:
                client = fastkv.asyncio.Redis(**kwargs)
                spoil(client)
                try:
                    await client.batch_tile_get(["v"], [memory], timeout=timeout)
                finally:
                    await client.aclose()

            client = fastkv.Redis(**kwargs)
            with pytest.raises((RedisError, ValueError, ZeroDivisionError)) as caught:
                if call == "await":
                    asyncio.run(wait())
                else:
                    spoil(client)
                    getattr(client, call)(["v"], [memory], timeout=timeout)
            assert resizable(memory), caught.value
            client.close()
    finally:
        gc.enable()


# --- signals -------------------------------------------------------------------------


def life(server: ModelServer, value: bytes, made: list[Any]) -> None:
    """Of a client, from its creation to its close."""
    client = fastkv.Redis(port=server.port, tile_workers=1, tile_connections=1)
    made.append(client)
    got = bytearray(len(value))
    made.append(got)
    assert client.batch_tile_get(["v"], [got], timeout=30) == [True]
    assert got == value
    assert client.submit_batch_tile_exists(["v"]).result(30) == [True]
    client.close()


def check_after_interrupt(made: list[Any], value: bytes, fds: dict[int, str]) -> None:
    """A client that was interrupted works, and ends."""
    if made:
        client, *memories = made
        for memory in memories:
            assert eventually(lambda memory=memory: resizable(memory))
        got = bytearray(len(value))
        assert client.batch_tile_get(["v"], [got], timeout=30) == [True]
        assert got == value
        assert client.submit_batch_tile_exists(["v"]).result(30) == [True]
        client.close()
        made.clear()
    assert eventually(lambda: not fastkv_threads()), fastkv_threads()

    def same_fds() -> bool:
        now = open_fds()
        return not [fd for fd in now if fd not in fds and "socket" not in now[fd]]

    assert eventually(same_fds), open_fds()


def test_an_interrupt_at_any_line_of_ours_leaves_a_client_that_works() -> None:
    """Signal handlers run between any two steps of the main thread. Lines are many of
    them, and can be chosen.
    """
    home = os.path.dirname(fastkv.__file__)
    left = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(home):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise Interrupted
        return trace

    value = os.urandom(2000)
    step = 1 if LONG else 9
    at = random.randrange(step)
    with ModelServer(1) as server:
        server.data[b"v"] = value
        made: list[Any] = []
        life(server, value, made)
        made.clear()
        gc.collect()
        fds = open_fds()
        lines = 0
        while True:
            at += step
            left = at
            try:
                sys.settrace(trace)
                try:
                    life(server, value, made)
                finally:
                    sys.settrace(None)
            except Interrupted:
                lines += 1
            else:
                if left > 0:
                    break
            check_after_interrupt(made, value, fds)
        made.clear()
        assert lines > (100 if LONG else 20)


# Python's own and redis-py's files and finalizers are interrupted, too.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_signals_at_random_moments_leave_a_client_that_works() -> None:
    seed = random.getrandbits(32)
    chance = random.Random(seed)
    value = os.urandom(2000)
    interrupted = 0
    with ModelServer(seed) as server:
        server.data[b"v"] = value
        made: list[Any] = []
        life(server, value, made)
        made.clear()
        gc.collect()
        fds = open_fds()
        longest = 0.02
        for _ in range(2000 if LONG else 80):
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-5, longest))
                try:
                    life(server, value, made)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupted:
                interrupted += 1
            check_after_interrupt(made, value, fds)
    assert interrupted, seed


def test_an_interrupted_call_starts_nothing_after_the_close(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    late: list[Callable[[], None]] = []

    def start(run: Callable[[], None], arguments: object) -> None:
        late.append(run)  # its thread is not scheduled yet
        signal_main()

    with ModelServer(1) as server, fastkv.Redis(port=server.port) as client:
        monkeypatch.setattr("fastkv.shielded._thread.start_new_thread", start)
        with pytest.raises(Interrupted):
            client.batch_tile_exists(["v"])
        monkeypatch.undo()
        client.close()
        late[0]()
        assert fastkv_threads() == []


def test_a_close_that_is_interrupted_is_finished_by_the_next() -> None:
    with SilentPeer() as silent:
        client = fastkv.Redis(port=silent.port)
        memory = bytearray(10)
        future = client.submit_batch_tile_get(["v"], [memory])
        assert silent.asked.wait(30)
        node: Any = client._tile_node
        before, closing = node._connector.close, threading.Event()

        def close(patience: float) -> None:
            closing.set()
            before(patience)

        node._connector.close = close

        def signal_then() -> None:
            assert closing.wait(30)
            signal_main()

        thread = threading.Thread(target=signal_then)
        thread.start()
        try:
            client.close()
            thread.join()  # it may come only now
        except Interrupted:
            pass
        thread.join()
        client.close()
        assert eventually(lambda: not fastkv_threads())
        assert isinstance(future.exception(30), ConnectionError)
        assert resizable(memory)


def test_a_client_can_be_used_by_a_signal_handler_at_any_moment() -> None:
    used = 0
    closed: list[str] = []
    with ModelServer(1) as server:
        server.data[b"v"] = value = os.urandom(2000)
        client = fastkv.Redis(port=server.port)

        def use(number: int, frame: FrameType | None) -> None:
            nonlocal used
            got = bytearray(2000)
            try:
                assert client.batch_tile_get(["v"], [got], timeout=30) == [True]
                assert got == value
            except ConnectionError as error:  # in the middle of close()
                closed.append(str(error))
            used += 1

        signal.signal(signal.SIGALRM, use)
        signal.setitimer(signal.ITIMER_REAL, 0.002, 0.005)
        try:
            for _ in range(100 if LONG else 20):
                other = fastkv.Redis.from_pool(client.connection_pool)
                for one in (client, other):
                    got = bytearray(2000)
                    assert one.batch_tile_get(["v"], [got], timeout=30) == [True]
                    assert got == value
                other.close()
                client.close()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        client.close()
    assert used
    assert all("client was closed" in error for error in closed)


def test_many_ends_at_random_moments_of_many_batches() -> None:
    """All of it at once, over threads: right bytes, or redis-py's exception."""
    seed = random.getrandbits(32)
    with ModelServer(seed) as server:
        values = {f"k{i}": os.urandom(20_000 + i) for i in range(20)}
        server.data |= {key.encode(): value for key, value in values.items()}
        clients = [fastkv.Redis(port=server.port) for _ in range(2)]

        def work(number: int) -> None:
            chance = random.Random(seed + number)
            for _ in range(200 if LONG else 25):
                client = chance.choice(clients)
                keys = chance.sample(sorted(values), chance.randint(1, 8))
                got = [bytearray(len(values[key])) for key in keys]
                try:
                    future = client.submit_batch_tile_get(
                        keys, got, timeout=chance.choice([None, 0.002, 30])
                    )
                    end = chance.random()
                    if end < 0.3:
                        future.cancel()
                    elif end < 0.4:
                        client.close()
                    assert future.result(60) == [True] * len(keys)
                    assert got == [values[key] for key in keys]
                except (ConnectionError, TimeoutError):
                    pass
                except concurrent.futures.CancelledError:
                    pass
                for memory in got:
                    assert eventually(lambda memory=memory: resizable(memory))
                    memory[:] = b"." * len(memory)

        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            for done in [threads.submit(work, i) for i in range(4)]:
                done.result(120)
        for client in clients:
            client.close()
