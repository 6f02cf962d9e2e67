"""Redis Cluster and Sentinel whose servers speak TLS, to clients and to each other."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.backoff import ConstantBackoff
from redis.exceptions import ConnectionError, RedisClusterException
from redis.retry import Retry

import fastkv
import fastkv.asyncio
from fastkv._core import key_slot
from fastkv.cli.private_server import ServerBinary
from fastkv.lmcache import NativeClient
from tests.clusters import ClusterServers, SentinelServers
from tests.conftest import eventually
from tests.demux import Demux
from tests.tls import Authority, server_arguments

KEYS = [f"k{i}" for i in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority(folder, "authority")


@pytest.fixture(scope="module")
def tls(authority: Authority) -> list[str]:
    """Arguments of each server."""
    assert authority.identity is not None
    identity = authority.issue("server", ("localhost", "127.0.0.1"))
    return server_arguments(identity, authority.identity)


@pytest.fixture(scope="module")
def secure(authority: Authority) -> dict[str, Any]:
    """Arguments of a client that trusts them."""
    assert authority.identity is not None
    return {"ssl": True, "ssl_ca_certs": authority.identity.cert_file}


@pytest.fixture(scope="module")
def cluster(tls_binary: ServerBinary, tls: list[str]) -> Iterator[ClusterServers]:
    with ClusterServers(tls_binary, tls=tls) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def sentinels(tls_binary: ServerBinary, tls: list[str]) -> Iterator[SentinelServers]:
    servers = SentinelServers(tls_binary, tls)
    yield servers
    servers.stop()


@pytest.fixture(autouse=True)
def no_leaks(
    cluster: ClusterServers, sentinels: SentinelServers, no_leaks: None
) -> None:
    pass


def values(size: int) -> list[bytes]:
    return [os.urandom(size) for _ in KEYS]


@pytest.mark.parametrize("immutable", [False, True])
def test_a_cluster_keeps_its_certificates_when_slots_move(
    cluster: ClusterServers, secure: dict[str, Any], immutable: bool
) -> None:
    stored = values(300_000)
    with fastkv.RedisCluster(host="127.0.0.1", port=cluster.port, **secure) as client:
        assert all(client.batch_tile_set(KEYS, stored))
        assert {len(member.admin.keys()) > 0 for member in cluster.primaries} == {True}
        slot = key_slot(b"k0")
        source = cluster.owner("k0")
        target = next(m for m in cluster.primaries if m is not source)
        if slot not in moved:  # a slot that goes back may be claimed by two for long
            cluster.begin_move(slot, source, target)
            got = [bytearray(300_000) for _ in KEYS]
            assert all(client.batch_tile_get(KEYS, got, immutable=immutable))
            assert got == stored
            while cluster.move_keys(slot, source, target, 100):
                pass
            cluster.end_move(slot, target)
            moved.add(slot)
        got = [bytearray(300_000) for _ in KEYS]
        future = client.submit_batch_tile_get(KEYS, got, immutable=immutable)
        assert all(future.result(20))
        assert got == stored


moved: set[int] = set()


def test_asyncio_reads_what_the_other_has_stored(
    cluster: ClusterServers, secure: dict[str, Any]
) -> None:
    stored = values(300_000)
    url = f"rediss://127.0.0.1:{cluster.port}?ssl_ca_certs={secure['ssl_ca_certs']}"
    with fastkv.RedisCluster.from_url(url) as client:
        assert all(client.batch_tile_set(KEYS, stored))

    async def main() -> None:
        async with fastkv.asyncio.RedisCluster(
            host="127.0.0.1", port=cluster.port, **secure
        ) as client:
            got = [bytearray(300_000) for _ in KEYS]
            assert all(await client.batch_tile_get(KEYS, got))
            assert got == stored

    asyncio.run(main())


def test_a_cluster_that_is_not_trusted_is_redis_pys_error(
    cluster: ClusterServers, folder: Path
) -> None:
    stranger = Authority(folder, "stranger").identity
    assert stranger is not None
    with pytest.raises((RedisClusterException, ConnectionError)):
        fastkv.RedisCluster(
            host="127.0.0.1",
            port=cluster.port,
            ssl=True,
            ssl_ca_certs=stranger.cert_file,
        )


def test_lmcaches_chunks_in_a_cluster(
    cluster: ClusterServers, secure: dict[str, Any], demux: Any
) -> None:
    lm: Demux = demux(
        f"fastkvs://127.0.0.1:{cluster.port}?cluster=true",
        ssl_ca_certs=secure["ssl_ca_certs"],
    )
    assert isinstance(lm.client, NativeClient)
    stored = values(200_000)
    assert lm.set(KEYS, stored) == [True] * 60
    got = [bytearray(200_000) for _ in KEYS]
    assert lm.get(KEYS, got) == [True] * 60
    assert got == stored


def test_sentinel_over_tls_and_after_a_failover(
    sentinels: SentinelServers, secure: dict[str, Any]
) -> None:
    stored = values(300_000)
    patient = Retry(ConstantBackoff(0.05), 400)
    with fastkv.Sentinel(
        sentinels.addresses, sentinel_kwargs=secure, socket_timeout=1.0
    ) as sentinel:
        with sentinel.master_for("mymaster", retry=patient, **secure) as master:
            assert all(master.batch_tile_set(KEYS, stored))
            master.wait(1, 5000)
            with sentinel.slave_for("mymaster", **secure) as replica:
                got = [bytearray(300_000) for _ in KEYS]
                assert all(replica.batch_tile_get(KEYS, got))
                assert got == stored
            sentinels.sentinels[0].call("FAILOVER", "mymaster")
            assert eventually(
                lambda: sentinels.replication(sentinels.replica).get("role") == "master"
            )
            got = [bytearray(300_000) for _ in KEYS]
            assert all(master.batch_tile_get(KEYS, got))
            assert got == stored
            assert all(master.batch_tile_set(KEYS, stored, timeout=30))
            with sentinels.replica.client() as admin:
                assert admin.dbsize() == len(KEYS)
