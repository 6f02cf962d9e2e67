"""What else happens while a process forks: handlers and hooks on the same thread, other
threads, and forks in between. (Forks at every stage of a batch: `test_processes.py`.)

Parent and child go on, and no descriptor of the parent's is left to the child.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import redis
from redis.exceptions import ConnectionError

import fastkv
from fastkv import connector, refresher, registry, topology
from fastkv.node import Node
from fastkv.refresher import Refresh, Refresher
from fastkv.rounds import ClusterFuture
from tests.conftest import eventually, fastkv_threads, open_fds
from tests.faults.conftest import LONG
from tests.faults.held import HeldServer
from tests.faults.test_callers import resizable
from tests.faults.test_processes import Child
from tests.faults.test_rounds import ONE, Moving
from tests.scripted import ModelServer

HOME = os.path.dirname(fastkv.__file__)


def fork() -> None:
    """One whose child ends at once."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def check(client: fastkv.Redis) -> None:
    client.connection_pool.disconnect()  # so that it needs a new connection
    assert client.batch_tile_exists(["v"], timeout=20) == [False]


def check_future(client: fastkv.Redis) -> None:
    client.connection_pool.disconnect()
    assert client.submit_batch_tile_exists(["v"], timeout=20).result() == [False]


USES: dict[str, Callable[[fastkv.Redis], None]] = {
    "close": fastkv.Redis.close,
    "call": check,
    "future": check_future,
    "fork": lambda client: fork(),
}


@pytest.mark.parametrize("use", USES)
def test_a_client_is_used_at_any_line_of_a_fork(use: str) -> None:
    """By a signal handler, on the thread that forks; in the child, too."""
    parent = os.getpid()
    left = used = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left, used
        if not frame.f_code.co_filename.startswith(HOME):
            return None
        if event in ("call", "line"):
            left -= 1
            if left == 0:
                sys.settrace(None)
                used += 1
                if os.getpid() != parent:
                    signal.alarm(30)  # ends a child that hangs
                for client in clients:
                    USES[use](client)
        return trace

    with ModelServer(1) as server:
        clients = [fastkv.Redis(port=server.port, tile_workers=1) for _ in range(2)]
        at = 0
        while left <= 0:
            at += 1 if LONG or at < 20 else 2
            for client in clients:
                assert client.batch_tile_exists(["v"], timeout=20) == [False]
            left = at
            sys.settrace(trace)
            pid = os.fork()
            sys.settrace(None)
            if pid == 0:
                os._exit(0 if left > 0 or used else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            # Whatever this thread holds, others find it free.
            done: list[object] = []

            def go_on(done: list[object] = done) -> None:
                for client in clients:
                    check(client)
                fork()
                done.append(None)

            thread = threading.Thread(target=go_on, daemon=True)
            thread.start()
            thread.join(30)
            assert done, at
        for client in clients:
            client.close()
    assert used > 20


# In a hook, a fork of its own hangs: concurrent.futures has taken a lock.
@pytest.mark.parametrize("use", ["close", "call", "future"])
def test_a_hook_that_comes_after_ours_uses_a_client(use: str) -> None:
    """Hooks that were registered before fastkv was imported run after its own."""
    code = """
import os, sys
clients = []
def hook():
    while clients:
        USES[sys.argv[2]](clients.pop())
os.register_at_fork(before=hook)
import fastkv
from tests.faults.test_forks import USES, check, fork
client = fastkv.Redis(port=int(sys.argv[1]))
for _ in range(2):
    check(client)
    clients.append(client)
    fork()
    assert not clients
    check(client)
client.close()
"""
    with ModelServer(1) as server:
        done = subprocess.run(
            [sys.executable, "-c", code, str(server.port), use],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def forks_while(
    wait: Callable[[], object], reached: threading.Event, go_on: threading.Event
) -> object:
    """What ``wait`` returned or raised in the parent; its child's status was that of
    `repr`, as told by a pipe.
    """
    read, write = os.pipe()
    children: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        children.append(os.fork())
        if children[-1] == 0:
            signal.alarm(30)

    def meanwhile() -> None:
        assert reached.wait(30)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        assert eventually(lambda: bool(children))
        go_on.set()

    before = signal.signal(signal.SIGUSR1, handler)
    thread = threading.Thread(target=meanwhile)
    thread.start()
    result: object = None
    try:
        result = wait()
    except Exception as error:
        result = f"{error}"
    finally:
        if children and children[-1] == 0:
            os.write(write, f"{result}".encode())
            os._exit(0)
        thread.join()
        signal.signal(signal.SIGUSR1, before)
        os.close(write)
        told = os.read(read, 1000).decode()
        os.close(read)
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0
    return result, told


@pytest.mark.parametrize("how", ["result", "exception"])
@pytest.mark.parametrize("timeout", [None, 60])
def test_a_signal_handler_forks_while_a_future_is_awaited(
    how: str, timeout: float | None
) -> None:
    with HeldServer(1, "asked") as server:
        client = fastkv.Redis(port=server.port, tile_connections=1)
        future = client.submit_batch_tile_exists(["v"])
        result = forks_while(
            lambda: getattr(future, how)(timeout), server.reached, server.go_on
        )
        client.close()
    lost = "The batch was submitted before a fork, in the parent."
    assert result == ([False] if how == "result" else None, lost)


@pytest.mark.parametrize("how", ["wait", "as_completed"])
def test_a_signal_handler_forks_while_futures_are_waited_for(how: str) -> None:
    """With a time-out: see what is known in the README."""

    def wait() -> object:
        while True:
            if how == "wait":
                done = concurrent.futures.wait([future], 0.5).done
            else:
                done = set()
                with contextlib.suppress(concurrent.futures.TimeoutError):
                    done.update(concurrent.futures.as_completed([future], 0.5))
            if done:
                return future.result()

    with HeldServer(1, "asked") as server:
        client = fastkv.Redis(port=server.port, tile_connections=1)
        future = client.submit_batch_tile_exists(["v"])
        result = forks_while(wait, server.reached, server.go_on)
        client.close()
    assert result == ([False], "The batch was submitted before a fork, in the parent.")


def test_a_signal_handler_forks_while_a_look_at_a_cluster_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is asked for once more in the child."""
    parent = os.getpid()
    reached, go_on = threading.Event(), threading.Event()
    before = refresher._Crew.enter

    def slow(self: refresher._Crew, waiter: refresher._Waiter) -> None:
        if os.getpid() == parent:
            reached.set()
            assert go_on.wait(30)
        before(self, waiter)

    monkeypatch.setattr(refresher._Crew, "enter", slow)
    shared = Refresher()
    looks: list[int] = []

    def look() -> object:
        shared.run(Refresh(), lambda _: looks.append(os.getpid() - parent))
        assert looks == [os.getpid() - parent]
        return client.batch_tile_exists(["v"], timeout=20)

    with ModelServer(1) as server, fastkv.Redis(port=server.port) as client:
        assert forks_while(look, reached, go_on) == ([False], "[False]")


def test_a_signal_handler_forks_while_it_is_said_that_a_look_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Right before the call waits for that; nobody lets the lock go in the child."""
    waiting, reached, go_on = (threading.Event() for _ in "abc")
    before = refresher.Shared.wait

    class Slow(refresher.Condition):
        def notify_all(self) -> None:
            assert waiting.wait(30)
            reached.set()
            assert go_on.wait(30)
            super().notify_all()

    def wait(*args: Any) -> Any:
        waiting.set()
        assert eventually(lambda: go_on.is_set() or os.getpid() != parent)
        return before(*args)

    def look() -> object:
        return Refresher().run(Refresh(), lambda _: None)

    parent = os.getpid()
    monkeypatch.setattr(refresher, "Condition", Slow)
    monkeypatch.setattr(refresher.Shared, "wait", wait)
    lost = "The call began before a fork, in the parent."
    assert forks_while(look, reached, go_on) == (None, lost)


@pytest.mark.parametrize("where", ["start", "close"])
def test_a_signal_handler_forks_while_threads_are_started_or_joined(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = os.getpid()
    reached, go_on = threading.Event(), threading.Event()
    name = {"start": "begin", "close": "close"}[where]
    before: Callable[[Node], None] = getattr(Node, name)

    def slow(self: Node) -> None:
        if os.getpid() == parent:
            reached.set()
            assert go_on.wait(30)
        before(self)

    with ModelServer(1) as server:
        client = fastkv.Redis(port=server.port)
        if where == "close":
            assert client.batch_tile_exists(["v"]) == [False]
        monkeypatch.setattr(Node, name, slow)

        def use() -> object:
            if where == "close":
                return client.close()
            return client.batch_tile_exists(["v"], timeout=20)

        result = forks_while(use, reached, go_on)
        assert result == ((None, "None") if where == "close" else ([False], "[False]"))
        client.close()


@pytest.mark.parametrize(
    ("cluster", "how"),
    [
        *((False, "run"), (False, "submit"), (True, "run"), (True, "submit")),
        *((True, "moved at once"), (True, "answered at once")),
    ],
)
def test_a_signal_handler_forks_at_any_line_of_a_call(
    cluster: bool, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the child the call ends, too, and the client can be used."""
    parent = os.getpid()
    drained = ClusterFuture._drained

    def last(self: ClusterFuture) -> None:
        # Then the submitting thread goes on with the rounds.
        if threading.current_thread() is threading.main_thread():
            assert eventually(lambda: len(self._left) == 1 or os.getpid() != parent)
        drained(self)

    if "at once" in how:
        monkeypatch.setattr(ClusterFuture, "_drained", last)
    of_slots = topology._Owners.__init__.__code__
    left = 0
    children: list[int] = []

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        code = frame.f_code
        if not code.co_filename.startswith(HOME) or code is of_slots:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                sys.settrace(None)
                children.append(os.fork())
                if children[-1] == 0:
                    signal.alarm(20)  # ends a child that hangs
        return trace

    def call() -> bytes:
        got = bytearray(2000)
        if how == "run":
            assert client.batch_tile_get(["a"], [got], timeout=30) == [True]
        else:
            future = client.submit_batch_tile_get(["a"], [got], timeout=30)
            assert future.result(30) == [True]
        return bytes(got)

    def check_child() -> None:
        """``call`` has returned or raised there."""
        error = sys.exc_info()[1]
        if error is not None:
            assert isinstance(error, (OSError, ConnectionError)), error
            assert "fork" in str(error)
        assert call() == value
        client.close()
        assert eventually(lambda: not fastkv_threads()), fastkv_threads()

    step = 1 if LONG else 11
    at = random.randrange(step)
    value = os.urandom(2000)
    with Moving(1) if cluster else ModelServer(1) as server:
        server.data[b"a"] = value
        kwargs: dict[str, Any] = {"host": "127.0.0.1", "port": server.port, **ONE}
        client = (fastkv.RedisCluster if cluster else fastkv.Redis)(**kwargs)
        assert call() == value
        while left <= 0:
            at += step
            left = at
            status = 1
            try:
                try:
                    if how == "answered at once":
                        server.moved = True  # it has said so already
                    sys.settrace(trace)
                    assert call() == value
                finally:
                    sys.settrace(None)
                    if os.getpid() != parent:
                        check_child()
                        status = 0
            except BaseException:
                if os.getpid() == parent:
                    raise
                if status:
                    traceback.print_exc()
            finally:
                if os.getpid() != parent:
                    os._exit(status)
            while children:
                code = os.waitstatus_to_exitcode(os.waitpid(children.pop(), 0)[1])
                assert code == 0, at
        client.close()
    assert at > 50


def test_what_was_accepted_before_a_fork_is_not_sent_again_in_the_child(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A signal handler forks right after that, and raises there: nothing is pinned."""
    parent = os.getpid()
    before = Node.start

    def start(*args: Any) -> int:
        code = before(*args)
        assert server.reached.wait(30)
        if os.fork() == 0:
            signal.alarm(20)  # ends a child that hangs
            raise ConnectionError("the handler's")
        return code

    with HeldServer(1, "asked") as server:
        client = fastkv.Redis(port=server.port, tile_connections=1)
        server.data[b"v"] = b"x"
        memory = bytearray(1)
        monkeypatch.setattr(Node, "start", start)
        status = 1
        try:
            future = client.submit_batch_tile_get(["v"], [memory])
        except ConnectionError as error:
            status = 0 if str(error) == "the handler's" and resizable(memory) else 2
        finally:
            if os.getpid() != parent:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
        server.go_on.set()
        assert future.result(30) == [True]
        client.close()


def test_a_connection_that_begins_during_a_fork_is_not_inherited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When its node has been looked at, and is held."""
    inside, go_on = threading.Event(), threading.Event()
    make, before = connector.make_connection, Node.before_fork
    held: list[Node] = []

    def slow(*args: Any) -> Any:
        inside.set()
        assert go_on.wait(30)
        return make(*args)

    def late(self: Node) -> None:
        before(self)
        held.append(self)
        if len(held) == 2:
            go_on.set()
            # For nothing, if all is well.
            for _ in range(30):
                if server.connections > connections:
                    break
                time.sleep(0.01)

    def connected() -> set[str]:
        """Sockets of clients."""
        found = set()
        for fd, what in open_fds().items():
            if what.startswith("socket"):
                with socket.socket(fileno=os.dup(fd)) as one:
                    try:
                        port = one.getpeername()[1]
                    except (OSError, IndexError):
                        continue  # not connected, or of a socketpair
                    if port == server.port:
                        found.add(what)
        return found

    with ModelServer(1) as server:
        clients = [fastkv.Redis(port=server.port, tile_connections=1) for _ in range(2)]
        for client in clients:
            check(client)
        monkeypatch.setattr(connector, "make_connection", slow)
        monkeypatch.setattr(Node, "before_fork", late)
        thread = threading.Thread(target=check, args=clients[:1])
        thread.start()
        assert inside.wait(30)
        connections = server.connections

        def work() -> None:
            assert not connected()

        child = Child(work)
        child.go_on()
        thread.join(30)
        assert not thread.is_alive()
        child.end()
        for client in clients:
            client.close()


def test_a_fork_while_a_node_starts_leaves_no_descriptor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inside, go_on = threading.Event(), threading.Event()
    before = connector.started

    def slow(run: Callable[[], None], name: str) -> threading.Thread:
        inside.set()
        assert go_on.wait(30)
        return before(run, name)

    monkeypatch.setattr(connector, "started", slow)
    with ModelServer(1) as server:
        others = open_fds()
        client = fastkv.Redis(port=server.port)
        thread = threading.Thread(target=lambda: client.batch_tile_exists(["v"]))
        thread.start()
        assert inside.wait(30)

        def work() -> None:
            left = {fd: what for fd, what in open_fds().items() if fd not in others}
            assert not [what for what in left.values() if "event" in what]

        child = Child(work)
        child.go_on()
        child.end()
        go_on.set()
        thread.join()
        client.close()


def test_a_node_that_starts_while_a_fork_looks_for_all_is_no_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raised: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", raised.append)
    parent = os.getpid()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        # Where weak references are gone through.
        if "weakref" not in frame.f_code.co_filename or os.getpid() != parent:
            return None
        if event == "line" and len(clients) < 20:
            clients.append(fastkv.Redis(port=server.port, tile_workers=1))
            thread = threading.Thread(target=clients[-1]._node)
            thread.start()
            thread.join()
        return trace

    with ModelServer(1) as server:
        clients = [fastkv.Redis(port=server.port, tile_workers=1) for _ in range(2)]
        for client in clients:
            client._node()
        sys.settrace(trace)
        pid = os.fork()
        sys.settrace(None)
        if pid == 0:
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert not raised
        assert len(clients) > 2
        for client in clients:
            check(client)
            client.close()


class ParentsNode:
    pid = -1

    def __init__(self, pool: redis.ConnectionPool) -> None:
        self.pool = lambda: pool

    def after_fork_in_child(self) -> None:
        pass


def test_who_comes_second_after_a_fork_in_c_waits_for_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their new nodes must not be taken for the parent's."""
    inside, over = threading.Event(), threading.Event()

    def unwatch(pool: object) -> None:
        inside.set()
        over.wait(0.3)  # unless the second waits for us

    with ModelServer(1) as server:
        client = fastkv.Redis(port=server.port)
        pool = redis.ConnectionPool()
        parents: Any = ParentsNode(pool)
        registry._nodes[pool] = registry._alive[id(parents)] = parents
        with monkeypatch.context() as patch:
            patch.setattr(registry, "_unwatch", unwatch)
            patch.setattr(registry, "_pid", -1)  # as if we were the child
            first = threading.Thread(target=registry._check_fork)
            first.start()
            assert inside.wait(30)
            node = client._node()
            over.set()
            first.join()
        assert node.usable
        check(client)
        assert client._tile_node is node
        client.close()


def test_a_handler_uses_a_client_in_a_child_before_the_rest_is_told_of_the_fork(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The child's nodes are not taken for the parent's."""
    before = registry._living

    def living() -> list[Node]:
        monkeypatch.undo()
        check(client)
        return before()

    with ModelServer(1) as server:
        client = fastkv.Redis(port=server.port)
        check(client)
        parent = os.getpid()

        def at_fork() -> list[Node]:
            return before() if os.getpid() == parent else living()

        def work() -> None:
            node = client._tile_node
            assert node is not None
            assert node.usable
            check(client)
            assert client._tile_node is node
            client.close()

        monkeypatch.setattr(registry, "_living", at_fork)
        child = Child(work)
        child.go_on()
        child.end()
        monkeypatch.undo()
        client.close()
