"""Forks, exits and other interpreters, at every stage of a batch.

The parent goes on with right bytes, the child can use the client anew, no connection
outlives its owner's close, and a process ends as if we were not there.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.resource_tracker
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from types import FrameType
from typing import Any

import pytest
import redis
from redis.exceptions import ConnectionError

import fastkv
from fastkv import registry
from tests.conftest import Endpoint, eventually, fastkv_threads, open_fds
from tests.faults.conftest import LONG
from tests.faults.held import STAGES, HeldServer
from tests.faults.native import loaded
from tests.faults.test_callers import Held, Interrupted, resizable
from tests.scripted import ModelServer, SilentPeer

# A library that forks asks nobody before. Then its child tells Python, or has nothing
# to do with it and waits for a byte.
FORKING = """
#include <Python.h>
#include <unistd.h>
extern "C" int fork_and_tell() {
  const int pid = fork();
  if (pid == 0) PyOS_AfterFork_Child();
  return pid;
}
extern "C" int fork_and_wait(int fd) {
  const int pid = fork();
  char byte;
  if (pid == 0) _exit(read(fd, &byte, 1) == 1 ? 0 : 1);
  return pid;
}
"""


@pytest.fixture(scope="module", autouse=True)
def warm_resource_tracker() -> None:
    """It keeps a pipe for ever from its first use on."""
    multiprocessing.resource_tracker.ensure_running()


@pytest.fixture(params=STAGES)
def held(request: pytest.FixtureRequest) -> Iterator[Held]:
    with HeldServer(random.getrandbits(32), request.param) as server:
        held = Held(server, request.param)
        yield held
        held.client.close()


class Child:
    """A forked process that does ``work`` once `go_on` is called, and then waits."""

    def __init__(
        self, work: Callable[[], object], fork: Callable[[], int] = os.fork
    ) -> None:
        self._ours, theirs = socket.socketpair()
        self.pid = fork()
        if self.pid:
            theirs.close()
            return
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends a child that hangs
            signal.alarm(30)
            self._ours.close()
            theirs.recv(1)
            work()
            theirs.send(b"done")
            theirs.recv(1)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def go_on(self) -> None:
        self._ours.send(b".")
        assert self._ours.recv(4) == b"done"

    def end(self) -> None:
        self._ours.send(b".")
        self._ours.close()
        assert os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) == 0


def in_thread(fork: Callable[[], int] = os.fork) -> Callable[[Any], Child]:
    def make(work: Callable[[], object]) -> Child:
        made: list[Child] = []
        thread = threading.Thread(target=lambda: made.append(Child(work, fork)))
        thread.start()
        thread.join()
        return made[0]

    return make


FORKS: dict[str, Callable[[Callable[[], object]], Child]] = {
    "main": Child,
    "thread": in_thread(),
    "C": lambda work: Child(work, loaded(FORKING).fork_and_tell),
}


def sockets() -> set[str]:
    return {target for target in open_fds().values() if target.startswith("socket")}


def check_in_child(held: Held) -> None:
    """The client is a new one, and the memory of the parent's batch is free."""
    assert resizable(held.memory)
    with ModelServer(1) as other:  # the parent's would be asked by both
        other.data[b"v"] = value = os.urandom(3000)
        held.client.connection_pool.connection_kwargs["port"] = other.port
        got = bytearray(3000)
        assert held.client.batch_tile_get(["v"], [got], timeout=30) == [True]
        assert got == value
        assert held.client.submit_batch_tile_exists(["v", "no"]).result(30) == [
            *(True, False)
        ]
        held.client.close()
    assert not fastkv_threads()


@pytest.mark.parametrize("fork", FORKS)
def test_a_fork_at_any_stage(held: Held, fork: str) -> None:
    before = sockets()
    future = held.submit()
    assert held.server.reached.wait(30)
    ours = sockets() - before

    def work() -> None:
        check_in_child(held)
        with pytest.raises(ConnectionError, match="before a fork"):
            future.result(0)
        if fork != "C":
            # No socket of the parent's engine or connector is left. (The server's are:
            # it is a thread of the test's.)
            server_side = {
                os.readlink(f"/proc/self/fd/{one.fileno()}")
                for one in held.server._sockets
                if one.fileno() >= 0
            }
            assert not (ours - server_side) & sockets()

    child = FORKS[fork](work)
    child.go_on()
    held.server.go_on.set()
    assert future.result(30) == [True]
    if held.sets:
        assert held.server.data[b"v"] == held.memory
    else:
        assert held.memory == held.value
    child.end()
    held.check_let_go()


class Closing(ModelServer):
    """Knows when its peers have closed."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.reached = threading.Event()
        self.go_on = threading.Event()
        self.ended: list[socket.socket] = []
        super().__init__(1)

    def handshake(self, command: list[bytes]) -> bytes:
        self.reached.set()
        if self.stage == "connecting":
            self.go_on.wait(30)
            return b"-ERR no\r\n"
        return super().handshake(command)

    def _serve(self, connection: socket.socket) -> None:
        super()._serve(connection)
        self.ended.append(connection)


@pytest.mark.parametrize("in_c", [False, True])
@pytest.mark.parametrize("end", ["close", "drop", "lose"])
def test_a_child_keeps_no_connection_of_the_parents_alive(in_c: bool, end: str) -> None:
    """Whatever descriptors it holds, the server sees that the parent has closed."""
    with Closing("") as server:
        client: Any = fastkv.Redis(port=server.port, tile_connections=2)
        assert client.submit_batch_tile_exists(["v"]).result(30) == [False]
        assert client.batch_tile_set(["v", "w"], [b"1", b"2"]) == [True, True]
        read, write = os.pipe()
        if in_c:
            pid = loaded(FORKING).fork_and_wait(read)
        else:
            child = Child(lambda: None)
            child.go_on()
        if end == "close":
            client.close()
        elif end == "drop":
            client = None
        else:
            client.connection_pool.disconnect()
        assert eventually(lambda: len(server.ended) == server.connections)
        if in_c:
            os.write(write, b".")
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        else:
            child.end()
        os.close(read)
        os.close(write)
        if client is not None:
            client.close()


def test_a_fork_that_nobody_was_told_of_is_noticed() -> None:
    """Python survives such a fork only if no other thread waits for the GIL: in the C
    library, a condition that somebody waited for at the fork hangs in the child.
    """
    code = """
import ctypes, os, signal, sys, threading
from pathlib import Path
import fastkv
from tests.conftest import eventually
def waits_in_poll(thread):
    return "poll" in Path(f"/proc/self/task/{thread.native_id}/wchan").read_text()
client = fastkv.Redis(port=int(sys.argv[1]))
value = bytes(range(250)) * 12
def check():
    got = bytearray(len(value))
    assert client.batch_tile_get(["v"], [got], timeout=20) == [True]
    assert got == value
check()
for close in (True, False):
    others = set(threading.enumerate()) - {threading.main_thread()}
    assert [thread.name for thread in others] == ["fastkv-connector"]
    assert eventually(lambda: waits_in_poll(*others))
    pid = ctypes.PyDLL(None).fork()  # keeps the GIL
    if pid == 0:
        signal.alarm(4)
        check()
        if close:
            client.close()
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    check()
"""
    with ModelServer(1) as server:
        server.data[b"v"] = bytes(range(250)) * 12
        done = subprocess.run(
            [sys.executable, "-c", code, str(server.port)],
            capture_output=True,
            text=True,
            timeout=90,
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("fork", ["main", "thread"])
def test_a_connection_that_is_being_made_is_left_to_the_parent(fork: str) -> None:
    with Closing("connecting") as server:
        client = fastkv.Redis(
            port=server.port, socket_timeout=1, client_name="x", tile_connections=1
        )
        client.set_retry(redis.retry.Retry(redis.backoff.NoBackoff(), 0))
        before = sockets()
        future = client.submit_batch_tile_exists(["v"])
        assert server.reached.wait(30)
        made = sockets() - before
        server_side = {os.readlink(f"/proc/self/fd/{server._sockets[0].fileno()}")}

        def work() -> None:
            assert not (made - server_side) & sockets()

        child = FORKS[fork](work)
        child.go_on()
        client.close()
        assert isinstance(future.exception(30), ConnectionError)
        assert eventually(lambda: not fastkv_threads())
        server.go_on.set()
        assert eventually(lambda: len(server.ended) == server.connections)
        child.end()


def test_a_socket_that_waits_for_an_answer_to_connect_is_not_inherited() -> None:
    """redis-py has it in a local variable."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)  # one connection, and then nobody is answered
        address = full.getsockname()
        with socket.create_connection(address), socket.socket() as second:
            second.setblocking(False)
            second.connect_ex(address)
            client = fastkv.Redis(
                port=address[1], socket_connect_timeout=2, tile_connections=1
            )
            client.set_retry(redis.retry.Retry(redis.backoff.NoBackoff(), 0))
            before = sockets()
            future = client.submit_batch_tile_exists(["v"])
            assert eventually(lambda: len(sockets() - before) == 1)
            made = sockets() - before

            def work() -> None:
                assert not made & sockets()

            child = Child(work)
            child.go_on()
            assert future.exception(30) is not None
            child.end()
            client.close()
            assert eventually(lambda: not fastkv_threads())


def test_a_socket_that_is_half_made_is_no_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And that of a user's hook is left to the child."""
    inside, go_on = threading.Event(), threading.Event()
    ours, theirs = socket.socketpair()

    def hold() -> None:
        if "connector" in threading.current_thread().name:
            inside.set()
            go_on.wait(30)

    def hook(connection: Any) -> None:
        sock = ours  # a local
        hold()
        del sock
        connection.on_connect()

    # As a frame of the module `socket`.
    scope: Any = {"hold": hold, "made": socket.socket.__init__, "__name__": "socket"}
    exec("def init(self, *a, **k): hold(); made(self, *a, **k)", scope)
    with ModelServer(1) as server, ours, theirs:
        others = [fastkv.Redis(port=server.port, tile_workers=1) for _ in range(3)]
        for other in others:
            assert other.batch_tile_exists(["v"]) == [False]
        for where in ("socket", "hook"):
            inside.clear()
            go_on.clear()
            client: Any = fastkv.Redis(
                port=server.port,
                tile_connections=1,
                **({"redis_connect_func": hook} if where == "hook" else {}),
            )
            with monkeypatch.context() as patch:
                if where == "socket":
                    patch.setattr(socket.socket, "__init__", scope["init"])
                future = client.submit_batch_tile_exists(["v"])
                assert inside.wait(30)

                def work(future: Any = future, where: str = where) -> None:
                    with pytest.raises(ConnectionError, match="before a fork"):
                        future.result(0)
                    assert not [fd for fd in open_fds().values() if "event" in fd]
                    if where == "hook":
                        assert ours.send(b"x") == 1

                child = Child(work)
                child.go_on()
                child.end()
                go_on.set()
                assert future.result(30) == [False]
            client.close()
        for other in others:
            other.close()


def test_a_tls_connection_that_is_being_made_is_left_to_the_parent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        client = fastkv.Redis(
            port=deaf.getsockname()[1],
            ssl=True,
            ssl_cert_reqs="none",
            ssl_check_hostname=False,
            tile_connections=1,
        )
        before = sockets()
        future = client.submit_batch_tile_exists(["v"])
        peer, _ = deaf.accept()
        with peer:
            assert peer.recv(1) == b"\x16"  # the handshake has begun
            server_side = {os.readlink(f"/proc/self/fd/{peer.fileno()}")}
            made = sockets() - before - server_side
            assert made

            def work() -> None:
                assert not made & sockets()
                client.close()

            child = Child(work)
            child.go_on()
            child.end()
            assert not future.done()
            client.close()
            assert isinstance(future.exception(30), ConnectionError)


def test_an_interrupt_at_any_line_of_a_fork_leaves_the_parent_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home = os.path.dirname(fastkv.__file__)
    left = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(home):
            return None
        if event in ("call", "line"):
            left -= 1
            if left == 0:
                raise Interrupted
        return trace

    raised: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", raised.append)
    with ModelServer(1) as server:
        clients = [fastkv.Redis(port=server.port, tile_workers=1) for _ in range(2)]
        at = 0
        while left <= 0:
            at += 1
            left = at
            sys.settrace(trace)
            pid = os.fork()
            sys.settrace(None)
            if pid == 0:
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            for client in clients:
                # Makes a connection, too.
                client.connection_pool.disconnect()
                assert client.batch_tile_exists(["v"], timeout=30) == [False]
        for client in clients:
            client.close()
    assert len(raised) == at - 1 > 20


@pytest.mark.parametrize("timeout", [None, 30])
def test_a_signal_handler_forks_during_a_call(timeout: float | None) -> None:
    children: list[int] = []

    def fork(number: int, frame: FrameType | None) -> None:
        children.append(os.fork())
        if children[-1] == 0:
            signal.alarm(30)

    handler = signal.signal(signal.SIGUSR1, fork)
    try:
        with HeldServer(1, "asked") as server:
            server.data[b"v"] = value = os.urandom(100)
            got = bytearray(100)
            client = fastkv.Redis(port=server.port, tile_connections=1)
            main = threading.main_thread().ident or 0

            def meanwhile() -> None:
                assert server.reached.wait(30)
                signal.pthread_kill(main, signal.SIGUSR1)
                assert eventually(lambda: bool(children))
                server.go_on.set()

            thread = threading.Thread(target=meanwhile)
            thread.start()
            try:
                hits = client.batch_tile_get(["v"], [got], timeout=timeout)
            except OSError as error:
                os._exit("a fork" in str(error) and got == bytes(100))
            finally:
                if children[-1] == 0:
                    os._exit(2)
            thread.join()
            assert (hits, got) == ([True], value)
            assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 1
            client.close()
    finally:
        signal.signal(signal.SIGUSR1, handler)


def test_a_child_of_a_fork_in_c_closes_without_ending_what_the_parent_makes() -> None:
    with HeldServer(1, "connecting") as server:
        client = fastkv.Redis(port=server.port, tile_connections=1)
        future = client.submit_batch_tile_exists(["v"])
        assert server.reached.wait(30)
        child = FORKS["C"](client.close)
        child.go_on()
        server.go_on.set()
        assert future.result(30) == [False]
        assert server.connections == 1
        child.end()
        client.close()


def test_forks_at_random_moments_of_everything(endpoint: Endpoint) -> None:
    """Creation, calls, losses and closes of clients, while another thread forks."""
    seed = random.getrandbits(32)
    stop = threading.Event()
    failed: list[BaseException] = []

    def live(number: int) -> None:
        chance = random.Random(seed + number)
        try:
            while not stop.is_set():
                client = fastkv.Redis(**endpoint.kwargs, tile_workers=1)
                for _ in range(chance.randint(0, 3)):
                    value = chance.randbytes(chance.randint(1, 200_000))
                    key = f"k{number}"
                    assert client.batch_tile_set([key], [value]) == [True]
                    got = bytearray(len(value))
                    assert client.batch_tile_get([key], [got]) == [True]
                    assert got == value
                    if chance.random() < 0.3:
                        client.connection_pool.disconnect()
                if chance.random() < 0.5:
                    client.close()
        except BaseException as error:
            failed.append(error)

    lives = [threading.Thread(target=live, args=(i,)) for i in range(2)]
    for thread in lives:
        thread.start()
    try:
        for _ in range(200 if LONG else 12):

            def work() -> None:
                assert list(registry._nodes) == []
                with fastkv.Redis(**endpoint.kwargs) as client:
                    assert client.batch_tile_exists(["no"], timeout=30) == [False]

            child = Child(work)
            child.go_on()
            child.end()
    finally:
        stop.set()
        for thread in lives:
            thread.join()
    assert not failed, seed


def _in_worker(kwargs: dict[str, Any]) -> list[bool]:
    with fastkv.Redis(**kwargs) as client:
        return client.batch_tile_exists(["a", "no"], timeout=30)


def test_children_of_a_forkserver_work() -> None:
    with ModelServer(1) as server:
        kwargs = {"port": server.port}
        with fastkv.Redis(**kwargs) as client:
            assert client.batch_tile_set(["a"], [b"x"]) == [True]
            with multiprocessing.get_context("forkserver").Pool(2) as pool:
                assert pool.map(_in_worker, [kwargs] * 4) == [[True, False]] * 4
            assert client.batch_tile_exists(["a"]) == [True]
    # It would stay, with a pipe to us.
    forkserver._forkserver._stop()  # type: ignore[attr-defined]  # for tests of Python's


def test_programs_that_we_start_inherit_nothing(held: Held) -> None:
    future = held.submit()
    assert held.server.reached.wait(30)
    ours = {fd for fd in open_fds() if not os.get_inheritable(fd)}
    listing = "import os; print(*os.listdir('/proc/self/fd'))"
    for close_fds in (True, False):
        seen = subprocess.run(
            [sys.executable, "-c", listing],
            close_fds=close_fds,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        # 0 to 2, and the directory that it reads.
        assert len(set(map(int, seen.split())) - {0, 1, 2}) <= 1 + len(
            set(open_fds()) - ours - {0, 1, 2}
        )
    inherited = {fd: what for fd, what in open_fds().items() if fd not in ours}
    assert not [what for what in inherited.values() if "socket" in what]
    assert not [what for what in inherited.values() if "event" in what]
    held.server.go_on.set()
    assert future.result(30) == [True]


# --- exit ----------------------------------------------------------------------------

BEGIN = """
import asyncio, atexit, os, signal, sys, threading
import fastkv, fastkv.asyncio
kwargs = {"port": int(sys.argv[1])}
client = fastkv.Redis(**kwargs)
value = bytes(range(256)) * 40
memory = bytearray(len(value))
def block():
    try:
        client.batch_tile_get(["v"], [memory])
    except BaseException as error:
        assert "closed" in str(error), error
def started():
    threading.Thread(target=block, daemon=True).start()
    while not client.tile_info()["connections"]:
        os.sched_yield()
async def many():
    aclient = fastkv.asyncio.Redis(**kwargs)
    calls = [aclient.batch_tile_get(["v"], [bytearray(len(value))]) for _ in range(20)]
    tasks = [asyncio.ensure_future(call) for call in calls]
    await asyncio.sleep(0.05)
"""

ENDINGS = {
    "daemon": "started()",
    "daemons": "[started() for _ in range(20)]",
    "sys.exit": "started(); sys.exit(3)",
    "raise": "started(); raise SystemExit(3)",
    "futures": "f = [client.submit_batch_tile_get(['v'], [bytearray(10)])"
    " for _ in range(1000)]",
    "asyncio": "asyncio.run(many())",
    "atexit": "atexit.register(client.submit_batch_tile_get, ['v'], [memory])",
    "atexit first use": "atexit.register(lambda:"
    " fastkv.Redis(**kwargs).submit_batch_tile_get(['v'], [memory]))",
    "atexit close": "atexit.register(client.close); started()",
    "callback": "client.submit_batch_tile_get(['v'], [memory])"
    ".add_done_callback(lambda f: client.close())",
    "finalizer": """
started()
class Last:
    def __del__(self, client=client):
        try:
            client.close()
            client.submit_batch_tile_exists(["v"])
        except RuntimeError as error:
            assert "shutdown" in str(error)
last = Last()
""",
    "module global": "sys.modules['sys'].kept = client, memory; started()",
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("silent", [True, False] if LONG else [True])
def test_a_process_ends_though_work_is_in_flight(ending: str, silent: bool) -> None:
    with SilentPeer() if silent else ModelServer(1) as server:
        if not silent:
            server.data[b"v"] = bytes(range(256)) * 40
        done = subprocess.run(
            [
                *(sys.executable, *(["-X", "dev"] if LONG else []), "-c"),
                *(BEGIN + ENDINGS[ending], str(server.port)),
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )
        # Of asyncio's debug mode, which tells of what is slow.
        lines = [line for line in done.stderr.splitlines() if "Executing" not in line]
        assert (done.returncode, done.stdout, lines) == (
            *(3 if ending in ("sys.exit", "raise") else 0, ""),
            [],
        )


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT] if LONG else [signal.SIGINT]
)
@pytest.mark.parametrize("where", ["blocking", "future", "asyncio", "closing"])
def test_a_signal_ends_a_process_at_once(number: signal.Signals, where: str) -> None:
    code = {
        "blocking": "block_on = lambda: client.batch_tile_get(['v'], [memory])",
        "future": "block_on = lambda:"
        " client.submit_batch_tile_get(['v'], [memory]).result()",
        "asyncio": "async def wait():\n"
        "    await fastkv.asyncio.Redis(**kwargs).batch_tile_get(['v'], [memory])\n"
        "block_on = lambda: asyncio.run(wait())",
        "closing": "block_on = lambda:"
        " [(started(), client.close()) for _ in range(9999)]",
    }[where]
    with SilentPeer() as silent:
        process = subprocess.Popen(
            [sys.executable, "-c", f"{BEGIN}{code}\nblock_on()", str(silent.port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert silent.asked.wait(60)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == -number
    if number == signal.SIGTERM:
        assert stderr == ""
    else:
        assert "KeyboardInterrupt" in stderr
        assert "Fatal" not in stderr


# --- other interpreters --------------------------------------------------------------


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_another_interpreter_is_refused_clearly(first: bool, isolated: bool) -> None:
    """Whoever comes first has it, if it may have threads; nobody crashes."""
    code = """
import sys
port, first, isolated = sys.argv[1], *(word == "True" for word in sys.argv[2:])
if sys.version_info >= (3, 13):
    import _interpreters as interpreters
    made = interpreters.create("isolated" if isolated else "legacy")
    def run(code):
        failure = interpreters.exec(made, code)
        if failure is not None:
            raise RuntimeError(failure.formatted)
else:
    import _xxsubinterpreters as interpreters
    made = interpreters.create(isolated=isolated)
    run = lambda code: interpreters.run_string(made, code)
use = f'''
import fastkv
client = fastkv.Redis(port={port})
got = bytearray(3000)
assert client.batch_tile_get(["v"], [got], timeout=30) == [True]
assert got == bytes(range(250)) * 12
client.close()
'''
if first:
    exec(use)
try:
    run(use)
    print("used")
except Exception as error:
    print(error)
if first:
    exec(use)
"""
    with ModelServer(1) as server:
        server.data[b"v"] = bytes(range(250)) * 12
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, (server.port, first, isolated))],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (0, "")
    refusals = (
        "Interpreter change detected",  # Cython's
        "does not support loading in subinterpreters",  # Python's, from 3.12 on
        "thread is not supported for isolated subinterpreters",  # before
    )
    refused = any(refusal in done.stdout for refusal in refusals)
    assert refused or (done.stdout == "used\n" and not first), done.stdout


def test_an_interpreter_without_its_lock_is_refused_clearly() -> None:
    """PYTHON_GIL=0 in a free-threaded build, seldom at hand; others turn it on."""
    code = "import sys; sys._is_gil_enabled = lambda: False; import fastkv"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError: fastkv needs the GIL" in done.stderr
