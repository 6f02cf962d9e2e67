"""Who carries the batches of a chunk store: the node of one server, or the nodes of a
Redis Cluster. Both wait in the three ways that LMCache's doors need.
"""

from __future__ import annotations

import asyncio
import copy
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, Protocol, TypeAlias

from redis.exceptions import ConnectionError, TimeoutError

from fastkv import rounds
from fastkv._core import Batch, CompletionQueue, Stats
from fastkv.client import Redis
from fastkv.cluster import RedisCluster
from fastkv.connector import make_connection
from fastkv.errors import for_callers
from fastkv.info import TileInfo, cluster_info
from fastkv.node import Node, TileFuture
from fastkv.refresher import Refresh, Shared
from fastkv.shielded import shielded

Attempt: TypeAlias = "Shared[RedisCluster]"


class Carrier(Protocol):
    """How a batch gets its answers. Thread-safe; nothing connects before a request."""

    def run(self, batch: Batch, timeout: float | None) -> list[bool]:
        """Block until every key has its answer."""

    async def wait(self, batch: Batch, timeout: float | None) -> list[bool]:
        """Await. A cancelled task goes on once no worker can touch the memory."""

    def submit_to(
        self, queue: CompletionQueue, batch: Batch, timeout: float | None
    ) -> None:
        """Do not block; the batch comes out of `drain` once, if this does not raise,
        and its ``waiter`` returns or raises what `run` would have.
        """

    def drain(self, queue: CompletionQueue) -> list[Batch]:
        """Return the batches of `submit_to` that completed, their memory unpinned."""

    def client(self) -> Redis | RedisCluster:
        """For redis-py's own commands. May connect."""

    def tile_info(self) -> TileInfo:
        """Of the client; zeros until there is one. Connects nothing."""

    def close(self) -> None:
        """Complete what is pending with an error, join the threads. Idempotent."""


class OneServer:
    """A `Carrier` over the native connections of one client."""

    def __init__(self, client: Redis) -> None:
        """Raises what redis-py says of wrong arguments, at a connect otherwise."""
        self._client = client
        self._closed = False
        make_connection(client.connection_pool, lambda: None)
        # Starts the threads, so that no submit has to. One for life, as the queues of
        # `submit_to` belong to its engine.
        self._node = self._current()

    def _current(self) -> Node:
        node = None if self._closed else self._client._node()
        if node is None or self._closed:
            # Or it was closed while a node was made.
            self._client.close()
            raise _closed()
        return node

    def run(self, batch: Batch, timeout: float | None) -> list[bool]:
        return self._current().run(batch, timeout)

    async def wait(self, batch: Batch, timeout: float | None) -> list[bool]:
        return await self._current().wait(batch, timeout)

    def submit_to(
        self, queue: CompletionQueue, batch: Batch, timeout: float | None
    ) -> None:
        self._node.submit_to(queue, batch, timeout)

    def drain(self, queue: CompletionQueue) -> list[Batch]:
        return self._node.drain(queue)

    def client(self) -> Redis:
        return self._client

    def tile_info(self) -> TileInfo:
        return self._client.tile_info()

    def close(self) -> None:
        self._closed = True
        self._client.close()


class Cluster:
    """A `Carrier` over a cluster's client, which connects when it is made: on a thread
    of its own, at the first request. Requests wait for the first attempt. After one
    that has failed, whoever comes next starts another and fails at once, so that a
    cluster that is away costs nobody the time of connecting.
    """

    def __init__(self, url: str, arguments: Mapping[str, Any]) -> None:
        self._make: Callable[[], RedisCluster] = lambda: RedisCluster.from_url(
            url, **arguments
        )
        # Never taken by the main thread: its signal handlers may use this, too.
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._closed = False
        self._attempt: Attempt | None = None  # under way, or the one that succeeded
        self._under_way = False
        self._error: Exception | None = None  # of the last attempt
        self._in_flight: set[Future[list[bool]]] = set()  # of `submit_to`
        self._done: deque[Batch] = deque()

    # --- the client ------------------------------------------------------------------

    def _check_fork(self) -> None:
        if self._pid != os.getpid():  # neither the lock's holder nor the thread is here
            self._lock = threading.Lock()
            self._pid = os.getpid()
            if self._attempt is not None:
                # A thread of the parent's may have had its lock.
                self._attempt._condition.forked()
                if not self._attempt.done():
                    self._attempt, self._under_way = None, False

    def _connected(self) -> Attempt:
        attempt = self._attempt
        usual = not self._closed and self._error is None
        if attempt is not None and usual and self._pid == os.getpid():
            return attempt
        return shielded(self._begun)

    def _begun(self) -> Attempt:
        self._check_fork()
        with self._lock:
            if self._closed:
                raise _closed()
            if self._attempt is None:
                attempt: Attempt = Shared()
                # May raise; then there is no attempt that anybody could wait for.
                threading.Thread(
                    target=self._connect,
                    args=(attempt,),
                    name="fastkv-cluster",
                    daemon=True,
                ).start()
                self._attempt, self._under_way = attempt, True
            if self._error is not None:
                raise _copy(self._error)
            return self._attempt

    def _connect(self, attempt: Attempt) -> None:
        client: RedisCluster | None = None
        error: Exception | None = None
        try:
            client = self._make()
        except BaseException as failure:  # a hook of the user's, whatever it raises
            # Without its traceback, which keeps redis-py's connections open.
            error = _copy(for_callers(failure))
        with self._lock:
            late = self._closed  # nobody will see the client: `close` ends the attempt
            self._under_way = False
            self._error = error
            if error is not None:
                self._attempt = None
        if late:
            if client is not None:
                client.close()
        elif client is not None:
            attempt.set_result(client)
        else:
            attempt.set_exception(error)

    def client(self) -> RedisCluster:
        return self._connected().wait()

    def _check_closed(self, client: RedisCluster) -> None:
        if self._closed:  # in between; the client may have opened again
            client.close()

    def tile_info(self) -> TileInfo:
        attempt = self._attempt
        if attempt is None or not attempt.done() or attempt.exception() is not None:
            return cluster_info(Stats(), {})
        return attempt.result().tile_info()

    # --- the three ways to wait ------------------------------------------------------

    def run(self, batch: Batch, timeout: float | None) -> list[bool]:
        began = time.monotonic()
        try:
            client = self._connected().wait(timeout)
        except FutureTimeoutError:
            raise _not_in_time(timeout) from None
        try:
            return rounds.run(client, batch, _rest(timeout, began))
        finally:
            self._check_closed(client)

    async def wait(self, batch: Batch, timeout: float | None) -> list[bool]:
        began = time.monotonic()
        attempt = self._connected()
        try:
            client = await asyncio.wait_for(
                # One that is not awaited any more must go on for the others.
                asyncio.shield(asyncio.wrap_future(attempt)),
                timeout,
            )
        except asyncio.TimeoutError:
            raise _not_in_time(timeout) from None
        try:
            return await rounds.wait(_OnLoop(client), batch, _rest(timeout, began))
        finally:
            self._check_closed(client)

    def submit_to(
        self, queue: CompletionQueue, batch: Batch, timeout: float | None
    ) -> None:
        began = time.monotonic()

        def submit(attempt: Future[RedisCluster]) -> None:
            try:
                client = attempt.result()
                try:
                    future = client._tile_submit(batch, _rest(timeout, began))
                finally:
                    self._check_closed(client)
            except Exception as error:
                future = TileFuture(list, lambda: None)
                future.set_exception(error)
            self._in_flight.add(future)
            future.add_done_callback(done)

        def done(future: Future[list[bool]]) -> None:
            self._in_flight.discard(future)
            batch.waiter = _raise_closed if future.cancelled() else future.result
            self._done.append(batch)
            queue.wake()

        self._connected().add_done_callback(submit)

    def drain(self, queue: CompletionQueue) -> list[Batch]:
        queue.clear()
        done = []
        try:
            while True:
                done.append(self._done.popleft())
        except IndexError:
            return done

    def close(self) -> None:
        attempt = shielded(self._end)
        if attempt is None or attempt.exception() is not None:
            return
        attempt.result().close()
        # No worker is left; a future may still be on its way to hear of it.
        for future in list(self._in_flight):
            future.cancel()

    def _end(self) -> Attempt | None:
        self._check_fork()
        with self._lock:
            already, self._closed = self._closed, True
            attempt, under_way = self._attempt, self._under_way
        if attempt is not None and under_way and not already:
            attempt.set_exception(_closed())
        return attempt


class _OnLoop:
    """A blocking client as `fastkv.rounds.wait` wants it."""

    def __init__(self, client: RedisCluster) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def _tile_refresh(self, step: Refresh) -> None:
        done = self._client._tile_refresher.do(step, self._client._tile_refresh)
        await asyncio.wrap_future(done)


def _copy(error: Exception) -> Exception:
    try:
        return copy.copy(error)
    except Exception:  # its class wants other arguments than its message
        return ConnectionError(f"{type(error).__name__}: {error}")


def _raise_closed() -> list[bool]:
    raise _closed()


def _closed() -> ConnectionError:
    return ConnectionError("The store was closed.")


def _not_in_time(timeout: float | None) -> TimeoutError:
    return TimeoutError(f"The cluster was not reached within {timeout} seconds.")


def _rest(timeout: float | None, began: float) -> float | None:
    if timeout is None:
        return None
    return max(timeout - (time.monotonic() - began), 0.001)
