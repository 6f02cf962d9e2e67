"""Right bytes, for every size, number, kind of key and kind of memory."""

from __future__ import annotations

import array
import random
from typing import Any

import numpy as np
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastkv
from tests.conftest import Endpoint

POISON = 0xA5


def values(sizes: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, size, dtype=np.uint8) for size in sizes]


def poisoned(sizes: list[int]) -> list[bytearray]:
    return [bytearray([POISON]) * size for size in sizes]


@pytest.mark.parametrize("size", [1, 2, 1000, 4096, 4097, 65_536, 1_000_003, 64 << 20])
def test_values_of_every_size_come_back_whole(client: fastkv.Redis, size: int) -> None:
    count = min(20, max(2, (64 << 20) // size // 4))
    keys = [f"v{i}" for i in range(count)]
    sent = values([size] * count)
    got = poisoned([size] * count)
    assert client.batch_tile_set(keys, sent) == [True] * count
    assert client.batch_tile_get(keys, got, immutable=True) == [True] * count
    assert all(a.tobytes() == b for a, b in zip(sent, got, strict=True))


def test_what_we_write_redis_py_reads_and_the_other_way_round(
    client: fastkv.Redis, plain: redis.Redis
) -> None:
    value = values([10_000])[0]
    client.batch_tile_set(["ours"], [value])
    assert plain.get("ours") == value.tobytes()
    plain.set("theirs", value.tobytes())
    got = bytearray(10_000)
    assert client.batch_tile_get(["theirs"], [got]) == [True]
    assert got == value.tobytes()


def test_lengths_may_differ_within_a_batch(client: fastkv.Redis) -> None:
    sizes = [random.Random(1).randrange(0, 200_000) for _ in range(300)]
    keys = [f"v{i}" for i in range(len(sizes))]
    sent, got = values(sizes), poisoned(sizes)
    assert all(client.batch_tile_set(keys, sent))
    assert all(client.batch_tile_get(keys, got))
    assert all(a.tobytes() == b for a, b in zip(sent, got, strict=True))


def test_a_hundred_thousand_keys_in_one_batch(client: fastkv.Redis) -> None:
    keys = [f"k{i}" for i in range(100_000)]
    sent = np.arange(100_000, dtype=np.int64)
    assert client.batch_tile_set(keys, sent) == [True] * 100_000
    got = np.full_like(sent, -1)
    assert client.batch_tile_get(keys, got) == [True] * 100_000
    assert (sent == got).all()
    half = [k if i % 2 else f"no{i}" for i, k in enumerate(keys)]
    assert client.batch_tile_exists(half) == [bool(i % 2) for i in range(100_000)]
    assert client.batch_tile_delete(half) == [bool(i % 2) for i in range(100_000)]
    assert client.batch_tile_exists(keys) == [not i % 2 for i in range(100_000)]


def test_every_kind_of_key(client: fastkv.Redis, plain: redis.Redis) -> None:
    keys: list[Any] = [
        *("text", "ümläut", b"bytes", bytearray(b"array"), memoryview(b"view")),
        *(12, -1.5, b"", b"\x00\r\n\xff" * 10, b"x" * 100_000),
    ]
    assert client.batch_tile_set(keys, [b"%d" % i for i in range(len(keys))])
    for i, key in enumerate(keys):
        assert plain.get(key) == b"%d" % i
    got = [bytearray(1) for _ in keys]
    assert client.batch_tile_get(tuple(keys), got) == [True] * len(keys)
    assert [bytes(b) for b in got] == [b"%d" % i for i in range(len(keys))]
    assert client.batch_tile_exists(iter(keys)) == [True] * len(keys)


@pytest.mark.parametrize("key", [None, True, ("a",), object(), 1j])
def test_unusable_keys_are_refused_in_redis_words(
    client: fastkv.Redis, key: Any
) -> None:
    with pytest.raises(redis.exceptions.DataError) as theirs:
        client.get_encoder().encode(key)  # hiredis has words of its own
    with pytest.raises(redis.exceptions.DataError) as ours:
        client.batch_tile_exists(["fine", key])
    assert str(ours.value) == str(theirs.value)


def test_one_string_is_no_sequence_of_keys(client: fastkv.Redis) -> None:
    for keys in ("key", b"key", 5):
        with pytest.raises(TypeError, match="keys: expected a sequence of keys, got"):
            client.batch_tile_exists(keys)  # type: ignore[arg-type]


def test_other_encodings_are_those_of_the_pool(make: Any, endpoint: Endpoint) -> None:
    client = make(**endpoint.kwargs, encoding="latin-1", decode_responses=True)
    client.batch_tile_set(["ü"], [b"\xff\x00"])
    got = bytearray(2)
    assert client.batch_tile_get([b"\xfc"], [got]) == [True]
    assert got == b"\xff\x00"


def test_empty_batches_and_empty_values(client: fastkv.Redis) -> None:
    assert client.batch_tile_get([], []) == []
    assert client.batch_tile_set([], []) == []
    assert client.batch_tile_exists([]) == []
    assert client.batch_tile_delete([]) == []
    assert client.submit_batch_tile_get([], []).result(1) == []
    assert client.batch_tile_get(["no"], [bytearray()]) == [False]
    assert client.batch_tile_set(["empty"], [b""]) == [True]
    assert client.batch_tile_get(["empty", "no"], [bytearray()] * 2) == [True, False]
    assert client.batch_tile_get(["empty"], [()]) == [True]


def test_duplicate_keys_each_get_their_answer(client: fastkv.Redis) -> None:
    client.batch_tile_set(["a"], [b"xyz"])
    got = [bytearray(3) for _ in range(50)]
    assert client.batch_tile_get(["a"] * 50, got) == [True] * 50
    assert all(b == b"xyz" for b in got)
    assert client.batch_tile_exists(["a", "b"] * 25) == [True, False] * 25
    assert sum(client.batch_tile_delete(["a"] * 10)) == 1


def test_a_value_may_lie_in_several_places(
    client: fastkv.Redis, plain: redis.Redis
) -> None:
    k, v, trailer = values([300_000, 300_000, 8])
    assert client.batch_tile_set(["page"], [(k, b"", v, trailer)]) == [True]
    assert plain.get("page") == k.tobytes() + v.tobytes() + trailer.tobytes()
    got = [bytearray(n) for n in (1, 299_999, 0, 300_007, 1)]
    assert client.batch_tile_get(["page"], [tuple(got)]) == [True]
    assert b"".join(got) == plain.get("page")
    # More parts than one system call takes.
    parts = tuple(bytearray(1000) for _ in range(300))
    assert client.batch_tile_set(["many"], [tuple(values([1000] * 300))]) == [True]
    assert client.batch_tile_get(["many"], [parts]) == [True]
    assert b"".join(parts) == plain.get("many")


def test_typed_and_multidimensional_memory_counts_in_bytes(
    client: fastkv.Redis, plain: redis.Redis
) -> None:
    halves = np.arange(1000, dtype=np.float16)
    assert (
        client.batch_tile_set(
            ["f16", "view", "array"],
            [
                halves,
                memoryview(halves).cast("B").cast("h"),
                array.array("d", [1.5, 2.5]),
            ],
        )
        == [True] * 3
    )
    assert plain.get("f16") == halves.tobytes() == plain.get("view")
    assert plain.strlen("array") == 16
    rows = np.zeros((2, 10, 100), np.float16)
    assert client.batch_tile_get(["f16", "view"], rows) == [True, True]
    assert (rows.reshape(2, 1000) == halves).all()


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float32", "int64"])
def test_torch_tensors_are_filled_in_place(client: fastkv.Redis, name: str) -> None:
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, name)
    sent = torch.from_numpy(values([4 * 64 * 8])[0]).view(dtype).reshape(4, -1)
    got = torch.zeros_like(sent)
    where = got.data_ptr()
    keys = [f"t{i}" for i in range(4)]
    assert client.batch_tile_set(keys, sent) == [True] * 4
    assert client.batch_tile_get(keys, list(got)) == [True] * 4
    assert got.data_ptr() == where
    assert torch.equal(sent.view(torch.uint8), got.view(torch.uint8))


def test_expiry_and_conditions_are_those_of_set(
    client: fastkv.Redis, plain: redis.Redis
) -> None:
    assert client.batch_tile_set(["a", "b"], [b"1", b"2"], ex=100) == [True, True]
    assert 90 < plain.ttl("a") <= 100
    assert client.batch_tile_set(["a"], [b"3"], keepttl=True) == [True]
    assert plain.ttl("a") > 90
    assert client.batch_tile_set(["a"], [b"4"], px=50_000) == [True]
    assert 40 < plain.ttl("a") <= 50
    assert client.batch_tile_set(["a"], [b"5"], exat=4_000_000_000) == [True]
    assert plain.expiretime("a") == 4_000_000_000
    assert client.batch_tile_set(["a"], [b"6"]) == [True]
    assert plain.ttl("a") == -1
    assert client.batch_tile_set(["a", "new"], [b"7", b"8"], nx=True) == [False, True]
    assert client.batch_tile_set(["a", "other"], [b"9", b"0"], xx=True) == [True, False]
    assert plain.mget("a", "new", "other") == [b"9", b"8", None]
    with pytest.raises(redis.exceptions.DataError, match="mutually exclusive"):
        client.batch_tile_set(["a"], [b""], ex=1, px=1)
    with pytest.raises(redis.exceptions.DataError, match="mutually exclusive"):
        client.batch_tile_set(["a"], [b""], nx=True, xx=True)


_KEYS = st.binary(max_size=3)
_OPERATIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("set"),
            st.lists(st.tuples(_KEYS, st.binary(max_size=9000)), max_size=8),
        ),
        st.tuples(
            st.just("get"), st.lists(st.tuples(_KEYS, st.integers(-2, 2)), max_size=8)
        ),
        st.tuples(st.just("exists"), st.lists(_KEYS, max_size=8)),
        st.tuples(st.just("delete"), st.lists(_KEYS, max_size=8, unique=True)),
    ),
    max_size=12,
)


@given(_OPERATIONS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_batches_do_what_a_dict_does(
    client: fastkv.Redis, plain: redis.Redis, operations: list[tuple[str, Any]]
) -> None:
    plain.flushall()
    model: dict[bytes, bytes] = {}
    for name, what in operations:
        if name == "set":
            unique = dict(what)  # the order of duplicates in one batch is open
            assert all(client.batch_tile_set(list(unique), list(unique.values())))
            model.update(unique)
        elif name == "exists":
            assert client.batch_tile_exists(what) == [key in model for key in what]
        elif name == "delete":
            expected = [model.pop(key, None) is not None for key in what]
            assert client.batch_tile_delete(what) == expected
        else:
            check_get(client, model, what)
    assert {k: plain.get(k) for k in plain.scan_iter()} == model


def check_get(client: fastkv.Redis, model: dict[bytes, bytes], what: Any) -> None:
    """Get with buffers that are some bytes too long or too short."""
    keys = [key for key, _ in what]
    sizes = [max(0, len(model.get(key, b"")) + off) for key, off in what]
    got = poisoned(sizes)
    try:
        outcomes: list[Any] = list(client.batch_tile_get(keys, got))
    except fastkv.TileError as error:
        outcomes = list(error.outcomes)
    for key, size, buffer, outcome in zip(keys, sizes, got, outcomes, strict=True):
        if key not in model:
            assert outcome is False
        elif len(model[key]) == size:
            assert outcome is True
            assert buffer == model[key]
        else:
            assert isinstance(outcome, fastkv.ValueSizeError)
            assert (outcome.expected, outcome.actual) == (size, len(model[key]))
            assert buffer == bytes([POISON]) * size
