"""Lost, refused and silent servers: redis-py's exception in time, and back to work by
itself.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from redis.backoff import ConstantBackoff, NoBackoff
from redis.exceptions import ConnectionError, TimeoutError
from redis.retry import Retry

import fastkv
from fastkv.cli.private_server import PrivateServer
from tests.conftest import Endpoint, eventually
from tests.scripted import ScriptedPeer, SilentPeer

KEYS = [f"k{i}" for i in range(64)]
VALUES = [os.urandom(200_000) for _ in KEYS]


def test_a_restarted_server_is_found_again(
    own_server: PrivateServer, make: Any
) -> None:
    client = make(port=own_server.port, retry=Retry(ConstantBackoff(0.02), 100))
    for _ in range(3):
        assert all(client.batch_tile_set(KEYS, VALUES))
        own_server.stop()
        restart = threading.Timer(0.2, own_server.start)
        restart.start()
        # Asked while there is no server.
        assert client.batch_tile_exists(KEYS) == [False] * 64
        restart.join()
        assert all(client.batch_tile_set(KEYS, VALUES))
        got = [bytearray(200_000) for _ in KEYS]
        assert all(client.batch_tile_get(KEYS, got))
        assert got == VALUES


def test_killing_connections_under_load_changes_no_answer(
    own_server: PrivateServer, make: Any
) -> None:
    client = make(port=own_server.port, retry=Retry(NoBackoff(), 50))
    client.batch_tile_set(KEYS, VALUES)
    stop = threading.Event()

    def kill() -> None:
        with own_server.client() as admin:
            # Slow enough for a connection to be made and used.
            while not stop.wait(0.005):
                admin.client_kill_filter(_type="normal", skipme=True)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        for round_ in range(30):
            got = [bytearray(200_000) for _ in KEYS]
            assert client.batch_tile_get([*KEYS, "no"], [*got, bytearray(1)]) == [
                True
            ] * 64 + [False]
            assert got == VALUES
            assert all(client.batch_tile_set(KEYS[:8], VALUES[:8]))
            assert client.batch_tile_exists([*KEYS, f"no{round_}"]) == [True] * 64 + [
                False
            ]
    finally:
        stop.set()
        killer.join()


def test_a_stale_idle_connection_is_replaced_even_without_retries(
    endpoint: Endpoint, plain: redis.Redis
) -> None:
    with fastkv.Redis.from_url(endpoint.url) as client:
        assert client.get_retry() is None
        for _ in range(5):
            client.batch_tile_set(["a"], [b"x"])
            client.batch_tile_exists(["a"])
            plain.client_kill_filter(_type="normal", skipme=True)
            # The server says that they are gone; our side learns of it by itself.
            assert client.batch_tile_exists(["a"]) == [True]
            got = bytearray(1)
            assert client.batch_tile_get(["a"], [got]) == [True]


@pytest.fixture
def refused_port() -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]  # bound, and not listening


def test_a_refused_connection_is_redis_pys_error(make: Any, refused_port: int) -> None:
    client = make(port=refused_port, retry=Retry(ConstantBackoff(0.05), 3))
    begin = time.monotonic()
    with pytest.raises(ConnectionError) as theirs:
        client.ping()
    theirs_took = time.monotonic() - begin
    for call in (
        lambda: client.batch_tile_exists(["a"]),
        lambda: client.batch_tile_get(["a"], [bytearray(1)]),
        lambda: client.submit_batch_tile_delete(["a"]).result(10),
    ):
        begin = time.monotonic()
        with pytest.raises(ConnectionError) as ours:
            call()
        assert str(ours.value) == str(theirs.value)
        assert "Error 111 connecting to" in str(ours.value)
        # Four attempts and three delays, as redis-py makes them.
        assert theirs_took * 0.5 < time.monotonic() - begin < theirs_took + 2


def test_a_missing_unix_socket_is_redis_pys_error(tmp_path: Any) -> None:
    with fastkv.Redis.from_url(f"unix://{tmp_path}/none") as client:
        with pytest.raises(ConnectionError) as theirs:
            client.ping()
        with pytest.raises(ConnectionError) as ours:
            client.batch_tile_exists(["a"])
        assert str(ours.value) == str(theirs.value)


def test_a_host_that_does_not_resolve_is_redis_pys_error() -> None:
    with fastkv.Redis.from_url("redis://no-such-host.invalid") as client:
        with pytest.raises(
            ConnectionError, match=r"connecting to no-such-host\.invalid"
        ):
            client.batch_tile_exists(["a"])


@pytest.fixture
def mute_port() -> Iterator[int]:
    """Accepts (the kernel does) and never says a word, not even in the handshake."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_server_that_accepts_and_says_nothing_times_out(
    make: Any, mute_port: int
) -> None:
    client = make(port=mute_port, socket_timeout=0.2, retry=None, password="x")
    client.set_retry(Retry(NoBackoff(), 1))
    with pytest.raises(TimeoutError):
        client.ping()
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        client.batch_tile_exists(["a"])
    assert time.monotonic() - begin < 3


@pytest.mark.parametrize("connections", [1, 16])
def test_a_server_that_says_nothing_is_asked_as_often_as_retry_says(
    own_server: PrivateServer, make: Any, connections: int
) -> None:
    """However many connections wait for it."""
    asked = []

    class Counted(redis.Connection):
        def connect(self) -> None:
            asked.append(self)
            super().connect()

    pool = redis.ConnectionPool(
        connection_class=Counted,
        port=own_server.port,
        socket_timeout=0.5,
        retry=Retry(NoBackoff(), 3),
    )
    client = make(connection_pool=pool, tile_connections=connections)
    client.batch_tile_set(KEYS, VALUES)
    got = [bytearray(200_000) for _ in KEYS]
    assert all(client.batch_tile_get(KEYS, got))
    asked.clear()
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(TimeoutError):
            client.batch_tile_get(KEYS, got)
        assert len(asked) <= 4 + 1  # the next may have begun
    finally:
        os.kill(own_server.pid, signal.SIGCONT)


def test_a_batch_has_its_time_out_while_connecting(make: Any, mute_port: int) -> None:
    client = make(port=mute_port)
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"not all answered within 0\.1 s"):
        client.batch_tile_exists(["a"], timeout=0.1)
    assert time.monotonic() - begin < 1


def test_close_does_not_wait_for_a_handshake(make: Any, mute_port: int) -> None:
    client = make(port=mute_port, socket_timeout=None)
    future = client.submit_batch_tile_exists(["a"])
    begin = time.monotonic()
    client.close()
    assert time.monotonic() - begin < 1
    with pytest.raises(ConnectionError, match="client was closed"):
        future.result(1)


def test_a_stopped_server_is_a_time_out_and_a_continued_one_works(
    own_server: PrivateServer, make: Any
) -> None:
    client = make(port=own_server.port, socket_timeout=0.3)
    client.set_retry(Retry(NoBackoff(), 0))
    client.batch_tile_set(["a"], [b"x"])
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(TimeoutError):
            client.batch_tile_get(["a"], [bytearray(1)])
        with pytest.raises(TimeoutError):
            client.batch_tile_set(KEYS, VALUES)
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    got = bytearray(1)
    assert client.batch_tile_get(["a"], [got]) == [True]
    assert got == b"x"


def test_a_slow_server_that_makes_progress_does_not_time_out(
    own_server: PrivateServer, make: Any
) -> None:
    client = make(port=own_server.port, socket_timeout=0.4, retry=None)
    client.batch_tile_set(KEYS, VALUES)
    stop = threading.Event()

    def stutter() -> None:
        while not stop.is_set():
            os.kill(own_server.pid, signal.SIGSTOP)
            stop.wait(0.05)
            os.kill(own_server.pid, signal.SIGCONT)
            stop.wait(0.005)

    thread = threading.Thread(target=stutter)
    thread.start()
    begin = time.monotonic()
    try:
        while time.monotonic() - begin < 1.5:
            got = [bytearray(200_000) for _ in KEYS]
            assert all(client.batch_tile_get(KEYS, got))
            assert got == VALUES
    finally:
        stop.set()
        thread.join()


def test_an_idle_connection_is_checked_as_redis_py_does(
    own_server: PrivateServer, make: Any
) -> None:
    client = make(port=own_server.port, health_check_interval=1, tile_connections=1)
    with own_server.client() as admin:
        client.batch_tile_set(["a"], [b"x"])
        pings = admin.info("commandstats")["cmdstat_ping"]["calls"]
        client.batch_tile_set(["a"], [b"x"])
        assert admin.info("commandstats")["cmdstat_ping"]["calls"] == pings
        time.sleep(1.1)  # idle is the point
        assert client.batch_tile_get(["a"], [bytearray(1)]) == [True]
        assert admin.info("commandstats")["cmdstat_ping"]["calls"] == pings + 1


def test_a_connection_reset_in_the_middle_of_a_set_is_an_error_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stop = threading.Event()

        def reset_each() -> None:
            while not stop.is_set():
                connection, _ = listener.accept()
                with connection:
                    connection.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                    )
                    while b"SET\r\n" not in (data := connection.recv(100_000)):
                        if not data:
                            break
                        connection.sendall(b"+OK\r\n" * data.count(b"SETINFO"))

        thread = threading.Thread(target=reset_each)
        thread.start()
        url = f"redis://127.0.0.1:{listener.getsockname()[1]}?tile_connections=1"
        with fastkv.Redis.from_url(url) as client:
            for _ in range(20):
                with pytest.raises(ConnectionError):
                    client.batch_tile_set(KEYS[:4], [b"x" * 5_000_000] * 4, timeout=10)
        stop.set()
        socket.create_connection(listener.getsockname()).close()
        thread.join()


def test_a_backoff_that_raises_hangs_nobody(make: Any, refused_port: int) -> None:
    class Odd(ConstantBackoff):
        def compute(self, failures: int) -> float:
            if threading.current_thread().name == "fastkv-connector":
                raise ZeroDivisionError("odd")
            return 0.0

    client = make(port=refused_port, retry=Retry(Odd(0), 3))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="odd"):
            client.batch_tile_exists(["a"], timeout=5)


def test_memory_is_flat_over_many_batches(make: Any, endpoint: Endpoint) -> None:
    client = make(**endpoint.kwargs)
    keys, value = [f"k{i}" for i in range(4)], [os.urandom(1000)] * 4
    got = [bytearray(1000) for _ in keys]

    def rss() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def work(rounds: int) -> None:
        for _ in range(rounds):
            client.batch_tile_set(keys, value)
            client.batch_tile_get(keys, got)
            client.batch_tile_exists(keys)
            client.submit_batch_tile_get([*keys, "no"], [*got, bytearray(1)]).result()
            with pytest.raises(fastkv.TileError):
                client.batch_tile_get(["k0"], [bytearray(1)])

    work(300)
    before = rss()
    work(2000)
    assert rss() - before < 2_000_000


class TricklingServer(SilentPeer):
    """Answers GET, a little of the value at a time, slower than it takes to wait for
    all of it.
    """

    PIECES, PIECE, PAUSE = 20, 1000, 0.05

    def answer(self, connection: socket.socket, command: list[bytes]) -> bool:
        connection.sendall(b"$%d\r\n" % (self.PIECES * self.PIECE))
        for _ in range(self.PIECES):
            time.sleep(self.PAUSE)  # the slow network itself, no wait for something
            connection.sendall(b"x" * self.PIECE)
        connection.sendall(b"\r\n")
        return True


def test_a_value_that_trickles_in_is_no_stall(make: Any) -> None:
    with TricklingServer() as peer:
        client = make(port=peer.port, socket_timeout=0.4, retry=None)
        got = bytearray(peer.PIECES * peer.PIECE)
        assert client.batch_tile_get(["k"], [got]) == [True]
        assert got == b"x" * len(got)


def test_a_busy_connection_that_was_retired_gets_no_more_work(make: Any) -> None:
    """As when the pool was disconnected for the sake of new credentials."""
    with ScriptedPeer() as peer:
        client = make(port=peer.port, max_connections=1)
        gate = threading.Event()
        busy = peer.expect("EXISTS", "a").reply(b":1\r\n").when(gate)
        peer.expect("EXISTS", "b").reply(b":0\r\n")
        first = client.submit_batch_tile_exists(["a"])
        assert busy.seen.wait(5)
        client.connection_pool.disconnect()
        second = client.submit_batch_tile_exists(["b"])
        gate.set()
        assert (first.result(5), second.result(5)) == ([True], [False])
        assert peer.connections == 2


def test_a_connection_that_cannot_be_set_up_is_closed_at_once(
    own_server: PrivateServer, make: Any
) -> None:
    """The exception that says why would hold it for as long as somebody has that."""

    def odd(connection: object) -> None:
        raise ZeroDivisionError("odd")

    client = make(port=own_server.port, redis_connect_func=odd)
    with own_server.client() as admin:
        with pytest.raises(ZeroDivisionError) as caught:
            client.batch_tile_exists(["a"])
        assert eventually(lambda: len(admin.client_list()) == 1)
        assert str(caught.value) == "odd"
