"""`NativeClient` of a Redis Cluster, whose client has to connect before it can work."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from fastkv.lmcache import NativeClient
from tests.clusters import ClusterServers
from tests.conftest import SERVERS, eventually, fastkv_threads
from tests.demux import key, memory

pytestmark = pytest.mark.skipif(not SERVERS, reason="no server found")

NAMES = [key(i) for i in range(64)]
VALUES = [os.urandom(100_000 + i) for i in range(64)]


@pytest.fixture(scope="module")
def running_cluster() -> Iterator[ClusterServers]:
    with ClusterServers(SERVERS[0]) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def no_leaks(running_cluster: ClusterServers, no_leaks: None) -> None:
    pass


@pytest.fixture
def cluster(running_cluster: ClusterServers) -> ClusterServers:
    running_cluster.flush()
    return running_cluster


def url_of(cluster: ClusterServers) -> str:
    return f"redis://127.0.0.1:{cluster.port}?cluster=true"


def signal_all(cluster: ClusterServers, number: int) -> None:
    for member in cluster.members:
        os.kill(member.server.pid, number)


@pytest.mark.parametrize("checksum", [False, True])
def test_chunks_lie_on_all_nodes_and_come_back(
    cluster: ClusterServers, demux: Any, checksum: bool
) -> None:
    lm = demux(url_of(cluster), checksum=checksum, key_prefix="p:", ttl=1000)
    assert lm.exists(NAMES) == [False] * 64
    assert lm.set(NAMES, VALUES) == [True] * 64
    for member in cluster.primaries:
        assert member.admin.dbsize() > 0
        name = member.admin.randomkey()
        value = VALUES[NAMES.index(name.decode().removeprefix("p:"))]
        assert member.admin.get(name)[: len(value)] == value
        assert 990 <= member.admin.ttl(name) <= 1000
    got = [memory(len(value)) for value in VALUES]
    assert lm.get(NAMES, got) == [True] * 64
    assert got == VALUES
    deleting = lm.client.submit_batch_delete([*NAMES, key(99)])
    assert lm.wait(deleting) == (True, "", [True] * 64 + [False])
    assert lm.get(NAMES[:5], got[:5]) == [False] * 5


def test_what_comes_before_the_connection_waits_for_it(
    cluster: ClusterServers, demux: Any
) -> None:
    lm = demux(url_of(cluster))
    storing = [
        lm.client.submit_batch_set([name], [value])
        for name, value in zip(NAMES, VALUES, strict=True)
    ]
    for one in storing:
        assert lm.wait(one) == (True, "", [True])


def test_a_cluster_that_is_away_is_a_miss_at_once_until_it_is_back(
    cluster: ClusterServers, demux: Any
) -> None:
    signal_all(cluster, signal.SIGSTOP)
    try:
        lm = demux(url_of(cluster), socket_timeout=0.5)
        first = lm.client.submit_batch_exists(NAMES)
        ok, error, bools = lm.wait(first)
        assert (ok, bools) == (False, [False] * 64)
        assert "127.0.0.1" in error or "cluster" in error.lower()
        began = time.monotonic()
        for _ in range(20):
            assert lm.exists(NAMES) == [False] * 64
        assert time.monotonic() - began < 0.5
    finally:
        signal_all(cluster, signal.SIGCONT)
    cluster.wait_ok()
    assert eventually(lambda: lm.set(NAMES, VALUES) == [True] * 64)
    assert lm.exists(NAMES) == [True] * 64


@pytest.mark.parametrize("connected", [False, True])
def test_close_completes_what_is_pending(
    cluster: ClusterServers, demux: Any, connected: bool
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}?cluster=1"
        lm = demux(url_of(cluster) if connected else url, socket_timeout=1)
        if connected:
            assert lm.set(NAMES, VALUES) == [True] * 64
            signal_all(cluster, signal.SIGSTOP)
        try:
            ids = [lm.client.submit_batch_exists(NAMES) for _ in range(50)]
            ids += [lm.client.submit_batch_get(["a"], [memory(9)]) for _ in range(50)]
            began = time.monotonic()
            lm.client.close()
            assert time.monotonic() - began < 0.9
        finally:
            if connected:
                signal_all(cluster, signal.SIGCONT)
        lm.take()
        for future_id in ids:
            ok, error, _ = lm.done[future_id]
            assert not ok
            assert "closed" in error
        late = lm.client.submit_batch_set(["a"], [b"x"])
        lm.take()
        assert lm.done[late][2] == [False]
    cluster.wait_ok()


def test_a_forked_child_hangs_neither_itself_nor_its_parent(
    cluster: ClusterServers, demux: Any
) -> None:
    lm = demux(url_of(cluster))
    assert lm.set(["a"], [b"x"]) == [True]
    signal_all(cluster, signal.SIGSTOP)
    try:
        pending = [lm.client.submit_batch_exists(["a"]) for _ in range(2)]
        child = os.fork()
        if child == 0:
            code = 1
            try:
                pending.append(lm.client.submit_batch_set(["a"], [b"y"]))
                done = lm.client.drain_completions()
                lm.client.close()
                failed = [future_id for future_id, ok, _, _ in done if not ok]
                code = 0 if sorted(failed) == pending else 2
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        signal_all(cluster, signal.SIGCONT)
    for future_id in pending:
        assert lm.wait(future_id) == (True, "", [True])
    got = memory(1)
    assert lm.get(["a"], [got]) == [True]
    assert got == b"x"
    cluster.wait_ok()


def test_a_child_of_a_client_that_was_not_used_yet_sends_nothing(
    cluster: ClusterServers, demux: Any
) -> None:
    """What has failed there must not be filled later."""
    lm = demux(url_of(cluster))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(30)  # ends a child that hangs
            ids = [
                lm.client.submit_batch_get(["a"], [memory(1)]),
                lm.client.submit_batch_set(["a"], [b"y"]),
            ]
            threads = fastkv_threads()
            done = lm.client.drain_completions()
            lm.client.close()
            failed = [future_id for future_id, ok, _, _ in done if not ok]
            code = 0 if sorted(failed) == ids and not threads else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert lm.exists(["a"]) == [False]
    assert lm.set(["a"], [b"x"]) == [True]


def test_its_numbers_are_those_of_its_calls(
    cluster: ClusterServers, demux: Any
) -> None:
    store = demux(url_of(cluster), metrics="cluster").client._store
    before = store.tile_info()
    assert before["nodes"] == {}
    assert set(before["commands"]["exists"]["batches"].values()) == {0}
    asyncio.run(store.carrier.wait(store.exists(NAMES).batch, 5.0))
    store.carrier.run(store.exists(NAMES).batch, 5.0)
    after = store.tile_info()
    assert after["commands"]["exists"]["batches"]["ok"] == 2
    assert after["commands"]["exists"]["keys"]["not_found"] == 2 * 64
    assert len(after["nodes"]) == 3


def test_what_a_cluster_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match="db: expected 0 with cluster, got 3"):
        NativeClient("redis://127.0.0.1:1/3", cluster=True)
    with pytest.raises(ValueError, match="expected redis:// or rediss:// with cluster"):
        NativeClient("unix:///tmp/x", cluster=True)
    with pytest.raises(TypeError, match="cluster: expected true or false, got 'maybe'"):
        NativeClient("redis://127.0.0.1:1?cluster=maybe")


def test_redis_py_reads_what_was_stored(cluster: ClusterServers, demux: Any) -> None:
    lm = demux(url_of(cluster))
    assert lm.set(NAMES, VALUES) == [True] * 64
    with redis.RedisCluster("127.0.0.1", cluster.port) as plain:
        assert [plain.get(name) for name in NAMES] == VALUES
