"""The clients that are measured beside each other: the same batch through each.

A peer reads into the caller's memory if its library can. One whose library is not
installed is left out, and the report says so.
"""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import redis
from redis._parsers import _RESP2Parser

import fastkv
import fastkv.asyncio

Memory = npt.NDArray[np.uint8]  # of shape (keys, bytes)
Values = Memory | Sequence[Any]  # one a key


@dataclass(frozen=True)
class Endpoint:
    """Of one server over one transport."""

    server: str  # name and version
    transport: str  # "tcp", "tls" or "unix"
    port: int
    unix_path: str

    @property
    def kwargs(self) -> dict[str, Any]:
        """For redis-py and fastkv."""
        if self.transport == "unix":
            return {"unix_socket_path": self.unix_path}
        where: dict[str, Any] = {"host": "127.0.0.1", "port": self.port}
        if self.transport == "tls":
            where |= {"ssl": True, "ssl_cert_reqs": "none"}
        return where

    @property
    def raw(self) -> tuple[str, str]:
        """For the ceilings: host or path, and port."""
        if self.transport == "unix":
            return self.unix_path, "0"
        host = "tls:127.0.0.1" if self.transport == "tls" else "127.0.0.1"
        return host, str(self.port)


class Peer(ABC):
    """One client, connected."""

    name: str
    can: frozenset[str] = frozenset({"get", "set", "exists"})

    @abstractmethod
    def __init__(self, endpoint: Endpoint) -> None:
        """Connect; raises ImportError if it cannot do this at all."""

    @abstractmethod
    def get(self, keys: Sequence[str], memory: Memory) -> Values:
        """Return the values, one a key: rows of ``memory`` or objects of its own."""

    def set(self, keys: Sequence[str], memory: Memory) -> None:
        raise NotImplementedError

    def exists(self, keys: Sequence[str]) -> list[bool]:
        raise NotImplementedError

    def delete(self, keys: Sequence[str]) -> list[bool]:
        raise NotImplementedError

    @abstractmethod
    def close(self) -> None: ...


class Fastkv(Peer):
    name = "fastkv"
    can = frozenset({"get", "set", "exists", "delete"})
    immutable = False

    def __init__(self, endpoint: Endpoint, **options: int) -> None:
        self.client = fastkv.Redis(**endpoint.kwargs, **options)

    def get(self, keys: Sequence[str], memory: Memory) -> Values:
        found = self.client.batch_tile_get(keys, memory, immutable=self.immutable)
        assert all(found)
        return memory

    def set(self, keys: Sequence[str], memory: Memory) -> None:
        assert all(self.client.batch_tile_set(keys, memory))

    def exists(self, keys: Sequence[str]) -> list[bool]:
        return self.client.batch_tile_exists(keys)

    def delete(self, keys: Sequence[str]) -> list[bool]:
        return self.client.batch_tile_delete(keys)

    def close(self) -> None:
        self.client.close()


class FastkvImmutable(Fastkv):
    name = "fastkv, immutable"
    can = frozenset({"get"})
    immutable = True


class RedisPy(Peer):
    """redis-py as most people use it: one command after the other."""

    name = "redis-py, hiredis"
    can = frozenset({"get", "set", "exists", "delete"})

    def __init__(self, endpoint: Endpoint) -> None:
        self.client = redis.Redis(**endpoint.kwargs)
        parser = self._parser()
        if parser is not None:
            self.client.connection_pool.connection_kwargs["parser_class"] = parser

    def _parser(self) -> type | None:
        return None  # redis-py takes hiredis if it is there

    def get(self, keys: Sequence[str], memory: Memory) -> Values:
        return [self.client.get(key) for key in keys]

    def set(self, keys: Sequence[str], memory: Memory) -> None:
        for key, row in zip(keys, memory, strict=True):
            self.client.set(key, row.data)

    def exists(self, keys: Sequence[str]) -> list[bool]:
        pipeline = self.client.pipeline(transaction=False)
        for key in keys:
            pipeline.exists(key)
        return [bool(count) for count in pipeline.execute()]

    def delete(self, keys: Sequence[str]) -> list[bool]:
        pipeline = self.client.pipeline(transaction=False)
        for key in keys:
            pipeline.unlink(key)
        return [bool(count) for count in pipeline.execute()]

    def close(self) -> None:
        self.client.close()


class RedisPyPure(RedisPy):
    name = "redis-py, no hiredis"

    def _parser(self) -> type | None:
        return _RESP2Parser


class LMCacheNative(Peer):
    """LMCache's own C++ client: four threads with a connection each; TCP only."""

    name = "LMCache native"

    def __init__(self, endpoint: Endpoint, workers: int = 4) -> None:
        if endpoint.transport != "tcp":
            raise ImportError("it has neither unix sockets nor TLS")
        os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")
        os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")
        import torch  # noqa: F401  # must be there before LMCache's extension
        from lmcache.lmcache_redis import LMCacheRedisClient

        self.client = LMCacheRedisClient("127.0.0.1", endpoint.port, workers, "", "")
        self.poll = select.poll()
        self.poll.register(self.client.event_fd(), select.POLLIN)

    def _wait(self, submitted: int) -> Any:
        while True:
            self.poll.poll()
            for number, ok, error, result in self.client.drain_completions():
                if number == submitted:
                    assert ok, error
                    return result

    def get(self, keys: Sequence[str], memory: Memory) -> Values:
        self._wait(self.client.submit_batch_get(list(keys), [r.data for r in memory]))
        return memory

    def set(self, keys: Sequence[str], memory: Memory) -> None:
        self._wait(self.client.submit_batch_set(list(keys), [r.data for r in memory]))

    def exists(self, keys: Sequence[str]) -> list[bool]:
        result = self._wait(self.client.submit_batch_exists(list(keys)))
        return [bool(there) for there in result]

    def close(self) -> None:
        self.client.close()


class Glide(Peer):
    """Valkey GLIDE, synchronous: MGET into buffers; TCP only."""

    name = "valkey-glide-sync"
    can = frozenset({"get", "set"})

    def __init__(self, endpoint: Endpoint) -> None:
        if endpoint.transport != "tcp":
            raise ImportError("here over TCP only")
        from glide_sync import GlideClient, GlideClientConfiguration, NodeAddress

        address = NodeAddress("127.0.0.1", endpoint.port)
        self.client = GlideClient.create(
            GlideClientConfiguration([address], request_timeout=60_000)
        )

    def get(self, keys: Sequence[str], memory: Memory) -> Values:
        self.client.mget(list(keys), buffers=[row.data for row in memory])
        return memory

    def set(self, keys: Sequence[str], memory: Memory) -> None:
        for key, row in zip(keys, memory, strict=True):
            self.client.set(key, row.data)

    def close(self) -> None:
        self.client.close()


class Asyncio(Peer):
    """fastkv on an event loop; for latency."""

    name = "fastkv, asyncio"
    can = frozenset({"get"})

    def __init__(self, endpoint: Endpoint) -> None:
        self.loop = asyncio.new_event_loop()
        self.client = fastkv.asyncio.Redis(**endpoint.kwargs)

    def get(self, keys: Sequence[str], memory: Memory) -> Values:
        self.loop.run_until_complete(self.client.batch_tile_get(keys, memory))
        return memory

    def close(self) -> None:
        self.loop.run_until_complete(self.client.aclose())
        self.loop.close()


PEERS: tuple[type[Peer], ...] = (
    FastkvImmutable,
    Fastkv,
    LMCacheNative,
    RedisPy,
    RedisPyPure,
    Glide,
)


def redis_benchmark(
    endpoint: Endpoint, key: str, size: int, total: int
) -> float | None:
    """GB/s of GET by Redis' own tool, four connections, four requests on each."""
    tool = shutil.which("redis-benchmark")
    if tool is None:
        return None
    where = (
        ["-s", endpoint.unix_path]
        if endpoint.transport == "unix"
        else ["-p", str(endpoint.port)]
    )
    if endpoint.transport == "tls":
        where += ["--tls", "--insecure"]
    requests = max(16, total // size)
    said = subprocess.run(
        [tool, *where, "-n", str(requests), "-c", "4", "-P", "4", "--csv", "GET", key],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return float(said.splitlines()[-1].split(",")[1].strip('"')) * size / 1e9


class Ceiling:
    """The program ``ceiling``, see there: one size on one endpoint.

    Args:
        program: Compiled.
        endpoint: Of the server.
        prefix: Of keys, which are numbered.
        keys: How many.
        size: Bytes a value.
    """

    def __init__(
        self, program: Path, endpoint: Endpoint, prefix: str, keys: int, size: int
    ) -> None:
        self._process = subprocess.Popen(
            [str(program), *endpoint.raw, prefix, str(keys), str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: object) -> tuple[float, float]:
        """Seconds, and cpu-seconds of the client."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(" ".join(map(str, command)) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"ceiling has ended at {command}")
        seconds, cpu = line.split()
        return float(seconds), float(cpu)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
