"""Servers, clients, and the leak check after every test."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import hypothesis
import pytest
import redis

import fastkv
from fastkv import registry
from fastkv._core import has_tls
from fastkv.cli.private_server import PrivateServer, ServerBinary, find_servers
from tests.demux import Demux
from tests.tls import speaks_tls

hypothesis.settings.register_profile("dev", max_examples=50, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=150, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

# Which servers must be there, else the run fails: beginnings of their names, such as
# "redis-7,redis-8,valkey-8", or "1" for any.
REQUIRED = os.environ.get("FASTKV_REQUIRE_SERVER", "")
# Likewise what tests would else be skipped for, such as "torch,lmcache".
REQUIRED_MODULES = os.environ.get("FASTKV_REQUIRE_MODULES", "")
SERVERS = find_servers()


def pytest_configure() -> None:
    names = [str(server) for server in SERVERS]
    for wanted in REQUIRED.split(",") if REQUIRED else []:
        if not (names if wanted == "1" else [n for n in names if n.startswith(wanted)]):
            raise pytest.UsageError(f"no server {wanted!r} among {names}")
    for module in filter(None, REQUIRED_MODULES.split(",")):
        if importlib.util.find_spec(module) is None:
            raise pytest.UsageError(f"no module {module!r}")
    # A shell has what it starts in the background ignore it, and so would our children.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Endpoint:
    """A way to a running server."""

    server: PrivateServer
    unix: bool

    @property
    def kwargs(self) -> dict[str, Any]:
        if self.unix:
            return {"unix_socket_path": self.server.unix_path}
        return {"host": "127.0.0.1", "port": self.server.port}

    @property
    def url(self) -> str:
        if self.unix:
            return f"unix://{self.server.unix_path}"
        return f"redis://127.0.0.1:{self.server.port}"


@pytest.fixture(scope="session")
def running() -> Iterator[Callable[[ServerBinary], PrivateServer]]:
    """One running server for each binary, for the whole session."""
    started: dict[ServerBinary, PrivateServer] = {}

    def start(binary: ServerBinary) -> PrivateServer:
        if binary not in started:
            server = PrivateServer(binary, "--enable-debug-command", "yes")
            server.start()
            started[binary] = server
        return started[binary]

    yield start
    for server in started.values():
        server.__exit__(None, None, None)


def _need(servers: list[ServerBinary]) -> list[Any]:
    if servers:
        return [pytest.param(server, id=str(server)) for server in servers]
    return [pytest.param(None, marks=pytest.mark.skip(reason="no server found"))]


@pytest.fixture(params=_need(SERVERS))
def binary(request: pytest.FixtureRequest) -> ServerBinary:
    """Each kind of server that is installed."""
    return request.param  # type: ignore[no-any-return]  # pytest's params are untyped


@pytest.fixture
def server(binary: ServerBinary, running: Any) -> PrivateServer:
    """Each kind of server, running and empty."""
    server: PrivateServer = running(binary)
    with server.client() as client:
        client.flushall()
    return server


@pytest.fixture(params=["tcp", "unix"])
def endpoint(request: pytest.FixtureRequest, server: PrivateServer) -> Endpoint:
    """Each kind of server, over each transport."""
    return Endpoint(server, request.param == "unix")


@pytest.fixture(params=_need(SERVERS[:1]))
def own_server(request: pytest.FixtureRequest) -> Iterator[PrivateServer]:
    """A server of the test's own, to be killed, stopped and configured."""
    with PrivateServer(request.param, "--enable-debug-command", "yes") as server:
        yield server


@pytest.fixture(scope="session")
def tls_binary() -> ServerBinary:
    """A server that was built with TLS."""
    missing = "this build of fastkv has no TLS" if not has_tls() else ""
    binary = next((one for one in SERVERS if speaks_tls(one)), None)
    if binary is not None and not missing:
        return binary
    missing = missing or "no server that was built with TLS"
    if os.environ.get("FASTKV_REQUIRE_TLS") == "1":
        pytest.fail(missing)
    pytest.skip(missing)


@pytest.fixture
def make(no_leaks: None) -> Iterator[Callable[..., fastkv.Redis]]:
    """Makes clients; closes them at the end."""
    clients: list[fastkv.Redis] = []

    def make_client(*args: Any, **kwargs: Any) -> fastkv.Redis:
        client = fastkv.Redis(*args, **kwargs)
        clients.append(client)
        return client

    yield make_client
    for client in clients:
        client.close()


@pytest.fixture
def demux(no_leaks: None) -> Iterator[Callable[..., Demux]]:
    """Makes clients for LMCache; closes them at the end."""
    made: list[Demux] = []

    def make(url: str, **settings: Any) -> Demux:
        made.append(Demux(url, **settings))
        return made[-1]

    yield make
    for one in made:
        one.client.close()
        one.take()
        assert one.client._in_flight == {}


@pytest.fixture
def client(make: Callable[..., fastkv.Redis], endpoint: Endpoint) -> fastkv.Redis:
    """A client of each kind of server over each transport."""
    return make(**endpoint.kwargs)


@pytest.fixture
def plain(server: PrivateServer) -> Iterator[redis.Redis]:
    """redis-py's own client of the same server."""
    with server.client() as client:
        yield client


def pytest_collection_finish() -> None:
    # `no_leaks` collects garbage twice a test: not all of torch's modules each time.
    gc.collect()
    gc.freeze()


def open_fds() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            pass  # the one that listdir had open
    return found


def fastkv_threads() -> list[str]:
    native = []
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/comm") as comm:
                name = comm.read().strip()
        except OSError:
            continue  # it has just ended
        if name.startswith("fastkv"):
            native.append(name)
    return native + [t.name for t in threading.enumerate() if "fastkv" in t.name]


def eventually(true: Callable[[], bool]) -> bool:
    """Wait for what tells nobody that it happens, such as the end of a thread."""
    deadline = time.monotonic() + 5
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


@pytest.fixture(autouse=True)
def no_leaks(running: object) -> Iterator[None]:
    """After every test: no thread, descriptor, node or batch of ours is left."""
    gc.collect()
    before = open_fds()
    yield
    gc.collect()
    # A client that was dropped, not closed, ends its threads from one of them.
    assert eventually(lambda: not fastkv_threads()), fastkv_threads()
    assert [n for n in registry._nodes.values() if not n.closed] == []
    after = open_fds()
    assert {fd: after[fd] for fd in after.keys() - before.keys()} == {}
