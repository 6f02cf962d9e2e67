"""redis-py connects and authenticates; then the engine takes the socket over.

One small thread an engine: the native workers never call Python, they ask for a
connection and go on. All that redis-py knows about connecting (name resolution,
credentials, client name, time-outs, `redis_connect_func`, custom connection classes)
holds, because redis-py's own Connection does it, from the pool's settings of that
moment.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
import select
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import redis.asyncio.connection
import redis.asyncio.sentinel
import redis.connection
import redis.sentinel
from redis._parsers.base import BaseParser
from redis.backoff import NoBackoff
from redis.exceptions import (
    ConnectionError,
    RedisError,
    ResponseError,
    TimeoutError,
)
from redis.retry import AbstractRetry, Retry

from fastkv._core import Engine, Notice, RetryPolicy, TlsStream
from fastkv._version import __version__
from fastkv.awaited import AwaitedCredentials, AwaitedSentinel, FindLoop
from fastkv.errors import UnsupportedConnection, error_of_reply, for_callers
from fastkv.log import Limited, connections
from fastkv.shielded import started
from fastkv.tls import TlsSocket, check_tls, native_tls_class

SyncPool: TypeAlias = redis.connection.ConnectionPool
AsyncPool: TypeAlias = redis.asyncio.connection.ConnectionPool
Pool: TypeAlias = "SyncPool | AsyncPool"

# What belongs to the pool's own RESP3 connections. A native one speaks RESP2 and gets
# no push messages; it reads host and time-outs anew at each connect.
NOT_FOR_LANES = frozenset(
    {
        "himport_registry",
        "maint_notifications_config",
        "maint_notifications_pool_handler",
        "maintenance_notification_hash",
        "maintenance_state",
        "orig_host_address",
        "orig_socket_connect_timeout",
        "orig_socket_timeout",
        "oss_cluster_maint_notifications_handler",
    }
)

_SYNC_TWIN = {
    redis.asyncio.connection.Connection: redis.connection.Connection,
    redis.asyncio.connection.SSLConnection: redis.connection.SSLConnection,
    redis.asyncio.connection.UnixDomainSocketConnection: (
        redis.connection.UnixDomainSocketConnection
    ),
    redis.asyncio.sentinel.SentinelManagedConnection: (
        redis.sentinel.SentinelManagedConnection
    ),
    redis.asyncio.sentinel.SentinelManagedSSLConnection: (
        redis.sentinel.SentinelManagedSSLConnection
    ),
}

# Delays that are worked out in advance: native threads cannot ask a Backoff.
_MOST_DELAYS = 64

# A connection that fails while others work is asked for again at this pace at most.
_LEAST_DELAY = 0.05


# Modules whose frames have sockets that are being connected.
_CONNECT = ("fastkv", "redis", "socket", "ssl")

# What the engine tells of, for the log.
_NOTICES = {
    Notice.CONNECTION_LOST: (logging.WARNING, "lost a connection with work on it"),
    Notice.IDLE_CONNECTION_LOST: (logging.INFO, "lost an idle connection"),
    Notice.RANGES_REFUSED: (
        *(logging.WARNING, "range reads are refused, values are read whole"),
    ),
}


def address_of(pool: Pool) -> str:
    """Host and port, a unix socket's path, or the name of a service of Sentinel's."""
    kwargs = pool.connection_kwargs
    name = getattr(pool, "service_name", None) or kwargs.get("path")
    return name or f"{kwargs.get('host', 'localhost')}:{kwargs.get('port', 6379)}"


def check_supported(pool: Pool) -> None:
    """Raise `UnsupportedConnection` for what can be known without connecting."""
    cls = pool.connection_class
    twin = _SYNC_TWIN.get(cls, cls)
    if issubclass(twin, redis.connection.SSLConnection):
        check_tls(twin, pool.connection_kwargs)
    if issubclass(cls, redis.asyncio.connection.AbstractConnection):
        if cls not in _SYNC_TWIN:
            raise UnsupportedConnection(
                f"batch_tile_* cannot use connections of class {cls.__name__} on an "
                "event loop; known are redis-py's own"
            )
        if inspect.iscoroutinefunction(
            pool.connection_kwargs.get("redis_connect_func")
        ):
            raise UnsupportedConnection(
                "batch_tile_* cannot await a redis_connect_func; pass a plain function"
            )


def make_connection(pool: Pool, find_loop: FindLoop) -> Any:
    """Make the sync redis-py Connection for one native connection; it does no I/O
    yet.
    """
    kwargs = {k: v for k, v in pool.connection_kwargs.items() if k not in NOT_FOR_LANES}
    kwargs["protocol"] = 2
    _name_fastkv(kwargs)
    cls: Any = pool.connection_class
    if cls in _SYNC_TWIN:
        cls = _SYNC_TWIN[cls]
        for key in ("retry", "parser_class", "encoder_class"):  # asyncio's own
            kwargs.pop(key, None)
        provider = kwargs.get("credential_provider")
        if provider is not None:
            kwargs["credential_provider"] = AwaitedCredentials(provider, find_loop)
        if "connection_pool" in kwargs:  # Sentinel's
            kwargs["connection_pool"] = AwaitedSentinel(
                kwargs["connection_pool"], find_loop
            )
    if issubclass(cls, redis.connection.SSLConnection):
        cls = native_tls_class(cls)
    connection = cls(**kwargs)
    # The connector retries by itself, so that close() need not wait for a back-off.
    connection.retry = Retry(NoBackoff(), 0)
    return connection


def take_socket(connection: Any) -> int | TlsStream:
    """Detach the descriptor or stream of a connected redis-py Connection; the caller
    owns it.
    """
    sock = connection._sock
    if type(sock) not in (socket.socket, TlsSocket):
        connection.disconnect()
        raise UnsupportedConnection(
            f"batch_tile_* need an operating system's socket; a connection of class "
            f"{type(connection).__name__} has {type(sock).__name__}"
        )
    parser = connection._parser
    reader = getattr(parser, "_reader", None)  # hiredis; else redis-py's own parser
    if reader.has_data() if reader is not None else parser._buffer.unread_bytes() > 0:
        connection.disconnect()
        raise ConnectionError("Unread data on a connection that was just made.")
    # detach() before anything can close the socket: redis-py shuts sockets down, which
    # would end every duplicate of the descriptor too.
    taken: int | TlsStream = (
        sock.take_stream() if type(sock) is TlsSocket else sock.detach()
    )
    connection._sock = None
    parser.on_disconnect()
    return taken


def retry_of(pool: Pool) -> AbstractRetry[Any]:
    """The Retry that redis-py's Connection would make of the pool's settings."""
    kwargs = pool.connection_kwargs
    retry: AbstractRetry[Any] | None = kwargs.get("retry")
    listed = kwargs.get("retry_on_error")
    errors = list(listed) if isinstance(listed, (list, tuple, set, frozenset)) else []
    if kwargs.get("retry_on_timeout"):
        errors.append(TimeoutError)
    if retry is None:
        retry = Retry(NoBackoff(), 1 if errors else 0)
    elif not errors:
        return retry
    retry = copy.deepcopy(retry)
    retry.update_supported_errors(errors)
    return retry


def policy_of(retry: AbstractRetry[Any], pool: Pool) -> RetryPolicy:
    """The part of a Retry that concerns an operation whose connection was lost."""
    errors = retry._supported_errors
    retries = retry._retries
    backoff = copy.deepcopy(retry._backoff)
    backoff.reset()
    attempts = _MOST_DELAYS if retries < 0 else min(retries, _MOST_DELAYS)
    replies = _replies_raising(errors)
    if _follows_master(pool) and issubclass(ConnectionError, errors):
        replies.append(_DEMOTED)
    return RetryPolicy(
        retries,
        [max(0.0, float(backoff.compute(n + 1))) for n in range(attempts)],
        connection_lost=issubclass(ConnectionError, errors),
        stalled=issubclass(TimeoutError, errors),
        error_replies=replies,
    )


def error_of_reply_of(pool: Pool) -> Callable[[str], RedisError]:
    """What makes exceptions of the error replies on connections of a pool."""
    if not _follows_master(pool):
        return error_of_reply

    def of_master(line: str) -> RedisError:
        if line.encode().startswith(_DEMOTED):
            return ConnectionError("The previous master is now a slave")
        return error_of_reply(line)

    return of_master


# Sentinel's pools: the master of that moment is found at each connect. A server that
# answers so was the master when we connected, and redis-py, too, looks again then.
_DEMOTED = b"READONLY "


def _follows_master(pool: Pool) -> bool:
    return bool(getattr(pool, "is_master", False))


def _replies_raising(errors: tuple[type[Exception], ...]) -> list[bytes]:
    """Beginnings of the error replies for which redis-py raises one of ``errors``."""
    if issubclass(ResponseError, errors):
        return [b""]
    prefixes = []
    classes: dict[str, Any] = BaseParser.EXCEPTION_CLASSES
    for code, raised in classes.items():
        if isinstance(raised, dict):
            for text, exception in raised.items():
                if issubclass(exception, errors):
                    prefixes.append(f"{code} {text}".encode())
        elif issubclass(raised, errors):
            prefixes.append(f"{code} ".encode())
    return prefixes


def _name_fastkv(kwargs: dict[str, Any]) -> None:
    """Add ours to the driver names that ``CLIENT LIST`` shows; switched off stays
    off.
    """
    try:
        from redis.driver_info import DriverInfo
    except ImportError:  # redis-py before 7.1
        return
    if "lib_name" in kwargs or "lib_version" in kwargs:
        return
    info = kwargs.get("driver_info", DriverInfo())
    if isinstance(info, DriverInfo):
        kwargs["driver_info"] = copy.deepcopy(info).add_upstream_driver(
            "fastkv", __version__
        )


def _without_secrets(error: BaseException) -> str:
    """For a log: some servers repeat the password in their answer to AUTH."""
    if type(error) in (ConnectionError, TimeoutError):  # the system's, by redis-py
        return f"{type(error).__name__}: {error}"
    return type(error).__name__


def _is_plain(sock: socket.socket | TlsSocket) -> bool:
    return type(sock) is socket.socket


def _close_in_child(sock: socket.socket | TlsSocket) -> None:
    """The fork may have come when it was half made, or half closed."""
    try:
        if isinstance(sock, TlsSocket):
            stream, sock = getattr(sock, "_stream", None), sock._sock
            if stream is not None:
                stream.close()
        # So that its own close, if one comes, does not hit somebody else's descriptor.
        os.close(socket.socket.detach(sock))
    except (AttributeError, OSError):
        pass  # it has none


class _Attempt:
    """A connection that the engine asked for."""

    def __init__(self) -> None:
        self.lane = -1
        self.failures = 0


class Connector:
    """Serves an engine's requests for connections, until `close`.

    Attributes:
        error: Why the last attempt that was given up has failed.
    """

    def __init__(
        self,
        engine: Engine,
        pool: Pool,
        find_loop: FindLoop,
        check_used: Callable[[], None],
    ) -> None:
        self.error: Exception = ConnectionError("Not connected.")
        self._engine = engine
        self._pool = weakref.ref(pool)
        self._find_loop = find_loop
        self._check_used = check_used
        self._address = address_of(pool)
        self._log = Limited(connections)
        self._failing = False  # the last attempt to connect has failed
        self._closing = False
        # The connector's thread only. After a failure the first is tried again, and
        # stands for all: at a server that says nothing each would take its time-out.
        self._attempts: list[_Attempt] = []
        self._due = 0.0  # time.monotonic(); nothing is tried before
        self._connecting: Any = None  # the Connection at work, for close()
        self._newest = 0  # batch that may be told of a failure of this turn
        # Held when a Connection begins, while its socket is handed over, and across
        # fork, which finds it either with the Connection or with the engine.
        # It knows its owner, whatever a signal handler's exception has cut short.
        self._handing_over = threading.RLock()
        self._at_fork: list[socket.socket | TlsSocket] = []  # on their way
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Start the thread. Before, a fork must know of the engine's descriptors."""
        self._thread = started(self._serve, "fastkv-connector")

    def close(self, timeout: float) -> None:
        """Stop, after the engine was closed. A connect to an address that does not
        answer cannot be interrupted: such a thread ends by itself, later. May be called
        again.
        """
        if self._pid != os.getpid():
            return  # a fork in C: the parent goes on with what it was connecting
        self._closing = True
        self._engine.wake_connector()
        connection = self._connecting
        sock = getattr(connection, "_sock", None)
        sock = sock or getattr(connection, "handshaking", None)
        if sock is not None:
            try:
                sock.shutdown(socket.SHUT_RDWR)  # ends a handshake that waits
            except (OSError, AttributeError):
                pass  # over already, or what a connection class has for a socket
        thread = self._thread
        if thread is not None and threading.get_ident() != thread.ident:
            thread.join(timeout)

    def before_fork(self) -> None:
        """One of the last two must follow."""
        self._handing_over.acquire()

    def look_before_fork(self) -> bool:
        """Take note of the sockets that are on their way.

        Returns:
            Whether none is in the making, which this thread could not see.
        """
        self._at_fork = found = self._sockets_on_their_way()
        if self._connecting is None:
            return True
        # Below 0: the system has made it, perhaps, and its thread not yet heard of it.
        return bool(found) and all(one.fileno() >= 0 for one in found if _is_plain(one))

    def _sockets_on_their_way(self) -> list[socket.socket | TlsSocket]:
        if self._connecting is None:
            return []
        found = list(vars(self._connecting).values())
        # redis-py keeps a socket that it is connecting in a local variable.
        thread = self._thread
        frame = sys._current_frames().get(thread.ident or 0) if thread else None
        while frame is not None:
            # Those of a user's hook may be the application's.
            if str(frame.f_globals.get("__name__")).partition(".")[0] in _CONNECT:
                found += frame.f_locals.values()
            frame = frame.f_back
        # Not isinstance, which asks the objects.
        return [
            one for one in found if issubclass(type(one), (socket.socket, TlsSocket))
        ]

    def after_fork_in_parent(self) -> None:
        """Go on. May be called again."""
        self._at_fork.clear()
        try:
            while self._handing_over._is_owned():  # type: ignore[attr-defined]
                self._handing_over.release()
        except RuntimeError:
            pass  # a signal handler has forked in between, and done it

    def after_fork_in_child(self) -> None:
        """Give the descriptors back; the parent goes on with what it was connecting."""
        self._closing = True
        for sock in self._at_fork:
            _close_in_child(sock)
        self._at_fork.clear()

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._engine.connect_event(), select.POLLIN)
        failure: BaseException | None = None
        later = 0
        while not self._closing:
            try:
                if failure is not None:
                    later = self._engine.newest_batch()
                    # Who waits for another lane must be told, too.
                    self._take_requests()
                    self._give_up(self._newest, failure)
                    failure = None  # it keeps the pool alive
                self._turn(poll)
            except BaseException as error:
                # A hook of the user's, whatever it raises; or there is no memory.
                # Nobody may wait for ever, and who comes later may have more luck.
                if failure is None:
                    failure = error
                else:
                    self._newest = later  # who came before could not even be told
                    time.sleep(_LEAST_DELAY)
                self._engine.wake_connector()  # what it stood for is still to be done

    def _turn(self, poll: select.poll) -> None:
        wait = self._due - time.monotonic()
        if not self._attempts:
            poll.poll()
        elif wait > 0:
            poll.poll(wait * 1000 + 1)
        # Who comes later is served by a turn of their own.
        self._newest = self._engine.newest_batch()
        # Clears the event, so it comes before the look at _closing.
        self._take_requests()
        for notice, text in self._engine.take_notices():
            level, kind = _NOTICES[notice]
            self._log.say(level, kind, f"{self._address}: {text}")
        self._check_used()  # may close us
        if self._closing or not self._attempts or self._due > time.monotonic():
            return
        pool = self._pool()
        if pool is None:
            # Who closes us may not know yet: a garbage collection takes its time
            # between the pool and the client.
            raise ConnectionError("The connection pool is gone.")
        try:
            retry = retry_of(pool)
            while self._attempts and not self._closing:
                if not self._try(pool, self._attempts[0], retry):
                    return
        finally:
            del pool  # the traceback of `error` holds this frame

    def _take_requests(self) -> None:
        while True:
            self._attempts.append(_Attempt())  # first, because it takes memory
            lane = self._engine.take_connect_request()
            if lane is None:
                break
            self._attempts[-1].lane = lane
        self._attempts.pop()

    def _try(self, pool: Pool, attempt: _Attempt, retry: AbstractRetry[Any]) -> bool:
        """Make one attempt. Say whether there is a connection."""
        newest = self._engine.newest_batch()
        connection = None
        try:
            connection = make_connection(pool, self._find_loop)
            with self._handing_over:  # a fork has looked, and seen nothing
                self._connecting = connection
            stall_timeout = float(connection.socket_timeout or 0)
            health_interval = float(connection.health_check_interval or 0)
            connection.connect()
            with self._handing_over:
                taken = take_socket(connection)
                if isinstance(taken, TlsStream):
                    adopt = self._engine.adopt_tls
                    adopt(attempt.lane, taken, stall_timeout, health_interval)
                else:
                    self._engine.adopt(
                        attempt.lane, taken, stall_timeout, health_interval
                    )
        except BaseException as error:
            # redis-py does it for errors of its own; the others would leave the socket
            # to the garbage collector.
            if connection is not None:
                connection.disconnect()
            if self._closing:
                return False
            self._failing = True
            self._log.say(
                logging.WARNING,
                "cannot connect",
                f"{self._address}: {_without_secrets(error)}",
            )
            attempt.failures += 1
            delay = float(retry._backoff.compute(attempt.failures))
            retries = retry._retries
            if isinstance(error, retry._supported_errors) and (
                retries < 0 or attempt.failures <= retries
            ):
                self._due = time.monotonic() + delay
                return False
            self._give_up(newest, error, delay)
            return False
        finally:
            self._connecting = None
            del pool  # the traceback of `error` holds this frame
        self._attempts.remove(attempt)
        if self._failing:
            self._failing = False
            self._log.say(logging.INFO, "connected again", self._address)
        return True

    def _give_up(self, newest: int, error: BaseException, delay: float = 0.0) -> None:
        """The others would fail likewise: nobody should wait for each of them."""
        self.error = for_callers(error)
        self._due = 0.0
        failure: BaseException | None = None
        for attempt in list(self._attempts):
            try:
                self._engine.connect_failed(
                    attempt.lane,
                    newest,
                    type(error).__name__,
                    max(delay, _LEAST_DELAY),
                )
            except MemoryError as no_memory:  # the next may be what somebody waits for
                failure = no_memory
            else:
                self._attempts.remove(attempt)
        if failure is not None:
            raise failure

    def fresh_error(self) -> Exception:
        """A copy of `error`, for one caller to raise."""
        try:
            error = copy.copy(self.error)
        except Exception:  # an exception class of the user's that cannot be copied
            return self.error
        error.__cause__ = self.error
        return error
