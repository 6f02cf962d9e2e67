"""Replies that no server sends, at each step of each command: redis-py's exception or
the right result, in time; nothing else is believed, kept or written.
"""

from __future__ import annotations

import gc
import os
import random
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.exceptions import (
    ConnectionError,
    InvalidResponse,
    RedisError,
    ResponseError,
    TimeoutError,
)
from redis.retry import Retry

import fastkv
from tests.faults.conftest import LONG
from tests.scripted import OddServer

SEED = int(os.environ.get("FASTKV_SEED", "1"))
KEYS = [b"first", b"odd", b"last"]
#: Of each value; in the modes with ranges, each is read in seven.
SIZE = 100_000
RANGE = 16 << 10


# --- expected ------------------------------------------------------------------------


@dataclass(frozen=True)
class Is:
    """The outcome of the key in the middle; the others have theirs."""

    outcome: object


RIGHT = Is(True)  # also that the value is read
REFUSED = Is(RedisError)  # by the error that redis-py has for the same reply
SIZE_ERROR = Is(fastkv.ValueSizeError)


# --- replies -------------------------------------------------------------------------


def replies(text: str) -> list[bytes]:
    """Two blanks or a new line stand between two; escapes are Python's."""
    found = re.split(r"\s{2,}", text.strip())
    return [reply.encode().decode("unicode_escape").encode("latin1") for reply in found]


#: No RESP2, or none that anybody could allocate: the same at every step.
MALFORMED = [
    *replies(r"""
    _\r\n  #t\r\n  ,1.5\r\n  (12\r\n  !3\r\nERR\r\n  =7\r\ntxt:abc\r\n
    %1\r\n+a\r\n+b\r\n  |1\r\n+ttl\r\n:9\r\n$1\r\nx\r\n  ~0\r\n
    >2\r\n$10\r\ninvalidate\r\n*1\r\n$3\r\nodd\r\n  >2\r\n
    HTTP/1.1 400 Bad Request\r\n\r\n  hello\r\n  220 smtp ESMTP\r\n
    \x15\x03\x03\0\2\2\x46  \r\n  \0  \xff\xfe\r\n  \x20+OK\r\n
    $-2\r\n  $+5\r\n
    $5x\r\n  $05\r\n  $ 5\r\n  $5 \r\n  $\r\n  $--1\r\n  $-0\r\n  $-\r\n
    $0x5\r\n  $1e3\r\n  $9223372036854775808\r\n  $5\r5\r\n  $5\n\n\r\n
    $-9999999999999\r\n  $99999999999999999999999999
    *-5\r\n  *+0\r\n  *00\r\n  *\r\n  *0x\r\n  * 0\r\n
    :abc\r\n  :\r\n  :+1\r\n  :1.0\r\n  :01\r\n  :9223372036854775808\r\n
    +O\nK\r\n  +O\rK\r\n"""),
    b"+" + b"x" * 70_000,
    b"-" + b"x" * 70_000,
    b"-ERR " + b"x" * 10_000_000 + b"\r\n",
]

#: Right RESP2, and another command's: where it is not due.
SIMPLE = replies(r"+QUEUED\r\n  +\r\n  +ok\r\n  +OK \r\n  +PONG\r\n")
OK = [b"+OK\r\n"]
INTEGERS = replies(r":1\r\n  :9223372036854775807\r\n")
NONE = replies(r":0\r\n  :-1\r\n")
BULKS = replies(r"$2\r\nOK\r\n  $0\r\n\r\n  $1\r\n1\r\n")
NIL = [b"$-1\r\n"]
ARRAYS = replies(
    r"*1\r\n+OK\r\n  *2\r\n$1\r\na\r\n$-1\r\n  *2147483647\r\n  *1\r\n*1\r\n"
)
EMPTY = [b"*0\r\n"]
NIL_ARRAY = [b"*-1\r\n"]

#: A value of the right length, and no line break behind it.
NO_END = [b"$%d\r\n%b%b" % (SIZE, b"x" * SIZE, end) for end in (b"\n\r", b"xx", b"\rx")]
#: What INFO is answered by servers that know little of themselves.
INFOS = [b"$11\r\n\nrun_id:\r\r\n\r\n", b"$20000\r\n%b\r\n" % (b"x" * 20_000)]

ERRORS = [
    *replies(r"""
    ERR  \x20  ERR\x20  err no  oops  OK  QUEUED  $5  -ERR  ERR \xff\xfe\xfd  ERR a\0b
    ERR unknown command 'X', with args beginning with:  ERR no such thing
    ERR max number of clients reached  ERR backend temporarily unavailable
    ERR command 'WATCH' is not allowed  NOPROTO no  upstream failure
    ERR index out of range
    ERR MULTI calls can not be nested  ERR EXEC without MULTI
    EXECABORT Transaction discarded because of previous errors.
    NOPERM User bob has no permissions to run the 'get' command  NOAUTH Not now.
    NOPERM No permissions to access a key  WRONGPASS invalid username-password pair
    WRONGTYPE Operation against a key holding the wrong kind of value
    BUSY no  BUSYKEY no  OOM command not allowed when used memory > 'maxmemory'.
    MISCONF Redis is configured
    READONLY You can't write against a read only replica.  NOREPLICAS Not enough
    LOADING Redis is loading the dataset in memory  MASTERDOWN Link with MASTER is down
    MOVED 7 127.0.0.1:1  MOVED  MOVED x  MOVED 7 127.0.0.1:x  ASK 7 127.0.0.1:1  ASK 1
    CLUSTERDOWN Hash slot not served  TRYAGAIN Multiple keys  CROSSSLOT Keys"""),
    b"",
    b"x" * 1024,
    b"ERR " + b"y" * 60_000,
]

#: The beginning of a reply that never goes on.
HALVES = [
    b"",
    *replies(r"-  -ERR hal  -ERR half\r  +O  +OK\r  :1  $  $1  $1000\r  *  *0\r"),
]
#: Of which a value can be the beginning, for the two that have one.
HALF_VALUES = [b"$100000\r\n" + b"x" * 20_000, b"$99999999999999\r\n" + b"x" * 20_000]


@dataclass
class Case:
    """A reply at a step, and what must come of it."""

    reply: bytes
    expected: Is | type[Exception]
    end: str = ""


def malformed_or(*others: tuple[list[bytes], Is]) -> list[Case]:
    """Those that are wrong at a step, but for ``others``."""
    wrong = [*SIMPLE, *OK, *INTEGERS, *NONE, *BULKS, *NIL, *ARRAYS, *EMPTY, *NIL_ARRAY]
    right = {reply: expected for replies, expected in others for reply in replies}
    cases = [Case(r, right.pop(r, InvalidResponse)) for r in [*MALFORMED, *wrong]]
    return cases + [Case(*one) for one in right.items()]


# --- commands and steps --------------------------------------------------------------


@dataclass
class Mode:
    """A call, and the commands that it sends."""

    name: str
    call: Callable[..., list[bool]]
    steps: dict[str, list[Case]] = field(default_factory=dict)


def _get(client: Any, buffers: list[bytearray], **options: Any) -> list[bool]:
    return client.batch_tile_get(KEYS, buffers, **options)  # type: ignore[no-any-return]


#: In ranges a refusal, another length and a change are reasons to read the value whole.
RANGED = {
    "GETRANGE": malformed_or((BULKS, RIGHT), (NO_END, InvalidResponse)),
    "WATCH": malformed_or((OK, RIGHT)),
    "MULTI": malformed_or((OK, RIGHT)),
    "EXEC": malformed_or((EMPTY, RIGHT), (NIL_ARRAY, RIGHT), (NIL, RIGHT)),
    # Only says whether other connections may help.
    "INFO": malformed_or(
        ([*SIMPLE, *OK, *INTEGERS, *NONE, *BULKS, *NIL, *INFOS], RIGHT)
    ),
}
COUNTED = malformed_or((INTEGERS, RIGHT), (NONE, Is(False)))
MODES = [
    Mode(
        "plain",
        lambda client, buffers: _get(client, buffers),
        {
            "GET": malformed_or(
                (NIL, Is(False)), (BULKS, SIZE_ERROR), (NO_END, InvalidResponse)
            )
        },
    ),
    Mode("snapshot", lambda client, buffers: _get(client, buffers), RANGED),
    Mode(
        "immutable",
        lambda client, buffers: _get(client, buffers, immutable=True),
        {"GETRANGE": RANGED["GETRANGE"]},
    ),
    Mode(
        "set",
        lambda client, buffers: client.batch_tile_set(KEYS, buffers),
        {"SET": malformed_or((OK, RIGHT), (NIL, Is(False)))},
    ),
    Mode(
        "exists",
        lambda client, _: client.batch_tile_exists(KEYS),
        {"EXISTS": COUNTED},
    ),
    Mode(
        "delete",
        lambda client, _: client.batch_tile_delete(KEYS),
        {"UNLINK": COUNTED},
    ),
]
STEPS = [
    pytest.param(mode, step, id=f"{mode.name}-{step}")
    for mode in MODES
    for step in mode.steps
]


@pytest.fixture
def peer() -> Iterator[OddServer]:
    with OddServer() as peer:
        yield peer


class Caller:
    """Makes one call with an odd reply in it, looks what came of it, and makes a good
    one.
    """

    def __init__(self, peer: OddServer, mode: Mode, seed: int) -> None:
        self.peer = peer
        self.mode = mode
        self.random = random.Random(seed)
        self.values = {key: self.random.randbytes(SIZE) for key in KEYS}

    def buffers(self) -> list[bytearray]:
        """To read into, or to write from."""
        if self.mode.name == "set":
            return [bytearray(value) for value in self.values.values()]
        return [bytearray(b"\xa5" * SIZE) for _ in KEYS]

    def outcomes(self, client: fastkv.Redis, buffers: list[bytearray]) -> list[object]:
        """Of one call, its effect compared with the server's data."""
        self.peer.data = {} if self.mode.name == "set" else dict(self.values)
        try:
            outcomes: list[object] = list(self.mode.call(client, buffers))
        except fastkv.TileError as error:
            outcomes = list(error.outcomes)
        for key, outcome, buffer in zip(KEYS, outcomes, buffers, strict=True):
            if outcome is not True:
                continue
            if self.mode.name == "set":
                assert self.peer.data[key] == self.values[key]
            elif self.mode.name not in ("exists", "delete"):
                assert buffer == self.values[key]
        return outcomes

    def refusal(self, step: str, case: Case) -> RedisError:
        """What redis-py raises for the same reply."""
        self.peer.odd(step).reply(case.reply)
        with redis.Redis(port=self.peer.port, protocol=2, retry=None) as theirs:
            try:
                with pytest.raises(RedisError) as caught:
                    theirs.execute_command(step, "odd", *["x"][: step == "SET"])
                return caught.value
            except ValueError:  # redis-py's own mishap with a MOVED to nowhere
                return ResponseError(case.reply[1:-2].decode())

    def check(self, client: fastkv.Redis, step: str, case: Case, split: int) -> None:
        expected = case.expected
        if expected is REFUSED:
            refusal: Any = self.refusal(step, case)
            # LOADING, NOAUTH: no answer about a key.
            whole = isinstance(refusal, ConnectionError)
            expected = type(refusal) if whole else Is(refusal)
        keyed = isinstance(expected, Is) and expected is not RIGHT
        nth = 2 if keyed else self.random.randint(1, self.most(step))
        odd = self.peer.odd(step, nth).reply(case.reply, split)
        odd.end = case.end
        if expected is InvalidResponse:  # no matter how often it may be sent again
            client.set_retry(Retry(NoBackoff(), 5))
        if not isinstance(expected, Is) and self.mode.name in ("set", "delete"):
            # What is still on its way there must not be done in the middle of the next.
            odd.end = odd.end or "silence"
        buffers = self.buffers()
        if isinstance(expected, Is):
            first, middle, last = self.outcomes(client, buffers)
            assert first is last is True
            self.compare(middle, expected.outcome)
        else:
            with pytest.raises(expected) as caught:
                self.outcomes(client, buffers)
            assert type(caught.value) is expected
            assert len(str(caught.value)) < 2000
        assert odd.seen.is_set(), "the reply was never due"
        # The memory is the caller's again, whatever still comes.
        for buffer in buffers:
            buffer[:] = b"\x5a" * SIZE
            buffer += b"grown"  # not pinned
        if case.end == "silence":  # a time-out so short may come by itself
            client.set_retry(Retry(NoBackoff(), 20))
        again = self.buffers()
        assert self.outcomes(client, again) == [True] * 3
        assert all(buffer == b"\x5a" * SIZE + b"grown" for buffer in buffers)

    @staticmethod
    def most(step: str) -> int:
        """How often it comes at least, whatever becomes of the others."""
        return {"INFO": 1, "GETRANGE": 21}.get(step, 3)

    @staticmethod
    def compare(outcome: object, expected: object) -> None:
        if isinstance(expected, RedisError):
            assert type(outcome) is type(expected)
            # 1 KiB of the line is kept, its first word not always shown.
            assert str(outcome) == str(expected)[: len(str(outcome))]
            assert len(str(outcome)) >= min(1000, len(str(expected)))
        elif isinstance(expected, type):
            assert type(outcome) is expected
        else:
            assert outcome is expected


def connect(peer: OddServer, mode: Mode, **options: Any) -> fastkv.Redis:
    """One native connection, so that replies have one order."""
    pool = redis.ConnectionPool(
        host="127.0.0.1", port=peer.port, max_connections=1, retry=None, **options
    )
    ranges = RANGE if mode.name in ("snapshot", "immutable") else 0
    return fastkv.Redis(
        connection_pool=pool, tile_range_bytes=ranges, tile_window_bytes=2 * RANGE
    )


def run(
    peer: OddServer,
    mode: Mode,
    step: str,
    cases: list[Case],
    split: int = 0,
    **options: Any,
) -> None:
    for number, case in enumerate(cases):
        seed = SEED * 1000 + number
        caller = Caller(peer, mode, seed)
        with connect(peer, mode, **options) as client:
            try:
                caller.check(client, step, case, split)
            except BaseException as error:
                error.add_note(f"{case.reply[:60]!r}, seed {seed}")
                raise


def drawn(cases: list[Case], most: int) -> list[Case]:
    """All in the long form."""
    if LONG or len(cases) <= most:
        return cases
    return random.Random(SEED).sample(cases, most)


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize(("mode", "step"), STEPS)
def test_what_is_no_answer_is_not_taken_for_one(
    peer: OddServer, mode: Mode, step: str, split: int
) -> None:
    cases = mode.steps[step]
    if split:
        cases = drawn([c for c in cases if len(c.reply) < 200], 15)
    run(peer, mode, step, cases, split)


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize(("mode", "step"), STEPS)
def test_an_error_reply_is_a_keys_own_or_no_matter(
    peer: OddServer, mode: Mode, step: str, split: int
) -> None:
    ranged = mode.name in ("snapshot", "immutable")
    expected = RIGHT if ranged else REFUSED
    cases = [Case(b"-" + line + b"\r\n", expected) for line in ERRORS]
    if split:
        cases = drawn([c for c in cases if len(c.reply) < 200], 10)
    run(peer, mode, step, cases, split)


@pytest.mark.parametrize(("mode", "step"), STEPS)
def test_half_a_reply_and_the_end_is_a_lost_connection(
    peer: OddServer, mode: Mode, step: str
) -> None:
    halves = [*HALVES, *(HALF_VALUES if step in ("GET", "GETRANGE") else [])]
    ends = ["close"] if not LONG else ["close", "reset"]
    cases = [Case(half, ConnectionError, end) for half in halves for end in ends]
    run(peer, mode, step, cases)


@pytest.mark.parametrize(("mode", "step"), STEPS)
def test_half_a_reply_and_silence_is_a_time_out(
    peer: OddServer, mode: Mode, step: str
) -> None:
    halves = [*HALVES, *(HALF_VALUES if step in ("GET", "GETRANGE") else [])]
    cases = drawn([Case(half, TimeoutError, "silence") for half in halves], 1)
    run(peer, mode, step, cases, socket_timeout=0.8)


# --- by hand -------------------------------------------------------------------------


LAST = [
    pytest.param(mode, "EXEC" if "EXEC" in mode.steps else step, id=mode.name)
    for mode in MODES
    for step in list(mode.steps)[:1]
]


@pytest.mark.parametrize(("mode", "step"), LAST)
def test_a_reply_that_nobody_asked_for_answers_nothing(
    peer: OddServer, mode: Mode, step: str
) -> None:
    """It comes with the last one, and before the next request."""
    extras = [
        *SIMPLE,
        *OK,
        *INTEGERS,
        *BULKS,
        *EMPTY,
        *replies(r"-ERR x\r\n  >0\r\n  \n"),
    ]
    caller = Caller(peer, mode, SEED)
    for extra in extras:
        with connect(peer, mode) as client:
            assert caller.outcomes(client, caller.buffers()) == [True] * 3
            before = peer.connections
            odd = peer.odd(step, caller.most(step), usual=True).reply(extra)
            assert caller.outcomes(client, caller.buffers()) == [True] * 3
            assert odd.seen.is_set()
            # Over a new connection, and no attempt lost: the policy allows one.
            assert caller.outcomes(client, caller.buffers()) == [True] * 3
            assert peer.connections == before + 1


class HastyServer(OddServer):
    """Answers a command when its beginning has come, and reads on when told."""

    def __init__(self, command: str, reply: bytes) -> None:
        self.beginning = command.encode() + b"\r\n"
        self.reply = reply
        self.go_on = threading.Event()
        self.received = 0  # of that command, in the end
        super().__init__()

    def peek(self, connection: socket.socket, data: bytes) -> bool:
        if self.beginning not in data or self.go_on.is_set():
            return True
        connection.sendall(self.reply)
        self.go_on.wait(20)
        while data:
            self.received += len(data)
            data = connection.recv(1 << 20)
        return False


EARLY = replies(r"+OK\r\n  :1\r\n  $3\r\nabc\r\n  $-1\r\n  *0\r\n  -ERR too large\r\n")


@pytest.mark.parametrize("reply", EARLY)
@pytest.mark.parametrize("step", ["SET", "GET", "EXISTS", "UNLINK", "WATCH"])
def test_a_reply_to_what_was_not_sent_to_its_end_is_none_but_a_refusal(
    step: str, reply: bytes
) -> None:
    mode = next(mode for mode in MODES if step in mode.steps)
    large = bytes(40_000_000)
    key, value = (b"k", large) if step == "SET" else (large, b"v" * SIZE)
    calls: dict[str, Callable[..., list[bool]]] = {
        "SET": lambda client: client.batch_tile_set([key], [value]),
        "EXISTS": lambda client: client.batch_tile_exists([key]),
        "UNLINK": lambda client: client.batch_tile_delete([key]),
    }
    with HastyServer(step, reply) as peer, connect(peer, mode) as client:
        # In few ranges: not worth an INFO before the WATCH.
        buffer = bytearray(b"\xa5" * RANGE)
        call = calls.get(step, lambda client: client.batch_tile_get([key], [buffer]))
        refused = reply.startswith(b"-")
        expected: type[RedisError] = fastkv.TileError
        if not refused:
            expected = InvalidResponse
        elif step == "WATCH":
            expected = ConnectionError
        with pytest.raises(expected) as caught:
            call(client)
        if refused:
            assert "too large" in str(caught.value)[-30:]
        peer.go_on.set()
        assert buffer == b"\xa5" * RANGE
        caller = Caller(peer, mode, SEED)
        assert caller.outcomes(client, caller.buffers()) == [True] * 3
    assert peer.received < len(large) / 2  # what the kernel had


def test_a_refused_step_is_tried_again_ever_more_rarely(peer: OddServer) -> None:
    """Once refused, ranges come back; always refused, in whatever words, they cost a
    round trip for ever fewer values.
    """
    mode = MODES[1]
    assert mode.name == "snapshot"
    for step in ("WATCH", "GETRANGE", "MULTI", "EXEC"):
        caller = Caller(peer, mode, SEED)

        def gets(client: fastkv.Redis, calls: int, caller: Caller = caller) -> int:
            """How many of the values were read whole."""
            peer.counts.clear()
            for _ in range(calls):
                assert caller.outcomes(client, caller.buffers()) == [True] * 3
            return peer.counts[b"GET"]

        for line in (b"ERR backend temporarily unavailable", b"unsupported command"):
            with connect(peer, mode) as client:
                odd = peer.odd(step).reply(b"-" + line + b"\r\n")
                assert 1 <= gets(client, 2) <= 3 and odd.seen.is_set()
                assert gets(client, 2) == 0
                peer.refused = {step.encode(): line}
                assert gets(client, 20) == 60
                tries = peer.counts[b"WATCH"]
                assert tries <= 12
                assert gets(client, 20) == 60
                assert peer.counts[b"WATCH"] <= 2
                peer.refused = {}
                gets(client, 45)  # more than the last refusal was worth
                assert gets(client, 2) == 0


@pytest.mark.parametrize("mode", MODES[1:3], ids=lambda mode: mode.name)
def test_a_proxy_that_hangs_up_on_what_it_does_not_know_is_done_without(
    peer: OddServer, mode: Mode
) -> None:
    """As twemproxy does."""
    caller = Caller(peer, mode, SEED)
    peer.refused = dict.fromkeys((b"WATCH", b"GETRANGE", b"MULTI", b"INFO"), b"")
    with connect(peer, mode) as client:
        client.set_retry(Retry(NoBackoff(), 3))
        for _ in range(20):
            assert caller.outcomes(client, caller.buffers()) == [True] * 3
    assert peer.connections <= 12


def test_memory_is_flat_whatever_the_reply(peer: OddServer) -> None:
    """Announced, endless or long: nothing is kept."""
    hostile = [
        b"-ERR " + b"x" * 10_000_000 + b"\r\n",
        b"-ERR " + b"x" * 60_000 + b"\r\n",
        b"$99999999999999\r\n" + b"x" * 10_000_000,
        b"*2147483647\r\n" + b":1\r\n" * 1_000_000,
        b"+" * 10_000_000,
    ]

    def peak() -> int:
        with open("/proc/self/status") as status:
            return int(re.findall(r"VmHWM:\s*(\d+) kB", status.read())[0]) << 10

    def work(rounds: int) -> None:
        for _ in range(rounds):
            for reply in hostile:
                for mode in MODES:
                    step = next(iter(mode.steps))
                    caller = Caller(peer, mode, SEED)
                    with connect(peer, mode) as client:
                        peer.odd(step).reply(reply).close()
                        try:
                            caller.outcomes(client, caller.buffers())
                        except RedisError:
                            pass

    work(1)
    gc.collect()
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # the peak begins anew: proc(5)
    before = peak()
    work(10 if LONG else 3)
    assert peak() - before < 4_000_000
