"""What may happen between two rounds of a call over a cluster: a round that cannot
begin, a look at the cluster that nobody waits for any more, a callback, a fork.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
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
from fastkv import commands, refresher
from fastkv.lmcache.carriers import Cluster as Carrier
from fastkv.refresher import Refresh, Refresher
from tests.conftest import eventually
from tests.integration.test_cluster_scripted import ScriptedNode

DOWN = b"-CLUSTERDOWN Hash slot not served\r\n"
ONE = {"tile_workers": 1, "tile_connections": 1, "protocol": 2}


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
