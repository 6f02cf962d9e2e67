"""Hit, miss, wrong length, error reply: a key's own, and the rest of the batch is
right.
"""

from __future__ import annotations

import copy
import pickle
import time
from typing import Any

import pytest
import redis
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError,
    InvalidResponse,
    NoPermissionError,
    OutOfMemoryError,
    ResponseError,
)

import fastkv
from fastkv.cli.private_server import PrivateServer
from tests.conftest import Endpoint
from tests.scripted import ModelServer, ScriptedPeer


def test_each_kind_of_outcome_is_a_keys_own(
    client: fastkv.Redis, plain: redis.Redis
) -> None:
    plain.set("hit", "12345")
    plain.set("short", "1234")
    plain.set("long", "1" * 1_000_000)
    plain.lpush("list", "x")
    keys = ["hit", "miss", "short", "list", "long"] * 20
    got = [bytearray(b".....") for _ in keys]
    with pytest.raises(fastkv.TileError) as caught:
        client.batch_tile_get(keys, got)
    for i in range(0, len(keys), 5):
        hit, miss, short, wrong, long = caught.value.outcomes[i : i + 5]
        assert hit is True and got[i] == b"12345"
        assert miss is False
        assert isinstance(short, fastkv.ValueSizeError) and short.actual == 4
        assert type(wrong) is ResponseError and str(wrong).startswith("WRONGTYPE")
        assert isinstance(long, fastkv.ValueSizeError) and long.actual == 1_000_000
        assert got[i + 2] == b"....." == got[i + 4]
    assert sorted(caught.value.errors) == [
        i for i in range(len(keys)) if keys[i] not in ("hit", "miss")
    ]
    assert (
        "60 of 100 keys failed; the first is 'short': expected a value of 5 bytes"
        in str(caught.value)
    )
    # Errors cross processes, as those of redis-py do.
    for twin in (pickle.loads(pickle.dumps(caught.value)), copy.copy(caught.value)):
        assert str(twin) == str(caught.value)
        assert repr(twin.outcomes) == repr(caught.value.outcomes)
        assert twin.outcomes[2].actual == 4
        assert twin.errors.keys() == caught.value.errors.keys()
    connections = {c["id"] for c in plain.client_list()}
    assert client.batch_tile_get(["hit"] * 50, got[:50]) == [True] * 50
    # None was lost; more may have been made meanwhile.
    assert connections <= {c["id"] for c in plain.client_list()}


def test_a_full_server_refuses_what_does_not_fit(
    own_server: PrivateServer, make: Any
) -> None:
    client = make(port=own_server.port)
    client.batch_tile_set(["before"], [b"x" * 1000])
    with own_server.client() as admin:
        admin.config_set("maxmemory", 1)
        with pytest.raises(fastkv.TileError) as caught:
            client.batch_tile_set(["a", "b"], [b"1" * 3_000_000, b"2"])
        assert {type(e) for e in caught.value.errors.values()} == {OutOfMemoryError}
        got = bytearray(1000)
        assert client.batch_tile_get(["before"], [got]) == [True]
        assert client.batch_tile_exists(["a"]) == [False]
        admin.config_set("maxmemory", 0)
    assert client.batch_tile_set(["a"], [b"1"]) == [True]


def test_a_value_that_the_server_will_not_read_is_refused_alone(
    own_server: PrivateServer, make: Any
) -> None:
    """The server answers in the middle of it, and closes. In many pieces, the value is
    sent in many system calls: some meet the close before the answer was read.
    """
    client = make(port=own_server.port)
    large = (b"2" * 100,) * 80_000
    values = [b"1" * 100, large, b"3" * 100]
    with own_server.client() as admin:
        admin.config_set("proto-max-bulk-len", 1 << 20)
        for _ in range(20):
            with pytest.raises(fastkv.TileError) as caught:
                client.batch_tile_set(["a", "b", "c"], values, timeout=20)
            first, second, third = caught.value.outcomes
            assert (first, third) == (True, True)
            assert "Protocol error" in str(second)


def test_keys_that_an_acl_forbids_are_named(
    own_server: PrivateServer, make: Any
) -> None:
    with own_server.client() as admin:
        admin.execute_command("ACL SETUSER bob on >pw ~open:* +@all")
    client = make(port=own_server.port, username="bob", password="pw")
    assert client.batch_tile_set(["open:1"], [b"x"]) == [True]
    with pytest.raises(fastkv.TileError) as caught:
        client.batch_tile_get(["open:1", "closed:1"], [bytearray(1), bytearray(1)])
    assert caught.value.outcomes[0] is True
    assert type(caught.value.outcomes[1]) is NoPermissionError


def test_a_wrong_password_is_redis_pys_error_and_is_not_shown(
    own_server: PrivateServer, make: Any
) -> None:
    with own_server.client() as admin:
        admin.config_set("requirepass", "right")
        for kwargs in ({"password": "very-wrong"}, {}):
            # With RESP2, as native connections have it: HELLO has words of its own.
            client = make(port=own_server.port, protocol=2, **kwargs)
            client.set_retry(redis.retry.Retry(redis.backoff.NoBackoff(), 1))
            with pytest.raises(AuthenticationError) as theirs:
                client.ping()
            with pytest.raises(AuthenticationError) as ours:
                client.batch_tile_exists(["a"])
            assert str(ours.value) == str(theirs.value)
            assert "very-wrong" not in f"{ours.value!r} {ours.value.__cause__!r}"
        client = make(port=own_server.port, password="right")
        assert client.batch_tile_exists(["a"]) == [False]


def test_a_bad_database_is_redis_pys_error(endpoint: Endpoint, make: Any) -> None:
    client = make(**endpoint.kwargs, db=5000, retry=None)
    with pytest.raises(redis.RedisError) as theirs:
        client.ping()
    with pytest.raises(type(theirs.value)) as ours:
        client.batch_tile_exists(["a"])
    assert str(ours.value) == str(theirs.value)


def single(port: int, **kwargs: Any) -> dict[str, Any]:
    """A client with one native connection, so that a script has one order."""
    pool = redis.ConnectionPool(
        host="127.0.0.1", port=port, max_connections=1, **kwargs
    )
    return {"connection_pool": pool}


@pytest.mark.parametrize("split", [0, 1, 3])
def test_replies_cut_into_segments_are_read_right(make: Any, split: int) -> None:
    with ScriptedPeer() as peer:
        client = make(**single(peer.port))
        for i, reply in enumerate(
            [
                b"$3\r\nabc\r\n",
                b"$-1\r\n",
                b"$5\r\nabcde\r\n",
                b"-ERR no\r\n",
                b"$3\r\n\r\n$\r\n",
            ]
        ):
            peer.expect("GET", f"k{i}").reply(reply, split)
        got = [bytearray(3) for _ in range(5)]
        with pytest.raises(fastkv.TileError) as caught:
            client.batch_tile_get([f"k{i}" for i in range(5)], got)
        outcomes = caught.value.outcomes
        assert outcomes[0] is True and got[0] == b"abc"
        assert outcomes[1] is False
        assert isinstance(outcomes[2], fastkv.ValueSizeError)
        assert type(outcomes[3]) is ResponseError
        assert outcomes[4] is True and got[4] == b"\r\n$"
        assert peer.connections == 1


@pytest.mark.parametrize(
    "reply",
    [
        *(
            b"+OK\r\n",
            b":3\r\n",
            b"*1\r\n$3\r\nabc\r\n",
            b"_\r\n",
            b">2\r\n",
            b"hello\r\n",
        ),
        *(b"$-2\r\n", b"$+3\r\nabc\r\n", b"$3x\r\nabc\r\n", b"$03\r\nabc\r\n"),
        *(b"$3\r\nabcd\r\n", b"$99999999999999999999\r\n", b"-" + b"x" * 70_000),
    ],
)
def test_what_is_no_answer_ends_the_connection_and_is_not_repeated(
    make: Any, reply: bytes
) -> None:
    retry = redis.retry.Retry(redis.backoff.NoBackoff(), 3)
    with ScriptedPeer() as peer:
        client = make(**single(peer.port, retry=retry))
        peer.expect("GET", "a").reply(reply)
        with pytest.raises(InvalidResponse, match="Protocol Error"):
            client.batch_tile_get(["a"], [bytearray(3)])
        peer.expect("GET", "b").reply(b"$3\r\nabc\r\n")
        got = bytearray(3)
        assert client.batch_tile_get(["b"], [got]) == [True]
        assert got == b"abc"
        assert peer.connections == 2


def test_a_server_that_is_loading_is_asked_again_and_then_believed(make: Any) -> None:
    retry = redis.retry.Retry(redis.backoff.ConstantBackoff(0.01), 2)
    with ScriptedPeer() as peer:
        client = make(**single(peer.port, retry=retry))
        loading = b"-LOADING Redis is loading the dataset in memory\r\n"
        peer.expect("EXISTS", "a").reply(loading)
        peer.expect("EXISTS", "a").reply(loading)
        peer.expect("EXISTS", "a").reply(b":1\r\n")
        assert client.batch_tile_exists(["a"]) == [True]
        assert peer.connections == 3
        for _ in range(3):
            peer.expect("EXISTS", "a").reply(loading)
        with pytest.raises(BusyLoadingError, match="loading the dataset"):
            client.batch_tile_exists(["a"])


@pytest.mark.parametrize("failure", ["loading", "close"])
def test_attempts_are_as_far_apart_as_redis_py_makes_them(
    make: Any, failure: str
) -> None:
    retry = redis.retry.Retry(redis.backoff.ConstantBackoff(0.1), 3)
    with ScriptedPeer() as peer:
        # Several connections: moving to another one is no way around the delay.
        client = make(port=peer.port, retry=retry)
        for _ in range(4):
            step = peer.expect("GET", "a")
            if failure == "loading":
                step.reply(b"-LOADING Redis is loading the dataset in memory\r\n")
            else:
                step.close()
        begin = time.monotonic()
        with pytest.raises(ConnectionError):
            client.batch_tile_get(["a"], [bytearray(3)])
        assert 0.3 <= time.monotonic() - begin < 2
        # A batch can be taken back between two attempts.
        peer.expect("GET", "b").close()
        with pytest.raises(redis.exceptions.TimeoutError):
            client.batch_tile_get(["b"], [bytearray(3)], timeout=0.05)
        time.sleep(0.15)  # past the time of the next attempt, which must not come
        peer.expect("EXISTS", "c").reply(b":1\r\n")
        assert client.batch_tile_exists(["c"]) == [True]


def test_a_delayed_attempt_wakes_whoever_can_make_it(make: Any) -> None:
    retry = redis.retry.Retry(redis.backoff.ConstantBackoff(0.05), 1)
    with ScriptedPeer() as peer:
        # The first worker watches the clock, and has lookups alone; values are the
        # other's.
        client = make(port=peer.port, retry=retry, tile_workers=2, tile_connections=1)
        peer.expect("GET", "a").close()
        peer.expect("GET", "a").reply(b"$3\r\nabc\r\n")
        got = bytearray(3)
        assert client.batch_tile_get(["a"], [got], timeout=20) == [True]
        assert got == b"abc"


def test_errors_that_the_user_wants_retried_are_retried(make: Any) -> None:
    with ScriptedPeer() as peer:
        client = make(
            **single(peer.port, retry_on_error=[redis.exceptions.ReadOnlyError])
        )
        peer.expect("UNLINK", "a").reply(b"-READONLY You can't write\r\n")
        peer.expect("UNLINK", "a").reply(b":1\r\n")
        assert client.batch_tile_delete(["a"]) == [True]
        peer.expect("UNLINK", "a").reply(b"-READONLY You can't write\r\n")
        peer.expect("UNLINK", "a").reply(b"-READONLY You can't write\r\n")
        with pytest.raises(fastkv.TileError, match="You can't write"):
            client.batch_tile_delete(["a"])


@pytest.mark.parametrize("end", ["close", "reset"])
def test_what_was_in_flight_is_sent_again_within_the_policy(
    make: Any, end: str
) -> None:
    retry = redis.retry.Retry(redis.backoff.NoBackoff(), 1)
    with ScriptedPeer() as peer:
        client = make(**single(peer.port, retry=retry))
        getattr(peer.expect("GET", "a").reply(b"$5\r\nab"), end)()
        peer.expect("GET", "a").reply(b"$5\r\nabcde\r\n")
        got = bytearray(5)
        assert client.batch_tile_get(["a"], [got]) == [True]
        assert got == b"abcde"
        for _ in range(2):
            getattr(peer.expect("GET", "a").reply(b"$5\r\nab"), end)()
        with pytest.raises(ConnectionError):
            client.batch_tile_get(["a"], [got])


def test_a_conditional_set_that_was_lost_is_not_sent_again(make: Any) -> None:
    retry = redis.retry.Retry(redis.backoff.NoBackoff(), 5)
    with ScriptedPeer() as peer:
        client = make(**single(peer.port, retry=retry))
        peer.expect("SET", "a", "v", "NX").close()
        with pytest.raises(ConnectionError, match="whether it was done is unknown"):
            client.batch_tile_set(["a"], [b"v"], nx=True)
        peer.expect("SET", "a", "v").close()
        peer.expect("SET", "a", "v").reply(b"+OK\r\n")
        assert client.batch_tile_set(["a"], [b"v"]) == [True]


@pytest.mark.parametrize("seed", range(5))
def test_a_model_server_that_cuts_its_replies_anywhere(make: Any, seed: int) -> None:
    with ModelServer(seed) as model:
        client = make(port=model.port, tile_workers=2)
        keys = [f"k{i}" for i in range(200)]
        sent = [bytes([i % 256]) * (i * 37 % 5000) for i in range(200)]
        assert client.batch_tile_set(keys, sent) == [True] * 200
        assert client.batch_tile_set(keys[:9], sent[:9], nx=True) == [False] * 9
        model.errors = {b"k7": b"WRONGTYPE no", b"k150": b"ERR odd"}
        for i in range(0, 200, 11):
            del model.data[keys[i].encode()]
        got = [bytearray(len(v)) for v in sent]
        with pytest.raises(fastkv.TileError) as caught:
            client.batch_tile_get(keys, got)
        for i, outcome in enumerate(caught.value.outcomes):
            if i in (7, 150):
                assert isinstance(outcome, ResponseError)
            else:
                assert outcome is (i % 11 != 0)
                assert outcome is False or got[i] == sent[i]
