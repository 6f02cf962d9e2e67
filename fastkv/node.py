"""The native side of one connection pool: an engine, its connector, and who waits on it.

A node starts with the first `batch_tile_*` call of a client of the pool, is shared by all
clients of the pool, and ends with the last of them. Knows no command and no client class.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, fields
from functools import partial
from typing import Any
from urllib.parse import parse_qsl, unquote

from redis.exceptions import ConnectionError

from fastkv import commands
from fastkv._core import Batch, Code, CompletionQueue, Engine, RetryPolicy
from fastkv.connector import Connector, Pool, check_supported, policy_of, retry_of
from fastkv.errors import error_of_code

# Requests that a connection may have in flight: enough to hide a round trip of lookups.
_WINDOW_REQUESTS = 1024
# How long close() waits for a connector that is in the middle of a connect.
_CONNECTOR_PATIENCE = 0.5


@dataclass(frozen=True)
class TileOptions:
    """The `tile_*` arguments of the clients; `None` is the default.

    Attributes:
        workers: Native threads. Default: half the cores, 4 at most.
        connections: Connections that carry values; one more carries lookups. Default: 4,
            or as many as there are workers. All together never more than the pool's
            `max_connections`.
        window_bytes: Value bytes that a connection may have asked for and not yet read,
            or still has to send. Default: 4 MiB.
    """

    workers: int | None = None
    connections: int | None = None
    window_bytes: int | None = None

    def __post_init__(self) -> None:
        for field, least, most in (
            ("workers", 1, 64),
            ("connections", 1, 1024),
            ("window_bytes", 1, 1 << 40),
        ):
            value = getattr(self, field)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(
                    f"tile_{field}: expected an int, got {type(value).__name__}"
                )
            if not least <= value <= most:
                raise ValueError(
                    f"tile_{field}: expected {least} to {most}, got {value}"
                )

    def filled(self, max_connections: int) -> tuple[int, int, int]:
        """``(workers, connections with the lookup one, window_bytes)``, no default left."""
        workers = self.workers or max(1, min(4, (os.cpu_count() or 1) // 2))
        connections = min((self.connections or max(4, workers)) + 1, max_connections)
        return min(workers, connections), connections, self.window_bytes or 4 << 20


def options_of_url(
    url: str, kwargs: dict[str, Any]
) -> tuple[str, TileOptions, dict[str, Any]]:
    """Take the `tile_*` options out of a URL's query and of keyword arguments.

    The query wins, as in redis-py.

    Returns:
        The URL and the keyword arguments without them, and the options.
    """
    given = {f"tile_{field.name}": field.name for field in fields(TileOptions)}
    taken = {given[k]: v for k, v in kwargs.items() if k in given}
    rest = {k: v for k, v in kwargs.items() if k not in given}
    # By hand, so that the rest stays as it is (urlunsplit would change unix:///path).
    head, mark, tail = url.partition("?")
    query, hash_sign, fragment = tail.partition("#")
    kept = []
    for item in query.split("&"):
        name = unquote(item.partition("=")[0])
        if not name.startswith("tile_"):
            kept.append(item)
            continue
        if name not in given:
            raise ValueError(f"{name}: unknown; known are {', '.join(given)}")
        value = dict(parse_qsl(item)).get(name, "")
        try:
            taken[given[name]] = int(value)
        except ValueError:
            raise ValueError(f"{name}: expected an int, got {value!r}") from None
    url = head + mark + "&".join(kept) + hash_sign + fragment
    return url, TileOptions(**taken), rest


class TileFuture(Future[list[bool]]):
    """The future of a batch. `cancel` takes the batch back, and its memory stays pinned
    until no worker can touch it."""

    def __init__(self, finish: Callable[[], list[bool]], cancel: Callable[[], None]):
        super().__init__()
        self._finish = finish
        self._cancel = cancel

    def cancel(self) -> bool:
        cancelled = super().cancel()
        if cancelled:
            self._cancel()
        return cancelled

    def _drained(self) -> None:
        if not self.set_running_or_notify_cancel():
            return
        try:
            result = self._finish()
        except BaseException as error:
            self.set_exception(error)
        else:
            self.set_result(result)
        finally:
            del self._finish, self._cancel  # they hold the node, and the client

    def _forked(self) -> None:
        # The thread that held the old one, if any, does not exist here.
        self._condition = threading.Condition()
        if not self.done():
            self.set_exception(_forked_error())


class Node:
    """See the module. Thread-safe."""

    def __init__(self, pool: Pool, options: TileOptions) -> None:
        check_supported(pool)
        workers, connections, window_bytes = options.filled(
            getattr(pool, "max_connections", 1 << 30)
        )
        self.options = options
        self.closed = False
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()
        self._pool = weakref.ref(pool)
        self._engine = Engine(workers, connections, window_bytes, _WINDOW_REQUESTS)
        self._lock = threading.Lock()
        self._idle: list[CompletionQueue] = []  # of blocking calls
        self._futures: _FutureThread | None = None
        self._loops: weakref.WeakKeyDictionary[
            asyncio.AbstractEventLoop, CompletionQueue
        ] = weakref.WeakKeyDictionary()
        self._policy: tuple[object, RetryPolicy] | None = None
        self._connector = Connector(self._engine, pool, self._running_loop)
        # When the pool is gone, and at exit; nothing of ours keeps the pool alive.
        self._finalizer = weakref.finalize(pool, self.close)

    # --- the three ways to wait ---------------------------------------------------------

    def run(self, batch: Batch, timeout: float | None) -> list[bool]:
        """Submit and block. Signal handlers run meanwhile, and may raise."""
        seconds = commands.check_timeout(timeout)
        if len(batch) == 0:
            return []
        code = self._block_on(batch, seconds)
        self._check_accepted(code, batch)
        return self._finish(batch, seconds)

    def submit(self, batch: Batch, timeout: float | None, client: object) -> TileFuture:
        """Submit; a thread of this node completes the future. ``client`` stays alive."""
        seconds = commands.check_timeout(timeout)

        def finish(_client: object = client) -> list[bool]:
            return self._finish(batch, seconds)

        future = TileFuture(finish, partial(self._engine.cancel, batch))
        if len(batch) == 0:
            future._drained()
            return future
        with self._lock:
            if self._futures is None and not self.closed:
                self._futures = _FutureThread(self._engine)
            thread = self._futures
        if thread is None:
            raise error_of_code(Code.CLOSED, "", len(batch), seconds)
        batch.waiter = future
        code = self._engine.submit(batch, thread.queue, self._retry_policy(), seconds)
        self._check_accepted(code, batch)
        return future

    async def wait(self, batch: Batch, timeout: float | None) -> list[bool]:
        """Submit and await. A cancelled task goes on once no worker can touch the memory."""
        seconds = commands.check_timeout(timeout)
        if len(batch) == 0:
            return []
        loop = asyncio.get_running_loop()
        queue = self._queue_of(loop)
        batch.waiter = loop.create_future()
        code = self._engine.submit(batch, queue, self._retry_policy(), seconds)
        self._check_accepted(code, batch)
        try:
            await batch.waiter
        except GeneratorExit:
            # The coroutine is thrown away, or its loop is gone: it cannot wait any more.
            # The memory stays pinned until the batch is drained.
            self._engine.cancel(batch)
            raise
        except BaseException:
            self._engine.cancel(batch)
            while not batch.drained:
                # The task cancelled the future; the drain resolves this one. A second
                # cancellation changes nothing: one is raised in any case.
                batch.waiter = loop.create_future()
                try:
                    await asyncio.wait([batch.waiter])
                except asyncio.CancelledError:
                    pass
            raise
        return self._finish(batch, seconds)

    # --- life ---------------------------------------------------------------------------

    def retire_connections(self) -> None:
        """Let every connection end once it is idle; the next batch opens new ones."""
        if not self.closed:
            self._engine.retire_connections()

    def close(self) -> None:
        """Complete what is pending with an error, join the threads. Idempotent."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
        self._finalizer.detach()
        _unwatch(self)
        self._engine.close()
        self._connector.close(_CONNECTOR_PATIENCE)
        if self._futures is not None:
            self._futures.close()
        for loop, queue in list(self._loops.items()):
            fd, done = queue.fileno(), self._engine.drain(queue)
            try:
                # The queue goes along, so that its descriptor is not reused before the
                # loop has forgotten it.
                loop.call_soon_threadsafe(_leave_loop, loop, fd, queue, done)
            except RuntimeError:
                pass  # closed: nobody waits there
        self._futures = None
        self._loops.clear()
        while self._idle:
            self._idle.pop().close()
        self._engine.close_fds()

    def close_after_fork(self) -> None:
        """In a child: only descriptors are left of us."""
        self.closed = True
        self._finalizer.detach()
        self._lock = threading.Lock()
        for batch in self._engine.after_fork_in_child():
            if isinstance(batch.waiter, TileFuture):
                batch.waiter._forked()
        queues = [*self._idle, *self._loops.values()]
        if self._futures is not None:
            queues.append(self._futures.queue)
        for queue in queues:
            queue.close_after_fork()
        self._idle.clear()
        self._loops.clear()
        self._futures = None

    # --- details ------------------------------------------------------------------------

    def _block_on(self, batch: Batch, seconds: float) -> int:
        try:
            queue = self._idle.pop()
        except IndexError:
            queue = CompletionQueue()
        code = self._engine.run(batch, queue, self._retry_policy(), seconds)
        # Not in a finally: after an interrupt the queue is not worth keeping.
        if self.closed:
            queue.close()
        else:
            self._idle.append(queue)
        return code

    def _retry_policy(self) -> RetryPolicy:
        """Of the pool's settings of this moment: `set_retry` may change them."""
        pool = self._pool()
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
            self._policy = (state, policy_of(retry_of(pool)))
        return self._policy[1]

    def _check_accepted(self, code: int, batch: Batch) -> None:
        if code != Code.OK:
            raise error_of_code(code, "", len(batch), 0)

    def _finish(self, batch: Batch, seconds: float) -> list[bool]:
        return commands.finish(batch, seconds, self._connector.fresh_error)

    def _queue_of(self, loop: asyncio.AbstractEventLoop) -> CompletionQueue:
        queue = self._loops.get(loop)
        if queue is None:
            queue = CompletionQueue()
            # The loop holds the engine, which knows nothing of the loop: no cycle.
            loop.add_reader(queue.fileno(), _drain_in_loop, self._engine, queue)
            with self._lock:
                self._loops[loop] = queue
        return queue

    def _running_loop(self) -> asyncio.AbstractEventLoop | None:
        with self._lock:
            loops = list(self._loops)
        return next((loop for loop in loops if loop.is_running()), None)


class _FutureThread:
    """Completes futures. (Their callbacks and `concurrent.futures.wait` want a thread.)"""

    def __init__(self, engine: Engine) -> None:
        self.queue = CompletionQueue()
        self._engine = engine
        self._closing = False
        self._thread = threading.Thread(
            target=self._serve, name="fastkv-futures", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Complete what is left, after the engine was closed."""
        self._closing = True
        self.queue.wake()
        # A callback, or the last reference to a client, may close the node from here.
        if threading.current_thread() is not self._thread:
            self._thread.join()
            self.queue.close()

    def _serve(self) -> None:
        while not self._closing:
            self.queue.wait()
            self._drain()
        self._drain()

    def _drain(self) -> None:
        for batch in self._engine.drain(self.queue):
            batch.waiter._drained()
            batch.waiter = None


def _drain_in_loop(engine: Engine, queue: CompletionQueue) -> None:
    _resolve(engine.drain(queue))


def _leave_loop(
    loop: asyncio.AbstractEventLoop, fd: int, queue: CompletionQueue, done: list[Batch]
) -> None:
    loop.remove_reader(fd)
    queue.close()
    _resolve(done)


def _resolve(done: list[Batch]) -> None:
    for batch in done:
        waiter, batch.waiter = batch.waiter, None
        if not waiter.done():
            waiter.set_result(None)


# --- which node serves which pool --------------------------------------------------------

_nodes: weakref.WeakKeyDictionary[Pool, Node] = weakref.WeakKeyDictionary()
_nodes_lock = threading.Lock()


def node_of(client: Any, options: TileOptions) -> Node:
    """The node of a client's pool; starts it if need be.

    Raises:
        ValueError: Another client of the pool has started it with other options.
        UnsupportedConnection: See `check_supported`.
    """
    pool = client.connection_pool
    with _nodes_lock:
        node = _nodes.get(pool)
        if node is None or node.closed:
            node = Node(pool, options)
            _nodes[pool] = node
            _watch(pool, node)
        elif options != TileOptions() and options != node.options:
            raise ValueError(
                f"the pool's native connections were started with {node.options}, "
                f"this client has {options}"
            )
        node.users.add(client)
        return node


def leave_node(client: Any, node: Node) -> None:
    """The client needs its node no longer; the last one closes it."""
    with _nodes_lock:
        node.users.discard(client)
        last = not node.users
    if last:
        node.close()


# What drops or re-authenticates a pool's connections must reach the native ones too.
_WATCHED = ("disconnect", "reset", "re_auth_callback")


def _watch(pool: Pool, node: Node) -> None:
    def watched(name: str) -> Callable[..., Any]:
        seen = weakref.ref(node)
        owner = weakref.ref(pool)

        def call(*args: Any, **kwargs: Any) -> Any:
            watcher, watched_pool = seen(), owner()
            if watcher is not None:
                # At the next connect the credential provider is asked again.
                watcher.retire_connections()
            return getattr(type(watched_pool), name)(watched_pool, *args, **kwargs)

        return call

    for name in _WATCHED:
        if hasattr(pool, name):
            setattr(pool, name, watched(name))


def _unwatch(node: Node) -> None:
    pool = node._pool()
    if pool is None:
        return
    for name in _WATCHED:
        pool.__dict__.pop(name, None)
    with _nodes_lock:
        if _nodes.get(pool) is node:
            del _nodes[pool]


# --- fork --------------------------------------------------------------------------------

_forking: list[Node] = []


def _before_fork() -> None:
    _forking[:] = [node for node in list(_nodes.values()) if not node.closed]
    for node in _forking:
        node._engine.before_fork()


def _after_fork_in_parent() -> None:
    for node in _forking:
        node._engine.after_fork_in_parent()
    _forking.clear()


def _after_fork_in_child() -> None:
    global _nodes_lock
    _nodes_lock = threading.Lock()
    for node in _forking:
        _unwatch(node)
        node.close_after_fork()
    _forking.clear()


def _forked_error() -> ConnectionError:
    return ConnectionError("The batch was submitted before a fork, in the parent.")


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
