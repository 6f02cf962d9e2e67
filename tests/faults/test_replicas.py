"""Reads from the replicas of a cluster that speaks TLS: one that is cut off, silent,
killed, loading, out of touch or promoted is done without, and in time.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from redis.cluster import LoadBalancingStrategy

from fastkv.cli.private_server import ServerBinary
from tests.clusters import ClusterServers, Member, wait_until
from tests.faults import test_network as network
from tests.faults.calls import COMMANDS, Caller, Trial
from tests.faults.conftest import CALM_NODES, LONG
from tests.faults.nets import NAMES, SIZES, SMALL_SIZES, WAYS, Net
from tests.faults.proxy import Fault
from tests.faults.test_network import CALM, OFTEN, SEED, SINGLE, told
from tests.tls import Authority, server_arguments

# A handshake of TLS must be through by then.
BRISK = {"socket_timeout": 0.5}
READS = ("get", "get immutable", "exists")
STRATEGIES = [
    LoadBalancingStrategy.ROUND_ROBIN,
    LoadBalancingStrategy.ROUND_ROBIN_REPLICAS,
]


@pytest.fixture(scope="module", params=["tls", "tcp"] if LONG else ["tls"])
def secured(
    request: pytest.FixtureRequest,
    tls_binary: ServerBinary,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[ClusterServers, dict[str, Any]]]:
    """The servers, and the arguments of a client that trusts them."""
    arguments: list[str] = []
    tls: dict[str, Any] = {}
    if request.param == "tls":
        authority = Authority(tmp_path_factory.mktemp("certificates"), "authority")
        assert authority.identity is not None
        shown = authority.issue("server", ("localhost", "127.0.0.1"))
        arguments = server_arguments(shown, authority.identity)
        tls = {"ssl": True, "ssl_ca_certs": authority.identity.cert_file}
    with ClusterServers(
        *(tls_binary, "--enable-debug-command", "yes"),
        *("--loading-process-events-interval-bytes", "1024"),
        replicas=1,
        tls=arguments,
    ) as servers:
        servers.wait_for_replicas()
        for member in servers.members:
            member.admin.config_set("cluster-node-timeout", CALM_NODES)
        yield servers, tls


# In this order: our own descriptors to the servers are there before it looks.
@pytest.fixture(autouse=True)
def no_leaks(secured: Any, no_leaks: None) -> None:
    pass


@pytest.fixture
def net(secured: Any, no_leaks: None) -> Iterator[Net]:
    servers, tls = secured
    with Net.around(servers, **tls) as net:
        yield net


def ways(random_: random.Random) -> list[tuple[str, LoadBalancingStrategy]]:
    every = list(itertools.product(WAYS, STRATEGIES))
    return every if LONG else [random_.choice(every)]


def is_primary(member: Member) -> bool:
    info: dict[str, Any] = member.admin.info("replication")
    return bool(info["role"] == "master")


def trials(net: Net, random_: random.Random, victim: int) -> list[Trial]:
    """Reads, of many keys that the replicas have, too."""
    made = [
        net.line(victim).trial(
            *(random_, command, [random_.choice([3, 300, 40_000]) for _ in range(24)])
        )
        for command in (READS if LONG else [random_.choice(READS)])
    ]
    for member in net.servers.members:
        if is_primary(member):
            assert member.admin.wait(1, 10_000) == 1
    return made


def run(made: list[Trial], caller: Caller) -> None:
    """All is right, and in time; each key may be lost twice, once for the machine."""
    caller.retries(2)
    for trial in made:
        trial.run(caller)
        assert trial.error is None, repr(trial.error)
        assert trial.took < 5
        trial.settle(repeated=True)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["cut", "stall"])
def test_a_node_that_speaks_tls_may_fail_at_every_byte(net: Net, kind: str) -> None:
    random_ = random.Random(f"{SEED} {kind}")
    settings, enough = (BRISK, OFTEN) if kind == "stall" else (CALM, 0)
    sizes = SMALL_SIZES if kind == "stall" else SIZES
    line = net.line(random_.randrange(3))
    way = network.one_way(random_)
    with net.calling(way, **SINGLE, **settings) as (caller,):
        for command in COMMANDS if LONG else [random_.choice(COMMANDS)]:
            totals = network.bytes_of_a_call(line, random_, command, sizes)
            directions = list(zip((True, False), totals, strict=True))
            for up, total in directions if LONG else [random_.choice(directions)]:
                for at in network.some(line, random_, total, 2):
                    fault = Fault(kind, at, up)
                    retries = random_.choice([0, enough or 2])
                    with told(way, command, line.names, fault, retries):
                        calls = [(command, sizes)] * 2
                        network.strike(
                            *(line, random_, caller, calls, fault, retries, enough)
                        )


@pytest.mark.parametrize(
    "kind", ["cut", "reset", "stall", "refuse"] if LONG else ["cut", "stall"]
)
def test_a_replica_that_cannot_be_reached_is_done_without(net: Net, kind: str) -> None:
    random_ = random.Random(f"{SEED} {kind}")
    settings = BRISK if kind == "stall" else CALM
    victim = random_.randrange(3)
    # No further than the shortest answer.
    fault = Fault(kind, random_.randrange(30), random_.random() < 0.5, times=None)
    for way, strategy in ways(random_):
        with (
            told(way, strategy, victim, fault),
            net.calling([way], load_balancing_strategy=strategy, **settings) as callers,
        ):
            before, after = (trials(net, random_, victim) for _ in "ab")
            net.proxies[victim + 3].inject(fault)
            if kind == "refuse":
                net.proxies[victim + 3].drop_all()
            run(before, callers[0])
            assert net.proxies[victim + 3].struck.is_set()
            net.heal()
            run(after, callers[0])


class Killed:
    """And later there again."""

    def __init__(self, replica: Member, primary: Member) -> None:
        self._replica = replica
        replica.server.stop()

    def end(self) -> None:
        self._replica.server.start()


class Stopped:
    """Its system still takes what is sent to it."""

    def __init__(self, replica: Member, primary: Member) -> None:
        self._pid = replica.server.pid
        os.kill(self._pid, signal.SIGSTOP)

    def end(self) -> None:
        os.kill(self._pid, signal.SIGCONT)


class OutOfTouch:
    """Says MASTERDOWN."""

    def __init__(self, replica: Member, primary: Member) -> None:
        self._admin = replica.admin
        self._admin.config_set("replica-serve-stale-data", "no")
        self._admin.config_set("masteruser", "nobody")
        self._admin.config_set("masterauth", "wrong")
        self._admin.client_kill_filter(_type="master")
        wait_until(lambda: self._link() == "down")

    def _link(self) -> Any:
        info: dict[str, Any] = self._admin.info("replication")
        return info["master_link_status"]

    def end(self) -> None:
        self._admin.config_set("masteruser", "")
        self._admin.config_set("masterauth", "")
        self._admin.config_set("replica-serve-stale-data", "yes")


class Loading:
    """Says LOADING, for some seconds."""

    def __init__(self, replica: Member, primary: Member) -> None:
        self._admin = replica.admin
        self._admin.config_set("key-load-delay", 10_000)
        primary.admin.execute_command("DEBUG", "CHANGE-REPL-ID")
        self._admin.client_kill_filter(_type="master")
        wait_until(lambda: self._loading() == 1)

    def _loading(self) -> Any:
        info: dict[str, Any] = self._admin.info("persistence")
        return info["loading"] or info["async_loading"]

    def end(self) -> None:
        assert self._loading() == 1, "it was ready too soon"
        self._admin.config_set("key-load-delay", 0)


@pytest.mark.parametrize("fault", [Killed, Stopped, OutOfTouch, Loading])
def test_a_replica_that_cannot_answer_is_done_without(net: Net, fault: Any) -> None:
    random_ = random.Random(f"{SEED} {fault}")
    victim = random_.randrange(3)
    filler = {f"{NAMES[victim]}filler{i}": b"x" * 1000 for i in range(800)}
    if fault is Loading:
        net.plain.mset(filler)  # it takes its time
    settings = BRISK if fault is Stopped else CALM
    for way, strategy in ways(random_):
        with (
            told(way, strategy, victim),
            net.calling([way], load_balancing_strategy=strategy, **settings) as callers,
        ):
            during, after = (trials(net, random_, victim) for _ in "ab")
            going_on = fault(*net.servers.members[victim + 3 :: -3][:2])
            try:
                run(during, callers[0])
            finally:
                going_on.end()
            net.servers.wait_ok()
            run(after, callers[0])
    net.plain.unlink(*filler)


def test_a_replica_that_becomes_the_primary_goes_on(net: Net) -> None:
    random_ = random.Random(f"{SEED}")
    victim = random_.randrange(3)
    primary, replica = net.servers.members[victim::3]
    for way, strategy in ways(random_):
        with (
            told(way, strategy, victim),
            net.calling([way], load_balancing_strategy=strategy, **CALM) as callers,
        ):
            for heir, old in ((replica, primary), (primary, replica)):
                before, after = (trials(net, random_, victim) for _ in "ab")
                # The others would vote again only after twice the nodes' time-out.
                heir.call("FAILOVER", "TAKEOVER")
                # Some while it is going on, some when it is over.
                run(before, callers[0])
                wait_until(lambda old=old: not is_primary(old))
                run(after, callers[0])
                # Who wants to write is sent to the new one.
                trial = net.line(victim).trial(random_, "set", SIZES).run(callers[0])
                assert trial.error is None, repr(trial.error)
                trial.settle()
                net.servers.wait_ok()
