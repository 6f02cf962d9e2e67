"""Slots move between nodes of a cluster while the connections to them break."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
from redis.exceptions import ConnectionError, TimeoutError

from fastkv._core import key_slot
from tests.clusters import ClusterServers
from tests.faults.calls import COMMANDS, Caller, Trial
from tests.faults.conftest import LONG
from tests.faults.nets import NAMES, WAYS, Net, tags_of
from tests.faults.proxy import Fault
from tests.faults.test_network import CALM, SEED, SINGLE, told

# Six keys of the slot that moves, of which the last two are not there before a SET, and
# three of a node that has nothing to do with it.
SIZES = (3, 2100, 40, 20, 0, 2100, 300, 2100, 1)

SOURCE, TARGET, OTHER = range(3)

# A slot that goes back to where it was may be claimed by two servers for a while.
_TAGS = tags_of(SOURCE, "m")


# In this order: our own descriptors to the servers are there before it looks.
@pytest.fixture(autouse=True)
def no_leaks(servers: ClusterServers, no_leaks: None) -> None:
    pass


@pytest.fixture
def net(servers: ClusterServers, no_leaks: None) -> Iterator[Net]:
    with Net.around(servers) as net:
        yield net


class Move:
    """Of one slot, step by step."""

    def __init__(self, net: Net) -> None:
        self._servers = net.servers
        self._plain = net.plain
        self._tag = next(_TAGS)
        self._slot = key_slot(self._tag.strip("{}").encode())

    def trial(self, random_: random.Random, command: str) -> Trial:
        names = (self._tag, self._tag, NAMES[OTHER])
        return Trial(self._plain, random_, command, SIZES, names)

    def begin(self) -> None:
        """From here on the source says ASK for about half of the keys."""
        source, target, _ = self._servers.primaries
        self._servers.begin_move(self._slot, source, target)
        # Some of each trial.
        keys = sorted(source.call("GETKEYSINSLOT", self._slot, 1 << 20))[::2]
        source.admin.execute_command(
            *("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        )

    def end(self) -> None:
        """From here on it says MOVED."""
        source, target, _ = self._servers.primaries
        while self._servers.move_keys(self._slot, source, target, 100):
            pass
        self._servers.end_move(self._slot, target)


def fault_of(random_: random.Random, kinds: Sequence[str]) -> Fault:
    at = random_.choice([random_.randrange(60), random_.randrange(4000)])
    up, seconds = random_.random() < 0.5, random_.uniform(0, 0.02)
    return Fault(random_.choice(kinds), at, up, seconds=seconds)


def check(trial: Trial, caller: Caller, net: Net, fault: Fault, retries: int) -> None:
    """Make the call while the ``fault`` is on, and heal."""
    struck = random.Random(fault.at).choice([SOURCE, TARGET])
    proxy = net.proxies[struck]
    proxy.inject(fault)
    caller.retries(retries)
    trial.run(caller)
    if trial.error is None:
        assert retries or not proxy.struck.is_set() or fault.kind in ("split", "delay")
    else:
        assert proxy.struck.is_set()
        assert fault.kind in ("cut", "reset")
        assert isinstance(trial.error, ConnectionError), repr(trial.error)
        assert retries == 0 or "is unknown" in str(trial.error)
    proxy.heal()
    trial.settle(retries > 0, answered=range(2, len(SIZES), 3))


KINDS = ("cut", "cut", "reset", "split", "delay")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", COMMANDS)
def test_asked_keys_arrive_while_connections_break(net: Net, command: str) -> None:
    random_ = random.Random(f"{SEED} {command}")
    move = Move(net)
    trials = [move.trial(random_, command) for _ in range(200 if LONG else 10)]
    with net.calling(list(WAYS), **SINGLE, **CALM) as callers:
        move.begin()
        asked = net.servers.primaries[TARGET].calls("asking")
        for trial in trials:
            caller, retries = random_.choice(callers), random_.choice([0, 3])
            fault = fault_of(random_, KINDS)
            with told(caller, fault, retries):
                check(trial, caller, net, fault, retries)
        assert net.servers.primaries[TARGET].calls("asking") > asked
    move.end()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", COMMANDS)
def test_moved_keys_arrive_while_connections_break(net: Net, command: str) -> None:
    random_ = random.Random(f"{SEED} {command}")
    for _ in range(30 if LONG else 1):
        move = Move(net)
        trials = [move.trial(random_, command) for _ in WAYS]
        with net.calling(list(WAYS), **SINGLE, **CALM) as callers:
            move.begin()
            move.end()
            # Each hears of it with its first call, and not again.
            for trial, caller in zip(trials, callers, strict=True):
                retries = random_.choice([0, 3])
                fault = fault_of(random_, KINDS)
                with told(caller, fault, retries):
                    check(trial, caller, net, fault, retries)


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_where_a_key_is_sent_next_may_be_silent(
    net: Net, way: str, moved: bool
) -> None:
    """The time that is left, not all of it, and not the connection's, counts."""
    random_ = random.Random(f"{SEED} {way} {moved}")
    for command in COMMANDS if LONG else [random_.choice(COMMANDS)]:
        move = Move(net)
        trials = [move.trial(random_, command) for _ in "ab"]
        with told(command), net.calling([way], **CALM) as (caller,):
            move.begin()
            if moved:
                move.end()
            net.proxies[TARGET].inject(Fault("stall", times=None))
            late, following = trials
            late.run(caller, timeout=0.15)
            assert isinstance(late.error, (TimeoutError, ConnectionError))
            assert 0.14 < late.took < 5
            net.heal()
            following.run(caller)
            assert following.error is None or "is unknown" in str(following.error)
            late.settle(repeated=True)
            following.settle(repeated=True)
        if not moved:
            move.end()


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_where_a_key_is_sent_next_may_be_closed(
    net: Net, way: str, moved: bool
) -> None:
    """Who is not let in says so; who tries again arrives."""
    random_ = random.Random(f"{SEED} {way} {moved}")
    for command in COMMANDS if LONG else [random_.choice(COMMANDS)]:
        move = Move(net)
        trials = [move.trial(random_, command) for _ in "ab"]
        with told(command), net.calling([way], **CALM) as (caller,):
            move.begin()
            if moved:
                move.end()
            net.proxies[TARGET].inject(Fault("refuse"))
            net.proxies[TARGET].drop_all()
            refused, following = trials
            caller.retries(2)
            refused.run(caller)
            assert isinstance(refused.error, ConnectionError)
            assert "refused" in str(refused.error)
            net.heal()
            caller.retries(0)
            following.run(caller)
            assert following.error is None, repr(following.error)
            refused.settle(answered=range(2, len(SIZES), 3))
            following.settle()
        if not moved:
            move.end()
