"""One call over the nodes of a cluster: which key is sent where, and where next.

`rounds` waits for nothing and does no I/O: it yields what has to happen, and goes on
when it has. `run`, `submit` and `wait` make it happen: by blocking, on futures, on an
event loop. The `Batch` of all keys is never sent; parts of it are, each to one node,
until every key has its answer. The rules for trying again are those of redis-py's
`RedisCluster._execute_command`, counted for each key by itself.
"""

from __future__ import annotations

import asyncio
import copy
import os
import time
import weakref
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

from redis.cluster import AbstractRedisCluster
from redis.exceptions import (
    AskError,
    BusyLoadingError,
    ClusterDownError,
    ClusterError,
    ConnectionError,
    MovedError,
    RedisError,
    SlotNotCoveredError,
    TimeoutError,
)

from fastkv import commands, info
from fastkv._core import Batch, Code, Stats, run_all
from fastkv.errors import error_of_code, error_of_reply, for_callers
from fastkv.node import Node, TileFuture, settled
from fastkv.refresher import Address, Refresh, Refresher

# redis-py's numbers: redirections of one command, seconds between the later ones, and
# seconds before it asks again what the cluster looks like when a slot has no server.
_HOPS = AbstractRedisCluster.RedisClusterRequestTTL
_HOP_PAUSE = 0.05
_DOWN_PAUSE = 0.25


@dataclass
class Part:
    """What is sent to one node.

    Attributes:
        node: Where to.
        name: redis-py's name of it.
        pool: Where its connections come from; lives as long as they may be needed.
        batch: Some keys of the whole.
        refusal: Why the node did not accept it, a `Code`.
    """

    node: Node
    name: str
    pool: object
    batch: Batch
    refusal: int = Code.OK


@dataclass
class Send:
    """To do: submit all parts, go on when each is drained or refused.

    Attributes:
        seconds: That are left for it; 0: no limit.
    """

    parts: list[Part]
    seconds: float


class Cluster(Protocol):
    """What the rounds need of a cluster client."""

    retry: Any

    @property
    def _tile_closes(self) -> int:
        """How often the client was closed."""

    def _tile_route(
        self,
        batch: Batch,
        indices: Sequence[int],
        asked: dict[int, Address],
        failed: set[str],
    ) -> tuple[list[Part], list[int]]:
        """Parts with all of ``indices``, and those whose slots nobody serves. Of nodes
        that have the same keys, those that have ``failed`` come last; if all have, they
        are taken out of it.
        """

    def _tile_calls(self) -> Stats:
        """Where whole calls are counted."""

    def _tile_remap(self, address: Address) -> Address:
        """Where a node that calls itself so is reached."""


class SyncCluster(Cluster, Protocol):
    _tile_refresher: Refresher

    def _tile_refresh(self, step: Refresh) -> None: ...


class AsyncCluster(Cluster, Protocol):
    async def _tile_refresh(self, step: Refresh) -> None: ...


Steps: TypeAlias = "Generator[Send | Refresh, None, None]"


class _Tries:
    """How often each key was sent, within the client's policy.

    Attributes:
        failed: Names of nodes that could not answer.
    """

    def __init__(self, retry: Any) -> None:
        self._retries: int = retry.get_retries()
        self._backoff = copy.deepcopy(retry._backoff)
        self._backoff.reset()
        self._losses: dict[int, int] = {}
        self._hops: dict[int, int] = {}
        self.failed: set[str] = set()

    def lose(
        self, indices: Iterable[int], error: Exception, name: str | None = None
    ) -> float:
        """These were not answered, by node ``name``. Returns seconds to wait, or raises
        ``error``.
        """
        if name is not None:
            self.failed.add(name)
        most = 0
        for index in indices:
            losses = self._losses[index] = self._losses.get(index, 0) + 1
            most = max(most, losses)
        if 0 <= self._retries < most:
            raise error
        return max(0.0, float(self._backoff.compute(most)))

    def hop(self, index: int) -> float:
        """It was sent elsewhere. Returns seconds to wait."""
        hops = self._hops[index] = self._hops.get(index, 0) + 1
        if hops >= _HOPS:
            raise ClusterError("TTL exhausted.")
        return _HOP_PAUSE if hops > _HOPS // 2 else 0.0


def rounds(cluster: Cluster, batch: Batch, seconds: float) -> Steps:
    """See the module. ``batch`` has all its answers afterwards, and is counted. Whoever
    cannot do a step throws the exception in.

    Raises:
        redis.exceptions.RedisError: A key's last loss or redirection; out of time.
    """
    submitted = time.monotonic()
    deadline = submitted + seconds if seconds else None
    stats = cluster._tile_calls()
    result = info.OK
    closes = cluster._tile_closes
    tries = _Tries(cluster.retry)
    pending: Sequence[int] = range(len(batch))
    asked: dict[int, Address] = {}

    def left() -> float:
        if cluster._tile_closes != closes:
            raise error_of_code(Code.CLOSED, "", len(batch), 0)
        if deadline is None:
            return 0.0
        more = deadline - time.monotonic()
        if more <= 0:
            raise error_of_code(Code.TIMED_OUT, "", len(batch), seconds)
        return more

    try:
        while pending:
            parts, uncovered = cluster._tile_route(batch, pending, asked, tries.failed)
            asked = {}
            again = list(uncovered)
            refresh = Refresh()
            began = time.monotonic()
            if parts:
                yield Send(parts, left())
            if uncovered:
                refresh.down = True
                refresh.pause = tries.lose(
                    uncovered,
                    SlotNotCoveredError(
                        f"The slot of {batch.keys[uncovered[0]]!r} is not covered by "
                        "the cluster."
                    ),
                )
            for part in parts:
                error = part.node.error_of(part.batch, part.refusal, seconds, began)
                unanswered, redirected = batch.take(part.batch)
                again += unanswered
                # The engine's own failure: what it says it has answered may be wrong.
                if unanswered or part.batch.code == Code.INTERNAL_ERROR:
                    assert error is not None
                    if not _may_repeat(part, error):
                        if part.batch.code == Code.TIMED_OUT:
                            left()
                        raise error
                    # The keys behind one that was answered by LOADING are lost.
                    refresh.down |= isinstance(error, BusyLoadingError)
                    refresh.lost.add(part.name)
                    pause = tries.lose(unanswered, error, part.name)
                    part.node.stats.add_retries(len(unanswered))
                    refresh.pause = max(refresh.pause, pause)
                for index, line in redirected:
                    again.append(index)
                    pause = _redirect(
                        *(cluster, tries, refresh, asked, index, line, part.name)
                    )
                    refresh.pause = max(refresh.pause, pause)
            pending = again
            if not pending:
                return
            if refresh.down:
                refresh.pause = max(refresh.pause, _DOWN_PAUSE)
            refresh.seconds = left()
            if deadline is not None:
                refresh.pause = min(refresh.pause, refresh.seconds)
            yield refresh
    except TimeoutError:
        result = info.TIMED_OUT
        raise
    except Exception:
        result = info.FAILED
        raise
    except BaseException:  # it was closed, or interrupted
        result = info.CANCELLED
        raise
    finally:
        batch.end_parts()
        if len(batch) > 0:
            stats.count(batch, result, time.monotonic() - submitted)


def _may_repeat(part: Part, error: Exception) -> bool:
    # A node that left the cluster was closed under our hands; if it was the client,
    # the next round finds out. UNKNOWN_OUTCOME is a ConnectionError, too.
    if part.refusal or part.batch.code in (
        Code.CLOSED,
        Code.CONNECT_FAILED,
        Code.CONNECTION_LOST,
        Code.STALLED,
    ):
        allowed = (*AbstractRedisCluster.ERRORS_ALLOW_RETRY, BusyLoadingError)
        return type(error) in allowed
    return False


def _redirect(
    cluster: Cluster,
    tries: _Tries,
    refresh: Refresh,
    asked: dict[int, Address],
    index: int,
    line: str,
    name: str,
) -> float:
    """Note where a key has to go, that node ``name`` has sent elsewhere. Returns
    seconds to wait before it does.
    """
    error = error_of_reply(line)
    # LOADING: a node that has come back, and in a cluster there are others. MASTERDOWN
    # is a ClusterDownError, too.
    if isinstance(error, (ClusterDownError, BusyLoadingError)):
        refresh.down = True
        return tries.lose([index], error, name)
    if isinstance(error, AskError):  # MovedError is one, too
        error.host, error.port = cluster._tile_remap((error.host, error.port))
        if isinstance(error, MovedError):
            refresh.moved[error.slot_id] = error
        else:
            asked[index] = (error.host, error.port)
            refresh.asked.add(asked[index])
    return tries.hop(index)


# --- by blocking ---------------------------------------------------------------------


def run(cluster: SyncCluster, batch: Batch, timeout: float | None) -> list[bool]:
    """Block until every key has its answer."""
    seconds = commands.check_timeout(timeout)
    steps = rounds(cluster, batch, seconds)
    try:
        for step in steps:
            if isinstance(step, Refresh):
                cluster._tile_refresher.run(step, cluster._tile_refresh)
                continue
            queues = [part.node.take_queue() for part in step.parts]
            with_queues = list(zip(step.parts, queues, strict=True))
            codes = run_all(
                [part.node.part(part.batch, queue) for part, queue in with_queues],
                step.seconds,
            )
            for (part, queue), code in zip(with_queues, codes, strict=True):
                part.refusal = code
                part.node.give_queue_back(queue)
    except BaseException as error:
        steps.throw(error)
    return _finish(batch, seconds)


def _finish(batch: Batch, seconds: float) -> list[bool]:
    return commands.finish(batch, seconds, ConnectionError)


# --- on futures ----------------------------------------------------------------------


class ClusterFuture(TileFuture):
    """The future of a call over several nodes.

    The last node that has done its part goes on with the rounds, on its own thread; the
    refresher does, after a refresh.
    """

    def __init__(
        self, cluster: SyncCluster, batch: Batch, steps: Steps, seconds: float
    ) -> None:
        super().__init__(self._read, self._take_back)
        self._cluster = cluster
        self._batch = batch
        self._steps = steps
        self._seconds = seconds
        self._parts: list[Part] = []
        self._left: list[bool] = []  # one for each part not drained; the last is true
        self._failure: BaseException | None = None
        _all_futures.add(self)

    def do(self, step: Send | Refresh | None, first: bool = False) -> None:
        """Have a step done; None: there is none left. ``first``: by the caller."""
        if isinstance(step, Send):
            self._send(step, first)
        elif step is not None:
            try:
                asked: Future[None] = self._cluster._tile_refresher.do(
                    step, self._cluster._tile_refresh
                )
            except Exception as error:  # no more threads, no memory
                asked = Future()
                asked.set_exception(error)
            asked.add_done_callback(self._refreshed)
        else:
            self._steps.close()  # lets go of the memory
            try:
                super()._drained()
            finally:  # a callback may raise SystemExit
                del self._cluster, self._batch, self._steps
                self._parts = []

    def _go_on(self) -> None:
        try:
            if self.done() and not self.cancelled():
                return  # a signal handler has forked, and this is the child
            step: Send | Refresh | None = None
            if self._failure is not None:
                self._steps.throw(self._failure)
            elif not self.cancelled():
                step = next(self._steps, None)
        except BaseException as error:
            self._failure, step = error, None
        self.do(step)

    def _send(self, step: Send, first: bool) -> None:
        self._parts = step.parts
        # One for ourselves: it must not be over before all were submitted.
        self._left = [True] + [False] * len(step.parts)
        for part in step.parts:
            try:
                part.refusal = part.node.start(
                    part.batch, part.node.future_queue(), step.seconds, self
                )
            except BaseException as error:
                if first and not isinstance(error, Exception):
                    raise  # an interrupt
                # Or it is a signal handler's, perhaps.
                accepted = part.batch.in_flight or part.batch.drained
                if not accepted:
                    part.refusal = Code.CLOSED
                # No more descriptors, threads, memory; a hook of the user's. What is in
                # flight has to end first.
                if accepted or not isinstance(error, RedisError):
                    self._failure = for_callers(error)
            if part.refusal:
                self._drained()
        if self.cancelled() or self._failure is not None:
            self._take_back()  # what cancel() came too early for
        self._drained()

    def _refreshed(self, asked: Future[None]) -> None:
        self._failure = asked.exception()
        self._go_on()

    def _drained(self) -> None:
        if self._left.pop():
            self._go_on()

    def _read(self) -> list[bool]:
        if self._failure is not None:
            raise self._failure
        return _finish(self._batch, self._seconds)

    def _take_back(self) -> None:
        for part in self._parts:
            part.node.cancel(part.batch)

    def _forked(self) -> None:
        super()._forked()
        batch: Batch | None = self.__dict__.get("_batch")
        if batch is not None:
            batch.end_parts()


def submit(cluster: SyncCluster, batch: Batch, timeout: float | None) -> TileFuture:
    """Do not block. What is wrong with the connections as such is raised at once."""
    seconds = commands.check_timeout(timeout)
    steps = rounds(cluster, batch, seconds)
    future = ClusterFuture(cluster, batch, steps, seconds)
    try:
        future.do(next(steps, None), first=True)
    except BaseException:
        future.cancel()  # interrupted, perhaps: nobody would know of it
        raise
    return future


# Between two rounds, no engine's table has them at a fork.
_all_futures: weakref.WeakSet[ClusterFuture] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for future in list(_all_futures):
        future._forked()
    _all_futures.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


# --- on an event loop ----------------------------------------------------------------


async def wait(
    cluster: AsyncCluster, batch: Batch, timeout: float | None
) -> list[bool]:
    """Await. A cancelled task goes on once no worker can touch the memory."""
    seconds = commands.check_timeout(timeout)
    loop = asyncio.get_running_loop()
    steps = rounds(cluster, batch, seconds)
    try:
        for step in steps:
            if isinstance(step, Refresh):
                try:
                    await asyncio.wait_for(
                        cluster._tile_refresh(step), step.seconds or None
                    )
                except asyncio.TimeoutError:
                    pass  # the next round finds out
                continue
            await settled(
                partial(_start, step, loop),
                [(part.node, part.batch) for part in step.parts],
            )
    except BaseException as error:
        steps.throw(error)
    return _finish(batch, seconds)


def _start(step: Send, loop: asyncio.AbstractEventLoop) -> None:
    for part in step.parts:
        try:
            part.refusal = part.node.start(
                part.batch,
                part.node.queue_of(loop),
                step.seconds,
                loop.create_future(),
            )
        except RedisError:
            if part.batch.in_flight or part.batch.drained:
                raise  # a signal handler's
            part.refusal = Code.CLOSED
