"""A unix socket that is gone, stale, barred or overcrowded: redis-py's error, and back
to work once it is right again.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from redis.backoff import ConstantBackoff
from redis.exceptions import ConnectionError, TimeoutError

from fastkv.cli.private_server import PrivateServer
from tests.conftest import SERVERS, eventually
from tests.faults.calls import COMMANDS, WAYS, Trial
from tests.faults.conftest import LONG
from tests.faults.test_network import CALM, SEED, SIZES, told

PAUSE = ConstantBackoff(0.02)


@pytest.fixture(params=SERVERS if LONG else SERVERS[:1], ids=str)
def own_server(request: pytest.FixtureRequest) -> Iterator[PrivateServer]:
    """Its queue is for our clients at once, and short enough to be filled."""
    # When it is killed, its system has all, because nothing waits for an fsync.
    kept = ("--appendonly", "yes", "--appendfsync", "no")
    with PrivateServer(request.param, "--tcp-backlog", "32", *kept) as server:
        yield server


@contextlib.contextmanager
def stale(server: PrivateServer) -> Iterator[None]:
    """It was killed: its path is there, and nobody listens."""
    server.stop()
    yield
    server.start()


@contextlib.contextmanager
def gone(server: PrivateServer) -> Iterator[None]:
    server.stop(signal.SIGTERM)
    assert not os.path.exists(server.unix_path)
    yield
    server.start()


@contextlib.contextmanager
def barred(server: PrivateServer) -> Iterator[None]:
    """We may not use it any more."""
    with server.client() as admin:
        admin.client_kill_filter(_type="normal", skipme=True)
    os.chmod(server.unix_path, 0)
    root = os.geteuid() == 0
    if root:  # who may use anything
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        os.chmod(server.unix_path, 0o755)


@contextlib.contextmanager
def overcrowded(server: PrivateServer) -> Iterator[None]:
    """It lets nobody in, and as many wait already as may."""
    with server.client() as admin:
        admin.client_kill_filter(_type="normal", skipme=True)
    with contextlib.ExitStack() as stack:
        os.kill(server.pid, signal.SIGSTOP)
        stack.callback(os.kill, server.pid, signal.SIGCONT)
        with contextlib.suppress(BlockingIOError):
            while True:
                crowd = stack.enter_context(socket.socket(socket.AF_UNIX))
                crowd.setblocking(False)
                crowd.connect(server.unix_path)
        yield
    assert eventually(lambda: lets_in(server))


def lets_in(server: PrivateServer) -> bool:
    with server.client() as client:
        try:
            return client.ping()
        except ConnectionError:
            return False


@pytest.mark.parametrize("fault", [stale, gone, barred, overcrowded])
@pytest.mark.parametrize("way", WAYS)
def test_who_is_not_let_in_is_told_as_by_redis_py_and_gets_in_later(
    own_server: PrivateServer, no_leaks: None, way: str, fault: Any
) -> None:
    random_ = random.Random(f"{SEED} {way} {fault}")
    commands = random_.sample(COMMANDS, 6 if LONG else 2)
    address = {"unix_socket_path": own_server.unix_path}
    with told(commands), contextlib.ExitStack() as stack:
        hasty, patient = (WAYS[way](**address, **CALM) for _ in "ab")
        for caller in (hasty, patient):
            stack.callback(caller.close)
        plain = stack.enter_context(own_server.client())
        theirs = stack.enter_context(redis.Redis(**address, retry=None))
        patient.retries(-1, PAUSE)
        for command in commands:
            refused, waiting, after = (
                Trial(plain, random_, command, SIZES) for _ in "abc"
            )
            hasty.retries(0)
            for caller in (hasty, patient):
                assert not any(caller("batch_tile_exists", ["no"]))
            with fault(own_server):
                # What is sent to who is gone may have arrived.
                for caller in (hasty, patient):
                    assert eventually(
                        lambda of=caller: of.client.tile_info()["connections"] == 0
                    )
                thread = threading.Thread(target=waiting.run, args=[patient])
                thread.start()
                refused.run(hasty)
                with pytest.raises(ConnectionError, match=r"Error \d+ conn") as due:
                    theirs.get("a")
                assert type(refused.error) is type(due.value)
                assert str(refused.error) == str(due.value)
                assert refused.took < 5
            after.run(hasty)
            assert after.error is None, repr(after.error)
            thread.join(30)
            assert not thread.is_alive()
            assert waiting.error is None, repr(waiting.error)
            for trial in (refused, waiting, after):
                trial.settle()


class Unhurried(redis.UnixDomainSocketConnection):
    """Its connect waits for room as long as it takes, as older versions of redis-py."""

    socket_connect_timeout = None


def test_a_connect_that_waits_for_room_keeps_nobody(
    own_server: PrivateServer, make: Any
) -> None:
    pool = redis.ConnectionPool(Unhurried, path=own_server.unix_path)
    client = make(connection_pool=pool)
    with overcrowded(own_server):
        waiting = client.submit_batch_tile_exists(["a"])
        with pytest.raises(TimeoutError, match=r"within 0.1 s"):
            client.batch_tile_exists(["a"], timeout=0.1)
        began = time.monotonic()
        client.close()
        assert time.monotonic() - began < 5
        with pytest.raises(ConnectionError, match="closed"):
            waiting.result(0)
    # The connector's thread ends now: see `no_leaks`.
