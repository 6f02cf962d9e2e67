"""Peers that do what real servers rarely do.

`ScriptedPeer` follows a script and fails the test that leaves it. `ModelServer` answers
from a dict, its replies cut at random places; `OddServer` does, but for one reply. All
answer redis-py's handshake.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections import Counter, deque
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import hiredis

_HANDSHAKE = {b"CLIENT", b"SELECT", b"AUTH", b"HELLO"}


def _bulk(value: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(value), value)


@dataclass
class Step:
    """A command that must come, and what is done then."""

    command: tuple[bytes, ...]
    payload: bytes = b""
    split: int = 0
    end: str = ""  # "", "close", "reset" or "silence", after the payload
    seen: threading.Event = field(default_factory=threading.Event)
    gate: threading.Event | None = None

    def reply(self, payload: bytes, split: int = 0) -> Step:
        """Answer; with ``split``, that many bytes a segment."""
        self.payload, self.split = payload, split
        return self

    def close(self) -> Step:
        """Then end the connection."""
        self.end = "close"
        return self

    def reset(self) -> Step:
        """Then reset the connection."""
        self.end = "reset"
        return self

    def silence(self) -> Step:
        """Then say nothing, whatever comes."""
        self.end = "silence"
        return self

    def when(self, gate: threading.Event) -> Step:
        """Answer only once the gate is set."""
        self.gate = gate
        return self

    def play(self, connection: socket.socket) -> bool:
        """Answer; False: the connection is to end."""
        size = self.split or max(1, len(self.payload))
        for at in range(0, len(self.payload), size):
            connection.sendall(self.payload[at : at + size])
        if self.end == "reset":
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        while self.end == "silence" and connection.recv(65536):
            pass
        return not self.end


class _Peer:
    """Listens on a free port; a thread for each connection."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        self.commands: list[list[bytes]] = []
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, name="peer")]
        self._threads[0].start()

    def answer(self, connection: socket.socket, command: list[bytes]) -> bool:
        """Do what the command wants; False ends the connection."""
        raise NotImplementedError

    def handshake(self, command: list[bytes]) -> bytes:
        return b"+OK\r\n"

    def peek(self, connection: socket.socket, data: bytes) -> bool:
        """Look at what has come, whole commands or not; False ends the connection."""
        return True

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self.connections += 1
                self._sockets.append(connection)
            thread = threading.Thread(
                target=self._serve, args=(connection,), name="peer"
            )
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        reader = hiredis.Reader()
        with connection:
            while True:
                try:
                    data = connection.recv(65536)
                    if not data or not self.peek(connection, data):
                        return
                except OSError:
                    return
                reader.feed(data)
                while (command := reader.gets()) is not False:
                    try:
                        if command[0].upper() in _HANDSHAKE:
                            connection.sendall(self.handshake(command))
                            continue
                        self.commands.append(command)
                        if not self.answer(connection, command):
                            return
                    except OSError:
                        return

    def drop_all(self) -> None:
        """End every connection."""
        with self._lock:
            for connection in self._sockets:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join(10)  # no connection is added any more
        self.drop_all()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()


class ScriptedPeer(_Peer):
    """Expects commands in an order, over all its connections."""

    def __init__(self) -> None:
        self._steps: deque[Step] = deque()
        self._wrong: list[str] = []
        self._gates: list[threading.Event] = []
        super().__init__()

    def expect(self, *command: str | bytes) -> Step:
        step = Step(tuple(c.encode() if isinstance(c, str) else c for c in command))
        self._steps.append(step)
        return step

    def answer(self, connection: socket.socket, command: list[bytes]) -> bool:
        with self._lock:
            step = self._steps.popleft() if self._steps else None
        if step is None or step.command != tuple(command):
            self._wrong.append(f"expected {step and step.command}, got {command}")
            return False
        step.seen.set()
        if step.gate is not None:
            self._gates.append(step.gate)
            step.gate.wait(10)
        return step.play(connection)

    def __exit__(self, *details: Any) -> None:
        for gate in self._gates:
            gate.set()  # nobody waits for an answer any more
        super().__exit__(*details)
        if details[0] is None:
            assert not self._wrong
            assert not self._steps, f"never came: {list(self._steps)}"


class SilentPeer(_Peer):
    """Accepts, answers the handshake, and then says nothing.

    Attributes:
        asked: Set when the first command has come.
    """

    def __init__(self) -> None:
        self.asked = threading.Event()
        super().__init__()

    def answer(self, connection: socket.socket, command: list[bytes]) -> bool:
        self.asked.set()
        return True


class ModelServer(_Peer):
    """GET, SET (with NX and XX), EXISTS and UNLINK on a dict."""

    def __init__(self, seed: int) -> None:
        self.data: dict[bytes, bytes] = {}
        self.errors: dict[bytes, bytes] = {}  # keys that are refused, with which line
        self._random = random.Random(seed)
        super().__init__()

    def _result(self, name: bytes, key: bytes, more: list[bytes]) -> bytes:
        """The reply to a command."""
        if key in self.errors:
            return b"-" + self.errors[key] + b"\r\n"
        if name == b"GET":
            if key not in self.data:
                return b"$-1\r\n"
            return _bulk(self.data[key])
        if name == b"SET":
            if (b"NX" in more[1:] and key in self.data) or (
                b"XX" in more[1:] and key not in self.data
            ):
                return b"$-1\r\n"
            self.data[key] = more[0]
            return b"+OK\r\n"
        if name == b"EXISTS":
            return b":%d\r\n" % (key in self.data)
        if name == b"UNLINK":
            return b":%d\r\n" % (self.data.pop(key, None) is not None)
        return b"-ERR unknown command\r\n"

    def answer(self, connection: socket.socket, command: list[bytes]) -> bool:
        with self._lock:
            reply = self._result(command[0], command[1], command[2:])
            cuts = sorted(self._random.sample(range(len(reply)), min(len(reply), 3)))
        for begin, end in zip([0, *cuts], [*cuts, len(reply)], strict=True):
            if end > begin:
                connection.sendall(reply[begin:end])
        return True


class OddServer(_Peer):
    """Answers from a dict, in ranges too, but for the reply that a test makes odd.

    Attributes:
        data: Nobody writes to it while a value is read in ranges.
        refused: Commands that are refused each time, and with which line; if that is
            empty, by hanging up.
        counts: How often each command came.
    """

    def __init__(self) -> None:
        self.data: dict[bytes, bytes] = {}
        self.refused: dict[bytes, bytes] = {}
        self.counts: Counter[bytes] = Counter()
        self._odd: Step | None = None
        # Whose client may have gone already, while commands of its are still read.
        self._had_theirs: set[socket.socket] = set()
        self._before = 0  # answered as usual before it
        self._usual = False
        self._in_multi: set[socket.socket] = set()  # MULTI without its EXEC
        super().__init__()

    def odd(self, command: str, nth: int = 1, usual: bool = False) -> Step:
        """The ``nth`` command of that name from now on is answered otherwise; with
        ``usual``, after the usual reply. Of a connection that has had an odd reply none
        counts.
        """
        with self._lock:
            self._odd, self._before = Step((command.encode(),)), nth - 1
            self._usual = usual
            return self._odd

    def _result(self, name: bytes, key: bytes, more: list[bytes]) -> bytes:
        self.counts[name] += 1
        value = self.data.get(key)
        if name in self.refused:
            return b"-" + self.refused[name] + b"\r\n"
        if name == b"GET":
            return b"$-1\r\n" if value is None else _bulk(value)
        if name == b"GETRANGE":
            return _bulk((value or b"")[int(more[0]) : int(more[1]) + 1])
        if name == b"SET":
            self.data[key] = more[0]
        if name == b"EXISTS":
            return b":%d\r\n" % (value is not None)
        if name == b"UNLINK":
            return b":%d\r\n" % (self.data.pop(key, None) is not None)
        if name == b"INFO":
            return _bulk(b"# Server\r\nrun_id:abc\r\n")
        return b"*0\r\n" if name == b"EXEC" else b"+OK\r\n"

    def answer(self, connection: socket.socket, command: list[bytes]) -> bool:
        self.commands.clear()  # they hold values
        with self._lock:
            reply = self._result(command[0], b"".join(command[1:2]), command[2:])
            step = None
            if (
                self._odd is not None
                and self._odd.command[0] == command[0]
                and connection not in self._had_theirs
            ):
                if self._before == 0:
                    step, self._odd = self._odd, None
                    self._had_theirs.add(connection)
                    step.payload = self._usual * reply + step.payload
                self._before -= 1
        if step is None and self.refused.get(command[0]) == b"":
            return False
        if step is not None:
            step.seen.set()
            reply = step.payload
        elif connection in self._in_multi and command[0] != b"EXEC":
            reply = b"+QUEUED\r\n"
        if command[0] == b"MULTI" and reply == b"+OK\r\n":
            self._in_multi.add(connection)
        if command[0] == b"EXEC" and not reply.startswith(b"-"):
            self._in_multi.discard(connection)
        if step is None:
            connection.sendall(reply)
            return True
        return step.play(connection)
