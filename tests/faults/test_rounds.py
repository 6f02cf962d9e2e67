"""What may happen between two rounds of a call over a cluster: a round that cannot
begin, a look at the cluster that nobody waits for any more, a callback, a fork.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import redis.connection
from redis.backoff import ConstantBackoff, NoBackoff
from redis.exceptions import ClusterError, ConnectionError, RedisError, TimeoutError
from redis.retry import Retry

import fastkv
import fastkv.asyncio
from fastkv import commands, refresher, rounds, topology
from fastkv import node as nodes
from fastkv._core import Code, CompletionQueue, key_slot
from fastkv.lmcache import NativeClient
from fastkv.lmcache.carriers import Cluster as Carrier
from fastkv.refresher import Refresh, Refresher
from tests.conftest import eventually, fastkv_threads
from tests.faults.conftest import LONG
from tests.faults.held import PLAIN_BYTES, HeldServer
from tests.faults.test_callers import Interrupted, resizable
from tests.integration.test_cluster_scripted import SLOT, ScriptedNode

DOWN = b"-CLUSTERDOWN Hash slot not served\r\n"
SMALL = {"tile_workers": 1, "tile_connections": 1}
ONE = {**SMALL, "protocol": 2}
# One in each half of the slots.
LOW, HIGH = (
    next(key for key in map(str, range(99)) if (key_slot(key.encode()) > 8191) is high)
    for high in (False, True)
)


class Half(HeldServer):
    """A node with half of the slots."""

    ports: tuple[int, int]

    def answer(self, connection: Any, command: list[bytes]) -> bool:
        if command[0] == b"COMMAND":
            connection.sendall(b"*0\r\n")
        elif command[0] == b"CLUSTER":
            line = b"*3\r\n:%d\r\n:%d\r\n*3\r\n$9\r\n127.0.0.1\r\n:%d\r\n$1\r\n%c\r\n"
            low = line % (0, 8191, self.ports[0], b"x")
            high = line % (8192, 16383, self.ports[1], b"y")
            connection.sendall(b"*2\r\n" + low + high)
        else:
            return super().answer(connection, command)
        return True


@pytest.fixture
def node() -> Iterator[ScriptedNode]:
    with ScriptedNode() as node:
        yield node


@pytest.fixture
def client(node: ScriptedNode) -> Iterator[fastkv.RedisCluster]:
    retry = Retry(NoBackoff(), 100)
    port = node.port
    with fastkv.RedisCluster("127.0.0.1", port, retry=retry, **ONE) as client:
        yield client


@pytest.fixture
def silent_excepthook(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that dies is told of by what hangs then."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)


# --- a round that cannot begin -------------------------------------------------------


@pytest.mark.parametrize("how", ["run", "submit", "await"])
def test_if_a_part_cannot_be_sent_the_others_let_go_first(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memories = [bytearray(PLAIN_BYTES), bytearray(PLAIN_BYTES)]
    error = OSError(errno.EMFILE, "Too many open files")
    with Half(1, "half received") as low, Half(2) as high:
        Half.ports = low.port, high.port
        for server, key in ((low, LOW), (high, HIGH)):
            server.data[key.encode()] = os.urandom(PLAIN_BYTES)

        def fail_after(count: int, work: Callable[..., Any]) -> Callable[..., Any]:
            calls = iter(range(99))

            def failing(*args: Any) -> Any:
                if next(calls) < count:
                    return work(*args)
                # The first part is on its way.
                assert low.reached.wait(30)
                raise error

            return failing

        kwargs: dict[str, Any] = {"host": "127.0.0.1", "port": low.port, **ONE}

        def check_let_go() -> None:
            assert all(resizable(memory) for memory in memories)
            before = bytes(memories[0])
            low.go_on.set()
            low.drop_all()
            time.sleep(0.1)
            assert memories[0] == before

        async def wait() -> None:
            async with fastkv.asyncio.RedisCluster(**kwargs) as client:
                work = nodes.Node.queue_of
                monkeypatch.setattr(nodes.Node, "queue_of", fail_after(1, work))
                with pytest.raises(OSError, match="Too many open files"):
                    await client.batch_tile_get([LOW, HIGH], memories)
                check_let_go()
                monkeypatch.undo()
                assert await client.batch_tile_exists([LOW, HIGH]) == [True, True]

        if how == "await":
            asyncio.run(wait())
            return
        with fastkv.RedisCluster(**kwargs) as client:
            if how == "submit":
                work = nodes.Node.future_queue
                monkeypatch.setattr(nodes.Node, "future_queue", fail_after(1, work))
                future = client.submit_batch_tile_get([LOW, HIGH], memories)
                assert future.exception(30) is error
            else:
                # Before the engine has any; there a failure is one of its own.
                work = nodes.Node.take_queue
                monkeypatch.setattr(nodes.Node, "take_queue", fail_after(1, work))
                low.reached.set()
                with pytest.raises(OSError, match="Too many open files"):
                    client.batch_tile_get([LOW, HIGH], memories)
            check_let_go()
            monkeypatch.undo()
            assert client.batch_tile_exists([LOW, HIGH]) == [True, True]


def test_a_task_that_is_cancelled_while_a_failed_call_lets_go_is_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memories = [bytearray(PLAIN_BYTES), bytearray(PLAIN_BYTES)]
    real = nodes.Node.start

    async def main() -> None:
        async with fastkv.asyncio.RedisCluster("127.0.0.1", low.port, **ONE) as client:
            task = asyncio.ensure_future(client.batch_tile_get([LOW, HIGH], memories))
            loop = asyncio.get_running_loop()

            def start(*args: Any) -> int:
                if not started:
                    started.append(True)
                    return real(*args)
                assert low.reached.wait(30)
                loop.call_soon(task.cancel)
                raise OSError(errno.EMFILE, "Too many open files")

            monkeypatch.setattr(nodes.Node, "start", start)
            with pytest.raises(asyncio.CancelledError):
                await task
            assert all(resizable(memory) for memory in memories)

    started: list[bool] = []
    with Half(1, "half received") as low, Half(2) as high:
        Half.ports = low.port, high.port
        low.data[LOW.encode()] = os.urandom(PLAIN_BYTES)
        asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.parametrize("raised", [RuntimeError, SystemExit])
def test_a_future_fails_if_a_later_round_cannot_begin(
    raised: type[BaseException],
    client: fastkv.RedisCluster,
    node: ScriptedNode,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[str] = []

    def started(run: Callable[[], None], name: str) -> threading.Thread:
        made.append(name)
        if made.count("fastkv-futures") > 1:
            raise raised("can't start new thread")
        return real(run, name)

    real = nodes.started
    monkeypatch.setattr(nodes, "started", started)
    with ScriptedNode() as other:
        line = b"-ASK %d 127.0.0.1:%d\r\n" % (SLOT, other.port)
        node.expect("EXISTS", "a").reply(line)
        future = client.submit_batch_tile_exists(["a"])
        error = future.exception(10)
        assert isinstance(error, (RuntimeError, ConnectionError))
        assert "can't start new thread" in str(error)
        client.close()


@pytest.mark.parametrize("how", ["submit", "await"])
def test_a_handlers_error_does_not_send_again_what_was_accepted(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = bytearray(PLAIN_BYTES)
    real, error = nodes.Node.start, TimeoutError("an alarm")

    def start(*args: Any) -> int:
        assert real(*args) == Code.OK
        assert low.reached.wait(30)
        raise error

    with Half(1, "half received") as low, Half(2) as high:
        Half.ports = low.port, high.port
        low.data[LOW.encode()] = os.urandom(PLAIN_BYTES)
        kwargs: dict[str, Any] = {"host": "127.0.0.1", "port": low.port, **ONE}

        def check() -> None:
            assert resizable(memory)
            before = bytes(memory)
            low.go_on.set()
            time.sleep(0.1)
            assert memory == before

        async def wait() -> None:
            async with fastkv.asyncio.RedisCluster(**kwargs) as client:
                await client.batch_tile_exists([HIGH])
                monkeypatch.setattr(nodes.Node, "start", start)
                with pytest.raises(TimeoutError, match="an alarm"):
                    await client.batch_tile_get([LOW], [memory])
                check()

        if how == "await":
            asyncio.run(wait())
            return
        with fastkv.RedisCluster(**kwargs) as client:
            monkeypatch.setattr(nodes.Node, "start", start)
            future = client.submit_batch_tile_get([LOW], [memory])
            assert future.exception(30) is error
            check()


@pytest.mark.parametrize("complete", [True, False])
def test_the_engines_own_failure_is_raised_whatever_was_answered(
    complete: bool,
) -> None:
    """A part that says so of itself: no memory for an error line, say."""
    error = RedisError("fastkv worker died: std::bad_alloc")
    part: Any = SimpleNamespace(
        name="a",
        refusal=Code.OK,
        batch=SimpleNamespace(code=Code.INTERNAL_ERROR),
        node=SimpleNamespace(error_of=lambda *_: error),
    )
    batch: Any = type(
        "Whole",
        (),
        {
            "__len__": lambda _: 1,
            "take": lambda *_: ([] if complete else [0], []),
            "end_parts": lambda _: None,
        },
    )()
    cluster: Any = SimpleNamespace(
        retry=Retry(NoBackoff(), 1),
        _tile_closes=0,
        _tile_calls=lambda: SimpleNamespace(count=lambda *_: None),
        _tile_route=lambda *_: ([part], []),
    )
    steps = rounds.rounds(cluster, batch, 0.0)
    next(steps)
    with pytest.raises(RedisError, match="bad_alloc"):
        next(steps)


# --- a look that nobody waits for any more -------------------------------------------


@pytest.mark.usefixtures("silent_excepthook")
@pytest.mark.parametrize("when", ["during the look", "before the look"])
def test_a_cancelled_wait_for_a_look_stops_no_other(when: str) -> None:
    looking, go_on = threading.Event(), threading.Event()
    refresher = Refresher()

    def look(step: Refresh) -> None:
        looking.set()
        assert go_on.wait(30)

    async def cancel() -> None:
        step = Refresh() if when == "during the look" else Refresh(5.0, seconds=0.1)
        waiting = asyncio.ensure_future(asyncio.wrap_future(refresher.do(step, look)))
        await asyncio.sleep(0)
        if when == "during the look":
            assert await asyncio.to_thread(looking.wait, 30)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(cancel())
    time.sleep(0.2)  # its time is over
    other = refresher.do(Refresh(seconds=20), look)
    go_on.set()
    assert other.result(10) is None
    assert refresher.do(Refresh(seconds=20), look).result(10) is None


@pytest.mark.usefixtures("silent_excepthook")
def test_a_cancelled_request_of_lmcaches_stops_no_other(node: ScriptedNode) -> None:
    carrier = Carrier(f"redis://127.0.0.1:{node.port}", {"socket_timeout": 1, **ONE})
    encoder = carrier.client().encoder
    step = node.expect("EXISTS", "a").reply(DOWN)

    async def cancel() -> None:
        waiting = asyncio.ensure_future(
            carrier.wait(commands.exists(encoder, ["a"]), None)
        )
        assert await asyncio.to_thread(step.seen.wait, 30)
        await asyncio.sleep(0.1)  # in the pause before the look
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(cancel())
    time.sleep(0.3)
    for how in ("await", "run"):
        node.expect("EXISTS", "a").reply(DOWN)
        node.expect("EXISTS", "a").reply(b":1\r\n")
        batch = commands.exists(encoder, ["a"])
        if how == "await":
            assert asyncio.run(carrier.wait(batch, 10.0)) == [True]
        else:
            assert carrier.run(batch, 10.0) == [True]
    carrier.close()


@pytest.mark.usefixtures("silent_excepthook")
def test_a_hook_that_ends_the_first_connect_of_lmcaches_leaves_nobody_waiting(
    node: ScriptedNode,
) -> None:
    def hook(connection: redis.connection.Connection) -> None:
        raise SystemExit

    carrier = Carrier(
        f"redis://127.0.0.1:{node.port}", {"redis_connect_func": hook, **ONE}
    )
    batch = commands.exists(redis.connection.Encoder("utf-8", "strict", False), ["a"])
    with pytest.raises(RedisError, match=r"A hook .* SystemExit"):
        carrier.run(batch, 10.0)
    carrier.close()


# --- a store of LMCache's that is closed ----------------------------------------------


@pytest.mark.parametrize("how", ["run", "submit", "await"])
def test_a_store_that_is_closed_while_a_request_begins_leaves_nothing_open(
    how: str, node: ScriptedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = topology.node_of

    def node_of(*args: Any) -> nodes.Node:
        made = real(*args)
        thread = threading.Thread(target=carrier.close)
        thread.start()
        thread.join()
        return made

    carrier = Carrier(f"redis://127.0.0.1:{node.port}", ONE)
    batch = commands.exists(carrier.client().encoder, ["a"])
    monkeypatch.setattr(topology, "node_of", node_of)
    with pytest.raises(ConnectionError, match="was closed"):
        if how == "run":
            carrier.run(batch, 10.0)
        elif how == "await":
            asyncio.run(carrier.wait(batch, 10.0))
        else:
            queue = CompletionQueue()
            carrier.submit_to(queue, batch, 10.0)
            assert carrier.drain(queue) == [batch]
            nodes.Node.result(batch)
    assert eventually(lambda: not fastkv_threads())


@pytest.mark.parametrize("use", ["close", "submit"])
def test_a_handler_uses_a_store_at_any_line_of_a_request(use: str) -> None:
    """No lock of this thread's keeps it, and all that was submitted completes."""
    home = os.path.dirname(fastkv.__file__)
    ids: list[int] = []
    left = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(home):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                sys.settrace(None)
                if use == "close":
                    store.close()
                else:
                    ids.append(store.submit_batch_exists(["b"]))
        return trace

    at = 0
    with Moving(1) as server:
        url = f"redis://127.0.0.1:{server.port}"
        while left <= 0:
            at += 1 if LONG or at < 40 else 7
            left = at
            ids.clear()
            store = NativeClient(url, cluster=True, protocol=2, **SMALL)
            sys.settrace(trace)
            ids.append(store.submit_batch_exists(["a"]))
            sys.settrace(None)
            done: list[int] = []

            def all_done(store: NativeClient = store, done: list[int] = done) -> bool:
                done += [completion[0] for completion in store.drain_completions()]
                return len(done) == len(ids)

            assert eventually(all_done), at
            assert sorted(done) == sorted(ids)
            store.close()
            assert eventually(lambda: not fastkv_threads()), at
    assert at > 40


# --- callbacks -----------------------------------------------------------------------


def test_a_callback_may_want_a_look_itself(
    client: fastkv.RedisCluster, node: ScriptedNode
) -> None:
    node.script_over = DOWN
    called: list[Any] = []

    def callback(future: Any) -> None:
        called.append(future.exception())
        try:
            client.batch_tile_exists(["a"], timeout=0.6)
        except RedisError as error:
            called.append(error)

    future = client.submit_batch_tile_exists(["a"], timeout=0.4)
    future.add_done_callback(callback)
    assert eventually(lambda: len(called) == 2)
    assert {type(error) for error in called} == {TimeoutError}


def test_a_callback_that_blocks_keeps_nobody(
    client: fastkv.RedisCluster, node: ScriptedNode
) -> None:
    node.script_over = DOWN
    go_on = threading.Event()
    blocked: list[Any] = []

    def callback(future: Any) -> None:
        blocked.append(future)
        assert go_on.wait(30)

    futures = [client.submit_batch_tile_exists([key], timeout=0.4) for key in "abcd"]
    for future in futures:
        future.add_done_callback(callback)
    try:
        for future in futures:
            assert isinstance(future.exception(5), TimeoutError)
        assert eventually(lambda: len(blocked) == 4)
        with pytest.raises(TimeoutError):
            client.batch_tile_exists(["a"], timeout=0.6)
    finally:
        go_on.set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("at", ["time-out", "look"])
def test_a_callback_that_exits_stops_no_other(
    client: fastkv.RedisCluster,
    node: ScriptedNode,
    monkeypatch: pytest.MonkeyPatch,
    at: str,
) -> None:
    node.script_over = DOWN
    called = threading.Event()

    def callback(future: Any) -> None:
        called.set()
        raise SystemExit

    if at == "look":
        error = ClusterError("no node is left")
        monkeypatch.setattr(client, "_tile_refresh", Mock(side_effect=error))
    else:
        monkeypatch.setattr(client, "retry", Retry(ConstantBackoff(9), 100))
    future = client.submit_batch_tile_exists(["a"], timeout=0.4)
    future.add_done_callback(callback)
    assert isinstance(future.exception(5), (TimeoutError, ClusterError))
    assert called.wait(5)
    monkeypatch.undo()
    node.expect("EXISTS", "a").reply(DOWN)
    node.expect("EXISTS", "a").reply(b":1\r\n")
    assert client.batch_tile_exists(["a"], timeout=10) == [True]


# --- forks ---------------------------------------------------------------------------


def test_a_future_that_is_between_two_rounds_fails_in_a_child(
    client: fastkv.RedisCluster, node: ScriptedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, go_on = threading.Event(), threading.Event()
    real = topology.Routing._tile_route

    def route(*args: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert go_on.wait(30)
        return real(*args)

    monkeypatch.setattr(topology.Routing, "_tile_route", route)
    node.expect("GET", "a").reply(DOWN)
    node.expect("GET", "a").reply(b"$1\r\nx\r\n")
    memory = bytearray(1)
    future = client.submit_batch_tile_get(["a"], [memory])
    assert inside.wait(30)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            message = str(future.exception(5))
            code = 0 if "before a fork" in message and resizable(memory) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    go_on.set()
    assert future.result(10) == [True]


def test_a_signal_handler_forks_while_a_call_waits_for_a_look(
    client: fastkv.RedisCluster, node: ScriptedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    children: list[int] = []
    looking, go_on = threading.Event(), threading.Event()
    real = client._tile_refresh

    def look(step: Refresh) -> None:
        looking.set()
        assert go_on.wait(30)
        real(step)

    def fork(number: int, frame: FrameType | None) -> None:
        children.append(os.fork())
        if children[-1] == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends a child that hangs
            signal.alarm(5)

    def meanwhile() -> None:
        assert looking.wait(30)
        signal.pthread_kill(main, signal.SIGUSR1)
        assert eventually(lambda: bool(children))
        go_on.set()

    main = threading.main_thread().ident or 0
    monkeypatch.setattr(client, "_tile_refresh", look)
    node.expect("EXISTS", "a").reply(DOWN)
    node.expect("EXISTS", "a").reply(b":1\r\n")
    handler = signal.signal(signal.SIGUSR1, fork)
    thread = threading.Thread(target=meanwhile)
    thread.start()
    try:
        hits = client.batch_tile_exists(["a"])
    except ConnectionError as error:
        os._exit(0 if children[-1] == 0 and "before a fork" in str(error) else 2)
    finally:
        if children[-1] == 0:
            os._exit(3)
        signal.signal(signal.SIGUSR1, handler)
    thread.join()
    assert hits == [True]
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0


def test_two_threads_may_want_the_first_look_of_a_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a fork in C, of which nobody was told."""
    inside, go_on = threading.Event(), threading.Event()
    real = refresher.Condition

    def condition() -> Any:
        if threading.current_thread().name == "first":
            inside.set()
            assert go_on.wait(30)
        return real()

    shared = Refresher()
    pid = os.getpid() + 1
    monkeypatch.setattr(refresher, "os", SimpleNamespace(getpid=lambda: pid))
    monkeypatch.setattr(refresher, "Condition", condition)
    done: list[Any] = []

    def first() -> None:
        done.append(shared.do(Refresh(seconds=5), lambda _: None))

    thread = threading.Thread(target=first, name="first")
    thread.start()
    assert inside.wait(30)
    done.append(shared.do(Refresh(pause=0.3, seconds=5), lambda _: None))
    go_on.set()
    thread.join()
    for future in done:
        assert future.result(5) is None


# --- interrupts ----------------------------------------------------------------------


class Moving(HeldServer):
    """The only node; it says each second time that a key has moved, to itself."""

    moved = False

    def answer(self, connection: Any, command: list[bytes]) -> bool:
        if command[0] == b"CLUSTER":
            slots = b"*1\r\n*3\r\n:0\r\n:16383\r\n"
            line = slots + b"*3\r\n$9\r\n127.0.0.1\r\n:%d\r\n$1\r\nx\r\n"
            connection.sendall(line % self.port)
        elif command[0] == b"COMMAND":
            connection.sendall(b"*0\r\n")
        elif command[0] == b"GET" and not self.moved:
            self.moved = True
            connection.sendall(b"-MOVED %d 127.0.0.1:%d\r\n" % (SLOT, self.port))
        else:
            self.moved = False
            return super().answer(connection, command)
        return True


@pytest.mark.parametrize("how", ["run", "submit"])
def test_an_interrupt_at_any_line_of_a_call_leaves_a_client_that_works(
    how: str,
) -> None:
    home = os.path.dirname(fastkv.__file__)
    of_slots = topology._Owners.__init__.__code__
    left = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        code = frame.f_code
        # (One of ours looks at each slot.)
        if not code.co_filename.startswith(home) or code is of_slots:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise Interrupted
        return trace

    def call(memory: bytearray) -> None:
        if how == "run":
            assert client.batch_tile_get(["a"], [memory], timeout=30) == [True]
        else:
            future = client.submit_batch_tile_get(["a"], [memory], timeout=30)
            assert future.result(30) == [True]

    step = 1 if LONG else 7
    at = random.randrange(step)
    value = os.urandom(2000)
    with Moving(1) as server:
        server.data[b"a"] = value
        with fastkv.RedisCluster("127.0.0.1", server.port, **ONE) as client:
            call(bytearray(2000))
            lines = 0
            while True:
                at += step
                left = at
                memory = bytearray(2000)
                try:
                    sys.settrace(trace)
                    try:
                        call(memory)
                    finally:
                        sys.settrace(None)
                except Interrupted:
                    lines += 1
                else:
                    if left > 0:
                        break
                if how == "run":
                    assert resizable(memory)
                else:  # it is on its way still, or cancelled
                    assert eventually(lambda memory=memory: resizable(memory)), at
                again = bytearray(2000)
                call(again)
                assert again == value
    assert lines > (100 if LONG else 15)


# What asyncio was to await was interrupted, too.
@pytest.mark.filterwarnings("ignore:.*was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("cluster", [False, True])
def test_an_interrupt_at_any_line_of_an_awaited_call_lets_go_first(
    cluster: bool,
) -> None:
    """When it has been raised, nobody writes the memory any more."""
    home = os.path.dirname(fastkv.__file__)
    of_slots = topology._Owners.__init__.__code__
    left = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        code = frame.f_code
        # (What a callback of asyncio's raises, asyncio keeps for itself.)
        others = code is of_slots or code.co_name in ("_drain_in_loop", "_resolve")
        if not code.co_filename.startswith(home) or others:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise Interrupted
        return trace

    async def main() -> int:
        nonlocal left
        kwargs: dict[str, Any] = {"host": "127.0.0.1", "port": server.port, **ONE}
        made_by: Any = fastkv.asyncio.RedisCluster if cluster else fastkv.asyncio.Redis
        async with made_by(**kwargs) as client:
            assert await client.batch_tile_get(["a"], [bytearray(2000)]) == [True]
            lines = 0
            while True:
                memory, again = bytearray(2000), bytearray(2000)
                left = lines + 1
                sys.settrace(trace)
                try:
                    await client.batch_tile_get(["a"], [memory])
                except Interrupted:
                    lines += 1
                finally:
                    sys.settrace(None)
                assert resizable(memory), lines
                if left > 0:
                    return lines
                assert await client.batch_tile_get(["a"], [again]) == [True]
                assert again == value

    value = os.urandom(2000)
    with Moving(1) if cluster else HeldServer(1) as server:
        server.data[b"a"] = value
        assert asyncio.run(asyncio.wait_for(main(), 60)) > 30
