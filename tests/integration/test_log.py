"""What an operator reads in the log: once in a while, and never a secret."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError
from redis.retry import Retry

import fastkv
from fastkv.cli.private_server import PrivateServer
from tests.conftest import eventually
from tests.scripted import ScriptedPeer


@pytest.fixture(autouse=True)
def listen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "fastkv")


def lines(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "fastkv.connections" and record.levelno == level
    ]


def test_a_server_that_works_is_not_worth_a_line(
    client: fastkv.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    client.batch_tile_set(["a"], [os.urandom(1_000_000)])
    client.connection_pool.disconnect()
    client.batch_tile_get(["a", "no"], [bytearray(1_000_000), bytearray(1)])
    client.close()
    assert caplog.records == []


def test_lost_connections_are_told_once_in_a_while(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with ScriptedPeer() as peer:
        for _ in range(5):
            peer.expect("EXISTS", "a").close()
        peer.expect("EXISTS", "a").reply(b":1\r\n")
        client = make(port=peer.port, retry=Retry(NoBackoff(), 5))
        assert client.batch_tile_exists(["a"]) == [True]
        assert client.tile_info()["retries"] == 5
        client.close()
    assert lines(caplog, logging.WARNING) == [
        f"lost a connection with work on it: localhost:{peer.port}: "
        "Connection closed by server."
    ]


def test_idle_connections_that_end_are_no_warning(
    client: fastkv.Redis, plain: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    client.batch_tile_exists(["a"])
    plain.client_kill_filter(_type="normal", skipme=True)
    assert eventually(lambda: client.tile_info()["connections"] == 0)
    assert eventually(lambda: len(lines(caplog, logging.INFO)) == 1)
    assert lines(caplog, logging.INFO)[0].startswith("lost an idle connection: ")
    assert lines(caplog, logging.WARNING) == []


def test_a_server_that_is_away_and_comes_back(
    own_server: PrivateServer, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    client = make(port=own_server.port, retry=None)
    own_server.stop()
    for _ in range(3):
        with pytest.raises(ConnectionError):
            client.batch_tile_exists(["a"])
    address = f"localhost:{own_server.port}"
    (line,) = lines(caplog, logging.WARNING)
    assert line.startswith(f"cannot connect: {address}: ConnectionError: Error 111 ")
    own_server.start()
    client.batch_tile_exists(["a"])
    again = [f"connected again: {address}"]
    assert eventually(lambda: lines(caplog, logging.INFO) == again)


def test_refused_range_reads_are_told(
    own_server: PrivateServer, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with own_server.client() as admin:
        admin.execute_command("ACL SETUSER bob on >hush ~* &* +@all -watch")
    client = make(
        port=own_server.port, username="bob", password="hush", tile_connections=1
    )
    value = os.urandom(3_000_000)
    client.batch_tile_set(["a"], [value])
    for _ in range(3):  # once may be a mishap: it is told when the third is refused
        got = bytearray(3_000_000)
        assert client.batch_tile_get(["a"], [got]) == [True]
        assert got == value
    assert eventually(lambda: len(lines(caplog, logging.WARNING)) == 1)
    client.close()
    (line,) = lines(caplog, logging.WARNING)
    assert line.startswith("range reads are refused, values are read whole: localhost:")
    assert "no permissions to run the 'watch' command" in line


class Gossip(ScriptedPeer):
    """Does not know AUTH, and says what was sent with it."""

    def handshake(self, command: list[bytes]) -> bytes:
        if command[0] == b"AUTH":
            return b"-ERR unknown command 'AUTH', with args beginning with: 'hush'\r\n"
        return b"+OK\r\n"


def test_a_password_that_the_server_repeats_is_not_logged(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with Gossip() as peer:
        client = make(port=peer.port, password="hush", retry=None)
        with pytest.raises(redis.RedisError):
            client.batch_tile_exists(["a"])
        client.close()
    assert lines(caplog, logging.WARNING) != []
    assert "hush" not in caplog.text


def test_a_handler_that_raises_does_not_end_the_connector(make: Any) -> None:
    class Raising(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            raise RuntimeError

    handler = Raising()
    logging.getLogger("fastkv").addHandler(handler)
    try:
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            client = make(port=bound.getsockname()[1], retry=None)
            for _ in range(2):
                with pytest.raises(ConnectionError):
                    client.batch_tile_exists(["a"])
    finally:
        logging.getLogger("fastkv").removeHandler(handler)
