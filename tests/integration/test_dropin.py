"""`redis.Redis` becomes `fastkv.Redis`, and nothing else changes."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import socket
import threading
import weakref
from typing import Any

import pytest
import redis
import redis.asyncio

import fastkv
import fastkv.asyncio
from fastkv import pooled
from fastkv.cli.private_server import PrivateServer
from fastkv.node import Node
from tests.conftest import Endpoint, eventually, fastkv_threads
from tests.faults.held import HeldServer
from tests.scripted import ModelServer


def native_connections(plain: redis.Redis) -> list[dict[str, str]]:
    """The only ones with RESP2 here."""
    return [c for c in plain.client_list() if c["resp"] == "2"]


def test_redis_commands_behave_as_before(client: fastkv.Redis) -> None:
    assert isinstance(client, redis.Redis)
    assert client.set("a", "1") is True
    assert client.get("a") == b"1"
    assert client.incr("a") == 2
    with client.pipeline() as pipe:
        pipe.set("b", "x").get("b")
        assert pipe.execute() == [True, b"x"]
        assert not hasattr(pipe, "batch_tile_get")
    with client.lock("lock", timeout=5):
        pass
    pubsub = client.pubsub()
    pubsub.subscribe("c")
    pubsub.close()
    assert client.transaction(lambda pipe: pipe.get("a")) == [b"2"]


def test_nothing_native_starts_before_the_first_batch_call(
    client: fastkv.Redis,
) -> None:
    client.ping()
    client.batch_tile_get.__doc__  # noqa: B018  # looking is not calling
    assert fastkv_threads() == []
    client.batch_tile_exists(["a"])
    assert fastkv_threads() != []


@pytest.mark.parametrize(
    "how", ["arguments", "url", "module", "connection_pool", "from_pool"]
)
def test_every_way_to_make_a_client_works(
    make: Any, endpoint: Endpoint, how: str
) -> None:
    if how == "arguments":
        client = make(**endpoint.kwargs)
    elif how == "url":
        client = fastkv.Redis.from_url(endpoint.url + "?tile_workers=2")
    elif how == "module":
        client = fastkv.from_url(endpoint.url, tile_workers=2)
    else:
        pool = redis.ConnectionPool.from_url(endpoint.url)
        client = (
            fastkv.Redis.from_pool(pool)
            if how == "from_pool"
            else fastkv.Redis(connection_pool=pool)
        )
    with client:
        assert type(client) is fastkv.Redis
        assert client.batch_tile_set(["a"], [b"x"]) == [True]
        assert client.get("a") == b"x"
    client.connection_pool.disconnect()  # what redis-py leaves to who made it


def test_settings_reach_the_native_connections(
    make: Any, endpoint: Endpoint, plain: redis.Redis
) -> None:
    plain.execute_command("ACL SETUSER bob on >pw ~* &* +@all")
    client = make(
        **endpoint.kwargs,
        db=3,
        username="bob",
        password="pw",
        client_name="me",
        tile_connections=2,
    )
    client.batch_tile_set(["a"] * 50, [b"x"] * 50)
    client.batch_tile_exists(["a"])
    found = native_connections(plain)
    assert len(found) == 3
    for one in found:
        assert (one["name"], one["db"], one["user"], one["resp"]) == (
            "me",
            "3",
            "bob",
            "2",
        )
        # Redis 7.0 has no library names.
        assert one.get("lib-name") in (None, f"redis-py(fastkv_v{fastkv.__version__})")
    assert plain.execute_command("ACL DELUSER bob") == 1


def test_driver_names_that_were_switched_off_stay_off(
    make: Any, endpoint: Endpoint, plain: redis.Redis
) -> None:
    make(**endpoint.kwargs, driver_info=None, tile_connections=1).batch_tile_exists(
        ["a"]
    )
    (found,) = native_connections(plain)
    assert found.get("lib-name", "") == ""


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("decode", [True, False])
def test_reply_settings_change_no_answer(
    make: Any, endpoint: Endpoint, protocol: int, decode: bool
) -> None:
    client = make(**endpoint.kwargs, protocol=protocol, decode_responses=decode)
    client.set_response_callback("EXISTS", lambda *_: "odd")
    assert client.batch_tile_set(["a"], [b"\xff"]) == [True]
    got = bytearray(1)
    assert client.batch_tile_get(["a"], [got]) == [True]
    assert got == b"\xff"
    assert client.batch_tile_exists(["a", "b"]) == [True, False]
    assert client.batch_tile_delete(["a"]) == [True]


def test_the_pools_limit_holds_for_native_connections(
    make: Any, endpoint: Endpoint, plain: redis.Redis
) -> None:
    client = make(**endpoint.kwargs, max_connections=2, tile_connections=8)
    for _ in range(3):
        client.batch_tile_set([f"k{i}" for i in range(100)], [b"x"] * 100)
        client.batch_tile_exists(["k1"])
    assert len(native_connections(plain)) == 2
    assert client.ping()  # and they do not count towards it


def test_redis_connect_func_and_credential_provider_are_used(
    make: Any, own_server: PrivateServer
) -> None:
    asked = []

    class Provider(redis.CredentialProvider):
        def get_credentials(self) -> tuple[str]:
            asked.append(threading.current_thread().name)
            return ("secret",)

    with own_server.client() as admin:
        admin.config_set("requirepass", "secret")
        client = make(
            port=own_server.port, credential_provider=Provider(), tile_connections=1
        )
        assert client.batch_tile_exists(["a"]) == [False]
        assert asked == ["fastkv-connector"]
        client.connection_pool.disconnect()  # drops the native ones too
        assert client.batch_tile_exists(["a"]) == [False]
        assert len(asked) == 2

        connected = []

        def connect(connection: redis.Connection) -> None:
            connected.append(connection)
            connection.on_connect()

        client = make(
            port=own_server.port,
            password="secret",
            redis_connect_func=connect,
            tile_connections=1,
        )
        assert client.batch_tile_exists(["a"]) == [False]
        assert len(connected) == 1


def test_a_connection_without_a_socket_is_refused_by_name(
    make: Any, endpoint: Endpoint
) -> None:
    class Wrapped(redis.connection.UnixDomainSocketConnection):
        def _connect(self) -> Any:
            class Recording:
                def __init__(self, sock: socket.socket) -> None:
                    self.sock = sock

                def __getattr__(self, name: str) -> Any:
                    return getattr(self.sock, name)

            return Recording(super()._connect())

    pool = redis.ConnectionPool(
        connection_class=Wrapped, path=endpoint.server.unix_path
    )
    client = make(connection_pool=pool)
    assert client.ping()
    with pytest.raises(fastkv.UnsupportedConnection, match="Wrapped has Recording"):
        client.batch_tile_exists(["a"])
    pool.disconnect()


def test_unknown_settings_are_redis_pys_type_error(
    make: Any, endpoint: Endpoint
) -> None:
    pool = redis.ConnectionPool(**endpoint_kwargs(endpoint), no_such_setting=1)
    client = make(connection_pool=pool)
    with pytest.raises(TypeError, match="no_such_setting"):
        client.ping()
    with pytest.raises(TypeError, match="no_such_setting"):
        client.batch_tile_exists(["a"])


def endpoint_kwargs(endpoint: Endpoint) -> dict[str, Any]:
    if not endpoint.unix:
        return endpoint.kwargs
    return {
        "connection_class": redis.UnixDomainSocketConnection,
        "path": endpoint.server.unix_path,
    }


def test_a_client_can_be_used_again_after_close(client: fastkv.Redis) -> None:
    for _ in range(3):
        assert client.batch_tile_set(["a"], [b"x"]) == [True]
        assert client.submit_batch_tile_exists(["a"]).result(5) == [True]
        client.close()
        client.close()
        assert fastkv_threads() == []
        assert client.ping()


def test_what_is_in_flight_on_a_replaced_pool_may_connect_again() -> None:
    with HeldServer(1, "asked") as old, ModelServer(2) as new:
        old.data[b"v"], got = b"old", bytearray(3)
        client = fastkv.Redis(port=old.port, protocol=2)  # with 3, others hold it, too
        future = client.submit_batch_tile_get(["v"], [got])
        assert old.reached.wait(30)
        client.connection_pool = redis.ConnectionPool(port=new.port)
        gc.collect()
        old.drop_all()
        old.go_on.set()
        assert future.result(30) == [True]
        assert got == b"old"
        client.close()


@pytest.mark.parametrize("where", ["node_of", "drop_node"])
def test_an_interrupt_while_a_pool_is_replaced_loses_no_node(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> None:
        before(*args)
        raise KeyboardInterrupt

    pools = [redis.ConnectionPool(port=port) for port in (1, 2)]
    client = fastkv.Redis(connection_pool=pools[0])
    client._node()
    client.connection_pool = pools[1]
    before = getattr(pooled, where)
    monkeypatch.setattr(pooled, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        client._node()
    monkeypatch.undo()
    client.close()
    assert eventually(lambda: not fastkv_threads())


@pytest.mark.parametrize("how", ["run", "submit", "wait"])
def test_a_pool_that_is_replaced_while_a_call_begins_is_no_matter(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread's call ends the node that this one has just taken."""
    awaited = how == "wait"
    before = getattr(Node, how)

    def replace_pool() -> None:
        client.connection_pool = other
        hits = client.batch_tile_exists(["v"])
        assert (asyncio.run(hits) if awaited else hits) == [True]

    def late(node: Node, *args: Any) -> Any:
        monkeypatch.undo()
        thread = threading.Thread(target=replace_pool)
        thread.start()
        thread.join()
        assert eventually(lambda: node.closed)
        return before(node, *args)

    async def get(memory: bytearray) -> Any:
        name = "submit_batch_tile_get" if how == "submit" else "batch_tile_get"
        got = getattr(client, name)(["v"], [memory])
        return await got if awaited else got

    with ModelServer(1) as old, ModelServer(2) as new:
        new.data[b"v"] = b"new"
        made_by: Any = fastkv.asyncio.Redis if awaited else fastkv.Redis
        pools: Any = redis.asyncio if awaited else redis
        other = pools.ConnectionPool(port=new.port, protocol=2)
        client = made_by(port=old.port, protocol=2)
        memory = bytearray(3)
        monkeypatch.setattr(Node, how, late)
        hits = asyncio.run(get(memory))
        assert (hits.result(30) if how == "submit" else hits) == [True]
        assert memory == b"new"
        if awaited:
            asyncio.run(client.aclose())
        else:
            client.close()


@pytest.mark.parametrize("how", ["blocking", "future", "asyncio"])
def test_a_client_whose_pool_is_replaced_asks_the_new_server(how: str) -> None:
    """What the old one has been asked still arrives."""
    awaited = how == "asyncio"

    def ask(client: Any, got: bytearray) -> Any:
        if awaited:
            return asyncio.ensure_future(client.batch_tile_get(["v"], [got]))
        return client.submit_batch_tile_get(["v"], [got])

    async def get(client: Any) -> bytes:
        got = bytearray(3)
        if how == "blocking":
            assert client.batch_tile_get(["v"], [got], timeout=30) == [True]
        else:
            future = ask(client, got)
            assert (await future if awaited else future.result(30)) == [True]
        return bytes(got)

    async def check() -> None:
        client = (fastkv.asyncio if awaited else fastkv).Redis(port=old.port)
        pools: Any = redis.asyncio if awaited else redis
        pool, other = client.connection_pool, pools.ConnectionPool(port=new.port)
        slow = bytearray(3)
        future = ask(client, slow)
        await asyncio.to_thread(old.reached.wait, 30)
        client.connection_pool = other
        assert await get(client) == b"new"
        old.go_on.set()
        assert (await future if awaited else future.result(30)) == [True]
        assert slow == b"old"
        client.connection_pool = pool
        assert await get(client) == b"old"
        client.connection_pool = other
        assert await get(client) == b"new"
        # The old one's threads have ended.
        assert eventually(lambda: fastkv_threads().count("fastkv-connector") == 1)
        await client.aclose() if awaited else client.close()
        assert eventually(lambda: not fastkv_threads())

    with HeldServer(1, "asked") as old, ModelServer(2) as new:
        old.data[b"v"], new.data[b"v"] = b"old", b"new"
        asyncio.run(check())


def test_clients_of_one_pool_share_connections_and_the_last_one_ends_them(
    endpoint: Endpoint, plain: redis.Redis
) -> None:
    pool = redis.ConnectionPool(**endpoint_kwargs(endpoint))
    first = fastkv.Redis(connection_pool=pool, tile_connections=2)
    second = fastkv.Redis(connection_pool=pool)
    first.batch_tile_set(["a"] * 9, [b"x"] * 9)
    second.batch_tile_set(["a"] * 9, [b"x"] * 9)
    assert 1 <= len(native_connections(plain)) <= 2
    first.close()
    assert second.batch_tile_exists(["a"]) == [True]
    with pytest.raises(ValueError, match="were started with"):
        fastkv.Redis(connection_pool=pool, tile_connections=7).batch_tile_exists(["a"])
    second.close()
    assert fastkv_threads() == []
    pool.disconnect()


def test_a_dropped_client_takes_everything_along(endpoint: Endpoint) -> None:
    client = fastkv.Redis(**endpoint.kwargs)
    client.batch_tile_exists(["a"])
    pool = weakref.ref(client.connection_pool)
    del client

    def gone() -> bool:
        gc.collect()
        return pool() is None and not fastkv_threads()

    assert eventually(gone)


def test_a_dropped_client_of_a_pool_that_lives_on_ends_its_threads(
    endpoint: Endpoint,
) -> None:
    pool = redis.ConnectionPool(**endpoint_kwargs(endpoint))
    client = fastkv.Redis(connection_pool=pool)
    client.batch_tile_exists(["a"])
    del client
    assert eventually(lambda: not fastkv_threads())
    assert fastkv.Redis(connection_pool=pool).batch_tile_exists(["a"]) == [False]


def test_clients_that_die_in_cycles_deadlock_nobody(endpoint: Endpoint) -> None:
    class Service:
        def __init__(self) -> None:
            self.client = fastkv.Redis(**endpoint.kwargs)
            self.me = self

    def use() -> None:
        for _ in range(60):
            Service().client.batch_tile_exists(["a"], timeout=10)

    before = gc.get_threshold()
    gc.set_threshold(50)  # so that collections happen everywhere
    try:
        threads = [threading.Thread(target=use) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    finally:
        gc.set_threshold(*before)


def test_client_copy_and_pickle_are_as_in_redis(client: fastkv.Redis) -> None:
    client.batch_tile_set(["a"], [b"x"])
    with client.client() as single:
        assert type(single) is fastkv.Redis
        assert single.batch_tile_exists(["a"]) == [True]
    twin = copy.copy(client)
    assert twin.batch_tile_exists(["a"]) == [True]
    assert twin.connection_pool is client.connection_pool
    with pytest.raises(TypeError):
        pickle.dumps(client)
    twin.close()
    assert client.batch_tile_exists(["a"]) == [True]


def test_single_connection_clients_have_native_connections_besides(
    make: Any, endpoint: Endpoint
) -> None:
    client = make(**endpoint.kwargs, single_connection_client=True)
    assert client.batch_tile_set(["a"], [b"x"]) == [True]
    assert client.get("a") == b"x"


@pytest.mark.parametrize("drop", ["disconnect", "reset", "close"])
def test_what_drops_the_pools_connections_drops_the_native_ones(
    client: fastkv.Redis, plain: redis.Redis, drop: str
) -> None:
    client.batch_tile_set(["a"], [b"x"])
    client.batch_tile_exists(["a"])
    before = {c["id"] for c in native_connections(plain)}
    getattr(client.connection_pool, drop)()
    assert client.batch_tile_exists(["a"]) == [True]
    client.batch_tile_set(["a"], [b"x"])
    assert before.isdisjoint(c["id"] for c in native_connections(plain))


def test_a_pool_that_somebody_has_patched_stays_so(
    client: fastkv.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.batch_tile_exists(["a"])
    called = []
    with monkeypatch.context() as patch:
        patch.setattr(client.connection_pool, "disconnect", lambda: called.append(1))
        client.close()  # and so does redis-py's
    assert called == [1]
    client.connection_pool.disconnect()
    assert called == [1]


def test_closing_does_not_mind_a_patched_socket_module(
    client: fastkv.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.batch_tile_exists(["a"])
    with monkeypatch.context() as patch:
        patch.setattr(socket, "socket", lambda *_: None)
        client.close()
    assert client.batch_tile_exists(["a"]) == [False]


def test_client_side_caches_hear_of_our_writes(make: Any, endpoint: Endpoint) -> None:
    if (endpoint.server.binary.name, endpoint.server.binary.version) < (
        "redis",
        "7.4",
    ) or endpoint.server.binary.name != "redis":
        pytest.skip("redis-py's cache wants Redis 7.4")
    client = make(**endpoint.kwargs, protocol=3, cache_config=redis.cache.CacheConfig())
    client.set("a", "old")
    assert client.get("a") == b"old"
    assert client.batch_tile_set(["a"], [b"new"]) == [True]
    client.ping()  # reads the invalidation
    assert client.get("a") == b"new"


def test_half_made_clients_can_be_thrown_away() -> None:
    with pytest.raises(TypeError):
        fastkv.Redis(no_such_argument=1)
    gc.collect()
    assert fastkv.Redis.__new__(fastkv.Redis).close() is None
