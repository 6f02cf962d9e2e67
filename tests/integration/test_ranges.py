"""Large values are read in ranges, and are of one version all the same."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import redis

import fastkv
from fastkv.cli.private_server import PrivateServer
from tests.conftest import Endpoint

SIZE = 6_000_001
SMALL = 900_001  # in parts, from a server with the C library's allocator


def calls(plain: redis.Redis, command: str, *kinds: str) -> int:
    stats: dict[str, Any] = plain.info("commandstats")  # type: ignore[assignment]
    found = stats.get(f"cmdstat_{command}", {})
    return sum(int(found.get(kind, 0)) for kind in kinds or ("calls",))


@pytest.mark.parametrize("immutable", [True, False])
def test_large_values_are_read_in_ranges_and_small_ones_whole(
    client: fastkv.Redis, plain: redis.Redis, immutable: bool
) -> None:
    values = [os.urandom(n) for n in ((256 << 10) - 1, 256 << 10, SIZE, 10)]
    keys = ["below", "from", "large", "small"]
    client.batch_tile_set(keys, values)
    plain.config_resetstat()
    got = [bytearray(len(value)) for value in values]
    assert client.batch_tile_get(keys, got, immutable=immutable) == [True] * 4
    assert got == values
    assert calls(plain, "get") == 2
    assert calls(plain, "getrange") == 2 + 12  # the rest is less than half a range
    if immutable:
        assert calls(plain, "watch") == calls(plain, "exec") == 0
    else:  # idle connections may have helped
        assert calls(plain, "exec") >= 2


@pytest.mark.parametrize("immutable", [True, False])
def test_small_values_are_read_in_parts_where_the_allocator_pays_for_replies(
    client: fastkv.Redis, plain: redis.Redis, immutable: bool
) -> None:
    sizes = [256 << 10, SMALL, 1 << 20, (2 << 20) - 1] * 4
    values = [os.urandom(n) for n in sizes]
    keys = [f"k{i}" for i in range(len(values))]
    client.batch_tile_set(keys, values)
    for _ in range(3):  # the first raises the question
        plain.config_resetstat()
        got = [bytearray(len(value)) for value in values]
        assert client.batch_tile_get(keys, got, immutable=immutable) == [True] * 16
        assert got == values
    memory: Any = plain.info("memory")
    ranges = [3, 5, 5, 9] if memory["mem_allocator"] == "libc" else [2, 3, 3, 5]
    assert calls(plain, "getrange") == 4 * sum(ranges)


@pytest.mark.parametrize("immutable", [True, False])
def test_outcomes_are_those_of_a_plain_get(
    client: fastkv.Redis, plain: redis.Redis, immutable: bool
) -> None:
    plain.set("hit", b"x" * SIZE)
    plain.set("short", b"x" * (SIZE - 1))
    plain.set("long", b"x" * (SIZE + 1))
    plain.set("empty", b"")
    plain.lpush("list", "x")
    keys = ["hit", "miss", "short", "long", "empty", "list", "hit"]
    got = np.zeros((len(keys), SIZE), np.uint8)
    with pytest.raises(fastkv.TileError) as caught:
        client.batch_tile_get(keys, got, immutable=immutable)
    hit, miss, short, long, empty, wrong, again = caught.value.outcomes
    assert (hit, miss, again) == (True, False, True)
    assert [getattr(e, "actual", None) for e in (short, long, empty)] == [
        SIZE - 1,
        SIZE + 1,
        0,
    ]
    assert str(wrong).startswith("WRONGTYPE")
    assert bytes(got[0]) == bytes(got[6]) == b"x" * SIZE


def version(number: int, size: int) -> bytes:
    return bytes([number % 256]) * size


def _overwrite(plain: redis.Redis, number: int, size: int) -> None:
    plain.set("k", version(number, size))


def _patch(plain: redis.Redis, number: int, size: int) -> None:
    # In place: the same string, changed at both ends at once.
    with plain.pipeline(transaction=True) as pipe:
        pipe.setrange("k", 0, bytes([number % 256]))
        pipe.setrange("k", size - 1, bytes([number % 256]))
        pipe.execute()


def _delete(plain: redis.Redis, number: int, size: int) -> None:
    plain.delete("k")
    plain.set("k", version(number, size))


def _expire(plain: redis.Redis, number: int, size: int) -> None:
    plain.set("k", version(number, size), px=3)
    threading.Event().wait(0.002)


def _rename(plain: redis.Redis, number: int, size: int) -> None:
    plain.set("other", version(number, size))
    plain.rename("other", "k")


@pytest.mark.parametrize("size", [SIZE, SMALL])
@pytest.mark.parametrize("change", [_overwrite, _patch, _delete, _expire, _rename])
def test_a_value_that_changes_all_the_time_is_never_a_mix(
    client: fastkv.Redis,
    plain: redis.Redis,
    change: Callable[[redis.Redis, int, int], None],
    size: int,
) -> None:
    plain.set("k", version(0, size))
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            change(plain, number, size)

    writer = threading.Thread(target=write)
    writer.start()
    hits = 0
    try:
        for _ in range(40):
            got = np.full(size, 0xA5, np.uint8)
            (hit,) = client.batch_tile_get(["k"], [got])
            hits += hit
            if hit:
                ends = {int(got[0]), int(got[-1])}
                assert len(ends) == 1
                if change is not _patch:
                    assert {int(n) for n in np.unique(got)} == ends
    finally:
        stop.set()
        writer.join()
    if change not in (_expire, _delete):
        assert hits == 40  # it is read, however often it changes


@pytest.mark.parametrize("retries", [0, 3])
@pytest.mark.parametrize("refused", ["watch", "multi", "exec", "getrange"])
def test_a_command_that_an_acl_forbids_is_done_without(
    own_server: PrivateServer, make: Any, refused: str, retries: int
) -> None:
    with own_server.client() as admin:
        admin.execute_command(f"ACL SETUSER bob on >pw ~* &* +@all -{refused}")
        retry = redis.retry.Retry(redis.backoff.NoBackoff(), retries)
        client = make(port=own_server.port, username="bob", password="pw", retry=retry)
        values = [os.urandom(3_000_000) for _ in range(8)]
        keys = [f"k{i}" for i in range(8)]
        client.batch_tile_set(keys, values)
        for _ in range(3):
            got = [bytearray(3_000_000) for _ in keys]
            assert client.batch_tile_get(keys, got, timeout=20) == [True] * 8
            assert got == values
        admin.config_resetstat()
        for _ in range(6):
            assert client.batch_tile_get(keys, got, timeout=20) == [True] * 8
        assert calls(admin, "get") >= 48
        # Tried ever more rarely: on each connection after 1, 2, 4 ... values.
        assert calls(admin, "watch", "calls", "rejected_calls") < 40


@pytest.mark.parametrize("immutable", [True, False])
def test_a_single_large_value_is_read_over_several_connections(
    make: Any, endpoint: Endpoint, plain: redis.Redis, immutable: bool
) -> None:
    client = make(**endpoint.kwargs, tile_connections=4)
    value = os.urandom(64 << 20)
    plain.set("k", value)
    got = bytearray(len(value))

    def last_commands() -> list[str]:
        listed: list[dict[str, str]] = plain.client_list()  # type: ignore[assignment]
        return [connection["cmd"] for connection in listed]

    parts = [bytearray(8 << 20) for _ in range(16)]
    client.batch_tile_set([f"warm{i}" for i in range(16)], parts)  # all connect
    plain.config_resetstat()
    assert client.batch_tile_get(["k"], [got], immutable=immutable) == [True]
    assert got == value
    if immutable:
        assert last_commands().count("getrange") > 1
    else:
        assert last_commands().count("exec") > 1
        assert calls(plain, "watch") == calls(plain, "exec") > 1


def test_a_value_that_is_evicted_all_the_time_is_never_a_mix(
    own_server: PrivateServer, make: Any
) -> None:
    client = make(port=own_server.port)
    with own_server.client() as admin:
        admin.config_set("maxmemory-policy", "allkeys-random")
        admin.config_set("maxmemory", 60_000_000)
        stop = threading.Event()

        def write() -> None:
            with own_server.client() as plain:
                number = 0
                while not stop.is_set():
                    number += 1
                    plain.set(f"other{number % 20}", b"x" * SIZE)
                    plain.set("k", version(number, SIZE))

        writer = threading.Thread(target=write)
        writer.start()
        hits = 0
        try:
            for _ in range(60):
                got = np.full(SIZE, 0xA5, np.uint8)
                (hit,) = client.batch_tile_get(["k"], [got])
                hits += hit
                if hit:
                    assert len(np.unique(got)) == 1
        finally:
            stop.set()
            writer.join()
        stats: dict[str, Any] = admin.info("stats")  # type: ignore[assignment]
        assert stats["evicted_keys"] > 0
        assert hits > 0


def test_several_large_values_share_one_connection(
    make: Any, endpoint: Endpoint
) -> None:
    client = make(**endpoint.kwargs, max_connections=1, tile_window_bytes=1 << 20)
    values = [os.urandom(SIZE + i) for i in range(4)]
    keys = [f"k{i}" for i in range(4)]
    client.batch_tile_set(keys, values)
    got = [bytearray(len(value)) for value in values]
    assert client.batch_tile_get(keys, got, timeout=20) == [True] * 4
    assert got == values


def test_ranges_can_be_switched_off(
    make: Any, endpoint: Endpoint, plain: redis.Redis
) -> None:
    client = make(**endpoint.kwargs, tile_range_bytes=0)
    client.batch_tile_set(["k"], [b"x" * SIZE])
    plain.config_resetstat()
    got = bytearray(SIZE)
    assert client.batch_tile_get(["k"], [got]) == [True]
    assert got == b"x" * SIZE
    assert calls(plain, "get") == 1


def test_connections_killed_between_ranges_change_no_answer(
    own_server: PrivateServer, make: Any
) -> None:
    # Enough: on a busy machine most connects are killed in the middle, too.
    retry = redis.retry.Retry(redis.backoff.NoBackoff(), 10_000)
    client = make(port=own_server.port, retry=retry)
    values = [os.urandom(SIZE) for _ in range(6)]
    keys = [f"k{i}" for i in range(6)]
    client.batch_tile_set(keys, values)
    stop = threading.Event()

    def kill() -> None:
        with own_server.client() as admin:
            while not stop.wait(0.003):
                admin.client_kill_filter(_type="normal", skipme=True)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        for round_ in range(20):
            got = [bytearray(SIZE) for _ in keys]
            hits = client.batch_tile_get(keys, got, immutable=round_ % 2 == 0)
            assert hits == [True] * 6
            assert got == values
    finally:
        stop.set()
        killer.join()


def test_two_servers_behind_one_name_are_not_mixed(
    own_server: PrivateServer, make: Any
) -> None:
    """As after a failover by DNS, when the old server goes on for those it has."""

    class Named(redis.Connection):
        server = own_server

        def _connect(self) -> Any:
            self.port = self.server.port
            return super()._connect()

    size = 64 << 20
    with PrivateServer(own_server.binary) as other:
        for number, server in enumerate((own_server, other)):
            with server.client() as admin:
                admin.set("k", bytes([number + 1]) * size)
        for _ in range(5):
            Named.server = own_server
            client = make(connection_pool=redis.ConnectionPool(connection_class=Named))
            got = bytearray(size)
            assert client.batch_tile_get(["k"], [got]) == [True]
            with own_server.client() as admin:
                lanes = [
                    one["id"]
                    for one in admin.client_list()
                    if one["cmd"] in ("getrange", "exec", "watch")
                ]
                assert len(lanes) > 1, "it was not shared"
                Named.server = other
                admin.client_kill_filter(_id=lanes[0])
            got = bytearray(size)
            assert client.batch_tile_get(["k"], [got]) == [True]
            assert got.count(got[0]) == size, "two versions"
