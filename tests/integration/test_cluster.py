"""A cluster at rest: every call over three nodes is what it is over one."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
import redis.asyncio
from redis.credentials import StreamingCredentialProvider
from redis.exceptions import RedisClusterException, TimeoutError

import fastkv
import fastkv.asyncio
from fastkv.cli.private_server import ServerBinary
from fastkv.metrics import TileCollector
from tests.clusters import ClusterServers
from tests.conftest import eventually, fastkv_threads

KEYS = [f"k{i}" for i in range(300)]


@pytest.fixture(scope="module")
def clusters() -> Iterator[Callable[[ServerBinary], ClusterServers]]:
    started: dict[ServerBinary, ClusterServers] = {}

    def start(binary: ServerBinary) -> ClusterServers:
        if binary not in started:
            started[binary] = ClusterServers(binary, "--bind", "127.0.0.1", "127.0.0.2")
        return started[binary]

    yield start
    for cluster in started.values():
        cluster.stop()


@pytest.fixture
def running_cluster(clusters: Any, binary: ServerBinary) -> ClusterServers:
    cluster: ClusterServers = clusters(binary)
    return cluster


# In this order: our own descriptors to the servers are there before it looks.
@pytest.fixture(autouse=True)
def no_leaks(running_cluster: ClusterServers, no_leaks: None) -> None:
    pass


@pytest.fixture
def cluster(running_cluster: ClusterServers) -> ClusterServers:
    running_cluster.flush()
    return running_cluster


@pytest.fixture
def client(cluster: ClusterServers) -> Iterator[fastkv.RedisCluster]:
    with fastkv.RedisCluster(host="127.0.0.1", port=cluster.port) as client:
        yield client


def values(size: int, count: int = len(KEYS)) -> list[bytes]:
    return [os.urandom(size) for _ in range(count)]


def test_a_batch_spans_all_nodes(
    client: fastkv.RedisCluster, cluster: ClusterServers
) -> None:
    stored = values(1000)
    assert client.batch_tile_set(KEYS, stored) == [True] * 300
    assert {m.admin.dbsize() for m in cluster.primaries} == {
        sum(cluster.owner(k) is m for k in KEYS) for m in cluster.primaries
    }
    got = [bytearray(1000) for _ in KEYS]
    keys = [*KEYS, "no"]
    assert client.batch_tile_get(keys, [*got, bytearray(9)]) == [True] * 300 + [False]
    assert got == stored
    assert client.batch_tile_exists(["no", *KEYS]) == [False] + [True] * 300
    assert client.batch_tile_delete([*KEYS[::2], "no"]) == [True] * 150 + [False]
    assert client.batch_tile_exists(KEYS) == [False, True] * 150
    for key, value in zip(KEYS[1::2], stored[1::2], strict=True):
        assert client.get(key) == value


def test_hash_tags_and_all_kinds_of_keys(client: fastkv.RedisCluster) -> None:
    keys: list[Any] = [f"{{tag}}{i}" for i in range(20)]
    keys += [b"\xff\x00", "schlüssel", 17, 2.5, bytearray(b"b"), ""]
    stored = values(50, len(keys))
    assert all(client.batch_tile_set(keys, stored))
    assert [client.get(key) for key in keys] == stored
    assert len({client.keyslot(key) for key in keys[:20]}) == 1
    assert client.batch_tile_exists([memoryview(b"b")]) == [True]
    # A key may stand there twice.
    assert client.batch_tile_exists([keys[0], keys[-2], keys[0]]) == [True] * 3


@pytest.mark.parametrize("size", [1, 4096, 300_000, 1 << 20, 8 << 20])
@pytest.mark.parametrize("immutable", [False, True])
def test_values_of_all_sizes(
    client: fastkv.RedisCluster, size: int, immutable: bool
) -> None:
    count = max(3, min(60, (24 << 20) // size))
    keys, stored = KEYS[:count], values(size, count)
    assert all(client.batch_tile_set(keys, stored, px=60_000))
    assert 0 < client.pttl(keys[0]) <= 60_000
    got = [bytearray(size) for _ in keys]
    assert all(client.batch_tile_get(keys, got, immutable=immutable))
    assert got == stored
    rows = bytearray(size * count)
    array = memoryview(rows).cast("B", (count, size))
    assert all(client.batch_tile_get(keys, array, immutable=immutable))
    assert rows == b"".join(stored)


def test_a_client_of_one_node_is_told_what_to_use(
    client: fastkv.RedisCluster,
) -> None:
    node = client.get_default_node()
    with fastkv.Redis(node.host, node.port) as one:
        with pytest.raises(fastkv.TileError, match=r"MovedError \d+ .*RedisCluster"):
            one.batch_tile_exists(KEYS)


def test_nx_and_parts_of_values(client: fastkv.RedisCluster) -> None:
    assert all(client.batch_tile_set(KEYS[::3], values(5, 100)))
    halves = [(b"ab", b"cde")] * 300
    assert client.batch_tile_set(KEYS, halves, nx=True) == [False, True, True] * 100
    first, second = bytearray(1), bytearray(4)
    assert client.batch_tile_get([KEYS[1]], [(first, second)]) == [True]
    assert (first, second) == (b"a", b"bcde")


def test_each_keys_error_is_its_own(client: fastkv.RedisCluster) -> None:
    stored = values(100)
    client.batch_tile_set(KEYS, stored)
    client.delete("k10")
    client.lpush("k10", "x")
    client.set("k20", b"longer" * 100)
    got = [bytearray(100) for _ in KEYS]
    with pytest.raises(fastkv.TileError, match="2 of 301 keys failed") as caught:
        client.batch_tile_get([*KEYS, "no"], [*got, bytearray(1)])
    assert list(caught.value.errors) == [10, 20]
    assert isinstance(caught.value.errors[10], redis.ResponseError)
    sized = caught.value.errors[20]
    assert isinstance(sized, fastkv.ValueSizeError)
    assert (sized.expected, sized.actual) == (100, 600)
    for i, outcome in enumerate(caught.value.outcomes[:300]):
        if i not in (10, 20):
            assert outcome is True
            assert got[i] == stored[i]
    assert caught.value.outcomes[300] is False


def test_calls_are_counted_in_total_and_by_node(
    client: fastkv.RedisCluster, cluster: ClusterServers
) -> None:
    client.batch_tile_set(KEYS, values(100))
    keys = [*KEYS[:100], "no"]
    client.batch_tile_get(keys, [bytearray(100) for _ in keys])
    check_counts(client.tile_info(), cluster)
    check_scrape(client, cluster)

    async def work() -> None:
        async with fastkv.asyncio.RedisCluster(
            host="127.0.0.1", port=cluster.port
        ) as client:
            await client.batch_tile_set(KEYS, values(100))
            await client.batch_tile_get(keys, [bytearray(100) for _ in keys])
            check_counts(client.tile_info(), cluster)

    asyncio.run(work())


def check_scrape(client: fastkv.RedisCluster, cluster: ClusterServers) -> None:
    (written,) = [
        family
        for family in TileCollector(cache=client).collect()
        if family.name == "fastkv_written_bytes"
    ]
    assert {sample.labels["client"] for sample in written.samples} == {"cache"}
    assert {sample.labels["node"]: sample.value for sample in written.samples} == {
        f"127.0.0.1:{member.port}": 100 * sum(cluster.owner(k) is member for k in KEYS)
        for member in cluster.primaries
    }


def check_counts(info: Any, cluster: ClusterServers) -> None:
    gets, sets = info["commands"]["get"], info["commands"]["set"]
    assert gets["batches"]["ok"] == sets["batches"]["ok"] == 1
    assert gets["seconds"]["count"] == sets["seconds"]["count"] == 1
    assert (gets["keys"]["hit"], gets["keys"]["miss"]) == (100, 1)
    assert sets["keys"]["stored"] == 300
    assert (info["bytes_read"], info["bytes_written"]) == (10_000, 30_000)
    assert info["retries"] == info["reconnects"] == 0
    assert len(info["nodes"]) == 3
    for name, node in info["nodes"].items():
        owned = sum(name.endswith(f":{cluster.owner(k).port}") for k in KEYS)
        assert node["commands"]["set"]["keys"]["stored"] == owned > 0
        assert node["commands"]["set"]["batches"]["ok"] == 1
        assert node["bytes_written"] == 100 * owned
    nodes = info["nodes"].values()
    assert sum(node["commands"]["get"]["keys"]["hit"] for node in nodes) == 100
    assert sum(node["connections"] for node in nodes) == info["connections"] > 0


def test_bad_arguments_are_refused_before_anything_is_sent(
    client: fastkv.RedisCluster,
) -> None:
    assert client.batch_tile_get([], []) == []
    assert client.submit_batch_tile_exists([]).result(1) == []
    with pytest.raises(ValueError, match="expected 2 buffers"):
        client.batch_tile_get(["a", "b"], [bytearray(1)])
    with pytest.raises(ValueError, match="read-only"):
        client.batch_tile_get(["a"], [b"x"])
    with pytest.raises(redis.DataError):
        client.batch_tile_exists([None])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="timeout"):
        client.batch_tile_exists(["a"], timeout=0)
    assert client._tile_nodes == {}


def test_futures(client: fastkv.RedisCluster) -> None:
    stored = values(2000)
    assert client.submit_batch_tile_set(KEYS, stored).result(5) == [True] * 300
    got = [[bytearray(2000) for _ in KEYS] for _ in range(10)]
    futures = [client.submit_batch_tile_get(KEYS, buffers) for buffers in got]
    called = threading.Event()
    futures[0].add_done_callback(lambda _: called.set())
    for future, buffers in zip(futures, got, strict=True):
        assert future.result(5) == [True] * 300
        assert buffers == stored
        buffers[0].append(1)  # no pin is left
    assert called.wait(5)
    wrong = client.submit_batch_tile_get(KEYS[:3], [bytearray(1)] * 3)
    assert isinstance(wrong.exception(5), fastkv.TileError)
    assert client.submit_batch_tile_exists(["no"]).result(5) == [False]
    assert client.submit_batch_tile_delete(KEYS).result(5) == [True] * 300


def test_asyncio(cluster: ClusterServers) -> None:
    async def main() -> None:
        async with fastkv.asyncio.RedisCluster(
            host="127.0.0.1", port=cluster.port, tile_connections=6
        ) as client:
            stored = values(100_000)
            assert await client.batch_tile_set(KEYS, stored) == [True] * 300
            got = [bytearray(100_000) for _ in KEYS]
            tasks = [
                client.batch_tile_get(KEYS[:150], got[:150]),
                client.batch_tile_get([*KEYS[150:], "no"], [*got[150:], bytearray(1)]),
                client.batch_tile_exists(["no", *KEYS]),
            ]
            first, second, third = await asyncio.gather(*tasks)
            assert first == [True] * 150
            assert second == [True] * 150 + [False]
            assert third == [False] + [True] * 300
            assert got == stored
            got[0].append(0)
            assert await client.get("k7") == stored[7]
            with pytest.raises(fastkv.TileError):
                await client.batch_tile_get(KEYS[:9], [bytearray(1) for _ in range(9)])
            assert await client.batch_tile_delete(KEYS) == [True] * 300
            assert await client.batch_tile_get([], []) == []

    asyncio.run(main())


def test_asyncio_without_a_context_and_from_a_url(cluster: ClusterServers) -> None:
    async def main() -> None:
        url = f"redis://127.0.0.1:{cluster.port}?tile_workers=1&tile_connections=3"
        client = fastkv.asyncio.RedisCluster.from_url(url)
        assert await client.batch_tile_exists(KEYS) == [False] * 300
        assert {n.options.connections for n in client._tile_nodes.values()} == {1}
        await client.aclose()
        assert client._tile_nodes == {}
        assert await client.batch_tile_exists(KEYS) == [False] * 300
        await client.aclose()

    asyncio.run(main())


def test_arguments_are_redis_pys_and_ours(cluster: ClusterServers) -> None:
    url = f"redis://127.0.0.1:{cluster.port}?tile_connections=7"
    with fastkv.RedisCluster.from_url(url, tile_workers=2) as client:
        assert client.batch_tile_exists(KEYS) == [False] * 300
        shares = [node.options for node in client._tile_nodes.values()]
        assert sorted(s.connections or 0 for s in shares) == [2, 2, 3]
        assert [s.workers for s in shares] == [1, 1, 1]
    node = redis.cluster.ClusterNode("localhost", cluster.port)
    with fastkv.RedisCluster(startup_nodes=[node], decode_responses=True) as client:
        assert client.batch_tile_set(["ä"], [b"\xff"]) == [True]
        assert client.batch_tile_exists(["ä"]) == [True]
    with pytest.raises(ValueError, match="tile_worker: unknown"):
        fastkv.RedisCluster.from_url(f"{url}&tile_worker=1")
    with pytest.raises(RedisClusterException):
        fastkv.RedisCluster()


def test_addresses_are_remapped_as_redis_py_does(cluster: ClusterServers) -> None:
    with fastkv.RedisCluster(
        host="127.0.0.1",
        port=cluster.port,
        address_remap=lambda address: ("127.0.0.2", address[1]),
    ) as client:
        assert client.batch_tile_exists(KEYS) == [False] * 300
        assert set(client._tile_nodes) == {
            f"127.0.0.2:{member.port}" for member in cluster.primaries
        }


def test_threads_and_connections_are_bounded(
    client: fastkv.RedisCluster, cluster: ClusterServers
) -> None:
    stored = values(10_000)

    def work() -> None:
        for _ in range(5):
            got = [bytearray(10_000) for _ in KEYS]
            assert all(client.batch_tile_set(KEYS, stored))
            assert all(client.batch_tile_get(KEYS, got))
            assert got == stored
            assert all(client.batch_tile_exists(KEYS))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    clients = [
        [c for c in m.admin.client_list() if "fastkv" in c.get("lib-name", "fastkv")]
        for m in cluster.primaries
    ]
    assert sum(len(of_node) for of_node in clients) <= 4 + 3 + 2 * 3 + 3
    total = sum(node.options.connections or 0 for node in client._tile_nodes.values())
    assert total == 4


def test_close_ends_what_is_in_flight_and_the_client_goes_on(
    cluster: ClusterServers,
) -> None:
    client = fastkv.RedisCluster(host="127.0.0.1", port=cluster.port)
    stored = values(1 << 20, 60)
    client.batch_tile_set(KEYS[:60], stored)
    got = [bytearray(1 << 20) for _ in range(60)]
    futures = [client.submit_batch_tile_get(KEYS[:60], got) for _ in range(3)]
    client.close()
    for future in futures:
        error = future.exception(5)
        assert error is None or "client was closed" in str(error)
    for buffer in got:
        buffer.append(0)
        buffer.pop()
    assert all(client.batch_tile_get(KEYS[:60], got))
    assert got == stored
    client.close()
    client.close()


def test_a_dropped_client_ends_its_threads(cluster: ClusterServers) -> None:
    client = fastkv.RedisCluster(host="127.0.0.1", port=cluster.port)
    client.batch_tile_exists(KEYS)
    del client

    def ended() -> bool:
        # redis-py's cluster client is a cycle, and a connector at work may hold it.
        gc.collect()
        return not fastkv_threads()

    assert eventually(ended)


def test_time_out_and_cancel_leave_no_pin(
    client: fastkv.RedisCluster, cluster: ClusterServers
) -> None:
    client.batch_tile_set(KEYS, values(1000))
    stopped = cluster.primaries[1]
    stopped.admin.execute_command("CLIENT", "PAUSE", 700, "ALL")
    got = [bytearray(1000) for _ in KEYS]
    begin = time.monotonic()
    with pytest.raises(
        TimeoutError, match=r"300 keys were not all answered in .*0\.2|0\.2 s"
    ):
        client.batch_tile_get(KEYS, got, timeout=0.2)
    assert time.monotonic() - begin < 0.5
    for buffer in got:
        buffer.append(0)
        buffer.pop()
    future = client.submit_batch_tile_get(KEYS, got)
    assert future.cancel()
    assert future.cancelled()

    def unpinned() -> bool:
        try:
            for buffer in got:
                buffer.append(0)
                buffer.pop()
        except BufferError:
            return False
        return True

    assert eventually(unpinned)
    assert all(client.batch_tile_get(KEYS, got))  # waits until the pause is over


def test_a_cancelled_task_raises_once_nothing_is_written(
    cluster: ClusterServers,
) -> None:
    async def main() -> None:
        async with fastkv.asyncio.RedisCluster(
            host="127.0.0.1", port=cluster.port
        ) as client:
            await client.batch_tile_set(KEYS, values(1000))
            cluster.primaries[2].admin.execute_command("CLIENT", "PAUSE", 500, "ALL")
            got = [bytearray(1000) for _ in KEYS]
            task = asyncio.create_task(client.batch_tile_get(KEYS, got))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            for buffer in got:
                buffer.append(0)
                buffer.pop()
            with pytest.raises(TimeoutError):
                await client.batch_tile_get(KEYS, got, timeout=0.1)
            assert all(await client.batch_tile_get(KEYS, got))

    asyncio.run(main())


def _in_child(client: fastkv.RedisCluster, stored: list[bytes], result: Any) -> None:
    got = [bytearray(1000) for _ in KEYS]
    result.send(all(client.batch_tile_get(KEYS, got)) and got == stored)
    client.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_gets_its_own_connections(client: fastkv.RedisCluster) -> None:
    stored = values(1000)
    client.batch_tile_set(KEYS, stored)
    ours, theirs = multiprocessing.get_context("fork").Pipe(False)
    child = multiprocessing.get_context("fork").Process(
        target=_in_child, args=(client, stored, theirs)
    )
    child.start()
    assert ours.poll(20)
    assert ours.recv() is True
    child.join(20)
    assert child.exitcode == 0
    got = [bytearray(1000) for _ in KEYS]
    assert all(client.batch_tile_get(KEYS, got))
    assert got == stored
    ours.close()
    theirs.close()


class _Token:
    def __init__(self, user: str) -> None:
        self.user = user

    def try_get(self, _key: str) -> str:
        return self.user

    def get_value(self) -> str:
        return "secret"


class _Provider(StreamingCredentialProvider):
    """Says a new user to all who asked to be told."""

    def __init__(self) -> None:
        self.user = "before"
        self.told: list[Any] = []

    def get_credentials(self) -> tuple[str, str]:
        return self.user, "secret"

    async def get_credentials_async(self) -> tuple[str, str]:
        return self.user, "secret"

    def on_next(self, callback: Any) -> None:
        self.told.append(callback)

    def on_error(self, callback: Any) -> None:
        pass

    def is_streaming(self) -> bool:
        return True


def test_a_rotated_token_reaches_the_connections_of_asyncio(
    cluster: ClusterServers,
) -> None:
    for member in cluster.members:
        for user in ("before", "after"):
            member.admin.acl_setuser(
                user,
                enabled=True,
                passwords=["+secret"],
                keys=["*"],
                categories=["+@all"],
            )

    def users() -> set[str]:
        return {
            one["user"]
            for member in cluster.members
            for one in member.admin.client_list()
            if one["cmd"] != "cluster|slots"  # redis-py's, which it forgets
        } - {"default"}

    async def main() -> None:
        provider = _Provider()
        async with fastkv.asyncio.RedisCluster(
            host="127.0.0.1", port=cluster.port, credential_provider=provider
        ) as client:
            assert not any(await client.batch_tile_exists(KEYS))
            for key in KEYS[:20]:
                await client.get(key)
            assert users() == {"before"}
            provider.user = "after"
            for tell in provider.told:
                await tell(_Token("after"))
            assert not any(await client.batch_tile_exists(KEYS))
            assert not any(
                await client.batch_tile_get(KEYS, [bytearray(1) for _ in KEYS])
            )
            assert eventually(lambda: users() == {"after"})

    try:
        asyncio.run(main())
    finally:
        for member in cluster.members:
            member.admin.acl_deluser("before", "after")
