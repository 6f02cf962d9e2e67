"""The reply parser against hiredis."""

from __future__ import annotations

import hiredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastkv._core import ReplyParser

_line = st.binary(max_size=30).filter(lambda b: b"\r" not in b and b"\n" not in b)
_scalar = st.one_of(
    st.integers(-(2**63), 2**63 - 1).map(lambda n: b":%d\r\n" % n),
    st.binary(max_size=200).map(lambda b: b"$%d\r\n%b\r\n" % (len(b), b)),
    _line.map(lambda b: b"+%b\r\n" % b),
    _line.map(lambda b: b"-%b\r\n" % b),
    st.sampled_from([b"$-1\r\n", b"*-1\r\n", b"*0\r\n"]),
)
_reply = st.recursive(
    _scalar,
    lambda inner: st.lists(inner, max_size=5).map(
        lambda items: b"*%d\r\n" % len(items) + b"".join(items)
    ),
    max_leaves=20,
)


def _hiredis(pieces: list[bytes]) -> list[object]:
    reader = hiredis.Reader(replyError=str, protocolError=ValueError)
    replies: list[object] = []
    for piece in pieces:
        reader.feed(piece)
        while (reply := reader.gets()) is not False:
            replies.append(reply)
    return replies


def _ours(pieces: list[bytes]) -> list[object]:
    parser = ReplyParser(str)
    return [reply for piece in pieces for reply in parser.feed(piece)]


def _cut(stream: bytes, places: list[int]) -> list[bytes]:
    cuts = sorted({place % (len(stream) + 1) for place in places})
    return [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]


@given(st.lists(_reply, max_size=6), st.lists(st.integers(0, 10_000), max_size=12))
def test_random_replies_cut_at_random_places_are_what_hiredis_makes_of_them(
    replies: list[bytes], places: list[int]
) -> None:
    pieces = _cut(b"".join(replies), places)
    assert _ours(pieces) == _hiredis(pieces)


@given(
    st.lists(
        st.sampled_from(
            [b"$", b"3", b"\r\n", b"\r", b"abc", b"-", b"+OK", b":", b"*2", b"-1", b"0"]
        ),
        max_size=12,
    ).map(b"".join),
    st.lists(st.integers(0, 100), max_size=6),
)
def test_any_bytes_give_replies_or_one_error_the_same_for_every_cut(
    stream: bytes, places: list[int]
) -> None:
    def outcome(pieces: list[bytes]) -> list[object]:
        parser = ReplyParser(str)
        replies: list[object] = []
        for piece in pieces:
            try:
                replies += parser.feed(piece)
            except ValueError as error:
                # Replies before the error in the same piece are lost with it.
                return [str(error)]
        return replies

    whole = outcome([stream])
    cut = outcome(_cut(stream, places))
    bytewise = outcome([stream[i : i + 1] for i in range(len(stream))])
    assert whole == cut == bytewise


@pytest.mark.parametrize(
    "reply", [b"+OK\r\n", b"$3\r\nabc\r\n", b"*2\r\n:1\r\n$-1\r\n", b"-ERR no\r\n"]
)
def test_a_reply_split_at_every_byte_is_not_a_protocol_error(reply: bytes) -> None:
    whole = _ours([reply])
    assert len(whole) == 1
    for at in range(len(reply)):
        assert _ours([reply[:at], reply[at:] + reply]) == whole * 2


@pytest.mark.parametrize(
    "stream",
    [b"$-2\r\n", b"$99999999999999999999\r\n", b"$+5\r\n", b"$5x\r\n", b"$1\r\nab\r\n"],
)
def test_a_malformed_length_is_a_protocol_error(stream: bytes) -> None:
    with pytest.raises(ValueError):
        ReplyParser(str).feed(stream)


def test_an_announced_length_allocates_nothing() -> None:
    assert ReplyParser(str).feed(b"$9223372036854775807\r\nabc") == []
    assert ReplyParser(str).feed(b"*9223372036854775807\r\n") == []
