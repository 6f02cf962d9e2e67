"""LMCache's own engine, whole, on CPU tensors, with fastkv as its remote tier. What
LMCache's layers do wrong around their own clients is a test here, row by row.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
import xxhash

from fastkv import registry
from fastkv.cli.private_server import PrivateServer
from tests.clusters import ClusterServers
from tests.conftest import SERVERS, eventually, fastkv_threads
from tests.scripted import ModelServer, SilentPeer

pytest.importorskip("torch")
pytest.importorskip("lmcache")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # LMCache's own
    import torch
    from lmcache.v1.exceptions import IrrecoverableException
    from lmcache.v1.health_monitor.checks.remote_backend_check import (
        RemoteBackendHealthCheck,
    )
    from lmcache.v1.storage_backend.connector import CreateConnector

    from bench import lmcache_engine
    from bench.lmcache_engine import TOKEN_BYTES, fastkv_plugin, random_kv

pytestmark = pytest.mark.filterwarnings("default")  # LMCache's own are not ours

CHUNK = 32  # tokens: 1 MiB
BYTES = CHUNK * TOKEN_BYTES
TOKENS = list(range(8 * CHUNK))


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Nothing of ours is left; LMCache leaves descriptors of its own."""
    yield
    assert eventually(lambda: not fastkv_threads()), fastkv_threads()
    assert [n for n in registry._nodes.values() if not n.closed] == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # event loops, never closed
        gc.collect()


@pytest.fixture
def server(request: pytest.FixtureRequest, running: Any) -> PrivateServer:
    """The first of the servers: LMCache's layers do not care which one it is."""
    if not SERVERS:
        pytest.skip("no server found")
    server: PrivateServer = running(getattr(request, "param", SERVERS[0]))
    with server.client() as client:
        client.flushall()
    return server


class Whole:
    """An engine and a prompt of 8 chunks of 1 MiB."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.backend = lmcache_engine.remote_backend(engine)
        self.connector = self.backend.connection.getWrappedConnector()
        self.keys = [key for _, _, key in engine.token_database.process_tokens(TOKENS)]
        self.kv = random_kv(len(TOKENS), seed=len(os.urandom(1)))

    def store(self) -> None:
        self.engine.store(TOKENS, kv=self.kv)
        # LMCache stores asynchronously; it is over when it holds no memory for it.
        assert eventually(lambda: self.allocated() == 0)

    def retrieve(self) -> int:
        """Number of tokens that came back, each with its right bytes."""
        lmcache_engine.poison(self.engine)
        got = torch.full_like(self.kv, 7.0)
        mask = self.engine.retrieve(TOKENS, kv=got)
        count = int(mask.sum())
        assert mask[:count].all(), "not a prefix"
        assert torch.equal(
            got[:, :, :count].view(torch.uint8), self.kv[:, :, :count].view(torch.uint8)
        ), "wrong bytes"
        assert (got[:, :, count:] == 7.0).all(), "more was written than was said"
        return count

    def allocated(self) -> int:
        return lmcache_engine.allocated(self.engine)

    def on_loop(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.backend.loop).result(20)


@pytest.fixture
def whole(no_leaks: None) -> Iterator[Callable[..., Whole]]:
    closing: list[Any] = []

    def make(url: str, *, config: dict[str, Any] | None = None, **settings: Any) -> Any:
        plugin = fastkv_plugin(url, **settings)
        config = dict(config or {})
        plugin["extra_config"].update(config.pop("extra_config", {}))
        context = lmcache_engine.engine(CHUNK, 64 << 20, **plugin, **config)
        engine = context.__enter__()
        closing.append(context)
        return Whole(engine)

    yield make
    for context in closing:
        context.__exit__(None, None, None)


def url_of(server: PrivateServer) -> str:
    return f"redis://127.0.0.1:{server.port}"


# --- the job -------------------------------------------------------------------------


@pytest.mark.parametrize("server", SERVERS, indirect=True, ids=str)
@pytest.mark.parametrize("checksum", [False, True])
def test_a_prompt_comes_back_byte_for_byte(
    server: PrivateServer, plain: redis.Redis, whole: Any, checksum: bool
) -> None:
    one = whole(url_of(server), checksum=checksum, key_prefix="p:", ttl=1000)
    assert one.engine.lookup(TOKENS) == 0
    assert one.retrieve() == 0
    one.store()
    assert one.engine.lookup(TOKENS) == len(TOKENS)
    assert one.retrieve() == len(TOKENS)
    # Another prompt with the same beginning hits what is the same.
    assert one.engine.lookup(TOKENS[: 3 * CHUNK] + [9999] * CHUNK) == 3 * CHUNK
    value = plain.get("p:" + one.keys[0].to_string())
    assert isinstance(value, bytes)
    data = one.kv[:, :, :CHUNK].contiguous().view(torch.uint8).numpy().tobytes()
    assert value == data + (xxhash.xxh3_64_digest(data) if checksum else b"")
    assert 990 < plain.ttl("p:" + one.keys[0].to_string()) <= 1000
    assert one.allocated() == 0


@pytest.mark.parametrize("cluster", [False, True])
def test_a_connector_may_connect_first_in_a_forked_child(
    server: PrivateServer, whole: Any, cluster: bool
) -> None:
    with contextlib.ExitStack() as stack:
        port = server.port
        if cluster:
            port = stack.enter_context(ClusterServers(SERVERS[0])).port
        one = whole(f"redis://127.0.0.1:{port}", cluster=cluster)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                signal.alarm(30)  # ends a child that hangs
                connector = one.connector
                assert asyncio.run(connector.ping()) == 0
                assert not connector.exists_sync(one.keys[0])
                assert connector.batched_contains(one.keys) == 0
                assert not asyncio.run(connector.exists(one.keys[0]))
                assert connector.counts()["not_found"] == 2 + len(one.keys)
                assert "failed" not in connector.counts()
                asyncio.run(connector.close())
                assert not fastkv_threads()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        one.store()
        assert one.retrieve() == len(TOKENS)


def test_a_cluster_holds_a_prompt(whole: Any) -> None:
    with ClusterServers(SERVERS[0]) as cluster:
        one = whole(f"redis://127.0.0.1:{cluster.port}", cluster=True)
        assert one.engine.lookup(TOKENS) == 0
        one.store()
        assert sum(member.admin.dbsize() > 0 for member in cluster.primaries) >= 2
        assert one.engine.lookup(TOKENS) == len(TOKENS)
        assert one.retrieve() == len(TOKENS)
        assert one.on_loop(one.connector.ping()) == 0
        os.kill(cluster.members[0].server.pid, signal.SIGKILL)
        assert 0 <= one.retrieve() < len(TOKENS)
        assert one.allocated() == 0


def test_what_was_evicted_in_between_is_computed_again(
    server: PrivateServer, plain: redis.Redis, whole: Any
) -> None:
    one = whole(url_of(server))
    one.store()
    for gone in (5, 3, 0):
        plain.unlink(one.keys[gone].to_string())
        assert one.engine.lookup(TOKENS) == gone * CHUNK
        assert one.retrieve() == gone * CHUNK
    one.store()
    assert one.retrieve() == len(TOKENS)


def test_a_restart_in_between(own_server: PrivateServer, whole: Any) -> None:
    one = whole(url_of(own_server))
    for _ in range(2):
        one.store()
        assert one.retrieve() == len(TOKENS)
        own_server.stop()
        assert one.engine.lookup(TOKENS) == 0
        assert one.retrieve() == 0
        one.store()  # fails, and harms nothing
        own_server.start()
        assert one.engine.lookup(TOKENS) == 0
    one.store()
    assert one.retrieve() == len(TOKENS)
    counts = one.connector.counts()
    assert counts["failed"] >= 16
    assert one.allocated() == 0


def test_a_client_that_returns_wrong_bytes_fails_these_tests(
    server: PrivateServer, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = whole(url_of(server))
    one.store()

    async def lie(self: Any, request: Any) -> Any:
        # Says that all was loaded, and has read nothing.
        return self._store.settle(request, [True] * len(request.batch))

    monkeypatch.setattr(type(one.connector), "_run", lie)
    with pytest.raises(AssertionError, match="wrong bytes"):
        one.retrieve()


# --- keys and values are those of resp:// --------------------------------------------


@pytest.mark.parametrize("server", SERVERS, indirect=True, ids=str)
def test_fastkv_and_resp_read_each_others_chunks(
    server: PrivateServer, whole: Any
) -> None:
    kv = random_kv(len(TOKENS), 5)
    one = whole(url_of(server))
    one.kv = kv
    with lmcache_engine.engine(
        CHUNK,
        64 << 20,
        remote_url=f"resp://127.0.0.1:{server.port}",
        extra_config={"save_chunk_meta": False},
    ) as theirs:
        one.store()
        got = torch.zeros_like(kv)
        assert theirs.retrieve(TOKENS, kv=got).sum() == len(TOKENS)
        assert torch.equal(got.view(torch.uint8), kv.view(torch.uint8))
        with server.client() as admin:
            admin.flushall()
            theirs.store(TOKENS, kv=kv)
            assert eventually(lambda: admin.dbsize() == 8)
        assert one.retrieve() == len(TOKENS)


# --- what LMCache's layers do wrong, row by row --------------------------------------


def test_row_15_closing_ends(server: PrivateServer, whole: Any) -> None:
    one = whole(url_of(server))
    one.store()
    begin = time.monotonic()
    one.backend.close()
    one.backend.close()
    assert time.monotonic() - begin < 5
    assert one.engine.lookup(TOKENS) == 0
    assert one.retrieve() == 0


def test_row_16_a_killed_connection_yields_misses_or_right_bytes(
    server: PrivateServer, plain: redis.Redis, whole: Any
) -> None:
    one = whole(url_of(server))
    one.store()
    stop = threading.Event()

    def kill() -> None:
        while not stop.wait(0.003):
            plain.client_kill_filter(_type="normal", skipme=True)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        for _ in range(15):
            one.retrieve()
    finally:
        stop.set()
        killer.join()
    assert one.retrieve() == len(TOKENS)
    assert one.allocated() == 0


def test_row_17_lookups_from_many_threads_all_return(
    server: PrivateServer, whole: Any
) -> None:
    one = whole(url_of(server))
    one.store()
    answers: list[int] = []

    def look() -> None:
        for _ in range(500):
            answers.append(one.backend.batched_contains(one.keys))

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [8] * 2000


def test_row_18_missing_keys_leak_no_memory(server: PrivateServer, whole: Any) -> None:
    one = whole(url_of(server))
    for _ in range(50):  # 400 chunks, where there is room for 64
        assert one.backend.batched_get_blocking(one.keys) == [None] * 8
        assert one.backend.get_blocking(one.keys[0]) is None
    assert one.allocated() == 0
    one.store()
    assert one.retrieve() == len(TOKENS)


def test_row_19_a_server_that_stalls_past_the_time_out(
    own_server: PrivateServer, whole: Any
) -> None:
    one = whole(
        url_of(own_server), socket_timeout=60, config={"blocking_timeout_secs": 1}
    )
    one.store()
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        for _ in range(4):
            assert one.backend.batched_get_blocking(one.keys) == [None] * 8
        begin = time.monotonic()
        for _ in range(4):
            assert one.backend.contains(one.keys[0]) is False
            assert one.backend.batched_contains(one.keys) == 0
        assert time.monotonic() - begin < 10
        assert one.on_loop(one.backend.connection.ping()) != 0
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    assert one.on_loop(one.backend.connection.ping()) == 0
    assert one.retrieve() == len(TOKENS)
    assert one.allocated() == 0


def test_row_20_a_missing_chunk_shifts_no_other(
    server: PrivateServer, plain: redis.Redis, whole: Any
) -> None:
    one = whole(url_of(server))
    one.store()
    plain.unlink(one.keys[4].to_string())
    connection = one.backend.connection
    loaded = one.on_loop(connection.batched_get_non_blocking("id", one.keys))
    assert len(loaded) == 4
    assert one.on_loop(connection.batched_async_contains("id", one.keys)) == 4
    all_of_them = one.backend.batched_get_blocking(one.keys)
    assert [memory is None for memory in all_of_them] == [
        i == 4 for i in range(len(one.keys))
    ]
    for i, memory in [*enumerate(loaded), *enumerate(all_of_them)]:
        if memory is not None:
            assert torch.equal(
                memory.tensor.view(torch.uint8),
                one.kv[:, :, i * CHUNK : (i + 1) * CHUNK].view(torch.uint8),
            )
            memory.ref_count_down()
    assert one.allocated() == 0


def test_row_21_a_batch_larger_than_lmcaches_memory(
    server: PrivateServer, plain: redis.Redis, whole: Any
) -> None:
    one = whole(url_of(server))
    value = os.urandom(BYTES)
    tokens = list(range(100 * CHUNK))
    keys = [key for _, _, key in one.engine.token_database.process_tokens(tokens)]
    for key in keys:
        plain.set(key.to_string(), value)
    loaded = one.backend.batched_get_blocking(keys)
    count = sum(memory is not None for memory in loaded)
    assert 32 <= count < 100
    assert all(memory is None for memory in loaded[count:])
    for memory in loaded[:count]:
        assert bytes(memory.byte_array) == value
    # The loop is not stuck: another call is answered while nothing is free.
    assert one.backend.contains(keys[0]) is True
    for memory in loaded[:count]:
        memory.ref_count_down()
    assert one.allocated() == 0


def test_row_22_remove(server: PrivateServer, whole: Any) -> None:
    one = whole(url_of(server))
    one.store()
    assert one.backend.remove(one.keys[2]) is True
    assert one.backend.remove(one.keys[2]) is False
    assert one.retrieve() == 2 * CHUNK


def test_a_server_that_is_away_at_the_start_is_found_later(
    own_server: PrivateServer, whole: Any
) -> None:
    own_server.stop()
    one = whole(url_of(own_server))
    check = RemoteBackendHealthCheck(one.backend)
    assert one.engine.lookup(TOKENS) == 0
    assert check.check() is False
    own_server.start()
    assert check.check() is True
    one.store()
    assert one.retrieve() == len(TOKENS)


def test_a_wrong_password_is_a_miss_and_unhealthy(
    own_server: PrivateServer, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with own_server.client() as admin:
        admin.config_set("requirepass", "right")
        monkeypatch.setenv("LM_PASSWORD", "wrong")
        one = whole(url_of(own_server), password_env="LM_PASSWORD")
        assert one.retrieve() == 0
        assert RemoteBackendHealthCheck(one.backend).check() is False
        monkeypatch.setenv("LM_PASSWORD", "right")
        assert RemoteBackendHealthCheck(one.backend).check() is True
        one.store()
        assert one.retrieve() == len(TOKENS)


def test_a_user_who_may_only_use_the_models_keys_is_healthy(
    own_server: PrivateServer, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with own_server.client() as admin:
        admin.acl_setuser(
            "lm",
            enabled=True,
            passwords=["+pw"],
            keys=["fastkv-bench@*"],
            commands=["+@read", "+@write", "+@connection"],
        )
        monkeypatch.setenv("LM_PASSWORD", "pw")
        one = whole(
            url_of(own_server).replace("//", "//lm@"), password_env="LM_PASSWORD"
        )
        assert RemoteBackendHealthCheck(one.backend).check() is True
        assert one.connector.counts() == {}
        one.store()
        assert one.retrieve() == len(TOKENS)


def test_a_store_that_fails_is_counted_by_lmcache(
    own_server: PrivateServer, whole: Any
) -> None:
    one = whole(url_of(own_server))
    local = one.backend.local_cpu_backend
    with own_server.client() as admin:
        admin.config_set("maxmemory", "1")
    memory = local.allocate(one.connector.meta_shapes, one.connector.meta_dtypes)
    one.backend.submit_put_task(one.keys[0], memory).exception(20)
    assert eventually(lambda: one.backend.put_failed_count == 1)
    memory.ref_count_down()
    one.store()
    assert one.connector.counts()["refused"] == 9
    assert one.allocated() == 0


# --- cancelled and closed while it runs ----------------------------------------------


def test_a_cancelled_load_gives_its_memory_back_when_nobody_writes_it(
    whole: Any,
) -> None:
    with SilentPeer() as peer:
        one = whole(f"redis://127.0.0.1:{peer.port}", socket_timeout=60)
        loading = asyncio.run_coroutine_threadsafe(
            one.backend.connection.batched_get(one.keys), one.backend.loop
        )
        assert peer.asked.wait(10)
        assert one.allocated() == 8 * BYTES
        loading.cancel()
        assert eventually(lambda: one.allocated() == 0)


class Trickle(ModelServer):
    """Sends its values slowly, until it is told to stop."""

    def __init__(self) -> None:
        self.sending = threading.Event()
        self.stop = threading.Event()
        super().__init__(seed=1)

    def answer(self, connection: Any, command: list[bytes]) -> bool:
        if command[0] not in (b"GET", b"GETRANGE"):
            return super().answer(connection, command)
        size = BYTES
        if command[0] == b"GETRANGE":
            size = min(int(command[3]) + 1, BYTES) - int(command[2])
        connection.sendall(b"$%d\r\n" % size)
        for _ in range(size // 64):
            connection.sendall(b"x" * 64)
            self.sending.set()
            if self.stop.wait(0.0001):
                break
        self.stop.wait()  # the end never comes
        return False


@pytest.mark.parametrize("how", ["cancelled", "timed out"])
def test_memory_goes_back_only_when_no_thread_writes_it(whole: Any, how: str) -> None:
    with Trickle() as peer:
        one = whole(
            f"redis://127.0.0.1:{peer.port}", config={"blocking_timeout_secs": 1}
        )
        engine = one.connector._store.carrier._node._engine
        in_flight = []
        local = one.backend.local_cpu_backend
        free = local.memory_allocator.free

        def watch(memory: Any, *args: Any) -> None:
            in_flight.append(engine.batches_in_flight)
            free(memory, *args)

        local.memory_allocator.free = watch
        begin = time.monotonic()
        loading = asyncio.run_coroutine_threadsafe(
            one.backend.connection.batched_get(one.keys), one.backend.loop
        )
        assert peer.sending.wait(10)
        if how == "cancelled":
            loading.cancel()
        else:
            # Before LMCache's own time-out, after which nobody would take the answer.
            assert loading.result(10) == [None] * 8
            assert 0.85 < time.monotonic() - begin < 0.99
        assert eventually(lambda: one.allocated() == 0)
        assert in_flight == [0] * 8
        peer.stop.set()


def test_what_lmcache_had_no_memory_for_is_counted_and_nothing_leaks(
    server: PrivateServer, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = whole(url_of(server))
    one.store()
    local = one.backend.local_cpu_backend
    allocate = local.allocate
    calls = iter(range(100))

    def scarce(*args: Any, **kwargs: Any) -> Any:
        return allocate(*args, **kwargs) if next(calls) < 3 else None

    def broken(*args: Any, **kwargs: Any) -> Any:
        if next(calls) < 6:
            return allocate(*args, **kwargs)
        raise RuntimeError("broken")

    monkeypatch.setattr(local, "allocate", scarce)
    loaded = one.backend.batched_get_blocking(one.keys)
    assert [memory is not None for memory in loaded] == [True] * 3 + [False] * 5
    assert one.connector.counts()["no_memory"] == 5
    for memory in loaded[:3]:
        memory.ref_count_down()
    monkeypatch.setattr(local, "allocate", broken)
    assert one.backend.batched_get_blocking(one.keys) == [None] * 8
    assert one.allocated() == 0


def test_closing_while_a_load_waits_makes_misses(whole: Any) -> None:
    with SilentPeer() as peer:
        one = whole(f"redis://127.0.0.1:{peer.port}", socket_timeout=60)
        loading = asyncio.run_coroutine_threadsafe(
            one.backend.connection.batched_get(one.keys), one.backend.loop
        )
        assert peer.asked.wait(10)
        one.backend.close()
        assert loading.result(10) == [None] * 8
        assert one.allocated() == 0


# --- chunks that are not full --------------------------------------------------------


@pytest.mark.parametrize("checksum", [False, True])
def test_the_last_chunk_may_be_shorter(
    server: PrivateServer, whole: Any, checksum: bool
) -> None:
    one = whole(url_of(server), checksum=checksum, config={"save_unfull_chunk": True})
    tokens = TOKENS[: 2 * CHUNK + 5]
    one.engine.store(tokens, kv=one.kv)
    assert eventually(lambda: one.allocated() == 0)
    got = torch.zeros_like(one.kv)
    mask = one.engine.retrieve(tokens, kv=got)
    assert int(mask.sum()) == len(tokens)
    assert torch.equal(
        got[:, :, : len(tokens)].view(torch.uint8),
        one.kv[:, :, : len(tokens)].view(torch.uint8),
    )
    assert one.connector.counts().get("wrong_size", 0) == 0
    assert one.allocated() == 0


def test_a_short_value_that_is_no_chunk_is_a_miss(
    server: PrivateServer, plain: redis.Redis, whole: Any
) -> None:
    one = whole(url_of(server), config={"save_unfull_chunk": True})
    plain.set(one.keys[0].to_string(), b"x" * (TOKEN_BYTES + 1))
    assert one.retrieve() == 0
    assert one.connector.counts()["wrong_size"] == 1
    assert one.allocated() == 0


# --- configuration -------------------------------------------------------------------


def connect(url: str, plugin_name: str | None = None, **config: Any) -> Any:
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.metadata import LMCacheMetadata

    metadata = LMCacheMetadata(
        "m", 1, 1, 0, 0, torch.bfloat16, (2, 2, 16, 2, 8), chunk_size=16
    )
    loop = asyncio.new_event_loop()
    try:
        made = LMCacheEngineConfig.from_defaults(chunk_size=16, **config)
        connector = CreateConnector(
            url, loop, None, made, metadata, plugin_name
        ).getWrappedConnector()
        loop.run_until_complete(connector.close())
        return connector
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


TTL = "remote_storage_plugin.fastkv.ttl"


def test_every_way_to_name_it() -> None:
    plugin = fastkv_plugin("redis://127.0.0.1:1/2", ttl=5)
    made = connect("plugin://fastkv", "fastkv", **plugin)
    assert made._store.settings.url == "redis://127.0.0.1:1/2"
    assert made._store.settings.ttl == 5
    made = connect("fastkv://127.0.0.1:1/3?ttl=7", **plugin)
    assert made._store.settings.url == "redis://127.0.0.1:1/3"
    assert made._store.settings.ttl == 7
    extra = {
        key.replace("fastkv.", "fastkv.b.", 1): value
        for key, value in plugin["extra_config"].items()
    }
    extra = {
        k.replace("fastkv.b.lmcache", "fastkv.lmcache"): v for k, v in extra.items()
    }
    both = {
        "remote_storage_plugins": ["fastkv", "fastkv.b"],
        "extra_config": extra | plugin["extra_config"] | {TTL: 6},
    }
    assert connect("plugin://fastkv.b", "fastkv.b", **both)._store.settings.ttl == 5
    assert connect("plugin://fastkv", "fastkv", **both)._store.settings.ttl == 6


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"extra_config": {"save_chunk_meta": True}}, "save_chunk_meta"),
        ({"use_layerwise": True}, "use_layerwise"),
        ({"remote_serde": "cachegen"}, "remote_serde"),
        ({"extra_config": {"remote_storage_plugin.fastkv.url": None}}, "url"),
        ({"extra_config": {"remote_storage_plugin.fastkv.colour": 1}}, "colour"),
    ],
)
def test_what_cannot_work_is_refused(config: dict[str, Any], text: str) -> None:
    plugin = fastkv_plugin("redis://127.0.0.1:1")
    extra = plugin.pop("extra_config") | config.pop("extra_config", {})
    with pytest.raises((ValueError, TypeError), match=text) as refused:
        connect("plugin://fastkv", "fastkv", extra_config=extra, **plugin, **config)
    assert not isinstance(refused.value, IrrecoverableException)


def test_list_names_what_is_under_the_prefix(
    server: PrivateServer, plain: redis.Redis, whole: Any
) -> None:
    one = whole(url_of(server), key_prefix="p*[:")
    plain.set("pxx:other", b"")
    one.store()
    names = one.on_loop(one.backend.connection.list())
    assert sorted(names) == sorted(key.to_string() for key in one.keys)
