"""Real servers that are killed, stopped, paused, full, loading or locked: redis-py's
exception or the right result, in time, and back to work by themselves.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from redis.backoff import ConstantBackoff, NoBackoff
from redis.connection import UnixDomainSocketConnection
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError,
    MasterDownError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    TimeoutError,
)
from redis.retry import Retry

import fastkv
from fastkv.cli.private_server import PrivateServer
from tests.conftest import SERVERS, Endpoint, eventually
from tests.faults.conftest import LONG

SEED = int(os.environ.get("FASTKV_SEED", "1"))
#: Small, below the size from which values are read in ranges, and above it.
SIZES = (100, 200_000, 1_500_000)
#: Seconds that no call takes, whatever happens to the server.
PATIENCE = 60
NEVER, ALWAYS = Retry(NoBackoff(), 0), Retry(ConstantBackoff(0.01), 10_000)


@pytest.fixture(params=SERVERS if LONG else SERVERS[:1], ids=str)
def own_server(request: pytest.FixtureRequest) -> Iterator[PrivateServer]:
    """Each kind of server in the long form."""
    with PrivateServer(request.param, "--enable-debug-command", "yes") as server:
        yield server


@pytest.fixture
def admin(own_server: PrivateServer) -> Iterator[redis.Redis]:
    with own_server.client() as admin:
        yield admin


@pytest.fixture(params=["tcp", "unix"] if LONG else ["tcp"])
def connect(
    request: pytest.FixtureRequest, make: Any, own_server: PrivateServer
) -> Callable[..., fastkv.Redis]:
    address = Endpoint(own_server, request.param == "unix").kwargs

    def connect(retry: Retry = NEVER, **options: Any) -> fastkv.Redis:
        client: fastkv.Redis = make(**address, **options)
        client.set_retry(retry)
        return client

    return connect


def poisoned(size: int) -> bytearray:
    return bytearray(b"\xa5" * size)


def read(client: fastkv.Redis, keys: list[str], sizes: list[int], **how: Any) -> Any:
    """What `batch_tile_get` has for each key: its bytes, None, or an exception."""
    buffers = [poisoned(size) for size in sizes]
    try:
        outcomes: list[Any] = list(client.batch_tile_get(keys, buffers, **how))
    except fastkv.TileError as error:
        outcomes = list(error.outcomes)
    return [
        bytes(buffer) if outcome is True else outcome or None
        for outcome, buffer in zip(outcomes, buffers, strict=True)
    ]


# --- under load ----------------------------------------------------------------------


class Load:
    """A thread that reads and writes keys of its own, and knows what they may hold.

    A SET that was not answered may have been done, or be done later: all that it may
    have left behind is right until the end.
    """

    def __init__(
        self, client: fastkv.Redis, seed: int, errors: tuple[type, ...]
    ) -> None:
        self.client = client
        self.random = random.Random(seed)
        self.errors = errors
        self.forgets = False  # the server may lose what it has
        self.calls = 0
        self.failed: BaseException | None = None
        self.sizes = {f"{seed}:{size}:{i}": size for size in SIZES for i in range(3)}
        self.stored: dict[str, bytes | None] = dict.fromkeys(self.sizes)
        self.doubtful: dict[str, set[bytes | None]] = {key: set() for key in self.sizes}
        self._stop = threading.Event()
        self._given_back: list[bytearray] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(2 * PATIENCE)
        assert not self._thread.is_alive(), "a call hangs"
        if self.failed is not None:
            raise self.failed

    def progress(self, calls: int) -> None:
        """Wait for so many more."""
        wanted = self.calls + calls
        assert self.failed is not None or eventually(
            lambda: self.calls >= wanted or self.failed is not None
        )

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                began = time.monotonic()
                keys = self.random.sample(list(self.sizes), self.random.randint(1, 9))
                self.random.choice([self._get, self._get, self._set, self._delete])(
                    keys
                )
                assert time.monotonic() - began < PATIENCE
                self.calls += 1
        except BaseException as error:
            error.add_note(f"seed {SEED}")
            self.failed = error

    def _outcomes(self, call: Callable[[], list[bool]], count: int) -> list[Any]:
        """Of each key; None: not known."""
        try:
            return list(call())
        except fastkv.TileError as error:
            for one in error.errors.values():
                assert isinstance(one, self.errors), repr(one)
            return list(error.outcomes)
        except self.errors:
            return [None] * count

    def _get(self, keys: list[str]) -> None:
        buffers = [poisoned(self.sizes[key]) for key in keys]
        outcomes = self._outcomes(
            lambda: self.client.batch_tile_get(keys, buffers), len(keys)
        )
        for key, outcome, buffer in zip(keys, outcomes, buffers, strict=True):
            right = {self.stored[key], *self.doubtful[key]}
            if outcome is True:
                assert bytes(buffer) in right, key
            elif outcome is False:
                assert self.forgets or None in right, key
        # What a call has given back stays as the caller leaves it.
        for buffer in self._given_back:
            assert buffer.count(0x5A) == len(buffer)
        self._given_back = buffers
        for buffer in buffers:
            buffer[:] = b"\x5a" * len(buffer)

    def _set(self, keys: list[str]) -> None:
        values = [self.random.randbytes(self.sizes[key]) for key in keys]
        outcomes = self._outcomes(
            lambda: self.client.batch_tile_set(keys, values), len(keys)
        )
        for key, outcome, value in zip(keys, outcomes, values, strict=True):
            if outcome is True:
                self.stored[key] = value
            elif outcome is None:
                self.doubtful[key].add(value)

    def _delete(self, keys: list[str]) -> None:
        keys = keys[:1]
        (outcome,) = self._outcomes(lambda: self.client.batch_tile_delete(keys), 1)
        if outcome is None:
            self.doubtful[keys[0]].add(None)
        elif not isinstance(outcome, RedisError):
            self.stored[keys[0]] = None


Fault = Callable[[PrivateServer, redis.Redis, random.Random], None]


def kill_and_restart(
    server: PrivateServer, _: redis.Redis, chance: random.Random
) -> None:
    server.stop()
    time.sleep(chance.choice([0, 0.05]))  # down is the point
    server.start()


def stop_and_continue(
    server: PrivateServer, _: redis.Redis, chance: random.Random
) -> None:
    os.kill(server.pid, signal.SIGSTOP)
    time.sleep(chance.uniform(0, 0.3))
    os.kill(server.pid, signal.SIGCONT)


def kill_clients(_: PrivateServer, admin: redis.Redis, chance: random.Random) -> None:
    found: Any = admin.client_list(_type="normal")
    others = [one["id"] for one in found if one["cmd"] != "client|list"]
    for one in chance.sample(others, chance.randint(0, len(others))):
        admin.client_kill_filter(_id=one)


def pause_all(_: PrivateServer, admin: redis.Redis, chance: random.Random) -> None:
    admin.client_pause(chance.randint(1, 300))


def pause_writes(_: PrivateServer, admin: redis.Redis, chance: random.Random) -> None:
    admin.client_pause(chance.randint(1, 300), all=False)


def reload(_: PrivateServer, admin: redis.Redis, chance: random.Random) -> None:
    admin.execute_command("DEBUG RELOAD")


def fill_up(_: PrivateServer, admin: redis.Redis, chance: random.Random) -> None:
    admin.config_set("maxmemory", 1)
    time.sleep(chance.uniform(0, 0.05))
    admin.config_set("maxmemory", 0)


def take_rights(_: PrivateServer, admin: redis.Redis, chance: random.Random) -> None:
    rights = ["-@read", "-@write", "-multi", "-exec", "-getrange", "resetkeys"]
    admin.execute_command("ACL", "SETUSER", "default", chance.choice(rights))
    time.sleep(chance.uniform(0, 0.05))
    admin.execute_command("ACL", "SETUSER", "default", "+@all", "~*")


def become_replica(_: PrivateServer, admin: redis.Redis, chance: random.Random) -> None:
    admin.replicaof("127.0.0.1", 1)  # nobody is there: it keeps what it has
    time.sleep(chance.uniform(0, 0.05))
    admin.replicaof("no", "one")


LOST = (ConnectionError, TimeoutError)
REFUSED = (NoPermissionError, OutOfMemoryError, ReadOnlyError)


@pytest.mark.parametrize("retry", [NEVER, ALWAYS], ids=["once", "always"])
@pytest.mark.parametrize(
    "fault",
    [
        *(kill_and_restart, stop_and_continue, kill_clients, pause_all, pause_writes),
        *(reload, fill_up, take_rights, become_replica),
    ],
)
def test_a_fault_under_load_changes_no_answer(
    own_server: PrivateServer,
    admin: redis.Redis,
    connect: Callable[..., fastkv.Redis],
    fault: Fault,
    retry: Retry,
) -> None:
    """Within the policy there is no error but what the server says to a key."""
    errors = REFUSED if retry is ALWAYS else (*REFUSED, *LOST)
    client = connect(retry, socket_timeout=PATIENCE / 3)
    chance = random.Random(SEED)
    loads = Load(client, 2 * SEED, errors), Load(client, 2 * SEED + 1, errors)
    with loads[0] as one, loads[1] as two:
        one.forgets = two.forgets = fault is kill_and_restart
        for _ in range(20 if LONG else 4):
            one.progress(chance.randint(1, 10))
            fault(own_server, admin, chance)
        one.progress(5)
        two.progress(5)
    # Nothing of it is left: the next calls work, with as many retries as none.
    client.set_retry(NEVER)
    keys = [f"after{size}" for size in SIZES]
    values = [chance.randbytes(size) for size in SIZES]
    assert client.batch_tile_set(keys, values) == [True] * 3
    assert read(client, keys, list(SIZES)) == values


# --- stopped and paused --------------------------------------------------------------


@contextmanager
def stopped(server: PrivateServer, _: redis.Redis) -> Iterator[None]:
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


@contextmanager
def paused(_: PrivateServer, admin: redis.Redis) -> Iterator[None]:
    admin.client_pause(5000)  # nobody could end it sooner: that, too, would wait
    yield


@pytest.mark.parametrize("limit", ["socket_timeout", "timeout"])
@pytest.mark.parametrize(
    ("quiet", "large"), [(stopped, False), (stopped, True), (paused, True)]
)
def test_a_server_that_does_not_answer_is_a_time_out_and_writes_nothing_later(
    own_server: PrivateServer,
    admin: redis.Redis,
    connect: Callable[..., fastkv.Redis],
    quiet: Any,
    limit: str,
    large: bool,
) -> None:
    client = connect(**({"socket_timeout": 0.3} if limit == "socket_timeout" else {}))
    how: Any = {"timeout": 0.3} if limit == "timeout" else {}
    sizes = [8_000_000 if large else 1000] * 8
    keys = [f"k{i}" for i in range(8)]
    values = [os.urandom(size) for size in sizes]
    with own_server.client() as plain:
        plain.mset(dict(zip(keys, values, strict=True)))
    assert client.batch_tile_exists(keys) == [True] * 8  # connected
    buffers = [poisoned(size) for size in sizes]
    with quiet(own_server, admin):
        for call in (
            lambda: client.batch_tile_get(keys, buffers, **how),
            lambda: client.batch_tile_get(keys, buffers, immutable=True, **how),
            lambda: client.batch_tile_set(keys, values, **how),
            lambda: client.batch_tile_exists(keys, **how),
            lambda: client.batch_tile_delete(["other"], **how),
        ):
            began = time.monotonic()
            with pytest.raises(TimeoutError):
                call()
            assert time.monotonic() - began < PATIENCE / 2
        for buffer in buffers:
            buffer[:] = b"\x5a" * len(buffer)
            buffer += b"grown"  # not pinned
    # It may be paused still, and slow to wake up.
    client.set_retry(Retry(NoBackoff(), 50))
    assert read(client, keys, sizes, timeout=PATIENCE) == values
    for buffer in buffers:
        assert buffer.count(0x5A) == len(buffer) - 5


def test_reads_go_on_while_writes_are_paused(
    admin: redis.Redis, connect: Callable[..., fastkv.Redis]
) -> None:
    client = connect()
    keys = [f"k{size}" for size in SIZES]
    values = [os.urandom(size) for size in SIZES]
    client.batch_tile_set(keys, values)
    admin.client_pause(3_600_000, all=False)
    stored = client.submit_batch_tile_set(["new"], [b"x" * 300_000])
    assert client.batch_tile_exists(keys, timeout=PATIENCE) == [True] * 3
    assert read(client, keys, list(SIZES), timeout=PATIENCE) == values
    with pytest.raises(TimeoutError):
        client.batch_tile_set(["late"], [b"y"], timeout=0.2)
    assert not stored.done()
    admin.client_unpause()
    assert stored.result(PATIENCE) == [True]
    assert client.batch_tile_set(["late"], [b"z"]) == [True]


# --- memory --------------------------------------------------------------------------


def test_a_full_server_keeps_what_fits_and_names_what_does_not(
    admin: redis.Redis, connect: Callable[..., fastkv.Redis]
) -> None:
    client = connect()
    client.batch_tile_set(["old"], [b"old value"])
    used: Any = admin.info("memory")
    admin.config_set("maxmemory", used["used_memory"] + 20_000_000)
    keys = ["old", *(f"k{i}" for i in range(40))]
    values = [os.urandom(1_000_000) for _ in keys]
    with pytest.raises(fastkv.TileError) as caught:
        client.batch_tile_set(keys, values)
    outcomes = dict(zip(keys, caught.value.outcomes, strict=True))
    assert True in outcomes.values()
    admin.config_set("maxmemory", 0)
    for (key, outcome), value in zip(outcomes.items(), values, strict=True):
        if outcome is True:
            assert admin.get(key) == value
        else:
            assert type(outcome) is OutOfMemoryError
            assert admin.get(key) == (b"old value" if key == "old" else None)
    assert client.batch_tile_set(keys, values) == [True] * 41


def test_a_server_that_evicts_while_it_is_read_gives_the_value_or_a_miss(
    admin: redis.Redis, connect: Callable[..., fastkv.Redis]
) -> None:
    client = connect()
    chance = random.Random(SEED)
    keys = [f"k{i}" for i in range(60)]
    values = {key: chance.randbytes(chance.choice(SIZES)) for key in keys}
    used: Any = admin.info("memory")
    admin.config_set("maxmemory-policy", "allkeys-lru")
    room = sum(map(len, values.values())) // 2
    admin.config_set("maxmemory", used["used_memory"] + room)
    for key, value in values.items():
        assert client.batch_tile_set([key], [value]) == [True]
    stop = threading.Event()
    failed: list[BaseException] = []

    def write() -> None:
        # A content hash is written once, and again when it was evicted.
        try:
            for key in iter(lambda: random.choice(keys), None):
                if stop.is_set():
                    return
                assert client.batch_tile_set([key], [values[key]]) == [True]
        except BaseException as error:
            failed.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    hits = misses = 0
    try:
        for number in range(500 if LONG else 80):
            wanted = chance.sample(keys, 10)
            sizes = [len(values[key]) for key in wanted]
            got = read(client, wanted, sizes, immutable=number % 2 == 0)
            for key, value in zip(wanted, got, strict=True):
                assert value is None or value == values[key], f"seed {SEED}"
                hits += value is not None
                misses += value is None
    finally:
        stop.set()
        writer.join()
    assert not failed
    stats: Any = admin.info("stats")
    assert stats["evicted_keys"] > 0 < hits and misses > 0


# --- loading -------------------------------------------------------------------------


def test_a_server_that_loads_is_busy_and_then_answers(
    own_server: PrivateServer, make: Any
) -> None:
    """After a crash, with what it had on disk, for as long as that takes."""
    slow = ("--key-load-delay", "2000")
    often = ("--loading-process-events-interval-bytes", "1024")
    with PrivateServer(own_server.binary, *slow, *often) as server:
        keys = [f"k{i}" for i in range(400)]
        values = [os.urandom(1000) for _ in keys]
        with server.client() as admin:
            admin.set("large", b"x" * 3_000_000)
            admin.mset(dict(zip(keys, values, strict=True)))
            admin.save()
        impatient = make(port=server.port)
        impatient.set_retry(NEVER)
        patient = make(port=server.port)
        patient.set_retry(ALWAYS)
        assert all(impatient.batch_tile_exists(keys))
        server.stop()
        starting = threading.Thread(target=server.start)
        starting.start()
        busy = 0
        while starting.is_alive():
            for call in (
                lambda: read(impatient, ["k1", "large"], [1000, 3_000_000]),
                lambda: impatient.batch_tile_set(["a", "b"], [b"1", b"2"]),
                lambda: impatient.batch_tile_exists(["k1", "k2"]),
            ):
                try:
                    call()
                except BusyLoadingError:
                    busy += 1
                except ConnectionError:
                    pass  # it does not listen yet
            if busy >= 3:
                break
        # Goes on as soon as there is an answer.
        assert read(patient, keys, [1000] * 400, timeout=PATIENCE) == values
        starting.join()
        assert busy >= 3
        assert read(impatient, keys, [1000] * 400) == values


# --- rights --------------------------------------------------------------------------


def test_a_password_that_was_changed_is_redis_pys_error_until_it_is_right_again(
    admin: redis.Redis, connect: Callable[..., fastkv.Redis]
) -> None:
    admin.execute_command("ACL", "SETUSER", "bob", "on", ">first", "~*", "+@all")
    client = connect(username="bob", password="first", protocol=2)
    value = os.urandom(1_500_000)
    assert client.batch_tile_set(["k"], [value]) == [True]
    for _ in range(2):
        admin.execute_command("ACL", "SETUSER", "bob", "<first", ">second")
        # Who is in stays in, as with redis-py.
        assert read(client, ["k"], [1_500_000]) == [value]
        admin.client_kill_filter(_type="normal", skipme=True)
        client.connection_pool.disconnect()
        with pytest.raises(AuthenticationError) as theirs:
            client.ping()
        for call in (
            lambda: read(client, ["k"], [1_500_000]),
            lambda: client.batch_tile_set(["k"], [b"other"]),
            lambda: client.batch_tile_exists(["k"]),
        ):
            with pytest.raises(AuthenticationError) as ours:
                call()
            assert str(ours.value) == str(theirs.value)
        admin.execute_command("ACL", "SETUSER", "bob", ">first", "<second")
        assert read(client, ["k"], [1_500_000]) == [value]
    # A user that is gone loses its connections at once.
    admin.execute_command("ACL", "DELUSER", "bob")
    with pytest.raises(AuthenticationError):
        client.batch_tile_exists(["k"])


def test_rights_that_are_taken_away_and_given_back_count_from_then_on(
    admin: redis.Redis, connect: Callable[..., fastkv.Redis]
) -> None:
    admin.execute_command("ACL", "SETUSER", "bob", "on", ">pw", "~*", "+@all")
    client = connect(username="bob", password="pw", tile_connections=1)
    keys = [f"{letter}{size}" for letter in "ab" for size in SIZES]
    sizes = [*SIZES, *SIZES]
    values = [os.urandom(size) for size in sizes]
    assert client.batch_tile_set(keys, values) == [True] * 6
    ids = {one["id"] for one in admin.client_list()}  # type: ignore[union-attr]  # a list

    def change(*rights: str) -> None:
        admin.execute_command("ACL", "SETUSER", "bob", *rights)

    def refused(outcomes: list[Any], which: str) -> None:
        for key, outcome in zip(keys, outcomes, strict=True):
            wrong = type(outcome) is NoPermissionError
            assert wrong == (key[0] in which), (key, outcome)

    def write() -> list[Any]:
        try:
            return list(client.batch_tile_set(keys, values))
        except fastkv.TileError as error:
            return list(error.outcomes)

    for _ in range(3):
        change("-get", "-getrange")
        refused(read(client, keys, sizes), "ab")
        refused(write(), "")
        change("+@all", "-set")
        refused(write(), "ab")
        assert read(client, keys, sizes) == values
        change("+@all", "resetkeys", "~a*")
        refused(read(client, keys, sizes), "b")
        refused(write(), "b")
        with pytest.raises(fastkv.TileError) as caught:
            client.batch_tile_exists(keys)
        refused(caught.value.outcomes, "b")
        change("~*")
        assert read(client, keys, sizes) == values
        refused(write(), "")
    # Ranges are tried again, and no connection was lost for any of it.
    admin.config_resetstat()
    for _ in range(20):
        assert read(client, keys, sizes) == values
    stats: Any = admin.info("commandstats")
    assert stats["cmdstat_getrange"]["calls"] > 0
    assert ids <= {one["id"] for one in admin.client_list()}  # type: ignore[union-attr]


# --- clients and roles ---------------------------------------------------------------


def test_a_server_with_no_room_for_clients_is_redis_pys_error_or_done_with_fewer(
    own_server: PrivateServer, admin: redis.Redis, connect: Callable[..., fastkv.Redis]
) -> None:
    value = os.urandom(1_500_000)
    keys = [f"k{i}" for i in range(8)]
    admin.mset(dict.fromkeys(keys, value))
    inside, outside = connect(), connect()
    assert inside.batch_tile_exists(["k0"]) == [True]
    clients: Any = admin.info("clients")
    admin.config_set("maxclients", clients["connected_clients"])
    no_room = "max number of clients"
    if issubclass(outside.connection_pool.connection_class, UnixDomainSocketConnection):
        no_room += "|Broken pipe"  # closed before redis-py, which connects, reads why
    with pytest.raises(ConnectionError, match=no_room):
        outside.ping()
    for call in (
        lambda: outside.batch_tile_exists(["k0"]),
        lambda: read(outside, keys, [1_500_000] * 8),
        lambda: outside.batch_tile_set(keys, [value] * 8),
    ):
        with pytest.raises(ConnectionError, match=no_room):
            call()
    outside.close()  # an attempt of its own may still be on its way
    # One connection more is let in, and does the work of all.
    admin.config_set("maxclients", clients["connected_clients"] + 1)
    for _ in range(3):
        assert read(inside, keys, [1_500_000] * 8, timeout=PATIENCE) == [value] * 8
    admin.config_set("maxclients", 1000)
    assert outside.batch_tile_exists(keys) == [True] * 8
    assert read(outside, keys, [1_500_000] * 8) == [value] * 8


def test_a_master_that_becomes_a_replica_refuses_writes_until_it_is_one_again(
    admin: redis.Redis, connect: Callable[..., fastkv.Redis]
) -> None:
    client = connect()
    stubborn = connect(ALWAYS, retry_on_error=[ReadOnlyError])
    keys = [f"k{size}" for size in SIZES]
    values = [os.urandom(size) for size in SIZES]
    for _ in range(3):
        assert client.batch_tile_set(keys, values) == [True] * 3
        admin.config_set("replica-serve-stale-data", "yes")
        admin.replicaof("127.0.0.1", 1)
        with pytest.raises(fastkv.TileError) as caught:
            client.batch_tile_set(keys, values)
        assert [type(one) for one in caught.value.outcomes] == [ReadOnlyError] * 3
        assert read(client, keys, list(SIZES)) == values
        stored = stubborn.submit_batch_tile_set(keys, values)
        admin.config_set("replica-serve-stale-data", "no")
        got = read(client, keys, list(SIZES))
        assert [type(one) for one in got] == [MasterDownError] * 3
        admin.replicaof("no", "one")
        assert stored.result(PATIENCE) == [True] * 3
        assert read(client, keys, list(SIZES)) == values
        values = [os.urandom(size) for size in SIZES]
