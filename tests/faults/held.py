"""A server that holds still in the middle of a batch, so that its stage is certain."""

from __future__ import annotations

import socket
import threading
from typing import Any

from tests.scripted import ModelServer

#: Where the first batch is when it is held: its connection is being made; asked for and
#: not answered, or behind such a batch; half of a value is here, or out; some ranges of
#: a value are here, between WATCH and EXEC.
STAGES = [*("connecting", "asked", "queued", "half received", "half sent", "ranges")]

#: Not all of it fits in the sockets.
SENT_BYTES = 24 << 20
#: Read in ranges of an eighth.
RANGED_BYTES = 256 << 10
PLAIN_BYTES = 10_000


class HeldServer(ModelServer):
    """A `ModelServer` that knows ranges, too.

    Attributes:
        reached: Set when it holds still.
        go_on: Set it, and it goes on, for good.
    """

    def __init__(self, seed: int, stage: str = "") -> None:
        self.stage = stage
        self.reached = threading.Event()
        self.go_on = threading.Event()
        super().__init__(seed)

    def hold(self) -> None:
        if not self.go_on.is_set():
            self.reached.set()
            self.go_on.wait(60)

    def handshake(self, command: list[bytes]) -> bytes:
        if self.stage == "connecting":
            self.hold()
        return super().handshake(command)

    def peek(self, connection: socket.socket, data: bytes) -> bool:
        if self.stage == "half sent" and b"SET\r\n" in data:
            self.hold()
        return True

    def _result(self, name: bytes, key: bytes, more: list[bytes]) -> bytes:
        if name == b"GETRANGE":
            found = self.data.get(key, b"")[int(more[0]) : int(more[1]) + 1]
            return b"$%d\r\n%b\r\n" % (len(found), found)
        return super()._result(name, key, more)

    def answer(self, connection: socket.socket, command: list[bytes]) -> bool:
        name = command[0]
        if name in (b"WATCH", b"UNWATCH", b"MULTI"):
            connection.sendall(b"+OK\r\n")
        elif name == b"EXEC":
            connection.sendall(b"*0\r\n")
        elif name == b"INFO":
            connection.sendall(b"-ERR unknown command\r\n")
        elif self.stage == "half received" and name == b"GET":
            reply = self._result(name, command[1], [])
            connection.sendall(reply[: len(reply) // 2])
            self.hold()
            connection.sendall(reply[len(reply) // 2 :])
        else:
            last = name == b"GETRANGE" and int(command[3]) < RANGED_BYTES // 2
            if self.stage in ("asked", "queued") or (self.stage == "ranges" and last):
                self.hold()
            return super().answer(connection, command)
        return True

    def __exit__(self, *details: Any) -> None:
        self.go_on.set()
        super().__exit__(*details)
