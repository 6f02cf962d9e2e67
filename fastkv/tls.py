"""redis-py's TLS connections over our native TLS stream.

redis-py connects, we wrap its socket as it would, redis-py does its handshake through
what looks like a socket, and the engine takes the stream over. What the ``ssl_*``
arguments mean is asked of a Python ``SSLContext`` that is made as redis-py makes it.
"""

from __future__ import annotations

import errno
import functools
import os
import select
import socket
import ssl
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import redis.connection

from fastkv._core import TlsStream, has_tls
from fastkv.errors import UnsupportedConnection

# They would need the SSLSocket, and more connections.
_OCSP = (
    "ssl_validate_ocsp",
    "ssl_validate_ocsp_stapled",
    "ssl_ocsp_context",
    "ssl_ocsp_expected_cert",
)


def check_tls(cls: type, kwargs: Mapping[str, Any]) -> None:
    """Raise `UnsupportedConnection` for what we cannot do as redis-py does.

    Args:
        cls: A sync SSLConnection or a class made from it.
        kwargs: Of its connections.
    """
    if not has_tls():
        raise UnsupportedConnection(
            "batch_tile_* cannot use TLS: this build of fastkv has none, because there "
            "was no OpenSSL 3 to build it with; install its headers (Debian, Ubuntu: "
            "apt-get install libssl-dev) and build fastkv again"
        )
    theirs = redis.connection.SSLConnection._wrap_socket_with_ssl
    if getattr(cls, "_wrap_socket_with_ssl", None) is not theirs:
        raise UnsupportedConnection(
            f"batch_tile_* do TLS natively, and {cls.__name__} wraps its sockets in "
            "another way than redis-py's SSLConnection"
        )
    for name in _OCSP:
        if kwargs.get(name):
            raise UnsupportedConnection(f"batch_tile_* cannot honour {name}")


@functools.lru_cache(maxsize=64)
def native_tls_class(cls: type) -> type:
    """Make the class whose connections have a `TlsSocket`."""
    return type(cls.__name__, (_NativeTls, cls), {"__module__": cls.__module__})


if TYPE_CHECKING:
    from typing_extensions import Buffer

    _Base = redis.connection.SSLConnection
else:
    _Base = object  # the pool's class follows it


class _NativeTls(_Base):
    #: For whoever must interrupt the handshake of TLS, when there is no ``_sock`` yet.
    handshaking: socket.socket | None = None

    def _wrap_socket_with_ssl(self, sock: socket.socket) -> TlsSocket:
        self.handshaking = sock
        try:
            wrapped = TlsSocket(sock, _settings(self))
            try:
                wrapped.handshake()
            except BaseException:
                wrapped.close()
                raise
        except BaseException:
            sock.close()
            raise
        finally:
            self.handshaking = None
        return wrapped


def _settings(connection: redis.connection.SSLConnection) -> dict[str, Any]:
    """The arguments of `TlsStream`."""
    password = _Password(connection.certificate_password)
    context = _context(connection, password)
    if type(context) is not ssl.SSLContext:
        raise UnsupportedConnection(
            "batch_tile_* do TLS by OpenSSL, and ssl.create_default_context makes "
            f"{type(context).__module__}.{type(context).__name__} here"
        )
    # Python refuses some names, and encodes others.
    name = context.wrap_bio(
        ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname=connection.host
    ).server_hostname
    assert name is not None
    ciphers = context.get_ciphers()
    system = ssl.get_default_verify_paths()
    data = connection.ca_data
    return {
        "server_name": name.encode(),
        "check_server_name": context.check_hostname,
        "check_common_name": context.hostname_checks_common_name,
        "wants_certificate": context.verify_mode != ssl.CERT_NONE,
        "verify_flags": int(context.verify_flags),
        "options": int(context.options),
        # Negative: the lowest, or highest, that there is.
        "min_version": max(0, int(context.minimum_version)),
        "max_version": max(0, int(context.maximum_version)),
        "security_level": context.security_level,
        "ciphers": _names(ciphers, of_1_3=False),
        "cipher_suites": _names(ciphers, of_1_3=True),
        "system_ca_file": _path(
            os.environ.get(system.openssl_cafile_env, system.openssl_cafile)
        ),
        "system_ca_path": _path(
            os.environ.get(system.openssl_capath_env, system.openssl_capath)
        ),
        "ca_file": _path(connection.ca_certs),
        "ca_path": _path(connection.ca_path),
        "ca_data": data.encode() if isinstance(data, str) else bytes(data or b""),
        "ca_data_is_pem": isinstance(data, str),
        "certificate_file": _path(connection.certfile),
        "key_file": _path(connection.keyfile),
        "password": password.value,
    }


def _context(
    connection: redis.connection.SSLConnection, password: _Password
) -> ssl.SSLContext:
    """As in redis-py's ``_wrap_socket_with_ssl``, with the same exceptions.

    Given files, it leaves the system's authorities, which take 20 ms to read, to us.
    """
    context = ssl.create_default_context(
        cafile=connection.ca_certs, capath=connection.ca_path, cadata=connection.ca_data
    )
    context.check_hostname = connection.check_hostname
    context.verify_mode = connection.cert_reqs
    for flag in connection.ssl_include_verify_flags or ():
        context.verify_flags |= flag
    for flag in connection.ssl_exclude_verify_flags or ():
        context.verify_flags &= ~flag
    if connection.certfile or connection.keyfile:
        context.load_cert_chain(
            certfile=connection.certfile,
            keyfile=connection.keyfile,
            password=password.given,
        )
    if connection.ssl_min_version is not None:
        context.minimum_version = connection.ssl_min_version
    if connection.ssl_ciphers:
        context.set_ciphers(connection.ssl_ciphers)
    return context


class _Password:
    """Of a key: what Python is given, and the ``value`` that it makes of it."""

    def __init__(self, given: Any) -> None:
        self.given = self._ask if given is None or callable(given) else given
        self.value = b"" if callable(self.given) else _octets(given)
        self._callable = given

    def _ask(self) -> bytes:
        if self._callable is None:
            # OpenSSL would ask at the terminal, on a thread of ours, and others wait.
            raise ValueError(
                "the key in ssl_keyfile or ssl_certfile is encrypted: expected "
                "ssl_password, got none"
            )
        self.value = _octets(self._callable())
        return self.value


def _octets(password: str | bytes | bytearray) -> bytes:
    return password.encode() if isinstance(password, str) else bytes(password)


def _names(ciphers: list[Any], *, of_1_3: bool) -> bytes:
    return ":".join(
        cipher["name"]
        for cipher in ciphers
        if (cipher["protocol"] == "TLSv1.3") is of_1_3
    ).encode()


def _path(path: Any) -> bytes:
    return os.fsencode(path) if path else b""


class TlsSocket:
    """What redis-py needs of a socket, over a native TLS stream."""

    def __init__(self, sock: socket.socket, settings: dict[str, Any]) -> None:
        """Take a connected socket over; its time-out stays."""
        self._timeout = sock.gettimeout()
        # The time-outs are ours: this is a property of what both descriptors share.
        sock.setblocking(False)
        # Of its own, because it goes on without us, and the socket without it is what
        # can be shut down by other threads.
        self._sock = sock
        try:
            self._stream = TlsStream(sock.fileno(), **settings)
        except RuntimeError as error:
            raise ssl.SSLError(ssl.SSL_ERROR_SSL, str(error)) from None

    def take_stream(self) -> TlsStream:
        """Give the stream away; closes the socket."""
        self._sock.close()
        return self._stream

    def handshake(self) -> None:
        """Do TLS's own."""
        deadline = self._deadline()
        while not self._stream.handshake():
            self._wait(select.POLLIN, deadline)

    def recv_into(self, buffer: Buffer) -> int:
        deadline = self._deadline()
        while not (count := self._stream.read_into(buffer)):
            self._wait(select.POLLIN, deadline)
        return count

    def recv(self, size: int) -> bytes:
        room = bytearray(size)
        return bytes(room[: self.recv_into(room)])

    def sendall(self, data: Buffer) -> None:
        deadline = self._deadline()
        rest = memoryview(data).cast("B")
        while rest:
            count = self._stream.write(rest)
            rest = rest[count:]
            if not count:
                self._wait(select.POLLOUT, deadline)

    def pending(self) -> int:
        """Whether `recv` has something though the descriptor is not readable."""
        return int(self._stream.holds_bytes)

    def settimeout(self, timeout: float | None) -> None:
        self._timeout = timeout

    def gettimeout(self) -> float | None:
        return self._timeout

    def fileno(self) -> int:
        return self._sock.fileno()

    def getpeername(self) -> Any:
        return self._sock.getpeername()

    def getsockname(self) -> Any:
        return self._sock.getsockname()

    def shutdown(self, how: int) -> None:
        """End the connection; any thread may."""
        self._sock.shutdown(how)

    def close(self) -> None:
        self._stream.close()
        self._sock.close()

    def _deadline(self) -> float:
        if self._timeout is None:
            return float("inf")
        return time.monotonic() + self._timeout

    def _wait(self, usual: int, deadline: float) -> None:
        if self._timeout == 0:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        events = usual
        if self._stream.crossed:
            events = select.POLLIN + select.POLLOUT - usual
        poll = select.poll()
        poll.register(self._sock, events)
        left = deadline - time.monotonic()
        # At least once: what came in time was in time.
        if not poll.poll(None if left == float("inf") else max(0.0, left) * 1000):
            raise TimeoutError("timed out")
