"""A cluster that clients reach through proxies, one before each node."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import redis
from redis.exceptions import RedisClusterException, TimeoutError

import fastkv
import fastkv.asyncio
from fastkv._core import key_slot
from tests.clusters import ClusterServers
from tests.faults import test_network as network
from tests.faults.calls import Awaited, Blocking, Caller, Futures
from tests.faults.proxy import Proxy
from tests.faults.test_network import OFTEN, Line

# Of each kind one for each node.
SIZES = [size for size in network.SIZES for _ in range(3)]
SMALL_SIZES = [size for size in network.SMALL_SIZES for _ in range(3)]


class ClusterFutures(Futures):
    made_by = fastkv.RedisCluster


class ClusterBlocking(Blocking):
    made_by = fastkv.RedisCluster


class ClusterAwaited(Awaited):
    made_by = fastkv.asyncio.RedisCluster


WAYS: dict[str, Callable[..., Caller]] = {
    "blocking": ClusterBlocking,
    "futures": ClusterFutures,
    "asyncio": ClusterAwaited,
}


class Plain:
    """redis-py's client of the servers themselves, for keys of any slots."""

    def __init__(self, servers: ClusterServers, **tls: Any) -> None:
        self._client = redis.RedisCluster(host="127.0.0.1", port=servers.port, **tls)

    def _each(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        with self._client.pipeline() as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any] = pipeline.execute()
            return answers

    def mset(self, mapping: dict[str, bytes]) -> None:
        self._each([("SET", *item) for item in mapping.items()])

    def mget(self, keys: list[str]) -> list[bytes | None]:
        return self._each([("GET", key) for key in keys])

    def unlink(self, *keys: str) -> None:
        self._each([("UNLINK", key) for key in keys])

    def close(self) -> None:
        self._client.close()


_given: set[int] = set()


def tags_of(node: int, prefix: str) -> Iterator[str]:
    """Beginnings of keys, each of a slot that was the node's in the beginning, and is
    given to nobody else.
    """
    first, last = ClusterServers.slots_of(node)
    for number in itertools.count():
        slot = key_slot(f"{prefix}{number}".encode())
        if first <= slot <= last and slot not in _given:
            _given.add(slot)
            yield f"{{{prefix}{number}}}"


# Of each node in turn, two slots each.
_TAGS = [tags_of(node, "n") for node in range(3)]
NAMES = [next(tags) for _ in "ab" for tags in _TAGS]


@dataclass
class Net:
    """A cluster, and a proxy before each of its nodes, the replicas' last."""

    servers: ClusterServers
    proxies: list[Proxy]
    plain: Plain
    tls: dict[str, Any]  # arguments of a client

    @classmethod
    @contextlib.contextmanager
    def around(cls, servers: ClusterServers, **tls: Any) -> Iterator[Net]:
        with contextlib.ExitStack() as stack:
            proxies = [
                stack.enter_context(Proxy(("127.0.0.1", member.port)))
                for member in servers.members
            ]
            plain = stack.enter_context(contextlib.closing(Plain(servers, **tls)))
            yield cls(servers, proxies, plain, tls)

    def __post_init__(self) -> None:
        ports = [member.port for member in self.servers.members]
        self.led = dict(
            zip(ports, (proxy.address for proxy in self.proxies), strict=True)
        )

    def line(self, victim: int) -> Line:
        """To all nodes; the faults are those of one, which has every third key, the
        first one included.
        """
        host, port = self.proxies[0].address
        kwargs = {
            "host": host,
            "port": port,
            "address_remap": lambda address: self.led.get(address[1], address),
            **self.tls,
        }
        names = NAMES[victim % 3 :] + NAMES[: victim % 3]
        return Line(self.proxies[victim], self.plain, kwargs, False, WAYS, names)

    def heal(self) -> None:
        for proxy in self.proxies:
            proxy.heal()

    @contextlib.contextmanager
    def calling(self, ways: list[str], **kwargs: Any) -> Iterator[list[Caller]]:
        """Who knows the cluster, and sees nothing of it but the proxies."""
        with network.calling(ways, self.line(0), **kwargs) as callers:
            for caller in callers:
                caller.retries(OFTEN)
                while True:
                    # redis-py, who asks for the slots first, has one time-out only.
                    with contextlib.suppress(TimeoutError, RedisClusterException):
                        assert not any(caller("batch_tile_exists", NAMES))
                        break
            yield callers
            through = {f"{host}:{port}" for host, port in self.led.values()}
            for caller in callers:
                assert caller.client.tile_info()["nodes"].keys() <= through
