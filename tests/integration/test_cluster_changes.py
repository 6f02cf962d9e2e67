"""A cluster that changes: slots move, primaries die. Nothing is lost, nothing mixed."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import redis
from redis.backoff import ConstantBackoff
from redis.cluster import LoadBalancingStrategy
from redis.exceptions import ClusterDownError, ConnectionError
from redis.retry import Retry

import fastkv
import fastkv.asyncio
from fastkv._core import key_slot
from tests.clusters import ClusterServers, wait_until
from tests.conftest import SERVERS

pytestmark = pytest.mark.skipif(not SERVERS, reason="no server found")

KEYS = [f"k{i}" for i in range(200)]


@pytest.fixture(scope="module")
def running_cluster() -> Iterator[ClusterServers]:
    with ClusterServers(SERVERS[0], replicas=1) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def no_leaks(running_cluster: ClusterServers, no_leaks: None) -> None:
    pass


@pytest.fixture
def cluster(running_cluster: ClusterServers) -> ClusterServers:
    running_cluster.flush()
    return running_cluster


@dataclass(frozen=True)
class Tag:
    """Keys that share a slot, whose server is the first primary in the beginning."""

    name: str

    @property
    def slot(self) -> int:
        return key_slot(self.name.encode())

    def key(self, what: object) -> str:
        return f"{{{self.name}}}{what}"

    @property
    def keys(self) -> list[str]:
        return [self.key(i) for i in range(40)]


_TAGS = (
    Tag(name)
    for name in map(str, itertools.count())
    if key_slot(name.encode()) <= ClusterServers.slots_of(0)[1]
)


@pytest.fixture
def tag() -> Tag:
    """One that no other test has. (A slot that goes back to where it has just been may
    be claimed by two servers for a long while.)
    """
    return next(_TAGS)


@pytest.fixture
def make_client(
    cluster: ClusterServers,
) -> Iterator[Callable[..., fastkv.RedisCluster]]:
    clients: list[fastkv.RedisCluster] = []

    def make(**kwargs: Any) -> fastkv.RedisCluster:
        clients.append(
            fastkv.RedisCluster(host="127.0.0.1", port=cluster.port, **kwargs)
        )
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def values(size: int, count: int) -> list[bytes]:
    return [os.urandom(size) for _ in range(count)]


@pytest.mark.parametrize("size", [100, 600_000])
@pytest.mark.parametrize("immutable", [False, True])
def test_moved_keys_are_followed(
    make_client: Any, cluster: ClusterServers, tag: Tag, size: int, immutable: bool
) -> None:
    client = make_client()
    keys, stored = tag.keys[:20] + KEYS[:20], values(size, 40)
    assert all(client.batch_tile_set(keys, stored))
    first, second, third = cluster.primaries
    cluster.move(tag.slot, first, second)
    for _ in range(2):
        got = [bytearray(size) for _ in keys]
        assert all(client.batch_tile_get(keys, got, immutable=immutable))
        assert got == stored
    cluster.move(tag.slot, second, third)
    assert client.submit_batch_tile_exists([*keys, tag.key("no")]).result(10) == [
        *[True] * 40,
        False,
    ]
    for other in [next(_TAGS) for _ in range(7)]:  # more than reinitialize_steps
        cluster.move(other.slot, first, second)
        keys += other.keys[:2]
    stored = values(size, len(keys))
    assert all(client.submit_batch_tile_set(keys, stored).result(10))
    assert client.batch_tile_delete(keys) == [True] * len(keys)


@pytest.mark.parametrize("size", [100, 600_000])
@pytest.mark.parametrize("immutable", [False, True])
def test_asked_keys_are_followed_while_a_slot_migrates(
    make_client: Any, cluster: ClusterServers, tag: Tag, size: int, immutable: bool
) -> None:
    client = make_client()
    stored = values(size, 40)
    assert all(client.batch_tile_set(tag.keys, stored))
    first, second = cluster.primaries[:2]
    cluster.begin_move(tag.slot, first, second)
    assert cluster.move_keys(tag.slot, first, second, 20) == 20
    asked = second.calls("asking")
    for call in (
        lambda got: client.batch_tile_get(tag.keys, got, immutable=immutable),
        lambda got: client.submit_batch_tile_get(
            tag.keys, got, immutable=immutable
        ).result(10),
    ):
        got = [bytearray(size) for _ in tag.keys]
        assert call(got) == [True] * 40
        assert got == stored
    assert second.calls("asking") == asked + 40
    assert client.batch_tile_exists([*tag.keys, tag.key("no")]) == [True] * 40 + [False]
    # A new key of a migrating slot belongs to where it goes.
    assert client.batch_tile_set([tag.key("new")], [b"x"], nx=True) == [True]
    assert second.call("COUNTKEYSINSLOT", tag.slot) == 21
    assert client.batch_tile_delete([*tag.keys[:5], tag.key("new")]) == [True] * 6
    while cluster.move_keys(tag.slot, first, second, 100):
        pass
    cluster.end_move(tag.slot, second)
    assert client.batch_tile_exists(tag.keys) == [False] * 5 + [True] * 35


def test_asyncio_follows_moved_and_asked_keys(
    cluster: ClusterServers, tag: Tag
) -> None:
    first, second, third = cluster.primaries

    async def main() -> None:
        async with fastkv.asyncio.RedisCluster(
            host="127.0.0.1", port=cluster.port
        ) as client:
            stored = values(300_000, 40)
            assert all(await client.batch_tile_set(tag.keys, stored))
            cluster.begin_move(tag.slot, first, second)
            cluster.move_keys(tag.slot, first, second, 20)
            got = [bytearray(300_000) for _ in tag.keys]
            assert all(await client.batch_tile_get(tag.keys, got))
            assert got == stored
            cluster.move_keys(tag.slot, first, second, 20)
            cluster.end_move(tag.slot, second)
            got = [bytearray(300_000) for _ in tag.keys]
            assert all(await client.batch_tile_get(tag.keys, got))
            assert got == stored
            # redis-py closes and reopens its side when much has moved.
            cluster.move(tag.slot, second, third)
            client.reinitialize_counter = client.reinitialize_steps - 1
            assert await client.get(tag.key(0)) == stored[0]
            assert client._tile_nodes
            assert all(await client.batch_tile_exists(tag.keys))

    asyncio.run(main())


class _Load:
    """Threads that store and read what they know, and look at every byte."""

    def __init__(self, client: fastkv.RedisCluster, keys: list[str], size: int) -> None:
        self._client = client
        self._keys = keys
        self._size = size
        self._stop = threading.Event()
        self.wrong: list[object] = []
        # Each stores in its turn: a store waits as long as others only read.
        self.rounds = dict.fromkeys((self._read, self._futures), 0)
        self._threads = [
            threading.Thread(target=self._run, args=(work,)) for work in self.rounds
        ]
        self.stored = values(size, len(keys))
        assert all(client.batch_tile_set(keys, self.stored))

    def _run(self, work: Callable[[], None]) -> None:
        while not self._stop.is_set():
            try:
                work()
                self._write()
            except Exception as error:
                self.wrong.append(error)
                return
            self.rounds[work] += 1

    def _compare(self, hits: list[bool], got: list[bytearray]) -> None:
        if hits != [True] * len(got) or got != self.stored:
            self.wrong.append(
                [k for k, h in zip(self._keys, hits, strict=True) if not h]
            )

    def _read(self) -> None:
        got = [bytearray(self._size) for _ in self._keys]
        hits = self._client.batch_tile_get(self._keys, got, timeout=30)
        self._compare(hits, got)

    def _futures(self) -> None:
        got = [bytearray(self._size) for _ in self._keys]
        future = self._client.submit_batch_tile_get(self._keys, got, immutable=True)
        self._compare(future.result(30), got)

    def _write(self) -> None:
        if not all(self._client.batch_tile_set(self._keys, self.stored, timeout=30)):
            self.wrong.append("not stored")

    def go_round(self) -> None:
        """Wait until every thread has done what it was at, and more."""
        done = dict(self.rounds)
        wait_until(
            lambda: (
                bool(self.wrong)
                or all(self.rounds[work] >= count + 2 for work, count in done.items())
            )
        )

    def __enter__(self) -> _Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()


def test_slots_that_move_under_load_lose_and_mix_nothing(
    make_client: Any, cluster: ClusterServers, tag: Tag
) -> None:
    client = make_client()
    first, second, third = cluster.primaries
    with _Load(client, tag.keys + KEYS[:20], 300_000) as load:
        for source, target in ((first, second), (second, third), (third, first)):
            cluster.begin_move(tag.slot, source, target)
            while cluster.move_keys(tag.slot, source, target, 3):
                pass
            cluster.end_move(tag.slot, target)
            # Not the next one before who was sent elsewhere has arrived: a command that
            # is two moves late would be done by a node that does not have the key yet.
            load.go_round()
    assert load.wrong == []


def test_reads_go_to_replicas(make_client: Any, cluster: ClusterServers) -> None:
    writer = make_client()
    stored = values(300_000, 60)
    assert all(writer.batch_tile_set(KEYS[:60], stored))
    for member in cluster.primaries:
        member.admin.wait(1, 5000)
    cluster.wait_for_replicas()

    def reads(members: Any) -> int:
        return sum(m.calls(c) for m in members for c in ("get", "getrange", "exists"))

    replicas = cluster.members[3:]
    client = make_client(
        load_balancing_strategy=LoadBalancingStrategy.ROUND_ROBIN_REPLICAS
    )
    for immutable in (False, True):
        before = reads(cluster.primaries), reads(replicas)
        got = [bytearray(300_000) for _ in range(60)]
        assert all(client.batch_tile_get(KEYS[:60], got, immutable=immutable))
        assert got == stored
        assert all(client.batch_tile_exists(KEYS[:60]))
        assert reads(cluster.primaries) == before[0]
        assert reads(replicas) >= before[1] + 120
    assert all(client.batch_tile_set(KEYS[:60], stored))  # to the primaries
    both = make_client(load_balancing_strategy=LoadBalancingStrategy.ROUND_ROBIN)
    before = reads(cluster.primaries), reads(replicas)
    assert all(both.batch_tile_exists(KEYS[:60]))
    assert reads(cluster.primaries) > before[0]
    assert reads(replicas) > before[1]

    async def main() -> None:
        async with fastkv.asyncio.RedisCluster(
            host="127.0.0.1",
            port=cluster.port,
            load_balancing_strategy=LoadBalancingStrategy.RANDOM_REPLICA,
        ) as client:
            before = reads(cluster.primaries)
            got = [bytearray(300_000) for _ in range(60)]
            assert all(await client.batch_tile_get(KEYS[:60], got))
            assert got == stored
            assert reads(cluster.primaries) == before

    for member in cluster.primaries:
        member.admin.wait(1, 5000)
    asyncio.run(main())


def test_a_slot_without_a_server_is_clusterdown_after_the_retries(
    make_client: Any, cluster: ClusterServers, tag: Tag
) -> None:
    client = make_client(retry=Retry(ConstantBackoff(0.01), 2))
    assert all(client.batch_tile_set(KEYS, values(10, 200)))
    for member in cluster.primaries:
        member.admin.config_set("cluster-require-full-coverage", "no")
    first = cluster.primaries[0]
    first.call("DELSLOTS", tag.slot)
    # Whether redis-py asks that one for the slots is chance.
    with pytest.raises((ClusterDownError, redis.exceptions.RedisClusterException)):
        client.batch_tile_exists([*KEYS, *tag.keys])
    assert all(client.batch_tile_exists(KEYS))
    # Covered again while it is being asked for.
    patient = make_client(
        retry=Retry(ConstantBackoff(0.05), 50), require_full_coverage=False
    )
    back = threading.Timer(0.5, first.call, ("ADDSLOTS", tag.slot))
    back.start()
    assert patient.batch_tile_exists(tag.keys) == [False] * 40
    back.join()
    cluster.wait_ok()


def test_a_primary_that_is_killed_is_replaced_under_load(
    make_client: Any, cluster: ClusterServers
) -> None:
    client = make_client(retry=Retry(ConstantBackoff(0.1), 100))
    victim, heir = cluster.members[1], cluster.members[4]
    with _Load(client, KEYS, 100_000) as load:
        for member in cluster.primaries:
            member.admin.wait(1, 5000)
        victim.server.stop(signal.SIGKILL)
        wait_until(lambda: heir.admin.info("replication")["role"] == "master")
        load.go_round()
        victim.server.start()  # comes back as a replica
        load.go_round()
    assert load.wrong == []
    cluster.wait_ok()


def test_a_password_is_sent_and_a_wrong_one_is_redis_pys_error() -> None:
    with ClusterServers(
        SERVERS[0],
        "--requirepass",
        "secret",
        "--masterauth",
        "secret",
        password="secret",
    ) as cluster:
        with fastkv.RedisCluster(
            host="127.0.0.1", port=cluster.port, password="secret"
        ) as client:
            assert all(client.batch_tile_set(KEYS, values(10, 200)))
            for member in cluster.primaries:
                member.admin.config_set("requirepass", "other")
            client.disconnect_connection_pools()
            with pytest.raises(
                ConnectionError, match=r"invalid username-password|WRONGPASS"
            ):
                client.batch_tile_exists(KEYS)
