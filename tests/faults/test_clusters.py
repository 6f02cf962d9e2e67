"""The network fails between a client and the nodes of a cluster: right bytes or
redis-py's exception, in time, and the other nodes are none the worse.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from redis.backoff import AbstractBackoff
from redis.exceptions import ConnectionError, RedisClusterException, TimeoutError

from tests.clusters import ClusterServers
from tests.faults import test_network as network
from tests.faults.calls import COMMANDS, Caller, Trial
from tests.faults.conftest import LONG
from tests.faults.nets import SIZES, SMALL_SIZES, WAYS, Net
from tests.faults.proxy import Fault
from tests.faults.test_network import CALM, OFTEN, SEED, SINGLE, told

# Met by every stall. redis-py, which looks at the cluster again, has it too.
BRISK = {"socket_timeout": 0.25}


def others(sizes: Sequence[int]) -> list[int]:
    """Keys that are not the victim's."""
    return [i for i in range(len(sizes)) if i % 3]


# In this order: our own descriptors to the servers are there before it looks.
@pytest.fixture(autouse=True)
def no_leaks(servers: ClusterServers, no_leaks: None) -> None:
    pass


@pytest.fixture
def net(servers: ClusterServers, no_leaks: None) -> Iterator[Net]:
    with Net.around(servers) as net:
        yield net


def parts(caller: Caller) -> dict[str, int]:
    """How many each node has had."""
    nodes = caller.client.tile_info()["nodes"]
    return {
        name: sum(sum(of["batches"].values()) for of in node["commands"].values())
        for name, node in nodes.items()
    }


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["cut", "reset"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_node_may_be_lost_at_every_byte(net: Net, command: str, kind: str) -> None:
    """Its keys alone are sent again; the others' are done whatever becomes of them."""
    random_ = random.Random(f"{SEED} {command} {kind}")
    line = net.line(random_.randrange(3))
    host, port = line.proxy.address
    with net.calling(list(WAYS), **SINGLE, **CALM) as callers:
        totals = network.bytes_of_a_call(line, random_, command, SIZES)
        for up, total in zip((True, False), totals, strict=True):
            for at in network.some(line, random_, total, 8):
                caller, fault = random_.choice(callers), Fault(kind, at, up)
                retries = random_.choice([0, 2])
                with told(caller, line.names, fault, retries):
                    before = parts(caller)
                    calls = [(command, SIZES)] * 2
                    network.strike(
                        *(line, random_, caller, calls, fault, retries, 0),
                        answered=others(SIZES),
                    )
                    after = parts(caller)
                    again = after.pop(f"{host}:{port}") - before[f"{host}:{port}"]
                    assert 2 <= again <= 3
                    assert after == {name: before[name] + 2 for name in after}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["cut", "reset", "stall"])
def test_a_connection_to_a_node_may_fail_at_every_byte_of_its_beginning(
    net: Net, kind: str
) -> None:
    random_ = random.Random(f"{SEED} {kind}")
    settings, enough = (BRISK, OFTEN) if kind == "stall" else (CALM, 0)
    ways = network.one_way(random_) if kind == "stall" else list(WAYS)
    line = net.line(random_.randrange(3))
    with net.calling(ways, **SINGLE, **settings) as callers:
        totals = network.bytes_of_a_connection(line)
        for up, total in zip((True, False), totals, strict=True):
            for at in network.some(line, random_, total, 4):
                caller, fault = random_.choice(callers), Fault(kind, at, up)
                retries = random_.choice([0, enough or 2])
                with told(caller, line.names, fault, retries):
                    line.proxy.drop_all()
                    calls = [(random_.choice(COMMANDS), SMALL_SIZES) for _ in "ab"]
                    network.strike(
                        *(line, random_, caller, calls, fault, retries, enough),
                        answered=() if kind == "stall" else others(SMALL_SIZES),
                    )


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_node_may_fall_silent_at_every_byte(net: Net, command: str) -> None:
    random_ = random.Random(f"{SEED} {command}")
    line = net.line(random_.randrange(3))
    with net.calling(network.one_way(random_), **SINGLE, **BRISK) as (caller,):
        totals = network.bytes_of_a_call(line, random_, command, SMALL_SIZES)
        for up, total in zip((True, False), totals, strict=True):
            for at in network.some(line, random_, total, 1):
                fault, retries = Fault("stall", at, up), random_.choice([0, OFTEN])
                with told(caller, line.names, fault, retries):
                    calls = [(command, SMALL_SIZES)] * 2
                    network.strike(line, random_, caller, calls, fault, retries, OFTEN)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_node_answers_too_late_is_never_taken_for_another_answer(
    net: Net, command: str
) -> None:
    random_ = random.Random(f"{SEED} {command}")
    line = net.line(random_.randrange(3))
    with net.calling(network.one_way(random_), **SINGLE, **CALM) as (caller,):
        totals = network.bytes_of_a_call(line, random_, command, SIZES)
        for up, total in zip((True, False), totals, strict=True):
            for at in random_.sample(range(total), min(total, 60 if LONG else 2)):
                with told(caller, line.names, up, at):
                    late, following = (
                        line.trial(random_, command, SIZES) for _ in "ab"
                    )
                    line.proxy.inject(Fault("stall", at, up))
                    late.run(caller, timeout=0.03)
                    assert isinstance(late.error, (TimeoutError, ConnectionError))
                    line.proxy.heal()
                    # The connection may be dropped, with a SET half sent.
                    caller.retries(1)
                    following.run(caller)
                    assert following.error is None, repr(following.error)
                    assert max(late.took, following.took) < 10
                    late.settle()
                    following.settle(repeated=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_segments_of_one_byte_and_pauses_at_all_nodes_change_nothing(
    net: Net, command: str
) -> None:
    random_ = random.Random(f"{SEED} {command}")
    line = net.line(random_.randrange(3))
    with net.calling(network.one_way(random_), **SINGLE, **CALM) as (caller,):
        caller.retries(0)
        totals = network.bytes_of_a_call(line, random_, command, SIZES)
        for up, total in zip((True, False), totals, strict=True):
            for _ in range(50 if LONG else 1):
                for kind in ("split", "delay"):
                    seconds = random_.uniform(0, 0.03)
                    fault = Fault(kind, random_.randrange(total), up, seconds=seconds)
                    with told(caller, fault):
                        trial = line.trial(random_, command, SIZES)
                        for proxy in net.proxies:
                            proxy.inject(fault)
                        trial.run(caller)
                        assert line.proxy.struck.is_set()
                        net.heal()
                        assert trial.error is None, repr(trial.error)
                        trial.settle()


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("command", COMMANDS)
def test_who_is_not_let_in_is_told_so_and_gets_in_later(
    net: Net, command: str, every: bool
) -> None:
    random_ = random.Random(f"{SEED} {command} {every}")
    for way in WAYS if LONG else network.one_way(random_):
        line = net.line(random_.randrange(3))
        with told(way, line.names), net.calling([way], **CALM) as (caller,):
            for kind, retries in itertools.product(("refuse", "slow"), (0, 2)):
                trials = [line.trial(random_, command, SIZES) for _ in "ab"]
                refused, following = trials
                for proxy in net.proxies if every else [line.proxy]:
                    proxy.inject(Fault(kind, seconds=0.02))
                    proxy.drop_all()
                caller.retries(retries)
                refused.run(caller)
                net.heal()
                if kind == "slow":
                    assert refused.error is None, repr(refused.error)
                else:
                    # Who looks at the cluster again finds nobody, as redis-py would.
                    due = RedisClusterException if every and retries else None
                    assert isinstance(refused.error, due or ConnectionError)
                    assert "Error 111 connecting" in str(refused.error)
                caller.retries(0)
                following.run(caller)
                assert following.error is None, repr(following.error)
                refused.settle(answered=() if every else others(SIZES))
                following.settle()


class Heals(AbstractBackoff):
    """The network is back as soon as somebody asks how long to wait."""

    def __init__(self, net: Net) -> None:
        self._net = net

    def __deepcopy__(self, memo: object) -> Heals:
        return self

    def compute(self, failures: int) -> float:
        self._net.heal()
        return 0


@pytest.mark.parametrize("way", WAYS)
def test_a_node_that_comes_back_is_in_time_for_the_retry(net: Net, way: str) -> None:
    random_ = random.Random(f"{SEED} {way}")
    with net.calling([way], **CALM) as (caller,):
        for command in COMMANDS:
            line = net.line(random_.randrange(3))
            with told(command, line.names):
                caller.retries(1, Heals(net))
                trial = line.trial(random_, command, SIZES)
                line.proxy.inject(Fault("refuse"))
                line.proxy.drop_all()
                trial.run(caller)
                assert trial.error is None, repr(trial.error)
                trial.settle()


@pytest.mark.parametrize("way", WAYS)
def test_a_node_that_says_nothing_more_keeps_nobody_from_the_others(
    net: Net, way: str
) -> None:
    random_ = random.Random(f"{SEED} {way}")
    line = net.line(random_.randrange(3))
    reached = [name for i, name in enumerate(line.names) if i % 3]
    commands = random_.sample(COMMANDS, len(COMMANDS) if LONG else 3)
    silence = Fault("stall", up=random_.random() < 0.5, times=None)
    with (
        told(way, line.names, commands, silence),
        net.calling([way], **BRISK) as (caller,),
    ):
        line.proxy.inject(silence)
        given_up = []
        for number, command in enumerate(commands):
            # The node's own time-out, once with a second try; and the call's.
            caller.retries(number % 2)
            for timeout in [None, 0.03] if LONG or number < 2 else [0.03]:
                given_up.append(line.trial(random_, command, SMALL_SIZES))
                given_up[-1].run(caller, timeout=timeout)
                assert isinstance(given_up[-1].error, (TimeoutError, ConnectionError))
                assert given_up[-1].took < 5
            caller.retries(OFTEN)
            trial = Trial(net.plain, random_, command, SIZES, reached)
            trial.run(caller)
            assert trial.error is None, repr(trial.error)
            assert trial.took < 5
            trial.settle(repeated=True)
        net.heal()
        for trial in given_up:
            trial.settle(repeated=True)
        trial = line.trial(random_, "set", SIZES).run(caller)
        assert trial.error is None
        trial.settle(repeated=True)


def test_a_call_that_waits_for_a_silent_node_is_in_nobodys_way(net: Net) -> None:
    random_ = random.Random(f"{SEED}")
    line = net.line(random_.randrange(3))
    with told(line.names), net.calling(["futures"], **CALM) as (caller,):
        line.proxy.inject(Fault("stall", times=None))
        waiting = caller.client.submit_batch_tile_exists(line.names)
        for command in COMMANDS:
            reached = [name for i, name in enumerate(line.names) if i % 3]
            trial = Trial(net.plain, random_, command, SIZES, reached).run(caller)
            assert trial.error is None
            trial.settle()
        assert not waiting.done()
        net.heal()
        assert waiting.result(10) == [False] * len(line.names)


@pytest.mark.parametrize("way", WAYS)
def test_no_node_says_anything_more(net: Net, way: str) -> None:
    """A look at the cluster does not outlast the call."""
    random_ = random.Random(f"{SEED} {way}")
    line = net.line(0)
    for settings, timeout in ((BRISK, None), (CALM, 0.1)):
        command = random_.choice(COMMANDS)
        with told(command, settings), net.calling([way], **settings) as (caller,):
            for proxy in net.proxies:
                proxy.inject(Fault("stall", times=None))
            caller.retries(3)
            trial = line.trial(random_, command, SMALL_SIZES)
            trial.run(caller, timeout=timeout)
            assert trial.error is not None
            assert trial.took < 5
            net.heal()
            caller.retries(OFTEN)
            following = line.trial(random_, command, SMALL_SIZES).run(caller)
            assert following.error is None or command == "set nx"
            trial.settle(repeated=True)
            following.settle(repeated=True)


@pytest.mark.parametrize("way", WAYS)
def test_a_look_at_a_cluster_that_is_silent_does_not_outlast_the_call(
    net: Net, way: str
) -> None:
    """A node is lost, and none of the others says who has its slots now."""
    random_ = random.Random(f"{SEED} {way}")
    line = net.line(random_.randrange(3))
    with told(line.names), net.calling([way], **CALM) as (caller,):
        command = random_.choice(COMMANDS)
        trial, following = (
            Trial(net.plain, random_, command, SIZES, line.names[:1]) for _ in "ab"
        )
        for proxy in net.proxies:
            proxy.inject(Fault("stall", times=None))
        line.proxy.inject(Fault("refuse"))
        line.proxy.drop_all()
        caller.retries(3)
        trial.run(caller, timeout=0.2)
        assert isinstance(trial.error, TimeoutError), repr(trial.error)
        assert trial.took < 5
        net.heal()
        following.run(caller)
        assert following.error is None, repr(following.error)
        trial.settle()
        following.settle(repeated=True)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", COMMANDS[:4])
def test_large_values_over_several_connections(net: Net, command: str) -> None:
    random_ = random.Random(f"{SEED} {command}")
    for _ in range(12 if LONG else 1):
        way = random_.choice(list(WAYS))
        settings = {
            "tile_range_bytes": random_.choice([0, 4096, 65536, None]),
            "tile_window_bytes": random_.choice([1, 65536, None]),
            "tile_connections": random_.choice([3, 6, 12]),
            "tile_workers": random_.choice([1, 4]),
            "socket_timeout": 0.4,
        }
        with net.calling([way], **settings) as (caller,):
            for _ in range(10 if LONG else 3):
                sizes = [random_.randrange(1 << 18) for _ in range(9)]
                sizes[0] = random_.randrange(1 << 16, 2 << 20)
                line = net.line(random_.randrange(3))
                faults = [
                    network.random_fault(random_, sum(sizes) // 3, network.KINDS)
                    for _ in net.proxies
                ]
                struck = [proxy for proxy in net.proxies if random_.random() < 0.4]
                struck = struck or [line.proxy]
                retries = random_.choice([0, OFTEN])
                with told(way, settings, sizes, line.names, faults, retries):
                    trial, following = (
                        line.trial(random_, command, sizes) for _ in "ab"
                    )
                    for proxy, fault in zip(struck, faults, strict=False):
                        proxy.inject(fault)
                    caller.retries(retries)
                    trial.run(caller)
                    net.heal()
                    caller.retries(OFTEN)
                    following.run(caller)
                    if command != "set nx":
                        # All nodes but one may have failed; somebody says the slots.
                        every = len(struck) == len(net.proxies)
                        assert trial.error is None or retries == 0 or every
                        assert following.error is None, repr(following.error)
                    trial.settle(repeated=True)
                    following.settle(repeated=True)


@pytest.mark.timeout(1800)
def test_a_crowd_while_all_nodes_fail_all_the_time(net: Net) -> None:
    random_ = random.Random(f"{SEED}")
    for round_ in range(8 if LONG else 1):
        settings = {"tile_range_bytes": 4096, "tile_window_bytes": 16384}
        faults = [
            replace(
                network.random_fault(random_, 200_000, ["cut", "reset", "split"]),
                # More than a window, a value and a handshake: some get through.
                at=random_.randrange(60_000, 120_000),
                connection=None,
                times=None,
                length=2000,
            )
            for _ in net.proxies
        ]
        trials = [
            net.line(i % 3).trial(
                random.Random(f"{SEED} {round_} {i}"),
                COMMANDS[i % len(COMMANDS)],
                [random_.randrange(20_000) for _ in range(random_.randrange(1, 7))],
            )
            for i in range(120)
        ]
        with (
            told(settings, faults),
            net.calling(["futures"], **settings, **CALM) as (caller,),
        ):
            caller.retries(OFTEN, random_.choice(network.BACKOFFS))
            for proxy, fault in zip(net.proxies, faults, strict=True):
                proxy.inject(fault)
            with concurrent.futures.ThreadPoolExecutor(16) as pool:
                for done in [pool.submit(trial.run, caller) for trial in trials]:
                    done.result()
            assert any(proxy.struck.is_set() for proxy in net.proxies)
            net.heal()
            for i, trial in enumerate(trials):
                if COMMANDS[i % len(COMMANDS)] != "set nx":
                    assert trial.error is None, str(trial.error)
                trial.settle(repeated=True)
