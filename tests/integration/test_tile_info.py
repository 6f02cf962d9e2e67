"""What `tile_info` counts is what was done."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
import threading
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, TimeoutError
from redis.retry import Retry

import fastkv
import fastkv.asyncio
from fastkv.cli.private_server import PrivateServer
from tests.conftest import Endpoint, eventually, fastkv_threads
from tests.scripted import SilentPeer


def nonzero(counts: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


def of(client: Any, command: str) -> tuple[dict[str, int], dict[str, int]]:
    """The counts of a command that are not zero: batches, keys."""
    info = client.tile_info()["commands"][command]
    return nonzero(info["batches"]), nonzero(info["keys"])


# --- what is counted -----------------------------------------------------------------


def test_outcomes_and_bytes_are_what_was_done(
    make: Any, endpoint: Endpoint, plain: redis.Redis
) -> None:
    client = make(**endpoint.kwargs, client_name="counted")
    large, small = os.urandom(3_000_000), os.urandom(1000)
    halves = (small[:300], small[300:])
    client.batch_tile_set(["large", "a", "b", "empty"], [large, small, halves, b""])
    assert client.batch_tile_set(["a", "c"], [small, small], nx=True) == [False, True]
    plain.lpush("list", "x")
    got = [bytearray(3_000_000), bytearray(1000), bytearray(999), bytearray(9)]
    keys = ["large", "a", "b", "list", "no", "large", "empty"]
    with pytest.raises(fastkv.TileError):
        client.batch_tile_get(keys, [*got, bytearray(1), bytearray(5), bytearray(0)])
    assert client.batch_tile_get(["a"], [got[1]]) == [True]
    client.batch_tile_exists(["a", "b", "no"])
    client.batch_tile_exists(["a"])
    client.batch_tile_delete(["a", "no"])
    client.batch_tile_exists([])

    assert of(client, "set") == ({"ok": 2}, {"stored": 5, "not_stored": 1})
    assert of(client, "get") == (
        {"ok": 2},
        {"hit": 4, "miss": 1, "wrong_size": 2, "refused": 1},
    )
    assert of(client, "exists") == ({"ok": 2}, {"found": 3, "not_found": 1})
    assert of(client, "delete") == ({"ok": 1}, {"deleted": 1, "not_deleted": 1})
    info = client.tile_info()
    assert info["bytes_written"] == 3_000_000 + 3 * 1000
    assert info["bytes_read"] == 3_000_000 + 2 * 1000
    assert info["retries"] == info["reconnects"] == info["socket_timeouts"] == 0
    assert info["queued"] == {"lookups": 0, "loads": 0, "stores": 0}
    native = [one for one in plain.client_list() if one["name"] == "counted"]
    assert info["connections"] == len(native) > 1


def test_a_batch_takes_as_long_as_its_caller_waits(
    own_server: PrivateServer, make: Any
) -> None:
    client = make(port=own_server.port)
    client.execute_command("CLIENT", "PAUSE", "200", "ALL")
    client.batch_tile_exists(["a"])
    seconds = client.tile_info()["commands"]["exists"]["seconds"]
    assert 0.1 < seconds["sum"] < 5
    assert seconds["buckets"][0.1024] == 0
    assert seconds["buckets"][math.inf] == seconds["count"] == 1


def test_before_the_first_batch_all_is_zero_and_nothing_is_started() -> None:
    async def on_a_loop() -> list[Any]:
        single = fastkv.asyncio.Redis(port=1)
        cluster = fastkv.asyncio.RedisCluster(host="localhost", port=1)
        infos = [single.tile_info(), cluster.tile_info()]
        await single.aclose()
        await cluster.aclose()
        return infos

    with fastkv.Redis(port=1) as client:
        infos: list[Any] = [client.tile_info(), *asyncio.run(on_a_loop())]
        assert fastkv_threads() == []
    for info in infos:
        assert info["connections"] == info["bytes_read"] == info["retries"] == 0
        for command in info["commands"].values():
            assert set(command["batches"].values()) == {0}
            assert set(command["keys"].values()) == {0}
            assert set(command["seconds"]["buckets"].values()) == {0}
    assert infos[2]["nodes"] == {}


def test_awaited_batches_are_counted(endpoint: Endpoint) -> None:
    async def work() -> None:
        async with fastkv.asyncio.Redis(**endpoint.kwargs) as client:
            await client.batch_tile_set(["a"], [b"12345"])
            await client.batch_tile_get(["a", "no"], [bytearray(5), bytearray(5)])
            assert of(client, "set") == ({"ok": 1}, {"stored": 1})
            assert of(client, "get") == ({"ok": 1}, {"hit": 1, "miss": 1})
            assert client.tile_info()["bytes_read"] == 5

    asyncio.run(work())


def test_killed_connections_are_retries_and_reconnects(
    own_server: PrivateServer, make: Any
) -> None:
    # With several, a key may be lost with one after the other.
    client = make(port=own_server.port, max_connections=1, retry=Retry(NoBackoff(), 3))
    client.batch_tile_set([f"k{i}" for i in range(8)], [b"x" * 1000] * 8)
    client.batch_tile_exists(["a"])
    assert client.tile_info()["connections"] == 1
    with own_server.client() as admin:
        before = admin.info("stats")["total_connections_received"]
        sock = admin.connection_pool.get_connection()
        # Asleep, it reads none of our requests, and then ends all connections at once.
        sock.send_packed_command(
            sock.pack_commands(
                [
                    ("DEBUG", "SLEEP", "0.3"),
                    ("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"),
                ]
            )
        )
        got = [bytearray(1000) for _ in range(8)]
        load = client.submit_batch_tile_get([f"k{i}" for i in range(8)], got)
        assert client.batch_tile_exists(["a", "k0", "k1"]) == [False, True, True]
        assert load.result(5) == [True] * 8
        assert got == [b"x" * 1000] * 8
        assert sock.read_response() == b"OK"
        assert sock.read_response() == 1
        admin.connection_pool.release(sock)
        after = admin.info("stats")["total_connections_received"]
    info = client.tile_info()
    assert info["retries"] == 3 + 8
    assert info["reconnects"] == info["connections"] == after - before == 1
    assert of(client, "exists") == ({"ok": 2}, {"found": 2, "not_found": 2})
    assert of(client, "get") == ({"ok": 1}, {"hit": 8})
    assert info["bytes_read"] == 8000


def test_time_outs_of_sockets_and_of_batches(make: Any) -> None:
    with SilentPeer() as silent:
        client = make(port=silent.port, socket_timeout=0.1, retry=Retry(NoBackoff(), 2))
        with pytest.raises(TimeoutError):
            client.batch_tile_exists(["a"])
        info = client.tile_info()
        # Three attempts.
        assert info["socket_timeouts"] == 3
        assert info["retries"] == info["reconnects"] == 2
        assert of(client, "exists") == ({"timed_out": 1}, {"unanswered": 1})

        patient = make(port=silent.port)
        with pytest.raises(TimeoutError):
            patient.batch_tile_get(["a", "b"], [bytearray(1)] * 2, timeout=0.05)
        assert of(patient, "get") == ({"timed_out": 1}, {"unanswered": 2})
        assert patient.tile_info()["socket_timeouts"] == 0

        future = patient.submit_batch_tile_exists(["a"])
        assert future.cancel()
        assert eventually(lambda: of(patient, "exists")[0] == {"cancelled": 1})


def test_what_waits_for_a_connection_is_queued(make: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # no answer to redis-py
        client = make(port=silent.getsockname()[1])
        futures = [
            client.submit_batch_tile_exists(["a", "b", "c"]),
            client.submit_batch_tile_get(["a", "b"], [bytearray(9), bytearray(9)]),
            client.submit_batch_tile_set(["a"], [b"x"]),
            client.submit_batch_tile_delete(["a", "b", "c"]),
        ]
        info = client.tile_info()
        assert info["queued"] == {"lookups": 3, "loads": 2, "stores": 4}
        assert info["connections"] == 0
        client.close()
        for future in futures:
            assert isinstance(future.exception(5), ConnectionError)
    assert client.tile_info()["queued"] == {"lookups": 0, "loads": 0, "stores": 0}
    assert of(client, "exists") == ({"failed": 1}, {"unanswered": 3})


def test_a_server_that_is_away_is_a_failed_batch(make: Any) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        client = make(port=bound.getsockname()[1], retry=None)
        with pytest.raises(ConnectionError):
            client.batch_tile_exists(["a"])
    assert of(client, "exists") == ({"failed": 1}, {"unanswered": 1})


# --- how long it is kept -------------------------------------------------------------


def test_counters_outlive_connections_and_engines(client: fastkv.Redis) -> None:
    client.batch_tile_set(["a"], [b"123"])
    for number, forget in enumerate(
        (client.connection_pool.disconnect, client.connection_pool.reset, client.close),
        start=2,
    ):
        forget()  # type: ignore[operator]  # mypy joins their types to object
        assert client.tile_info()["bytes_written"] == 3 * (number - 1)
        client.batch_tile_set(["a"], [b"123"])
        assert of(client, "set") == ({"ok": number}, {"stored": number})
    client.close()
    assert client.tile_info()["connections"] == 0


def test_clients_of_a_pool_share_their_numbers(client: fastkv.Redis) -> None:
    other = fastkv.Redis(connection_pool=client.connection_pool)
    client.batch_tile_exists(["a"])
    other.batch_tile_exists(["a"])
    assert of(client, "exists") == of(other, "exists") == ({"ok": 2}, {"not_found": 2})
    other.close()


def test_a_forked_child_counts_for_itself(client: fastkv.Redis) -> None:
    client.batch_tile_exists(["a"])
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            client.tile_info()

    reader = threading.Thread(target=read)  # may hold any lock at the fork
    reader.start()
    try:
        for _ in range(5):
            pid = os.fork()
            if pid == 0:
                status = 1
                with contextlib.suppress(BaseException):
                    signal.alarm(20)
                    before = of(client, "exists")
                    client.batch_tile_exists(["a", "b"])
                    after = of(client, "exists")
                    client.close()
                    if (before, after) == (({}, {}), ({"ok": 1}, {"not_found": 2})):
                        status = 0
                os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        stop.set()
        reader.join()
    assert of(client, "exists") == ({"ok": 1}, {"not_found": 1})
