"""TLS that ends in odd ways, comes in odd records or from the wrong server: right bytes
or redis-py's exception, at once, and the next call works.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError
from redis.retry import Retry

from fastkv._core import has_tls
from fastkv.cli.private_server import ServerBinary
from tests.conftest import eventually
from tests.faults.calls import WAYS, Caller, memory
from tests.faults.conftest import LONG
from tests.faults.test_network import CALM, SEED, one_way, told
from tests.scripted import OddServer, Step
from tests.tls import Authority, Identity, TlsServer

pytestmark = pytest.mark.skipif(not has_tls(), reason="no TLS")

ONCE = Retry(NoBackoff(), 0)
SIZE = 20_000
KEYS = ["a", "b", "c"]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"), "authority")


@pytest.fixture(scope="module")
def shown(authority: Authority) -> Identity:
    return authority.issue("server", ("localhost", "127.0.0.1"))


@pytest.fixture
def trusting(authority: Authority) -> dict[str, Any]:
    """Arguments of a client."""
    assert authority.identity is not None
    return {"ssl": True, "ssl_ca_certs": authority.identity.cert_file, **CALM}


class Records(ssl.SSLSocket):
    """Sends records of so many bytes at most."""

    size = 1 << 14

    def sendall(self, data: Any, flags: int = 0) -> None:
        for at in range(0, len(data), self.size):
            super().sendall(data[at : at + self.size], flags)


class TlsPeer(OddServer):
    """Answers from a dict, over TLS.

    Attributes:
        left: Set when a client has gone after an end of TLS's own.
    """

    def __init__(self, identity: Identity) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(identity.cert_file, identity.key_file)
        self._context.sslsocket_class = Records
        self.left = threading.Event()
        self._step = Step(())
        super().__init__()

    def odd(self, command: str, nth: int = 1, usual: bool = False) -> Step:
        self.left.clear()
        self._step = super().odd(command, nth, usual)
        return self._step

    def _serve(self, connection: socket.socket) -> None:
        try:
            tls = self._context.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
            with self._lock:
                self._sockets.append(tls)
            tls.do_handshake()
        except OSError:
            return
        super()._serve(tls)

    def answer(self, connection: socket.socket, command: list[bytes]) -> bool:
        if super().answer(connection, command):
            return True
        assert isinstance(connection, Records)
        below = super(ssl.SSLSocket, connection)
        with contextlib.suppress(OSError):
            if self._step.end == "notify":  # the end for TLS, and not for TCP
                with contextlib.suppress(ssl.SSLError):
                    connection.unwrap()
            if self._step.end == "overflow":  # a record that is too long for one
                below.sendall(b"\x17\x03\x03\xff\xff" + bytes(1000))
            while self._step.end in ("notify", "overflow") and below.recv(65536):
                pass
        self.left.set()
        return False


class PlainPeer(OddServer):
    """Says something else to whoever greets."""

    def __init__(self, said: bytes) -> None:
        self._said = said
        super().__init__()

    def peek(self, connection: socket.socket, data: bytes) -> bool:
        connection.sendall(self._said)
        return False


@pytest.fixture
def peer(shown: Identity, no_leaks: None) -> Iterator[TlsPeer]:
    with TlsPeer(shown) as peer:
        peer.data = {key.encode(): os.urandom(SIZE) for key in KEYS}
        yield peer


def check(peer: TlsPeer, caller: Caller, immutable: bool = False) -> None:
    """Read and write; values come as they are."""
    buffers = [memory(b"\xa5" * SIZE) for _ in KEYS]
    found = caller("batch_tile_get", KEYS, buffers, immutable=immutable)
    assert found == [True] * len(KEYS)
    assert buffers == list(peer.data.values())
    values = [memory(os.urandom(SIZE)) for _ in KEYS]
    assert caller("batch_tile_set", KEYS, values) == [True] * len(KEYS)
    assert values == list(peer.data.values())
    assert caller("batch_tile_exists", [*KEYS, "no"]) == [True, True, True, False]


@contextlib.contextmanager
def calling(way: str, *facts: object, **kwargs: Any) -> Iterator[Caller]:
    """One connection carries values."""
    with told(way, *facts):
        caller = WAYS[way](**kwargs, tile_connections=1)
        caller.retries(0)
        try:
            yield caller
        finally:
            caller.close()


def some_ways(*about: object) -> Sequence[str]:
    """Each, or in the short form one."""
    return list(WAYS) if LONG else one_way(random.Random(f"{SEED} {about}"))


@pytest.mark.parametrize("size", [1, 7, 1 << 14] if LONG else [1, 1 << 14])
def test_records_may_be_of_any_size(
    peer: TlsPeer,
    trusting: dict[str, Any],
    size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Records, "size", size)
    kwargs = {"port": peer.port, "tile_range_bytes": 4096, **trusting}
    for way in some_ways(size):
        with calling(way, **kwargs) as caller:
            for immutable in (False, True) if LONG else [size == 1]:
                check(peer, caller, immutable)


# In the middle of what is answered to a command: which, and what it gets instead.
HALVES = {
    "GET": b"$%d\r\n" % SIZE + b"x" * (SIZE // 2),
    "GETRANGE": b"$4096\r\n" + b"x" * 2000,
    "SET": b"+O",
    "EXISTS": b"",
}


@pytest.mark.parametrize("end", ["close", "notify", "overflow", "reset"])
@pytest.mark.parametrize("step", HALVES)
def test_an_end_of_tls_in_the_middle_of_an_answer_is_one_of_the_connection(
    peer: TlsPeer, trusting: dict[str, Any], step: str, end: str
) -> None:
    in_ranges = 4096 if step == "GETRANGE" else 0
    kwargs = {"port": peer.port, "tile_range_bytes": in_ranges, **trusting}
    for way in some_ways(step, end):
        with calling(way, **kwargs) as caller:
            for retries in (0, 1):
                check(peer, caller)
                peer.odd(step).reply(HALVES[step]).end = end
                began = time.monotonic()
                if retries:
                    caller.retries(1)
                    check(peer, caller)
                    caller.retries(0)
                else:
                    with pytest.raises(ConnectionError, match=r"closed|reset|pipe|SSL"):
                        check(peer, caller)
                assert time.monotonic() - began < 10
                assert peer.left.wait(10), "the connection is kept"
            check(peer, caller)


def test_an_end_of_tls_between_two_calls_is_seen_by_itself(
    peer: TlsPeer, trusting: dict[str, Any]
) -> None:
    for way in some_ways():
        with calling(way, port=peer.port, **trusting) as caller:
            for _ in range(3):
                check(peer, caller)
                before = caller.client.tile_info()["connections"]
                peer.odd("GET", len(KEYS), usual=True).reply(b"").end = "notify"
                buffers = [memory(bytes(SIZE)) for _ in KEYS]
                assert caller("batch_tile_get", KEYS, buffers) == [True] * 3
                assert peer.left.wait(10), "the connection is kept"
                assert eventually(
                    lambda of=caller.client, before=before: (
                        of.tile_info()["connections"] < before
                    )
                )


def same(ours: BaseException, theirs: BaseException) -> None:
    """But for Python's own line number, and a full stop."""
    assert type(ours) is type(theirs)
    told = [str(error).partition(" (_ssl.c")[0].rstrip(".") for error in (ours, theirs)]
    assert told[0] == told[1]


@pytest.mark.parametrize("said", [b"-DENIED\r\n", b"HTTP/1.1 400 Bad Request\r\n"])
def test_who_answers_tls_with_something_else_is_redis_pys_error(
    trusting: dict[str, Any], no_leaks: None, said: bytes
) -> None:
    with PlainPeer(said) as peer:
        with redis.Redis(port=peer.port, **trusting, retry=ONCE) as theirs:
            with pytest.raises(ConnectionError) as due:
                theirs.exists("a")
        for way in some_ways(said):
            with calling(way, port=peer.port, **trusting) as caller:
                with pytest.raises(ConnectionError) as ours:
                    caller("batch_tile_exists", ["a"])
                same(ours.value, due.value)


WRONG: list[dict[str, Any]] = [
    {"name": "elsewhere", "hosts": ("elsewhere.example",)},
    {"name": "expired", "hosts": ("localhost",), "expired": True},
    {"name": "stranger", "hosts": ("localhost",), "self_signed": True},
]


def test_a_server_with_a_wrong_certificate_is_an_error_until_it_has_the_right_one(
    tls_binary: ServerBinary,
    authority: Authority,
    shown: Identity,
    trusting: dict[str, Any],
    no_leaks: None,
) -> None:
    assert authority.identity is not None
    value = os.urandom(2_000_000)
    with TlsServer(tls_binary, shown, authority.identity) as server:
        for way, wrong in itertools.product(some_ways(), WRONG):
            kwargs = {"port": server.tls_port, **trusting}
            with calling(way, wrong, **kwargs) as caller:
                assert caller("batch_tile_set", ["a"], [value]) == [True]
                server.show(authority.issue(**wrong))
                # Who is in stays in, and those who are not let in do no harm.
                buffer = memory(bytes(len(value)))
                assert caller("batch_tile_get", ["a"], [buffer]) == [True]
                assert buffer == value
                with server.client() as admin:
                    admin.client_kill_filter(_type="normal", skipme=True)
                with redis.Redis(**kwargs, retry=ONCE) as theirs:
                    with pytest.raises(ConnectionError) as due:
                        theirs.exists("a")
                assert eventually(
                    lambda of=caller.client: of.tile_info()["connections"] == 0
                )
                for _ in range(2):
                    with pytest.raises(ConnectionError) as ours:
                        caller("batch_tile_exists", ["a"])
                    same(ours.value, due.value)
                server.show(shown)
                assert caller("batch_tile_exists", ["a"]) == [True]
