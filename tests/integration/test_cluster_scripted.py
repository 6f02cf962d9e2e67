"""What a node of a cluster says rarely, and what is sent again then: no key but those
without an answer, and no more often than redis-py would.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.cluster import LoadBalancingStrategy
from redis.exceptions import (
    ClusterDownError,
    ClusterError,
    ConnectionError,
    RedisClusterException,
    TimeoutError,
)
from redis.retry import Retry

import fastkv
import fastkv.asyncio
from fastkv._core import key_slot
from tests.conftest import eventually
from tests.scripted import ScriptedPeer

SLOT = key_slot(b"a")


class ScriptedNode(ScriptedPeer):
    """A node that follows a script, and says by itself that all slots are its own."""

    refreshes = 0
    silent = False  # about the slots
    held: threading.Event | None = None  # what is said about them waits for it
    told_over = 0  # how often the following was said
    script_over = b""  # what is said to all that comes after the script

    def answer(self, connection: socket.socket, command: list[bytes]) -> bool:
        if command[0] == b"COMMAND":
            # All that redis-py's pipelines want to know of one.
            get = b"*6\r\n$3\r\nget\r\n:2\r\n*1\r\n+readonly\r\n:1\r\n:1\r\n:1\r\n"
            connection.sendall(b"*1\r\n" + get)
            return True
        if command[0] != b"CLUSTER":
            if self.script_over and not self._steps:
                self.told_over += 1
                connection.sendall(self.script_over)
                return True
            return super().answer(connection, command)
        self.refreshes += 1
        if self.silent:
            return True
        if self.held is not None:
            self.held.wait(30)
        connection.sendall(
            b"*1\r\n*3\r\n:0\r\n:16383\r\n*3\r\n$9\r\n127.0.0.1\r\n:%d\r\n$1\r\nx\r\n"
            % self.port
        )
        return True


@pytest.fixture
def node() -> Iterator[ScriptedNode]:
    with ScriptedNode() as node:
        yield node


@pytest.fixture
def make_client(node: ScriptedNode) -> Iterator[Callable[..., fastkv.RedisCluster]]:
    clients: list[fastkv.RedisCluster] = []

    def make(retries: int, **kwargs: Any) -> fastkv.RedisCluster:
        clients.append(
            fastkv.RedisCluster(
                host="127.0.0.1",
                port=node.port,
                protocol=2,
                tile_connections=1,
                retry=Retry(NoBackoff(), retries),
                **kwargs,
            )
        )
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.mark.parametrize(
    "line", [b"-TRYAGAIN later\r\n", b"-CLUSTERDOWN not served\r\n"]
)
def test_only_the_key_that_has_to_wait_is_sent_again(
    make_client: Any, node: ScriptedNode, line: bytes
) -> None:
    client = make_client(1)
    for key, reply in (
        ("a", b":1\r\n"),
        ("b", line),
        ("c", b":0\r\n"),
        ("b", b":1\r\n"),
    ):
        node.expect("EXISTS", key).reply(reply)
    assert client.batch_tile_exists(["a", "b", "c"]) == [True, True, False]
    node.expect("EXISTS", "b").reply(line)
    node.expect("EXISTS", "b").reply(b":0\r\n")
    assert client.submit_batch_tile_exists(["b"]).result(5) == [False]


def test_a_node_that_is_loading_is_asked_again(
    make_client: Any, node: ScriptedNode
) -> None:
    client = make_client(1)
    node.expect("EXISTS", "b").reply(b"-LOADING Redis is loading\r\n")
    node.expect("EXISTS", "b").reply(b":1\r\n")
    assert client.batch_tile_exists(["b"]) == [True]
    # With the keys that were behind it.
    node.expect("EXISTS", "a").reply(b"-LOADING Redis is loading\r\n").close()
    node.expect("EXISTS", "b").reply(b":0\r\n")
    node.expect("EXISTS", "a").reply(b":1\r\n")
    assert client.batch_tile_exists(["a", "b"]) == [True, False]


def test_clusterdown_ends_after_the_clients_retries(
    make_client: Any, node: ScriptedNode
) -> None:
    client = make_client(1)
    for _ in range(2):
        node.expect("EXISTS", "a").reply(b"-CLUSTERDOWN Hash slot not served\r\n")
    with pytest.raises(ClusterDownError, match="not served"):
        client.batch_tile_exists(["a"])
    assert node.refreshes == 2


def test_a_lost_connection_costs_a_retry_and_a_look_at_the_cluster(
    make_client: Any, node: ScriptedNode
) -> None:
    client = make_client(2)
    node.expect("EXISTS", "a").reply(b":1\r\n")
    for _ in range(3):
        node.expect("EXISTS", "b").close()
    with pytest.raises(ConnectionError, match="Connection closed by server"):
        client.batch_tile_exists(["a", "b"])
    assert node.refreshes == 3
    for _ in range(3):
        node.expect("EXISTS", "b").close()
    future = client.submit_batch_tile_exists(["b"])
    assert isinstance(future.exception(5), ConnectionError)


def test_a_conditional_set_is_sent_again_if_it_was_refused_and_not_if_lost(
    make_client: Any, node: ScriptedNode
) -> None:
    client = make_client(3)
    node.expect("SET", "a", "x", "NX").reply(b"-TRYAGAIN later\r\n")
    node.expect("SET", "a", "x", "NX").reply(b"+OK\r\n")
    assert client.batch_tile_set(["a"], [b"x"], nx=True) == [True]
    node.expect("SET", "a", "x", "NX").close()
    with pytest.raises(ConnectionError, match="whether it was done is unknown"):
        client.batch_tile_set(["a"], [b"x"], nx=True)


def test_a_node_that_nobody_has_named_is_asked(
    make_client: Any, node: ScriptedNode
) -> None:
    client = make_client(0)
    with ScriptedNode() as importing:
        line = b"-ASK %d 127.0.0.1:%d\r\n" % (SLOT, importing.port)
        for _ in range(2):
            node.expect("GET", "a").reply(line)
            importing.expect("ASKING").reply(b"+OK\r\n")
            importing.expect("GET", "a").reply(b"$3\r\nabc\r\n")
            got = bytearray(3)
            assert client.batch_tile_get(["a"], [got]) == [True]
            assert got == b"abc"
        client.close()


def test_moved_from_one_to_the_other_for_ever_is_redis_pys_error(
    make_client: Any, node: ScriptedNode
) -> None:
    client = make_client(0, reinitialize_steps=0)
    with ScriptedNode() as other:
        for asked, named in ((node, other), (other, node)) * 8:
            line = b"-MOVED %d 127.0.0.1:%d\r\n" % (SLOT, named.port)
            asked.expect("EXISTS", "a").reply(line)
        with pytest.raises(ClusterError, match="TTL exhausted"):
            client.batch_tile_exists(["a"])
        client.close()


def test_the_time_out_is_for_all_rounds(make_client: Any, node: ScriptedNode) -> None:
    client = make_client(100)
    step = node.expect("EXISTS", "a").reply(b"-CLUSTERDOWN Hash slot not served\r\n")
    node.script_over = b"-CLUSTERDOWN Hash slot not served\r\n"
    with pytest.raises(TimeoutError, match=r"1 keys .* within 0\.4 s"):
        client.batch_tile_exists(["a"], timeout=0.4)
    assert step.seen.wait(5)


@pytest.mark.parametrize("how", ["run", "submit", "await"])
def test_the_time_out_holds_while_nobody_says_what_the_cluster_looks_like(
    make_client: Any, node: ScriptedNode, how: str
) -> None:
    began = 0.0

    async def wait() -> None:
        nonlocal began
        async with fastkv.asyncio.RedisCluster(
            host="127.0.0.1",
            port=node.port,
            protocol=2,
            retry=AsyncRetry(NoBackoff(), 9),
        ) as client:
            await client.batch_tile_exists(["a"])
            node.silent = True
            began = time.monotonic()
            await client.batch_tile_exists(["a"], timeout=0.5)

    node.expect("EXISTS", "a").reply(b":1\r\n")
    node.expect("EXISTS", "a").reply(b"-CLUSTERDOWN Hash slot not served\r\n")
    with pytest.raises(TimeoutError, match=r"1 keys .* within 0\.5 s"):
        if how == "await":
            asyncio.run(wait())
        client = make_client(9)
        client.batch_tile_exists(["a"])
        node.silent = True
        began = time.monotonic()
        if how == "run":
            client.batch_tile_exists(["a"], timeout=0.5)
        client.submit_batch_tile_exists(["a"], timeout=0.5).result()
    assert time.monotonic() - began < 2


def test_many_that_wait_look_at_the_cluster_together(
    make_client: Any, node: ScriptedNode
) -> None:
    def threads() -> int:
        return sum(t.name == "fastkv-refresh" for t in threading.enumerate())

    client = make_client(1000)
    looked = node.refreshes
    node.held = threading.Event()
    node.script_over = b"-CLUSTERDOWN Hash slot not served\r\n"
    futures = [
        client.submit_batch_tile_exists([f"k{i}"], timeout=60) for i in range(300)
    ]
    assert eventually(lambda: node.told_over == len(futures))
    crew = client._tile_refresher._crews[os.getpid()]

    def all_are_due() -> bool:
        """For one of them it is looked, for the others after that."""
        waiting = list(crew._waiting)
        due = [one for one in waiting if one.due <= time.monotonic()]
        return len(due) + len(crew._served) == len(futures) and len(due) < len(futures)

    assert eventually(all_are_due)
    assert eventually(lambda: threads() == 2)  # one keeps the time, and one looks
    assert node.refreshes == looked + 1
    node.script_over = b":1\r\n"
    node.held.set()
    assert [future.result(10) for future in futures] == [[True]] * len(futures)
    assert node.refreshes == looked + 2
    assert eventually(lambda: threads() == 0)


def test_many_that_wait_run_out_of_time_and_look_no_more_often(
    make_client: Any, node: ScriptedNode
) -> None:
    client = make_client(1000)
    node.script_over = b"-CLUSTERDOWN Hash slot not served\r\n"
    looked = node.refreshes
    futures = [
        client.submit_batch_tile_exists([f"k{i}"], timeout=1.0) for i in range(300)
    ]
    for future in futures:
        assert isinstance(future.exception(5), TimeoutError)
    assert node.refreshes - looked < 30


def test_a_wrong_answer_is_not_repeated(make_client: Any, node: ScriptedNode) -> None:
    client = make_client(5)
    node.expect("EXISTS", "a").reply(b"-WRONGTYPE no\r\n")
    with pytest.raises(fastkv.TileError):
        client.batch_tile_exists(["a"])


def test_a_node_that_redis_py_makes_anew_does_not_end_what_is_in_flight(
    make_client: Any, node: ScriptedNode
) -> None:
    client = make_client(5)
    answered = threading.Event()
    sent = node.expect("SET", "a", "x", "NX").reply(b"+OK\r\n").when(answered)
    node.expect("EXISTS", "b").reply(b":1\r\n")
    storing = client.submit_batch_tile_set(["a"], [b"x"], nx=True)
    assert sent.seen.wait(5)
    # As when a node leaves the cluster and comes back: it has another pool then.
    client.nodes_manager.get_node("127.0.0.1", node.port).redis_connection = None
    assert client.batch_tile_exists(["b"]) == [True]
    answered.set()
    assert storing.result(5) == [True]
    node.expect("EXISTS", "c").reply(b":1\r\n")
    assert client.batch_tile_exists(["c"]) == [True]
    assert client._tile_replaced == []


def test_a_conditional_set_that_was_sent_is_not_sent_again_by_another_node(
    make_client: Any, node: ScriptedNode
) -> None:
    client = make_client(5)
    sent = node.expect("SET", "a", "x", "NX")
    storing = client.submit_batch_tile_set(["a"], [b"x"], nx=True)
    assert sent.seen.wait(5)
    next(iter(client._tile_nodes.values())).close()
    with pytest.raises(ConnectionError, match="unknown"):
        storing.result(5)


def test_a_future_is_cancelled_between_two_rounds(
    make_client: Any, node: ScriptedNode
) -> None:
    client = make_client(5)
    step = node.expect("EXISTS", "a").reply(b"-CLUSTERDOWN Hash slot not served\r\n")
    future = client.submit_batch_tile_exists(["a"])
    assert step.seen.wait(5)
    assert future.cancel()
    client.close()


def test_a_pipeline_of_redis_py_that_looks_again_ends_no_batch(
    node: ScriptedNode,
) -> None:
    answered = threading.Event()
    sent = node.expect("EXISTS", "a").reply(b":1\r\n").when(answered)
    node.expect("GET", "b").reply(b"-CLUSTERDOWN Hash slot not served\r\n")
    node.expect("GET", "b").reply(b"$1\r\nx\r\n")

    async def main() -> None:
        async with fastkv.asyncio.RedisCluster(
            host="127.0.0.1", port=node.port, protocol=2, tile_connections=1
        ) as client:
            looking = asyncio.ensure_future(client.batch_tile_exists(["a"]))
            assert await asyncio.to_thread(sent.seen.wait, 5)
            assert await client.pipeline().get("b").execute() == [b"x"]
            answered.set()
            assert await looking == [True]

    asyncio.run(main())


# --- what is counted -----------------------------------------------------------------


def test_what_is_sent_again_is_counted_by_node_and_once_in_total(
    make_client: Any, node: ScriptedNode
) -> None:
    client = make_client(2)
    for key, reply in (
        ("a", b":1\r\n"),
        ("b", b"-TRYAGAIN later\r\n"),
        ("b", b":1\r\n"),
    ):
        node.expect("EXISTS", key).reply(reply)
    assert client.batch_tile_exists(["a", "b"]) == [True, True]
    node.expect("EXISTS", "c").close()
    node.expect("EXISTS", "c").reply(b":0\r\n")
    assert client.batch_tile_exists(["c"]) == [False]
    info = client.tile_info()
    total = info["commands"]["exists"]
    assert total["batches"] == {"ok": 2, "timed_out": 0, "cancelled": 0, "failed": 0}
    assert total["keys"] == {
        "found": 2,
        "not_found": 1,
        "unanswered": 0,
        "refused": 0,
        "redirected": 0,
    }
    assert total["seconds"]["count"] == 2
    assert (info["retries"], info["reconnects"]) == (1, 1)
    (of_node,) = info["nodes"].values()
    assert of_node["commands"]["exists"]["keys"] == {
        "found": 2,
        "not_found": 1,
        "unanswered": 1,
        "refused": 0,
        "redirected": 1,
    }
    assert (of_node["retries"], of_node["reconnects"]) == (1, 1)


def test_what_a_call_over_several_nodes_came_to(
    make_client: Any, node: ScriptedNode
) -> None:
    client = make_client(1)

    def results() -> list[int]:
        return list(client.tile_info()["commands"]["exists"]["batches"].values())

    node.expect("EXISTS", "a").close()
    node.expect("EXISTS", "a").close()
    with pytest.raises(ConnectionError):
        client.batch_tile_exists(["a"])
    assert results() == [0, 0, 0, 1]
    step = node.expect("EXISTS", "a").reply(b"-CLUSTERDOWN Hash slot not served\r\n")
    future = client.submit_batch_tile_exists(["a"])
    assert step.seen.wait(5)
    assert future.cancel()
    assert eventually(lambda: results() == [0, 0, 1, 1])
    gate = threading.Event()
    node.expect("EXISTS", "a").when(gate).reply(b":1\r\n")
    with pytest.raises(TimeoutError):
        client.batch_tile_exists(["a"], timeout=0.1)
    assert results() == [0, 1, 1, 1]
    gate.set()


def test_a_cluster_that_is_gone_is_a_failed_call() -> None:
    with ScriptedNode() as node:
        client = fastkv.RedisCluster(
            host="127.0.0.1",
            port=node.port,
            protocol=2,
            retry=Retry(NoBackoff(), 1),
        )
    with client:
        with pytest.raises(RedisClusterException, match="cannot be connected"):
            client.batch_tile_exists(["a"])
        future = client.submit_batch_tile_exists(["a"])
        assert isinstance(future.exception(10), RedisClusterException)
        calls = client.tile_info()["commands"]["exists"]
    assert calls["batches"]["failed"] == 2
    assert calls["keys"]["unanswered"] == 2


class Primary(ScriptedNode):
    """It has a replica."""

    replica = 0  # its port

    def answer(self, connection: socket.socket, command: list[bytes]) -> bool:
        if command[0] == b"READONLY":
            connection.sendall(b"+OK\r\n")
        elif command[0] == b"CLUSTER":
            node = b"*3\r\n$9\r\n127.0.0.1\r\n:%d\r\n$1\r\n%c\r\n"
            nodes = node % (self.port, b"x") + node % (self.replica, b"y")
            connection.sendall(b"*1\r\n*4\r\n:0\r\n:16383\r\n" + nodes)
        else:
            return super().answer(connection, command)
        return True


def test_a_primary_that_was_lost_once_is_asked_again_if_its_replica_is_gone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone, Primary() as primary:
        primary.replica = gone.getsockname()[1]
        gone.close()
        with fastkv.RedisCluster(
            *("127.0.0.1", primary.port),
            protocol=2,
            tile_connections=1,
            load_balancing_strategy=LoadBalancingStrategy.ROUND_ROBIN_REPLICAS,
            retry=Retry(NoBackoff(), 3),
        ) as client:
            # The replica, the primary, once more each.
            primary.expect("EXISTS", "a").close()
            primary.expect("EXISTS", "a").reply(b":1\r\n")
            assert client.batch_tile_exists(["a"]) == [True]
