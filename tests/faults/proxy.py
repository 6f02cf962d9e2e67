"""A network that fails on request: a proxy between clients and a real server.

Sees bytes only, so TLS is as good as TCP and unix sockets. Knows nothing of what it
carries.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

#: A host and a port, or the path of a unix socket.
Address = tuple[str, int] | str

_CHUNK = 256 << 10
_ABORT = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and where.

    Attributes:
        kind: Of what happens when byte number `at` is about to pass:

            - ``cut``: both sides see the end of the stream;
            - ``reset``: both see a reset (over a unix socket, an end);
            - ``stall``: it does not pass, nor does what follows in this direction,
              until `Proxy.heal`;
            - ``delay``: it passes `seconds` later;
            - ``split``: it and the `length` bytes behind it pass one by one;
            - ``flip``: it passes with one bit changed.

            Or of what happens to those that connect, until `Proxy.heal`:

            - ``refuse``: nobody listens;
            - ``slow``: they wait `seconds` until they are served.
        at: Bytes of this direction that pass before, counted on each connection from
            its beginning, or from `Proxy.inject` if it was open then.
        up: To the server, not from it.
        connection: Only this one, in the order of their first bytes; None: any.
        times: How many connections it strikes; None: each.
        seconds: See above.
        length: See above.
    """

    kind: str
    at: int = 0
    up: bool = False
    connection: int | None = None
    times: int | None = 1
    seconds: float = 0.0
    length: int = 1 << 40


def _quietly_shut(sock: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):  # the other side was first
        sock.shutdown(how)


class _Pipe:
    """One direction of a connection."""

    def __init__(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        self.source, self.sink, self.up = source, sink, up
        self.waiting = memoryview(b"")  # read and not passed on
        self.passed = 0  # since the plan was made
        self.ended = False  # the source has no more
        self.spared = False  # its fault is behind it
        self.stalled = False
        self.due = 0.0  # nothing passes before
        self.singly = 0  # so many bytes pass one by one


class _Connection:
    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.pipes = (_Pipe(client, server, True), _Pipe(server, client, False))
        self.number: int | None = None
        self.gone: set[socket.socket] = set()  # nothing happens there any more
        self.cut = False
        self.closed = False


class Proxy:
    """Listens like ``target`` (TCP on 127.0.0.1, or a unix socket) and leads there.

    One thread serves all connections. All methods may be called from any other.

    Args:
        target: The server's.
        folder: For the unix socket, if the target is one.

    Attributes:
        struck: Set when a fault has struck, until the next `inject`.
    """

    def __init__(self, target: Address, folder: str = "") -> None:
        self.target = target
        self.struck = threading.Event()
        self._strikes = 0
        self._fault: Fault | None = None
        self._numbered = 0
        self._connections: dict[int, _Connection] = {}  # by both descriptors
        self._delayed: set[_Connection] = set()  # of which a pipe waits for its time
        self._calls: deque[Callable[[], None]] = deque()
        self._wake, self._woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)[::-1]
        self._epoll = select.epoll()
        self._epoll.register(self._woken, select.EPOLLIN)
        self._listening = True
        self._accept_due = 0.0
        self.address: Address
        if isinstance(target, str):
            self.address = os.path.join(folder, f"proxy-{id(self):x}.sock")
            self._listener = socket.socket(socket.AF_UNIX)
        else:
            # Bound to a port by its number, which the kernel then keeps for us while
            # nobody listens.
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.address = probe.getsockname()
            self._listener = socket.socket()
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(self.address)
        self._listener.setblocking(False)
        self._listener.listen(4096)
        self._epoll.register(self._listener.fileno(), select.EPOLLIN)
        self._knocked = False
        self._running = True
        self._thread = threading.Thread(target=self._serve, name="proxy")
        self._thread.start()

    @property
    def kwargs(self) -> dict[str, Any]:
        """For a client."""
        if isinstance(self.address, str):
            return {"unix_socket_path": self.address}
        return {"host": self.address[0], "port": self.address[1]}

    def inject(self, fault: Fault) -> None:
        """From now on. What an earlier one did stays."""
        self._do(lambda: self._plan(fault))

    def heal(self) -> None:
        """No fault any more; what was stalled goes on."""
        self._do(self._resume)

    def drop_all(self) -> None:
        """End every connection, with what is on its way on it."""
        self._do(self._drop_all)

    def passed(self) -> tuple[int, int]:
        """Bytes since the last `inject` or `heal`, on connections that are open: to the
        server, from it.
        """
        found = [0, 0]

        def add() -> None:
            for connection in set(self._connections.values()):
                for number, pipe in enumerate(connection.pipes):
                    found[number] += pipe.passed

        self._do(add)
        return found[0], found[1]

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._running = False
        os.write(self._wake, b"x")
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._drop_all()
        self._listener.close()
        self._epoll.close()
        os.close(self._wake)
        os.close(self._woken)
        if isinstance(self.address, str):
            os.unlink(self.address)

    # --- the plan: the proxy's thread from here on -----------------------------------

    def _do(self, call: Callable[[], None]) -> None:
        done = threading.Event()

        def run() -> None:
            try:
                call()
            finally:
                done.set()

        self._calls.append(run)
        os.write(self._wake, b"x")
        assert done.wait(10), "the proxy is dead"

    def _plan(self, fault: Fault | None) -> None:
        self._fault = fault
        self._strikes = self._numbered = 0
        self.struck.clear()
        for connection in self._connections.values():
            connection.number = None
            for pipe in connection.pipes:
                pipe.passed, pipe.spared = 0, False
        if fault is not None and fault.kind == "refuse":
            self._listen(False)
            self.struck.set()
        elif fault is not None and fault.kind == "slow":
            self._accept_due = -1.0

    def _resume(self) -> None:
        struck = self.struck.is_set()
        self._plan(None)
        if struck:
            self.struck.set()
        self._listen(True)
        self._accept_due = 0.0
        self._knocked = True
        for connection in set(self._connections.values()):
            for pipe in connection.pipes:
                pipe.stalled, pipe.due, pipe.singly = False, 0.0, 0
            self._move(connection)

    def _listen(self, listening: bool) -> None:
        if listening == self._listening:
            return
        self._listening = listening
        if isinstance(self.address, str):
            if listening:
                os.unlink(self.address)
                self._listener = socket.socket(socket.AF_UNIX)
                self._listener.bind(self.address)
                self._listener.setblocking(False)
            else:
                self._epoll.unregister(self._listener.fileno())
                self._listener.close()  # the path stays, and refuses
        elif not listening:
            self._epoll.unregister(self._listener.fileno())
            self._listener.shutdown(socket.SHUT_RDWR)
        if listening:
            self._listener.listen(4096)
            self._epoll.register(self._listener.fileno(), select.EPOLLIN)

    def _drop_all(self) -> None:
        for connection in set(self._connections.values()):
            self._close(connection)

    # --- moving bytes ----------------------------------------------------------------

    def _serve(self) -> None:
        while self._running:
            self._knocked = False
            for fd, events in self._epoll.poll(self._patience()):
                if fd == self._woken:
                    os.read(fd, 4096)
                    while self._calls:
                        self._calls.popleft()()
                elif self._listening and fd == self._listener.fileno():
                    self._knocked = True
                elif (connection := self._connections.get(fd)) is not None:
                    if events & (select.EPOLLERR | select.EPOLLHUP):
                        self._failed(connection, fd)
                    if not connection.closed:
                        self._move(connection)
            for connection in list(self._delayed):
                self._move(connection)
            # Only now: a new connection may get a descriptor that was closed meanwhile,
            # and was spoken of above once more.
            if self._knocked and self._listening:
                self._accept()
            if 0 < self._accept_due <= time.monotonic():
                self._accept_due = 0.0
                self._accept()

    def _patience(self) -> float | None:
        due = [p.due for c in self._delayed for p in c.pipes if p.due > 0]
        if self._accept_due > 0:
            due.append(self._accept_due)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _accept(self) -> None:
        if self._accept_due:
            if self._accept_due < 0 and self._fault is not None:
                self._accept_due = time.monotonic() + self._fault.seconds
                self._struck()
            # Not asked again for what is there until then.
            self._epoll.modify(self._listener.fileno(), 0)
            return
        self._epoll.modify(self._listener.fileno(), select.EPOLLIN)
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(client.family)
            server.settimeout(5)
            try:
                server.connect(self.target)
            except OSError:  # there is none
                server.close()
                client.close()
                continue
            for sock in (client, server):
                sock.setblocking(False)
                if client.family == socket.AF_INET:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = _Connection(client, server)
            for sock in (client, server):
                self._connections[sock.fileno()] = connection
                self._epoll.register(sock.fileno(), select.EPOLLIN)

    def _failed(self, connection: _Connection, fd: int) -> None:
        """A side is gone, with what was to be sent there; the other learns of it."""
        from_client = fd == connection.client.fileno()
        gone = connection.client if from_client else connection.server
        if gone.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0:
            self._close(connection, reset=True)
            return
        # There may be something to read, but epoll would say the same for ever.
        connection.gone.add(gone)
        self._epoll.unregister(fd)
        pipe = connection.pipes[1 if from_client else 0]
        pipe.ended = True
        pipe.waiting = memoryview(b"")

    def _move(self, connection: _Connection) -> None:
        for pipe in connection.pipes:
            try:
                self._pump(connection, pipe)
            except BlockingIOError:
                pass
            except OSError:  # reset by a side
                self._close(connection, reset=True)
            if connection.closed:
                return
        if all(pipe.ended and not pipe.waiting for pipe in connection.pipes):
            self._close(connection)
            return
        self._poll(connection)

    def _pump(self, connection: _Connection, pipe: _Pipe) -> None:
        while True:
            if connection.cut:
                # What still comes is read: closed with it unread, it would be a reset.
                pipe.waiting = memoryview(b"")
            elif pipe.waiting:
                if pipe.stalled or pipe.due > time.monotonic():
                    return
                pipe.due = 0.0
                if connection.number is None:
                    connection.number = self._numbered
                    self._numbered += 1
                self._pass_on(connection, pipe)
                if connection.closed:
                    return
                if pipe.waiting:
                    continue
            if pipe.ended:
                if not connection.cut:
                    _quietly_shut(pipe.sink, socket.SHUT_WR)
                return
            data = pipe.source.recv(_CHUNK)
            pipe.waiting, pipe.ended = memoryview(data), not data

    def _pass_on(self, connection: _Connection, pipe: _Pipe) -> None:
        fault = self._fault_of(connection, pipe)
        most = len(pipe.waiting)
        if fault is not None:
            most = min(most, fault.at - pipe.passed)
            if most == 0:
                self._strike(connection, pipe, fault)
                return
        if pipe.singly > 0:
            most = 1
            pipe.singly -= 1
        sent = pipe.sink.send(pipe.waiting[:most])
        pipe.passed += sent
        pipe.waiting = pipe.waiting[sent:]

    def _fault_of(self, connection: _Connection, pipe: _Pipe) -> Fault | None:
        fault = self._fault
        if fault is None or pipe.spared or pipe.up != fault.up:
            return None
        if fault.kind in ("refuse", "slow") or fault.connection not in (
            None,
            connection.number,
        ):
            return None
        return fault

    def _struck(self) -> None:
        self._strikes += 1
        self.struck.set()

    def _strike(self, connection: _Connection, pipe: _Pipe, fault: Fault) -> None:
        pipe.spared = True
        if fault.times is not None and self._strikes >= fault.times:
            return
        self._struck()
        if fault.kind == "cut":
            connection.cut = True
            for one in connection.pipes:
                one.waiting = memoryview(b"")
                _quietly_shut(one.sink, socket.SHUT_WR)
        elif fault.kind == "reset":
            self._close(connection, reset=True)
        elif fault.kind == "stall":
            pipe.stalled = True
        elif fault.kind == "delay":
            pipe.due = time.monotonic() + fault.seconds
        elif fault.kind == "split":
            pipe.singly = fault.length
        elif fault.kind == "flip":
            pipe.waiting = memoryview(
                bytes([pipe.waiting[0] ^ 1]) + bytes(pipe.waiting[1:])
            )
        else:
            raise ValueError(fault.kind)

    def _poll(self, connection: _Connection) -> None:
        """Ask for what can be gone on with."""
        for sock, reads, writes in (
            (connection.client, *connection.pipes),
            (connection.server, *connection.pipes[::-1]),
        ):
            if sock in connection.gone:
                continue
            events = 0
            if not reads.waiting and not reads.ended:
                events |= select.EPOLLIN
            if writes.waiting and not writes.stalled and not writes.due:
                events |= select.EPOLLOUT
            self._epoll.modify(sock.fileno(), events)
        if any(pipe.due for pipe in connection.pipes):
            self._delayed.add(connection)
        else:
            self._delayed.discard(connection)

    def _close(self, connection: _Connection, reset: bool = False) -> None:
        connection.closed = True
        self._delayed.discard(connection)
        for sock in (connection.client, connection.server):
            del self._connections[sock.fileno()]
            if sock not in connection.gone:
                self._epoll.unregister(sock.fileno())
            if reset and sock.family == socket.AF_INET:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
            sock.close()
