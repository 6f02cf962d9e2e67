"""How fast a server can be read at all: threads with a connection each that know every
reply's length, parse nothing and keep nothing.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import redis
from redis.exceptions import RedisError

_RANGE = 512 << 10
# Where ranges begin, so that the server's copies are not from just ahead of where they
# go, as seen within a page: processors are slow at that (see bench/README.md).
_OFF_GRID = 2 << 10
_DEPTH = 2  # requests on their way on a connection


@dataclass(frozen=True)
class Shape:
    """How values are asked for.

    Attributes:
        connections: On each node.
        ranged: By GETRANGE of 512 KiB, else by GET.
    """

    connections: int
    ranged: bool

    def __str__(self) -> str:
        way = "GETRANGE of 512 KiB" if self.ranged else "GET"
        return f"{way} on {self.connections} connection" + (
            "s" if self.connections > 1 else ""
        )


class Drain:
    """Connections of redis-py's, read by themselves. To be closed.

    Args:
        nodes: A client of each node, and the keys that it has, all of one size.
        size: Bytes a value.
        most: Connections on each node.
    """

    def __init__(
        self, nodes: Sequence[tuple[redis.Redis, Sequence[str]]], size: int, most: int
    ) -> None:
        self._size = size
        self._keys = [keys for _, keys in nodes]
        self._threads = ThreadPoolExecutor(most * len(nodes), "fastkv-drain")
        self._connections: list[list[Any]] = []
        for client, _ in nodes:
            made: list[Any] = []
            self._connections.append(made)
            for _ in range(most):
                made.append(client.connection_pool.make_connection())
                made[-1].connect()

    def close(self) -> None:
        for made in self._connections:
            for connection in made:
                connection.disconnect()
        self._threads.shutdown()

    def gb_per_second(self, shape: Shape) -> float:
        """Read all values once.

        Raises:
            RedisError: The server answered something else.
            OSError: It was lost, or says nothing.
        """
        jobs = []
        for keys, connections in zip(self._keys, self._connections, strict=True):
            requests = [r for key in keys for r in self._requests(key, shape.ranged)]
            used = connections[: shape.connections]
            jobs += [
                (connection, requests[i :: len(used)])
                for i, connection in enumerate(used)
            ]
        jobs = [job for job in jobs if job[1]]
        started = time.perf_counter()
        octets = sum(self._threads.map(lambda job: _read(*job), jobs))
        return octets / (time.perf_counter() - started) / 1e9

    def _requests(self, key: str, ranged: bool) -> list[tuple[tuple[object, ...], int]]:
        if not ranged:
            return [(("GET", key), self._size)]
        begins = [0, *range(_OFF_GRID, self._size, _RANGE)]
        return [
            (("GETRANGE", key, first, end - 1), end - first)
            for first, end in zip(begins, [*begins[1:], self._size], strict=True)
        ]


def _read(connection: Any, requests: Sequence[tuple[tuple[object, ...], int]]) -> int:
    """Send the requests, a few ahead, and receive exactly what the replies must be."""
    sock: socket.socket = connection._sock
    packed = [b"".join(connection.pack_command(*what)) for what, _ in requests]
    memory = memoryview(bytearray(max(size for _, size in requests) + 64))
    for request in packed[:_DEPTH]:
        sock.sendall(request)
    octets = 0
    for number, (what, size) in enumerate(requests):
        head = b"$%d\r\n" % size
        reply = memory[: len(head) + size + 2]
        at = 0
        while at < len(reply):
            got = sock.recv_into(reply[at:])
            if not got:
                raise OSError("connection closed by the server")
            at += got
            if not head.startswith(bytes(reply[: min(at, len(head))])):
                said = bytes(reply[: min(at, 80)])
                raise RedisError(f"{what[0]}: expected {size} bytes, got {said!r}")
        octets += size
        if number + _DEPTH < len(packed):
            sock.sendall(packed[number + _DEPTH])
    return octets
