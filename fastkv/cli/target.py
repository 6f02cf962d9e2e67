"""What a URL leads to: one server or a cluster, and clients of it.

Knows what may be shown of a URL: never a password.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import unquote, urlsplit

import redis
from redis.backoff import ConstantBackoff, NoBackoff
from redis.retry import Retry

import fastkv
from fastkv.cli.terminal import Failure
from fastkv.options import TileOptions, options_of_url

TRANSPORTS = {"redis": "TCP", "rediss": "TLS", "unix": "unix"}
_EXPECTED = (
    "expected redis://[[user]:password@]host[:port][/database], the same with "
    "rediss:// for TLS, or unix://[[user]:password@]/path, with redis-py's arguments "
    "and tile_* options in the query"
)

Fast: TypeAlias = fastkv.Redis | fastkv.RedisCluster
Plain: TypeAlias = "redis.Redis | redis.RedisCluster"


@dataclass(frozen=True)
class Member:
    """One server.

    Attributes:
        name: Host and port in a cluster, else nothing.
        primary: It owns slots, or is alone.
        client: To ask it by; replies are bytes.
    """

    name: str
    primary: bool
    client: redis.Redis


@dataclass(frozen=True)
class Target:
    """A server or a cluster that has answered.

    Attributes:
        url: For redis-py: without `tile_*` options. May hold a password.
        options: The `tile_*` options of the URL.
        server: Such as ``Redis 8.2.3``.
        cluster: It is one of a cluster.
    """

    url: str
    options: TileOptions
    server: str
    cluster: bool

    @classmethod
    def of(cls, url: str) -> Target:
        """Ask the server what it is.

        Raises:
            Failure: The URL is none, or its server cannot be worked with.
            redis.exceptions.RedisError: It does not answer, or wants another password.
        """
        if _scheme(url) not in TRANSPORTS:
            raise Failure(f"URL: {_EXPECTED}")
        try:
            url, options, _ = options_of_url(url, {})
        except (TypeError, ValueError) as error:
            raise Failure(f"URL: {error}") from None
        # Values here are bytes, and random ones.
        url = re.sub(r"([?&])decode_responses=[^&#]*&?", r"\1", url)
        try:
            # A dead server should be told at once.
            with redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0)) as probe:
                said: Any = probe.execute_command("HELLO")
        except (TypeError, ValueError):  # their text may hold a piece of a password
            raise Failure(f"URL: {_EXPECTED}") from None
        if isinstance(said, list):  # RESP2
            said = dict(zip(said[::2], said[1::2], strict=True))
        server = server_name(said)
        mode = said[b"mode"].decode()
        if mode == "sentinel":
            raise Failure(f"{server} is a Sentinel: give the URL of its master")
        if mode == "cluster" and urlsplit(url).scheme == "unix":
            raise Failure(
                f"{server} is one of a cluster: give its host and port, as its unix "
                "socket does not lead to the others"
            )
        return cls(url, options, server, mode == "cluster")

    @property
    def transport(self) -> str:
        return TRANSPORTS[urlsplit(self.url).scheme]

    @property
    def shown(self) -> str:
        """The URL without what might be secret: user, password, query."""
        parts = urlsplit(self.url)
        if parts.scheme == "unix":
            return f"unix://{unquote(parts.path)}"
        host = parts.hostname or "localhost"
        host = f"[{host}]" if ":" in host else host
        path = "" if self.cluster else parts.path.rstrip("/")
        return f"{parts.scheme}://{host}:{parts.port or 6379}{path}"

    @property
    def has_password(self) -> bool:
        return bool(urlsplit(self.url).password) or "password=" in self.url

    @property
    def has_arguments(self) -> bool:
        """It says more than `shown` does."""
        parts = urlsplit(self.url)
        return "@" in parts.netloc or bool(parts.query)

    @property
    def max_connections(self) -> int:
        """Of redis-py's pool; of a cluster's pools together there is no limit."""
        if self.cluster:
            return 1 << 30
        with redis.Redis.from_url(self.url) as plain:
            most: int = plain.connection_pool.max_connections
            return most

    @property
    def local(self) -> bool:
        """The server is on this machine."""
        parts = urlsplit(self.url)
        if parts.scheme == "unix":
            return True
        try:
            for family, *_, address in socket.getaddrinfo(
                parts.hostname or "localhost", 0, type=socket.SOCK_STREAM
            ):
                with socket.socket(family) as probe:
                    probe.bind(address)  # only an address of ours can be bound
                    return True
        except OSError:
            pass
        return False

    def fast(self, options: TileOptions | None = None) -> Fast:
        """A client of fastkv's; ``options`` in place of those of the URL."""
        given = {
            f"tile_{name}": value
            for name, value in vars(options or self.options).items()
            if value is not None
        }
        made: Fast = self._make(fastkv.RedisCluster, fastkv.Redis, **given)
        return made

    def plain(self) -> Plain:
        """redis-py's client."""
        made: Plain = self._make(redis.RedisCluster, redis.Redis)
        return made

    def _make(self, cluster: Any, single: Any, **given: int) -> Any:
        kind = cluster if self.cluster else single
        # Who waits at a terminal wants to hear soon that a server is lost.
        return kind.from_url(self.url, retry=Retry(ConstantBackoff(0.1), 2), **given)


def members(plain: Plain) -> Iterator[Member]:
    """All servers of a cluster, or the one."""
    if isinstance(plain, redis.Redis):
        yield Member("", True, plain)
        return
    for node in sorted(plain.get_nodes(), key=lambda node: node.name):
        client: Any = plain.get_redis_connection(node)
        yield Member(node.name, node.server_type == "primary", client)


def server_name(hello: dict[bytes, Any]) -> str:
    """Such as ``Valkey 8.1.8``, of a reply to HELLO."""
    name: str = hello[b"server"].decode().capitalize()
    return f"{name} {hello[b'version'].decode()}"


def _scheme(url: str) -> str | None:
    """The scheme, of what is a URL at all."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  # raises if it is no number
    except ValueError:
        return None
    return parts.scheme
