"""The network fails between a client and a Sentinel, or the master that it names."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import redis
import redis.asyncio.retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError
from redis.retry import Retry

import fastkv
import fastkv.asyncio
from fastkv.cli.private_server import PrivateServer
from tests.clusters import SentinelServer, wait_until
from tests.conftest import SERVERS
from tests.faults import test_network as network
from tests.faults.calls import COMMANDS, Awaited, Blocking, Caller, Futures
from tests.faults.conftest import LONG
from tests.faults.proxy import Fault, Proxy
from tests.faults.test_network import CALM, OFTEN, SEED, SINGLE, SIZES, Line, told
from tests.tls import Authority, TlsServer, server_arguments

pytestmark = pytest.mark.skipif(not SERVERS, reason="no server found")

BRISK = {"socket_timeout": 0.1}


class Led(fastkv.Sentinel):
    """Its masters are reached through proxies, by their ports."""

    led: dict[int, Proxy]

    def discover_master(self, service_name: str) -> Any:
        return self.led[super().discover_master(service_name)[1]].address


class AwaitedLed(fastkv.asyncio.Sentinel):
    """As `Led`."""

    led: dict[int, Proxy]

    async def discover_master(self, service_name: str) -> Any:
        return self.led[(await super().discover_master(service_name))[1]].address


def master_of(kind: Any, sentinel: Proxy, led: dict[int, Proxy], **kwargs: Any) -> Any:
    retry = redis.asyncio.retry.Retry if kind is AwaitedLed else Retry
    settings: dict[str, Any] = {"socket_timeout": 5.0, "retry": retry(NoBackoff(), 0)}
    settings |= {name: of for name, of in kwargs.items() if name.startswith("ssl")}
    watcher = kind([sentinel.address], sentinel_kwargs=settings)
    watcher.led = led
    return watcher.master_for("mymaster", **kwargs)


class MasterFutures(Futures):
    made_by = staticmethod(lambda **kwargs: master_of(Led, **kwargs))

    def close(self) -> None:
        super().close()
        self.client.connection_pool.sentinel_manager.close()


class MasterBlocking(MasterFutures, Blocking):
    pass


class MasterAwaited(Awaited):
    made_by = staticmethod(lambda **kwargs: master_of(AwaitedLed, **kwargs))

    def close(self) -> None:
        async def end() -> None:
            watcher = self.client.connection_pool.sentinel_manager
            await self.client.aclose()
            # As asyncio.run does: one may still wait for the Sentinel.
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await watcher.aclose()

        self._loop.run_until_complete(end())
        super().close()


WAYS: dict[str, Callable[..., Caller]] = {
    "blocking": MasterBlocking,
    "futures": MasterFutures,
    "asyncio": MasterAwaited,
}


@dataclass
class Watch:
    """A Sentinel, who names one of two servers, each of them behind a proxy."""

    ports: list[int]  # of the servers
    plain: list[redis.Redis]
    led: list[Proxy]
    sentinel: SentinelServer
    asked: Proxy  # before the Sentinel
    tls: dict[str, Any]  # arguments of a client

    def line(self, number: int = 0) -> Line:
        """To the master, who shall be that server."""
        kwargs = {
            "sentinel": self.asked,
            "led": dict(zip(self.ports, self.led, strict=True)),
            **self.tls,
        }
        return Line(self.led[number], self.plain[number], kwargs, False, WAYS)

    def name(self, number: int) -> None:
        """From here on this server is the master."""
        self.sentinel.call("REMOVE", "mymaster")
        self.sentinel.call(
            "MONITOR", "mymaster", "127.0.0.1", str(self.ports[number]), "2"
        )


@dataclass
class Running:
    """Servers, who do not know of each other, and a Sentinel."""

    servers: list[PrivateServer]
    ports: list[int]
    sentinel: SentinelServer
    tls: dict[str, Any]


@pytest.fixture(scope="module", params=["tcp"])
def running_watch(request: pytest.FixtureRequest) -> Iterator[Running]:
    """Over TCP, or over TLS for those tests that say so."""
    servers: list[PrivateServer]
    tls: dict[str, Any] = {}
    arguments: list[str] = []
    if request.param == "tcp":
        servers = [PrivateServer(SERVERS[0]) for _ in "ab"]
        ports = [server.port for server in servers]
    else:
        binary = request.getfixturevalue("tls_binary")
        folder = request.getfixturevalue("tmp_path_factory").mktemp("certificates")
        authority = Authority(folder, "authority")
        assert authority.identity is not None
        shown = authority.issue("server", ("localhost", "127.0.0.1"))
        secure = [TlsServer(binary, shown, authority.identity) for _ in "ab"]
        servers, ports = [*secure], [server.tls_port for server in secure]
        arguments = server_arguments(shown, authority.identity)
        tls = {"ssl": True, "ssl_ca_certs": authority.identity.cert_file}
    with servers[0], servers[1]:
        sentinel = SentinelServer(servers[0].binary, ports[0], arguments)

        def answers() -> bool:
            with contextlib.suppress(ConnectionError):
                return bool(sentinel.call("MASTERS"))
            return False

        wait_until(answers)
        yield Running(servers, ports, sentinel, tls)
        sentinel.stop()


@pytest.fixture
def watch(running_watch: Running, no_leaks: None) -> Iterator[Watch]:
    sentinel, ports = running_watch.sentinel, running_watch.ports
    with contextlib.ExitStack() as stack:
        plain = [stack.enter_context(of.client()) for of in running_watch.servers]
        led = [stack.enter_context(Proxy(("127.0.0.1", port))) for port in ports]
        asked = stack.enter_context(Proxy(("127.0.0.1", sentinel.port)))
        watch = Watch(ports, plain, led, sentinel, asked, running_watch.tls)
        watch.name(0)
        yield watch


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["cut", "reset", "stall"])
@pytest.mark.parametrize("command", COMMANDS)
def test_the_master_may_be_lost_at_every_byte(
    watch: Watch, command: str, kind: str
) -> None:
    random_ = random.Random(f"{SEED} {command} {kind}")
    settings, enough = (BRISK, OFTEN) if kind == "stall" else (CALM, 0)
    ways = network.one_way(random_) if kind == "stall" else list(WAYS)
    line = watch.line()
    with network.calling(ways, line, **SINGLE, **settings) as callers:
        totals = network.bytes_of_a_call(line, random_, command, SIZES)
        for up, total in zip((True, False), totals, strict=True):
            for at in network.some(line, random_, total, 1 if enough else 4):
                caller, fault = random_.choice(callers), Fault(kind, at, up)
                retries = random_.choice([0, enough or 2])
                with told(caller, fault, retries):
                    calls = [(command, SIZES)] * 2
                    network.strike(line, random_, caller, calls, fault, retries, enough)


@pytest.mark.parametrize("running_watch", ["tls"], indirect=True)
@pytest.mark.parametrize("kind", ["cut", "stall"])
def test_a_master_that_speaks_tls_may_be_lost(watch: Watch, kind: str) -> None:
    """A connection of it that is there, and one that is being made."""
    random_ = random.Random(f"{SEED} {kind}")
    line = watch.line()
    settings, enough = (line.brisk, OFTEN) if kind == "stall" else (CALM, 0)
    (way,) = network.one_way(random_)
    command = random_.choice(COMMANDS)
    with network.calling([way], line, **SINGLE, **settings) as (caller,):
        for fresh in (False, True) if LONG else [random_.random() < 0.5]:
            totals = network.bytes_of_a_call(line, random_, command, SIZES)
            if fresh:
                totals = network.bytes_of_a_connection(line)
            for up, total in zip((True, False), totals, strict=True):
                for at in network.some(line, random_, total, 2):
                    fault = Fault(kind, at, up)
                    retries = random_.choice([0, enough or 2])
                    with told(way, command, fault, retries):
                        if fresh:
                            line.proxy.drop_all()
                        calls = [(command, SIZES)] * 2
                        network.strike(
                            *(line, random_, caller, calls, fault, retries, enough)
                        )


@pytest.mark.parametrize("kind", ["cut", "reset", "stall", "refuse"])
@pytest.mark.parametrize("way", WAYS)
def test_who_cannot_ask_for_the_master_says_so_and_finds_it_later(
    watch: Watch, way: str, kind: str
) -> None:
    random_ = random.Random(f"{SEED} {way} {kind}")
    line = watch.line()
    with network.calling([way], line, **SINGLE, **CALM) as (caller,):
        for command in random_.sample(COMMANDS, 3):
            lost, following = (line.trial(random_, command, SIZES) for _ in "ab")
            fault = Fault(kind, random_.randrange(30), random_.random() < 0.5)
            with told(command, fault):
                watch.asked.inject(replace(fault, times=None))
                for proxy in (watch.asked, line.proxy):
                    proxy.drop_all()
                caller.retries(1)
                lost.run(caller, timeout=0.2 if kind == "stall" else None)
                assert lost.error is not None
                assert lost.took < 5
                watch.asked.heal()
                following.run(caller)
                assert following.error is None, repr(following.error)
                lost.settle()
                following.settle(repeated=True)


@pytest.mark.parametrize("kind", ["cut", "reset", "stall", "refuse"])
@pytest.mark.parametrize("way", WAYS)
def test_what_a_lost_master_did_not_answer_goes_to_the_new_one(
    watch: Watch, way: str, kind: str
) -> None:
    random_ = random.Random(f"{SEED} {way} {kind}")
    settings = BRISK if kind == "stall" else CALM
    with network.calling([way], watch.line(), **settings) as (caller,):
        caller.retries(OFTEN)
        assert caller("batch_tile_exists", ["a"]) == [False]
        commands = random_.sample(COMMANDS, len(COMMANDS))
        for number, command in enumerate(commands if LONG else commands[:3]):
            old, new = number % 2, 1 - number % 2
            fault = Fault(kind, up=random_.random() < 0.5, times=None)
            with told(command, fault):
                watch.led[old].inject(fault)
                if kind == "refuse":
                    watch.led[old].drop_all()
                watch.name(new)
                for _ in "ab":
                    trial = watch.line(new).trial(random_, command, SIZES)
                    trial.run(caller)
                    if trial.error is not None:
                        assert command == "set nx"
                        assert "is unknown" in str(trial.error)
                    trial.settle(repeated=True)
                    # Those that were not used have not noticed yet.
                    watch.led[old].drop_all()
                watch.led[old].heal()
