"""The native side of one connection pool: an engine, its connector, and who waits on
it.

Shared by all clients of the pool. Knows four ways to wait for a batch, and no client
class.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from redis.exceptions import ConnectionError

from fastkv import commands, forking, telemetry
from fastkv._core import (
    Batch,
    Code,
    CompletionQueue,
    Engine,
    RetryPolicy,
    Stats,
)
from fastkv.connector import (
    Connector,
    Pool,
    check_supported,
    error_of_reply_of,
    policy_of,
    retry_of,
)
from fastkv.errors import error_of_code
from fastkv.log import logger
from fastkv.options import TileOptions
from fastkv.shielded import Condition, shielded, started

# Requests that a connection may have in flight: enough to hide a round trip of lookups.
_WINDOW_REQUESTS = 1024
# Seconds that close() waits for a connector in the middle of a connect, and for a
# callback.
_PATIENCE = 0.4


def _nothing(*_: object) -> Any:
    """What is left to do for a future that is done."""


class TileFuture(Future[list[bool]]):
    """The future of a batch. `cancel` takes the batch back, and its memory stays pinned
    until no worker can touch it.
    """

    def __init__(self, finish: Callable[[], list[bool]], cancel: Callable[[], None]):
        super().__init__()
        self._condition: Condition = Condition()
        self._finish = finish
        self._cancel = cancel

    def cancel(self) -> bool:
        cancelled = super().cancel()
        if cancelled:
            self._cancel()
        return cancelled

    def result(self, timeout: float | None = None) -> list[bool]:
        forking.let_go()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        forking.let_go()
        return super().exception(timeout)

    def _drained(self) -> None:
        try:
            if not self.set_running_or_notify_cancel():
                return
            try:
                result = self._finish()
            except BaseException as error:
                self.set_exception(error)
            else:
                self.set_result(result)
        finally:
            self._finish = self._cancel = _nothing  # they held the node, and the client
            del self  # the traceback of the error holds this frame

    def _forked(self) -> None:
        # The threads and loops that callbacks and waiters belong to do not exist here,
        # and locks of theirs may be held.
        own = vars(self)
        own["_done_callbacks"] = []
        waiters, own["_waiters"] = own["_waiters"], []
        self._finish = self._cancel = _nothing
        self._condition.forked()
        if not self.done():
            self.set_exception(
                ConnectionError("The batch was submitted before a fork, in the parent.")
            )
        # If a signal handler has forked, this thread may be about to complete it, or
        # about to take a waiter of its own out.
        for name in ("set_running_or_notify_cancel", "set_result", "set_exception"):
            own[name] = _nothing
        own["_waiters"] = waiters


class Node:
    """See the module. Thread-safe."""

    def __init__(
        self,
        pool: Pool,
        options: TileOptions,
        stats: Stats,
        unused: Callable[[Node], None],
    ) -> None:
        """Make all but what `begin` starts.

        Args:
            pool: Where redis-py's connections come from; not kept alive.
            options: For the engine.
            stats: Where it counts.
            unused: Called on a thread of the node's when it has no users any more and
                `wake_connector` was called.
        """
        check_supported(pool)
        self.options = options
        if getattr(pool, "is_master", True) is False:  # Sentinel's, of replicas
            options = options.on_replica()
        workers, connections, window_bytes, range_bytes = options.filled(
            getattr(pool, "max_connections", 1 << 30)
        )
        self.closed = False
        self.pid = os.getpid()
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()  # clients
        self.pool = weakref.ref(pool)
        self._broken = False  # a worker has died
        self.stats = stats
        self._engine = Engine(
            *(workers, connections, window_bytes, _WINDOW_REQUESTS, range_bytes),
            options.near_load_bytes,
            options.range_bytes is None,
            stats,
        )
        # Reentrant: a signal handler may use a client in the middle of anything.
        self._lock = threading.RLock()
        self._idle: list[CompletionQueue] = []  # of blocking calls
        self._futures: _FutureThread | None = None
        self._loops: list[_Loop] = []
        self._policy: tuple[object, RetryPolicy] | None = None
        self._error_of_reply = error_of_reply_of(pool)
        self._unused = unused
        self._connector = Connector(
            self._engine, pool, self._running_loop, self._check_used
        )
        # Nothing of ours keeps the pool alive. When it is gone no client is left, and
        # the connector ends us: whatever thread collects the garbage must not join
        # others.
        self._finalizer = weakref.finalize(pool, self._engine.wake_connector)
        self._finalizer.atexit = False

    def begin(self) -> None:
        """Connect from now on. A fork must know of us first."""
        self._connector.begin()

    @property
    def usable(self) -> bool:
        """Whether new batches are taken. A fork in C tells nobody."""
        return not (self.closed or self._broken) and self.pid == os.getpid()

    # --- the four ways to wait -------------------------------------------------------

    def run(self, batch: Batch, timeout: float | None) -> list[bool]:
        """Submit and block. Signal handlers run meanwhile, and may raise."""
        seconds = commands.check_timeout(timeout)
        if len(batch) == 0:
            return []
        began = time.monotonic()
        code = self._block_on(batch, seconds)
        self._check_accepted(code, batch)
        return self._finish(batch, seconds, began)

    def submit(self, batch: Batch, timeout: float | None, client: object) -> TileFuture:
        """Submit; a thread of this node completes the future. ``client`` stays
        alive.
        """
        seconds = commands.check_timeout(timeout)
        began = time.monotonic()

        def finish(_client: object = client) -> list[bool]:
            return self._finish(batch, seconds, began)

        future = TileFuture(finish, partial(self._engine.cancel, batch))
        if len(batch) == 0:
            future._drained()
            return future
        try:
            code = self.start(batch, self.future_queue(), seconds, future)
            self._check_accepted(code, batch)
            return future
        except BaseException:
            # Interrupted, perhaps after it was accepted: nobody would know of it.
            self._engine.cancel(batch)
            raise

    async def wait(self, batch: Batch, timeout: float | None) -> list[bool]:
        """Submit and await. A cancelled task goes on once no worker can touch the
        memory.
        """
        seconds = commands.check_timeout(timeout)
        if len(batch) == 0:
            return []
        began = time.monotonic()
        loop = asyncio.get_running_loop()
        queue = self.queue_of(loop)

        def start() -> None:
            code = self.start(batch, queue, seconds, loop.create_future())
            self._check_accepted(code, batch)

        await settled(start, [(self, batch)])
        return self._finish(batch, seconds, began)

    def submit_to(
        self, queue: CompletionQueue, batch: Batch, timeout: float | None
    ) -> None:
        """Submit; the batch comes out of `drain` of the caller's own queue, once, and
        `result` reads it.
        """
        seconds = commands.check_timeout(timeout)
        began = time.monotonic()
        if self.closed:  # in a forked child nobody else would say so
            raise error_of_code(Code.CLOSED, "", len(batch), seconds)
        batch.waiter = partial(self._finish, batch, seconds, began)
        code = self._engine.submit(batch, queue, self._retry_policy(), seconds)
        self._check_accepted(code, batch)

    def drain(self, queue: CompletionQueue) -> list[Batch]:
        """Return the batches of `submit_to` that completed, their memory unpinned."""
        return self._engine.drain(queue)

    @staticmethod
    def result(batch: Batch) -> list[bool]:
        """Return or raise what `run` would have. Once a batch."""
        finish, batch.waiter = batch.waiter, None
        result: list[bool] = finish()
        return result

    # --- a part of a call over several nodes: see fastkv.rounds ----------------------

    def take_queue(self) -> CompletionQueue:
        """A queue for one blocking call."""
        try:
            return self._idle.pop()
        except IndexError:
            return CompletionQueue()

    def give_queue_back(self, queue: CompletionQueue) -> None:
        """Nothing is in flight on it. After an interrupt it is not worth keeping."""
        if self.closed:
            queue.close()
        else:
            self._idle.append(queue)

    def part(
        self, batch: Batch, queue: CompletionQueue
    ) -> tuple[Engine, Batch, CompletionQueue, RetryPolicy]:
        """For `fastkv._core.run_all`."""
        return self._engine, batch, queue, self._retry_policy()

    def start(
        self, batch: Batch, queue: CompletionQueue, seconds: float, waiter: object
    ) -> int:
        """Submit; ``waiter`` is told once it is drained, if the `Code` is OK."""
        batch.waiter = waiter
        code = self._engine.submit(batch, queue, self._retry_policy(), seconds)
        if code != Code.OK:
            batch.waiter = None
        return code

    def cancel(self, batch: Batch) -> None:
        """Take it back; nothing happens if it is not in flight."""
        self._engine.cancel(batch)

    def error_of(
        self, batch: Batch, refusal: int, seconds: float, began: float
    ) -> Exception | None:
        """Why a part was not accepted (``refusal`` is not OK) or not answered."""
        code = refusal or batch.code
        self._broken |= code == Code.INTERNAL_ERROR
        error: Exception | None = None
        if code == Code.CONNECT_FAILED:
            error = self._connector.fresh_error()
        elif code != Code.OK:
            error = error_of_code(code, batch.detail, len(batch), seconds)
        self._record(batch, began, error)
        return error

    def gauges(self) -> tuple[int, tuple[int, int, int]]:
        """Open connections, and queued keys: lookups, loads, stores."""
        return self._engine.gauges()

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight."""
        return self._engine.batches_in_flight == 0

    def future_queue(self) -> CompletionQueue:
        """Of the thread that completes futures; started if need be."""
        futures = self._futures
        if futures is None:
            futures = shielded(self._start_futures)
        return futures.queue

    def _start_futures(self) -> _FutureThread:
        with self._lock:
            if self._futures is None:
                if self.closed:
                    raise error_of_code(Code.CLOSED, "", 0, 0)
                self._futures = _FutureThread(self._engine)
            return self._futures

    # --- life ------------------------------------------------------------------------

    def retire_connections(self) -> None:
        """Let every connection end once it is idle; the next batch opens new ones."""
        forking.let_go()
        if not self.closed:
            self._engine.retire_connections()

    def wake_connector(self) -> None:
        """Have it look whether the node is still used."""
        if not self.closed:
            self._engine.wake_connector()

    def close(self) -> None:
        """Complete what is pending with an error, join the threads. Idempotent: whoever
        comes second does what the first has not done yet, and may have failed to.
        """
        with self._lock:
            self.closed = True
        self._finalizer.detach()
        self._engine.close()
        self._connector.close(_PATIENCE)
        futures = self._futures
        if futures is not None:
            futures.close(_PATIENCE)
        for of_whom in (self._loops, self._idle):
            while of_whom:
                try:
                    of_whom.pop().close()
                except IndexError:  # somebody else closes, too
                    break
        self._engine.close_fds()

    def before_fork(self) -> None:
        """One of the last two must follow, also if a signal handler's exception cuts
        this short.
        """
        self._connector.before_fork()
        self._engine.before_fork()

    def look_before_fork(self) -> bool:
        """See `fastkv.connector.Connector.look_before_fork`."""
        return self._connector.look_before_fork()

    def after_fork_in_parent(self) -> None:
        """Go on. May be called again."""
        self._engine.after_fork_in_parent()
        self._connector.after_fork_in_parent()

    def after_fork_in_child(self) -> None:
        """Only descriptors are left of us: give them back."""
        self.closed = True
        self._finalizer.detach()
        self._lock = threading.RLock()
        self._connector.after_fork_in_child()
        batches = self._engine.after_fork_in_child()
        if self._futures is not None:
            batches += self._futures.drained
        for batch in batches:
            if isinstance(batch.waiter, TileFuture):  # several parts may have one
                batch.waiter._forked()
        queues = [*self._idle, *(loop.queue for loop in self._loops)]
        if self._futures is not None:
            queues.append(self._futures.queue)
        for queue in queues:
            queue.close_after_fork()
        self._idle.clear()
        self._loops.clear()
        self._futures = None

    # --- details ---------------------------------------------------------------------

    def _check_used(self) -> None:
        # Before the first user comes, nobody wakes the connector.
        if not self.users:
            self._unused(self)

    def _block_on(self, batch: Batch, seconds: float) -> int:
        queue = self.take_queue()
        code = self._engine.run(batch, queue, self._retry_policy(), seconds)
        self.give_queue_back(queue)
        return code

    def _retry_policy(self) -> RetryPolicy:
        """Of the pool's settings of this moment: `set_retry` may change them. Whoever
        submits a batch comes here.
        """
        forking.let_go()
        pool = self.pool()
        if pool is None:
            raise ConnectionError("The connection pool is gone.")
        kwargs = pool.connection_kwargs
        retry = kwargs.get("retry")
        state = (
            retry,
            getattr(retry, "_retries", None),
            getattr(retry, "_supported_errors", None),
            kwargs.get("retry_on_timeout"),
        )
        if self._policy is None or self._policy[0] != state:
            self._policy = (state, policy_of(retry_of(pool), pool))
        return self._policy[1]

    def _check_accepted(self, code: int, batch: Batch) -> None:
        if code != Code.OK:
            self._broken = code == Code.INTERNAL_ERROR
            batch.waiter = None  # a cycle that would keep the memory pinned
            raise error_of_code(code, "", len(batch), 0)

    def _finish(self, batch: Batch, seconds: float, began: float) -> list[bool]:
        if batch.code == Code.INTERNAL_ERROR:
            self._broken = True
        try:
            result = commands.finish(
                batch, seconds, self._connector.fresh_error, self._error_of_reply
            )
        except Exception as error:
            self._record(batch, began, error)
            raise
        self._record(batch, began, None)
        return result

    def _record(self, batch: Batch, began: float, error: Exception | None) -> None:
        telemetry.record(batch.command, self.pool, began, error)

    def queue_of(self, loop: asyncio.AbstractEventLoop) -> CompletionQueue:
        for known in self._loops:
            if known.loop() is loop:
                return known.queue
        with self._lock:
            if self.closed:
                raise error_of_code(Code.CLOSED, "", 0, 0)
            # Loops that have ended: nobody else drains what was in flight on them.
            for ended in [known for known in self._loops if known.ended]:
                self._engine.drain(ended.queue)
                if ended.queue.in_flight == 0:
                    self._loops.remove(ended)
                    ended.queue.close()
            self._loops.append(_Loop(self._engine, loop))
            return self._loops[-1].queue

    def _running_loop(self) -> asyncio.AbstractEventLoop | None:
        with self._lock:
            loops = [known.loop() for known in self._loops]
        return next((loop for loop in loops if loop and loop.is_running()), None)


async def settled(
    start: Callable[[], None], parts: Sequence[tuple[Node, Batch]]
) -> None:
    """Start batches, whose waiters are futures of this loop, and await those that were
    accepted. If anything is raised in between, by a signal handler, say, they are
    cancelled, and it goes on once no worker can touch the memory.
    """
    try:
        start()
        for _, batch in parts:
            if batch.in_flight:
                await batch.waiter
    except GeneratorExit:
        # The coroutine is thrown away, or its loop is gone: it cannot wait any more.
        # The memory stays pinned until the batch is drained.
        for node, batch in parts:
            node.cancel(batch)
        raise
    except BaseException as error:
        cancelled = await _taken_back(parts)
        if cancelled and isinstance(error, Exception):
            raise asyncio.CancelledError from error  # nothing else tells the task
        raise


async def _taken_back(parts: Sequence[tuple[Node, Batch]]) -> bool:
    """Returns whether the task was cancelled meanwhile."""
    cancelled = False
    while True:
        try:
            for node, batch in parts:
                node.cancel(batch)
            for _, batch in parts:
                while batch.in_flight:
                    # The task may have cancelled the one before.
                    batch.waiter = asyncio.get_running_loop().create_future()
                    await batch.waiter
            return cancelled
        except GeneratorExit:
            raise
        except asyncio.CancelledError:
            cancelled = True
        except BaseException:
            pass  # a second one changes nothing: one is raised in any case


class _Loop:
    """An event loop that awaits batches. Does not keep it alive: it holds us."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        self.queue = CompletionQueue()
        self.loop = weakref.ref(loop)
        self._engine = engine
        loop.add_reader(self.queue.fileno(), _drain_in_loop, engine, self.queue)

    @property
    def ended(self) -> bool:
        loop = self.loop()
        return loop is None or loop.is_closed()

    def close(self) -> None:
        """Give its waiters what has completed, and the descriptor back. Any thread."""
        done = self._engine.drain(self.queue)
        loop = self.loop()
        try:
            if loop is None:
                raise RuntimeError
            # Closed only there, so that the descriptor is not somebody else's before
            # the loop has forgotten it.
            loop.call_soon_threadsafe(_leave_loop, loop, self.queue, done)
        except RuntimeError:  # closed: nobody waits there
            self.queue.close()


class _FutureThread:
    """Completes futures. (Their callbacks and `concurrent.futures.wait` want a
    thread.)
    """

    def __init__(self, engine: Engine) -> None:
        self.queue = CompletionQueue()
        self.drained: list[Batch] = []  # and not resolved yet
        self._engine = engine
        self._closing = False
        self._thread = started(self._serve, "fastkv-futures")

    def close(self, timeout: float) -> None:
        """Complete what is left, after the engine was closed."""
        self._closing = True
        self.queue.wake()
        # A callback, or the last reference to a client, may close the node from here.
        if threading.get_ident() != self._thread.ident:
            self._thread.join(timeout)  # a callback may take its time

    def _serve(self) -> None:
        while not self._closing or self.queue.in_flight > 0:
            try:
                self.queue.wait()
                self._drain()
            except MemoryError:
                pass  # what was not drained comes again
        self.queue.close()

    def _drain(self) -> None:
        self.drained = self._engine.drain(self.queue)
        for batch in self.drained:
            try:
                batch.waiter._drained()
            # SystemExit in a callback; others must not wait for it.
            except BaseException:
                # Nor for what a log's handler raises.
                with contextlib.suppress(BaseException):
                    logger.exception("a callback of a future has raised")
            batch.waiter = None
        self.drained = []


def _drain_in_loop(engine: Engine, queue: CompletionQueue) -> None:
    _resolve(engine.drain(queue))


def _leave_loop(
    loop: asyncio.AbstractEventLoop, queue: CompletionQueue, done: list[Batch]
) -> None:
    loop.remove_reader(queue.fileno())
    queue.close()
    _resolve(done)


def _resolve(done: list[Batch]) -> None:
    for batch in done:
        waiter, batch.waiter = batch.waiter, None
        if not waiter.done():
            waiter.set_result(None)
