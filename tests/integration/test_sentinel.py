"""Sentinel: after a failover the native connections are the new master's."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ConstantBackoff, NoBackoff
from redis.exceptions import ConnectionError
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError

import fastkv
import fastkv.asyncio
from tests.clusters import SentinelServers, wait_until
from tests.conftest import SERVERS, eventually
from tests.scripted import OddServer, ScriptedPeer

pytestmark = pytest.mark.skipif(not SERVERS, reason="no server found")

KEYS = [f"k{i}" for i in range(60)]
PATIENT = {"retry": Retry(ConstantBackoff(0.05), 400)}


@pytest.fixture(scope="module")
def servers() -> Iterator[SentinelServers]:
    servers = SentinelServers(SERVERS[0])
    yield servers
    servers.stop()


@pytest.fixture(autouse=True)
def no_leaks(servers: SentinelServers, no_leaks: None) -> None:
    pass


@pytest.fixture
def sentinel(servers: SentinelServers) -> Iterator[fastkv.Sentinel]:
    with fastkv.Sentinel(servers.addresses, socket_timeout=1.0) as sentinel:
        yield sentinel


def values(size: int) -> list[bytes]:
    return [os.urandom(size) for _ in KEYS]


def test_clients_are_ours_and_take_our_options(servers: SentinelServers) -> None:
    with fastkv.Sentinel(
        servers.addresses, tile_connections=3, tile_workers=1
    ) as sentinel:
        with sentinel.master_for("mymaster", tile_connections=2, db=0) as master:
            assert type(master) is fastkv.Redis
            stored = values(300_000)
            assert all(master.batch_tile_set(KEYS, stored))
            assert master._node().options.connections == 2
            assert master._node().options.workers == 1
            got = [bytearray(300_000) for _ in KEYS]
            assert all(master.batch_tile_get(KEYS, got))
            assert got == stored
            master.wait(1, 5000)
        for find in (sentinel.slave_for, sentinel.replica_for):
            with find("mymaster") as replica:
                assert type(replica) is fastkv.Redis
                assert replica._tile_options.range_bytes == 0
                got = [bytearray(300_000) for _ in KEYS]
                assert all(replica.batch_tile_get(KEYS, got))
                assert got == stored
                with pytest.raises(fastkv.TileError) as caught:
                    replica.batch_tile_set(KEYS[:1], [b"x"])
                error = caught.value.errors[0]
                assert isinstance(error, redis.exceptions.ReadOnlyError)
        with sentinel.master_for("nobody") as nobody:
            with pytest.raises(MasterNotFoundError):
                nobody.batch_tile_exists(["a"])


def test_asyncio(servers: SentinelServers) -> None:
    async def main() -> None:
        sentinel = fastkv.asyncio.Sentinel(servers.addresses, tile_workers=1)
        master = sentinel.master_for("mymaster")
        replica = sentinel.slave_for("mymaster")
        try:
            assert type(master) is fastkv.asyncio.Redis
            stored = values(1000)
            assert all(await master.batch_tile_set(KEYS, stored))
            await master.wait(1, 5000)
            for client in (master, replica):
                got = [bytearray(1000) for _ in KEYS]
                assert all(await client.batch_tile_get(KEYS, got))
                assert got == stored
            nobody = sentinel.master_for("nobody")
            with pytest.raises(redis.asyncio.sentinel.MasterNotFoundError):
                await nobody.batch_tile_exists(["a"])
            await nobody.aclose()
        finally:
            await master.aclose()
            await replica.aclose()
            await sentinel.aclose()

    asyncio.run(main())


class _Load:
    """Reads what was stored and compares every byte; stores it again."""

    def __init__(self, client: fastkv.Redis) -> None:
        self._stored = values(200_000)
        assert all(client.batch_tile_set(KEYS, self._stored))
        client.wait(1, 5000)
        self._client = client
        self._stop = threading.Event()
        self.rounds = 0
        self.wrong: list[object] = []
        self._threads = [threading.Thread(target=self._run) for _ in range(2)]

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                got = [bytearray(200_000) for _ in KEYS]
                assert self._client.batch_tile_get(KEYS, got) == [True] * 60
                assert got == self._stored
                assert all(self._client.batch_tile_set(KEYS, self._stored))
                future = self._client.submit_batch_tile_exists([*KEYS, "no"])
                assert future.result(30) == [True] * 60 + [False]
                self.rounds += 1
        except BaseException as error:
            self.wrong.append(error)

    def go_on(self) -> None:
        done = self.rounds
        wait_until(lambda: self.rounds >= done + 6 or bool(self.wrong))

    def __enter__(self) -> _Load:
        for thread in self._threads:
            thread.start()
        self.go_on()
        return self

    def __exit__(self, *details: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()


def test_a_failover_by_command_under_load(
    servers: SentinelServers, sentinel: fastkv.Sentinel
) -> None:
    with sentinel.master_for("mymaster", **PATIENT) as client, _Load(client) as load:
        servers.sentinels[0].call("FAILOVER", "mymaster")
        wait_until(lambda: servers.replication(servers.replica).get("role") == "master")
        # As Sentinel does ten seconds later, but without killing its clients: until
        # READONLY says so, they do not know.
        with servers.master.client() as admin:
            admin.replicaof("127.0.0.1", servers.replica.port)
        load.go_on()
        with servers.replica.client() as admin:
            before = admin.info("commandstats")["cmdstat_exists"]["calls"]
            load.go_on()
            after = admin.info("commandstats")["cmdstat_exists"]["calls"]
        assert after > before
    assert load.wrong == []
    servers.master, servers.replica = servers.replica, servers.master


def test_a_killed_master_under_load(
    servers: SentinelServers, sentinel: fastkv.Sentinel
) -> None:
    servers.wait_for_link()
    with sentinel.master_for("mymaster", **PATIENT) as client, _Load(client) as load:
        servers.master.stop(signal.SIGKILL)
        wait_until(lambda: servers.replication(servers.replica).get("role") == "master")
        load.go_on()
    assert load.wrong == []

    async def main() -> None:
        sentinel = fastkv.asyncio.Sentinel(servers.addresses, socket_timeout=1.0)
        client = sentinel.master_for(
            "mymaster", retry=AsyncRetry(ConstantBackoff(0.05), 400)
        )
        assert all(await client.batch_tile_exists(KEYS))
        await client.aclose()
        await sentinel.aclose()

    asyncio.run(main())


class _Master:
    """A Sentinel that names the first peer until it has refused, then the second."""

    def __init__(self, old: ScriptedPeer, new: ScriptedPeer) -> None:
        self._old = old
        self._new = new
        self._refusal = old.expect("SET", "a", "x").reply(
            b"-READONLY You can't write against a read only replica.\r\n"
        )

    def discover_master(self, service: str) -> tuple[str, int]:
        seen = self._refusal.seen.is_set()
        return "127.0.0.1", self._new.port if seen else self._old.port


@pytest.fixture
def demoted() -> Iterator[Callable[[Retry], tuple[fastkv.Redis, ScriptedPeer]]]:
    """A client whose master becomes a replica, and the new master."""
    with ScriptedPeer() as old, ScriptedPeer() as new:

        def make(retry: Retry) -> tuple[fastkv.Redis, ScriptedPeer]:
            pool = redis.sentinel.SentinelConnectionPool(
                "x", _Master(old, new), retry=retry
            )
            return fastkv.Redis.from_pool(pool), new

        yield make


def test_readonly_is_a_reason_to_look_again(demoted: Any) -> None:
    client, new = demoted(Retry(NoBackoff(), 1))
    with client:
        new.expect("SET", "a", "x").reply(b"+OK\r\n")
        assert client.batch_tile_set(["a"], [b"x"]) == [True]


def test_readonly_without_retries_is_redis_pys_connection_error(demoted: Any) -> None:
    client, new = demoted(Retry(NoBackoff(), 0))
    with client:
        with pytest.raises(ConnectionError, match="The previous master is now a slave"):
            client.batch_tile_set(["a"], [b"x"])
        new.expect("SET", "a", "y").reply(b"+OK\r\n")
        assert client.batch_tile_set(["a"], [b"y"]) == [True]


def test_readonly_is_a_reason_to_leave_the_old_master_with_every_connection() -> None:
    """One retry is enough: it does not go to the old one over another of them."""

    class Sentinel:
        demoted = False

        def discover_master(self, service: str) -> tuple[str, int]:
            return "127.0.0.1", new.port if self.demoted else old.port

    sentinel = Sentinel()
    keys, values = [f"k{i}" for i in range(20)], [b"x" * 200_000] * 20
    with OddServer() as old, OddServer() as new:
        pool = redis.sentinel.SentinelConnectionPool(
            "x", sentinel, retry=Retry(NoBackoff(), 1)
        )
        with fastkv.Redis.from_pool(pool) as client:
            assert eventually(
                lambda: (
                    all(client.batch_tile_set(keys, values)) and old.connections >= 4
                )
            )
            sentinel.demoted = True
            old.refused = {b"SET": b"READONLY You can't write"}
            assert client.batch_tile_set(["a"], [b"x"]) == [True]
            assert new.data == {b"a": b"x"}
