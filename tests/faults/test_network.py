"""The network fails at every byte of a call: right bytes or redis-py's exception, and
the next call works.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import os
import random
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from redis.backoff import ConstantBackoff, NoBackoff
from redis.exceptions import ConnectionError, TimeoutError

from fastkv.cli.private_server import ServerBinary
from tests.conftest import SERVERS
from tests.faults.calls import COMMANDS, WAYS, Caller, Store, Trial
from tests.faults.conftest import LONG
from tests.faults.proxy import Fault, Proxy
from tests.tls import Authority, TlsServer

SEED = int(os.environ.get("FASTKV_SEED", random.randrange(1 << 32)))

# One connection, so that bytes come in one order. The last value is read in ranges.
SINGLE = {"max_connections": 1, "tile_range_bytes": 64}
SIZES = (3, 20, 0, 2100)
# No value is read in ranges, so a stall, which takes its time, can be had at each byte.
SMALL_SIZES = (3, 20, 0, 40)

# A time-out that is never met, and one that is met by every stall: then a busy machine
# may meet it too, and whatever must succeed is retried.
CALM = {"socket_timeout": 20.0}
OFTEN = 200


@dataclass
class Line:
    """What leads from a client to a server."""

    proxy: Proxy
    plain: Store  # of the server itself
    kwargs: dict[str, Any]  # for a client
    thorough: bool  # in the long form, each byte
    ways: Mapping[str, Callable[..., Caller]] = field(default_factory=lambda: WAYS)
    names: Sequence[str] = ("",)  # what keys begin with

    def trial(
        self, random_: random.Random, command: str, sizes: Sequence[int]
    ) -> Trial:
        return Trial(self.plain, random_, command, sizes, self.names)

    @property
    def brisk(self) -> dict[str, float]:
        """See `CALM`. A handshake of TLS takes longer, and must be through by then."""
        return {"socket_timeout": 0.25 if "ssl" in self.kwargs else 0.04}


@pytest.fixture(scope="module")
def secure(
    tls_binary: ServerBinary, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[TlsServer, str]]:
    """A server, and the file of who vouches for it."""
    authority = Authority(tmp_path_factory.mktemp("certificates"), "authority")
    assert authority.identity is not None
    shown = authority.issue("server", ("localhost", "127.0.0.1"))
    server = TlsServer(tls_binary, shown, authority.identity)
    with server:
        yield server, authority.identity.cert_file


LINES = [
    *(
        pytest.param((transport, binary), id=f"{transport}-{binary}")
        for binary in (SERVERS if LONG else SERVERS[:1])
        for transport in ("tcp", "unix")
    ),
    pytest.param(("tls", None), id="tls"),
]


@pytest.fixture(params=LINES)
def line(
    request: pytest.FixtureRequest, tmp_path: Path, no_leaks: None
) -> Iterator[Line]:
    """Each transport to each server, with a proxy on the way."""
    transport, binary = request.param
    settings: dict[str, Any] = {}
    if transport == "tls":
        server, trusted = request.getfixturevalue("secure")
        settings = {"ssl": True, "ssl_ca_certs": trusted}
        port = server.tls_port
    else:
        server = request.getfixturevalue("running")(binary)
        port = server.port
    target = server.unix_path if transport == "unix" else ("127.0.0.1", port)
    with server.client() as plain, Proxy(target, str(tmp_path)) as proxy:
        plain.flushall()
        thorough = LONG and binary == SERVERS[0]
        yield Line(proxy, plain, {**proxy.kwargs, **settings}, thorough)


@contextlib.contextmanager
def calling(ways: list[str], line: Line, **kwargs: Any) -> Iterator[list[Caller]]:
    callers: list[Caller] = [line.ways[way](**line.kwargs, **kwargs) for way in ways]
    try:
        yield callers
    finally:
        for caller in callers:
            caller.close()


def one_way(random_: random.Random) -> list[str]:
    """For short time-outs: another caller, who still connects, might meet the fault."""
    return [random_.choice(list(WAYS))]


@contextlib.contextmanager
def told(*facts: object) -> Iterator[None]:
    """How to repeat what fails in here."""
    try:
        yield
    except BaseException as error:
        raise AssertionError(f"FASTKV_SEED={SEED}: {facts}: {error!r}") from error


def some(line: Line, random_: random.Random, total: int, count: int) -> list[int]:
    """Offsets: each, or a sample. Most is said at the ends; between them are values."""
    if "ssl" in line.kwargs:
        count = max(2, count // 4)  # its handshakes take their time
    if LONG:
        count = 2600 if line.thorough else 6 * count
    if count >= total:
        return random_.sample(range(total), total)
    ends = [*range(min(120, total)), *range(max(0, total - 120), total)]
    return [random_.choice(random_.choice([range(total), ends])) for _ in range(count)]


def bytes_of_a_call(
    line: Line, random_: random.Random, command: str, sizes: Sequence[int]
) -> tuple[int, int]:
    """To the server, from it; on a connection that was open."""
    with calling(["futures"], line, **SINGLE, **CALM) as (caller,):
        for _ in "ab":
            line.proxy.heal()
            trial = line.trial(random_, command, sizes).run(caller)
            assert trial.error is None
        return line.proxy.passed()


def bytes_of_a_connection(line: Line) -> tuple[int, int]:
    """What is said on a new one, by both sides, until it is of use."""
    with calling(["futures"], line, **SINGLE, **CALM) as (caller,):
        line.proxy.heal()
        assert caller("batch_tile_exists", ["a"]) == [False]
        return line.proxy.passed()


DUE: dict[str, Any] = {
    "cut": ConnectionError,
    "reset": ConnectionError,
    "stall": TimeoutError,
    "flip": (ConnectionError, TimeoutError),
}


def strike(
    line: Line,
    random_: random.Random,
    caller: Caller,
    calls: Sequence[tuple[str, Sequence[int]]],
    fault: Fault,
    retries: int,
    enough: int,
    answered: Collection[int] = (),
) -> None:
    """Make a call with ``retries`` in which a fault strikes, then one with ``enough``,
    when the network is healed. What the fault does not concern is ``answered``.
    """
    trial, following = [line.trial(random_, *call) for call in calls]
    line.proxy.inject(fault)
    caller.retries(retries)
    trial.run(caller)
    struck = line.proxy.struck.is_set()
    line.proxy.heal()
    caller.retries(enough)
    following.run(caller)
    assert max(trial.took, following.took) < 10, (trial.took, following.took)
    # On a busy machine a time-out may come without a fault, and before it.
    busy = fault.kind in ("stall", "flip") and "is unknown" in str(following.error)
    assert following.error is None or busy, repr(following.error)
    if not struck:
        # Or TLS has made fewer records of it.
        assert fault.kind == "stall" or "ssl" in line.kwargs
    elif retries == 0:
        assert trial.error is not None
    if trial.error is not None:
        unknown = "is unknown" in str(trial.error)
        assert retries == 0 or unknown
        due = ConnectionError if unknown else DUE[fault.kind]
        assert isinstance(trial.error, due), repr(trial.error)
    trial.settle(retries > 0, answered)
    following.settle(repeated=enough > 0)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["cut", "reset"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_connection_may_end_at_every_byte(
    line: Line, command: str, kind: str
) -> None:
    random_ = random.Random(f"{SEED} {command} {kind}")
    with calling(list(WAYS), line, **SINGLE, **CALM) as callers:
        totals = bytes_of_a_call(line, random_, command, SIZES)
        for up, total in zip((True, False), totals, strict=True):
            for at in some(line, random_, total, 14):
                caller, fault = random_.choice(callers), Fault(kind, at, up)
                retries = random_.choice([0, 2])
                with told(caller, fault, retries):
                    calls = [(command, SIZES)] * 2
                    strike(line, random_, caller, calls, fault, retries, 0)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["cut", "reset"])
def test_a_connection_may_end_at_every_byte_of_its_beginning(
    line: Line, kind: str
) -> None:
    random_ = random.Random(f"{SEED} {kind}")
    with calling(list(WAYS), line, **SINGLE, **CALM) as callers:
        totals = bytes_of_a_connection(line)
        for up, total in zip((True, False), totals, strict=True):
            for at in some(line, random_, total, 6):
                caller, fault = random_.choice(callers), Fault(kind, at, up)
                retries = random_.choice([0, 2])
                with told(caller, fault, retries):
                    line.proxy.drop_all()
                    calls = [(random_.choice(COMMANDS), SMALL_SIZES) for _ in "ab"]
                    strike(line, random_, caller, calls, fault, retries, 0)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_connection_may_fall_silent_at_every_byte(line: Line, command: str) -> None:
    random_ = random.Random(f"{SEED} {command}")
    with calling(one_way(random_), line, **SINGLE, **line.brisk) as callers:
        totals = bytes_of_a_call(line, random_, command, SMALL_SIZES)
        for up, total in zip((True, False), totals, strict=True):
            for at in some(line, random_, total, 2):
                caller, fault = random_.choice(callers), Fault("stall", at, up)
                retries = random_.choice([0, OFTEN])
                with told(caller, fault, retries):
                    calls = [(command, SMALL_SIZES)] * 2
                    strike(line, random_, caller, calls, fault, retries, OFTEN)


@pytest.mark.timeout(1800)
def test_a_connection_may_fall_silent_at_every_byte_of_its_beginning(
    line: Line,
) -> None:
    random_ = random.Random(f"{SEED}")
    with calling(one_way(random_), line, **SINGLE, **line.brisk) as callers:
        totals = bytes_of_a_connection(line)
        for up, total in zip((True, False), totals, strict=True):
            for at in some(line, random_, total, 4):
                caller, fault = random_.choice(callers), Fault("stall", at, up)
                retries = random_.choice([0, OFTEN])
                with told(caller, fault, retries):
                    line.proxy.drop_all()
                    calls = [(random_.choice(COMMANDS), SMALL_SIZES) for _ in "ab"]
                    strike(line, random_, caller, calls, fault, retries, OFTEN)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_answered_too_late_is_never_taken_for_another_answer(
    line: Line, command: str
) -> None:
    """The batch's own time-out, and the connection goes on with what was on its way."""
    random_ = random.Random(f"{SEED} {command}")
    way = random_.choice(list(WAYS))
    with calling([way], line, **SINGLE, **CALM) as (caller,):
        totals = bytes_of_a_call(line, random_, command, SIZES)
        for up, total in zip((True, False), totals, strict=True):
            for at in random_.sample(range(total), min(total, 200 if LONG else 2)):
                with told(way, up, at):
                    line.proxy.inject(Fault("stall", at, up))
                    trials = [Trial(line.plain, random_, command, SIZES) for _ in "ab"]
                    late, following = trials
                    late.run(caller, timeout=0.02)
                    assert isinstance(late.error, (TimeoutError, ConnectionError))
                    line.proxy.heal()
                    # It may be dropped, with a SET that was not sent to its end.
                    caller.retries(1)
                    following.run(caller)
                    caller.retries(0)
                    assert following.error is None, repr(following.error)
                    late.settle()
                    following.settle(repeated=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_segments_of_one_byte_and_pauses_change_nothing(
    line: Line, command: str
) -> None:
    random_ = random.Random(f"{SEED} {command}")
    way = random_.choice(list(WAYS))
    with calling([way], line, **SINGLE, **CALM) as (caller,):
        caller.retries(0)
        totals = bytes_of_a_call(line, random_, command, SIZES)
        for up, total in zip((True, False), totals, strict=True):
            for _ in range(100 if LONG else 2):
                at = random_.randrange(total)
                for fault in (
                    Fault("split", at, up),
                    Fault("delay", at, up, seconds=random_.uniform(0, 0.03)),
                ):
                    with told(way, fault):
                        trial = Trial(line.plain, random_, command, SIZES)
                        line.proxy.inject(fault)
                        trial.run(caller)
                        assert line.proxy.struck.is_set()
                        line.proxy.heal()
                        assert trial.error is None, repr(trial.error)
                        trial.settle()


@pytest.mark.parametrize("command", COMMANDS)
def test_who_is_not_let_in_is_told_so_and_gets_in_later(
    line: Line, command: str
) -> None:
    random_ = random.Random(f"{SEED} {command}")
    for way in WAYS if LONG else [random_.choice(list(WAYS))]:
        with told(way), calling([way], line, **CALM) as (caller,):
            for fault in (Fault("refuse"), Fault("slow", seconds=0.02)):
                for retries in (0, 2):
                    trials = [Trial(line.plain, random_, command, SIZES) for _ in "ab"]
                    refused, following = trials
                    line.proxy.inject(fault)
                    line.proxy.drop_all()  # with those that are being made
                    caller.retries(retries)
                    refused.run(caller)
                    line.proxy.heal()
                    if fault.kind == "refuse":
                        assert isinstance(refused.error, ConnectionError)
                        assert "refused" in str(refused.error)
                    else:
                        assert refused.error is None, repr(refused.error)
                    caller.retries(0)
                    following.run(caller)
                    assert following.error is None, repr(following.error)
                    refused.settle()
                    following.settle()


def random_fault(random_: random.Random, total: int, kinds: list[str]) -> Fault:
    """At any offset, up to three times."""
    return Fault(
        random_.choice(kinds),
        at=random_.choice([random_.randrange(total), random_.randrange(300)]),
        up=random_.random() < 0.4,
        connection=random_.choice([None, None, 0, 1, 2]),
        times=random_.randrange(1, 4),
        seconds=random_.uniform(0, 0.02),
        length=random_.randrange(1, 5000),
    )


KINDS = ["cut", "reset", "stall", "delay", "split"]
BACKOFFS = [NoBackoff(), ConstantBackoff(0.002)]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", COMMANDS[:4])
def test_large_values_over_several_connections(line: Line, command: str) -> None:
    random_ = random.Random(f"{SEED} {command}")
    kinds = [*KINDS, "flip"] if "ssl" in line.kwargs else KINDS
    for _ in range(6 if LONG else 1):
        way = random_.choice(list(WAYS))
        settings = {
            "tile_range_bytes": random_.choice([0, 4096, 65536, None]),
            "tile_window_bytes": random_.choice([1, 65536, None]),
            "tile_connections": random_.choice([1, 2, 4]),
            "tile_workers": random_.choice([1, 2, 4]),
            "socket_timeout": 0.25,
        }
        with calling([way], line, **settings) as (caller,):
            for _ in range(10 if LONG else 4):
                sizes = [
                    random_.choice(
                        [random_.randrange(5000), random_.randrange(1 << 20)]
                    )
                    for _ in range(random_.randrange(1, 6))
                ]
                sizes[0] = random_.randrange(1 << 16, 2 << 20)
                fault = random_fault(random_, sum(sizes), kinds)
                retries = random_.choice([0, OFTEN])
                with told(way, settings, sizes, fault, retries):
                    trials = [Trial(line.plain, random_, command, sizes) for _ in "ab"]
                    line.proxy.inject(fault)
                    caller.retries(retries)
                    trials[0].run(caller)
                    line.proxy.heal()
                    caller.retries(OFTEN)
                    trials[1].run(caller)
                    for trial, repeated in zip(
                        trials, (retries > 0, True), strict=True
                    ):
                        if repeated and command != "set nx":
                            assert trial.error is None, repr(trial.error)
                        trial.settle(repeated)


@pytest.mark.timeout(1800)
def test_a_crowd_on_a_network_that_fails_all_the_time(line: Line) -> None:
    """Many calls of all kinds at once; each connection fails after some bytes."""
    random_ = random.Random(f"{SEED}")
    for round_ in range(8 if LONG else 1):
        settings = {
            "tile_range_bytes": 4096,
            "tile_window_bytes": 65536,
            "tile_workers": random_.choice([1, 4]),
        }
        fault = replace(
            random_fault(random_, 200_000, ["cut", "reset", "split"]),
            # More than the largest value and a handshake: each can get through.
            at=random_.randrange(40_000, 200_000),
            connection=None,
            times=None,
            length=2000,
        )
        trials = [
            Trial(
                line.plain,
                random.Random(f"{SEED} {round_} {i}"),
                COMMANDS[i % len(COMMANDS)],
                [random_.randrange(20_000) for _ in range(random_.randrange(1, 5))],
            )
            for i in range(240)
        ]
        with (
            told(settings, fault),
            calling(["futures"], line, **settings, **CALM) as (caller,),
        ):
            caller.retries(OFTEN, random_.choice(BACKOFFS))
            line.proxy.inject(fault)
            with concurrent.futures.ThreadPoolExecutor(24) as pool:
                for done in [pool.submit(trial.run, caller) for trial in trials]:
                    done.result()
            assert line.proxy.struck.is_set()
            line.proxy.heal()
            for i, trial in enumerate(trials):
                if COMMANDS[i % len(COMMANDS)] != "set nx":
                    assert trial.error is None, repr(trial.error)
                trial.settle(repeated=True)


# So little that all connections are needed.
SHARED = {"tile_range_bytes": 4096, "tile_window_bytes": 4096, "tile_connections": 4}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("immutable", [False, True])
@pytest.mark.parametrize("workers", [1, 4])
def test_a_value_that_connections_share_survives_the_loss_of_some(
    line: Line, workers: int, immutable: bool
) -> None:
    random_ = random.Random(f"{SEED} {workers} {immutable}")
    size = 300_000
    command = "get immutable" if immutable else "get"
    with calling(list(WAYS), line, **SHARED, **CALM, tile_workers=workers) as callers:
        for caller in callers:
            caller.retries(OFTEN)
            for _ in range(200 if LONG else 5):
                fault = replace(
                    random_fault(random_, size // 4, ["cut", "reset"]),
                    up=random_.random() < 0.2,
                )
                with told(caller, fault):
                    trial = Trial(line.plain, random_, command, [size])
                    line.proxy.inject(fault)
                    trial.run(caller)
                    assert trial.error is None, repr(trial.error)
                    line.proxy.heal()
                    trial.settle()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("workers", [1, 4])
def test_a_value_that_changes_while_connections_break_is_of_one_version(
    line: Line, workers: int
) -> None:
    random_ = random.Random(f"{SEED} {workers}")
    size = 300_000
    stop = threading.Event()

    def write() -> None:
        pauses = random.Random(f"{SEED}")
        for number in itertools.count(1):
            line.plain.set("k", bytes([number % 256]) * size)
            if stop.wait(pauses.choice([0.001, 0.02, 0.04])):
                return

    writer = threading.Thread(target=write)
    line.plain.set("k", b"\0" * size)
    with calling(list(WAYS), line, **SHARED, **CALM, tile_workers=workers) as callers:
        writer.start()
        try:
            for _ in range(400 if LONG else 15):
                fault = random_.choice(
                    [
                        random_fault(random_, size // 4, ["cut", "reset", "delay"]),
                        # A connection whose WATCH comes late.
                        Fault(
                            "delay",
                            at=random_.randrange(20),
                            up=True,
                            connection=random_.randrange(4),
                            seconds=random_.uniform(0.01, 0.06),
                        ),
                    ]
                )
                caller = random_.choice(callers)
                buffer = bytearray(random_.randbytes(1) * size)
                with told(fault):
                    caller.retries(OFTEN)
                    line.proxy.inject(fault)
                    assert caller("batch_tile_get", ["k"], [buffer]) == [True]
                    line.proxy.heal()
                    assert buffer.count(buffer[0]) == size, "two versions"
        finally:
            stop.set()
            writer.join()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_bit_that_is_changed_under_tls_is_noticed(
    request: pytest.FixtureRequest, no_leaks: None, command: str
) -> None:
    server, trusted = request.getfixturevalue("secure")
    random_ = random.Random(f"{SEED} {command}")
    with server.client() as plain, Proxy(("127.0.0.1", server.tls_port)) as proxy:
        tls = {"ssl": True, "ssl_ca_certs": trusted}
        line = Line(proxy, plain, {**proxy.kwargs, **tls}, thorough=False)
        with calling(one_way(random_), line, **SINGLE, **line.brisk) as callers:
            totals = bytes_of_a_call(line, random_, command, SIZES)
            for up, total in zip((True, False), totals, strict=True):
                for at in some(line, random_, total, 3):
                    caller, fault = random_.choice(callers), Fault("flip", at, up)
                    retries = random_.choice([0, OFTEN])
                    with told(caller, fault, retries):
                        calls = [(command, SIZES)] * 2
                        strike(line, random_, caller, calls, fault, retries, OFTEN)
