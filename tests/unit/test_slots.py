"""Slots of Redis Cluster, against Python's CRC and redis-py."""

from __future__ import annotations

import time
from array import array
from binascii import crc_hqx

from hypothesis import example, given
from hypothesis import strategies as st
from redis.crc import key_slot as redis_key_slot

from fastkv._core import Batch, Command, SlotMap, key_slot


def tag_of(key: bytes) -> bytes:
    begin = key.find(b"{")
    end = key.find(b"}", begin + 1)
    return key[begin + 1 : end] if begin >= 0 and end > begin + 1 else key


@given(
    st.binary() | st.lists(st.sampled_from([b"{", b"}", b"a", b"\xff"])).map(b"".join)
)
@example(b"")
@example(b"{}a")
@example(b"}{a}")
@example(b"{{a}}")
@example(b"foo{}{bar}")
@example(b"{user1000}.following")
def test_key_slot_is_the_crc_of_the_hash_tag(key: bytes) -> None:
    assert key_slot(key) == crc_hqx(tag_of(key), 0) % 16384 == redis_key_slot(key)


@given(
    st.lists(st.binary(max_size=8), max_size=50),
    st.lists(st.integers(0, 4), min_size=1, max_size=30),
)
def test_each_key_goes_to_the_owner_of_its_slot(
    keys: list[bytes], owners: list[int]
) -> None:
    table = array("H", ([*owners, 0xFFFF] * 16384)[:16384])
    batch = Batch(Command.EXISTS, keys, None, True)
    routed = SlotMap(table).route(batch, range(len(keys)))
    assert sorted(i for _, some in routed for i in some) == list(range(len(keys)))
    for owner, some in routed:
        assert some == sorted(some)
        for index in some:
            expected = table[redis_key_slot(keys[index])]
            assert owner == (None if expected == 0xFFFF else expected)


def test_a_short_map_leaves_the_rest_to_nobody() -> None:
    batch = Batch(Command.EXISTS, [b"foo"], None, True)  # slot 12182
    assert SlotMap(array("H", [3])).route(batch, [0]) == [(None, [0])]
    assert SlotMap(array("H")).route(batch, [0]) == [(None, [0])]


def test_routing_a_hundred_thousand_keys_takes_milliseconds() -> None:
    keys = [f"chunk:{i:032x}".encode() for i in range(100_000)]
    batch = Batch(Command.EXISTS, keys, None, True)
    table = array("H", [slot * 3 // 16384 for slot in range(16384)])
    slots = SlotMap(table)
    took = []
    for _ in range(5):
        begin = time.thread_time()  # not what others do on the machine
        routed = slots.route(batch, range(len(keys)))
        took.append(time.thread_time() - begin)
    assert [owner for owner, _ in routed] == [0, 1, 2]
    assert min(took) < 0.02
