"""One look at a cluster for all batches that wait for it, however many there are."""

from __future__ import annotations

import _thread
import contextlib
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import TypeAlias, TypeVar

from redis.exceptions import ConnectionError, MovedError

from fastkv.errors import for_callers
from fastkv.log import logger
from fastkv.shielded import Condition, shielded, started

Address: TypeAlias = "tuple[str, int]"

# Seconds that a callback may take before others get a thread of their own, and after
# which a blocked call sees that it is in a forked child.
_PATIENCE = 0.1

_Result = TypeVar("_Result")


@dataclass
class Refresh:
    """To do: wait, then bring redis-py's picture of the cluster up to date.

    Attributes:
        pause: Seconds to wait before.
        seconds: That are left for both; 0: no limit.
        moved: One error a slot.
        asked: Nodes that must be known.
        lost: Names of nodes that could not be reached.
        down: Slots had no server.
    """

    pause: float = 0.0
    seconds: float = 0.0
    moved: dict[int, MovedError] = field(default_factory=dict)
    asked: set[Address] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    down: bool = False

    @classmethod
    def of_all(cls, steps: Iterable[Refresh]) -> Refresh:
        """What does for each of ``steps``, whose pauses are over."""
        whole = cls()
        for step in steps:
            whole.moved |= step.moved
            whole.asked |= step.asked
            whole.lost |= step.lost
            whole.down |= step.down
        return whole


class _Sleepers:
    """Threads that wait for a future. What a future has for that may be locked for ever
    in a child; here, each has a lock of the C level that nobody else takes.
    """

    def __init__(self) -> None:
        self._locks: deque[_thread.LockType] = deque()
        self._over = False

    def enter(self) -> _thread.LockType:
        """A lock that can be acquired once it is over."""
        lock = _thread.allocate_lock()
        lock.acquire()
        self._locks.append(lock)
        if self._over:
            self.wake()
        return lock

    def wake(self, *_: object) -> None:
        self._over = True
        while self._locks:
            with contextlib.suppress(IndexError):  # another thread was first
                self._locks.pop().release()


class Shared(Future[_Result]):
    """A future that many may wait for: none of them can cancel it, and no signal
    handler leaves it locked.
    """

    def __init__(self) -> None:
        super().__init__()
        self._condition: Condition = Condition()
        self._pid = os.getpid()
        self._sleepers = _Sleepers()
        self.add_done_callback(self._sleepers.wake)
        self.set_running_or_notify_cancel()

    def wait(self, timeout: float | None = None) -> _Result:
        """As `result`, for the main thread, too.

        Raises:
            redis.exceptions.ConnectionError: It was made before a fork, in the parent,
                and not done by then.
        """
        end = math.inf if timeout is None else time.monotonic() + timeout
        over = self._sleepers.enter()
        while True:
            left = max(0.0, min(_PATIENCE, end - time.monotonic()))
            if over.acquire(timeout=left):
                break
            if self._pid != os.getpid():
                raise ConnectionError("The call began before a fork, in the parent.")
            if time.monotonic() >= end:
                raise FutureTimeoutError
        try:
            # Not `result`, which takes the lock.
            if self._exception is not None:
                raise self._exception
            return self._result  # type: ignore[return-value]  # it is done
        finally:
            del self  # the traceback of the error holds this frame


class _Waiter:
    def __init__(self, step: Refresh, look: Callable[[Refresh], None]) -> None:
        now = time.monotonic()
        self.step = step
        self.look = look
        self.due = now + step.pause
        self.deadline = now + step.seconds if step.seconds else math.inf
        self.done: Shared[None] = Shared()
        self.error: Exception | None = None

    def tell(self) -> None:
        """That it is over."""
        try:
            if self.error is None:
                self.done.set_result(None)
            else:
                self.done.set_exception(self.error)
        # SystemExit in a callback of the user's; others must not wait for it.
        except BaseException:
            # Nor for what a log's handler raises.
            with contextlib.suppress(BaseException):
                logger.exception("a callback of a future has raised")


class Refresher:
    """Has the looks done, one at a time, by threads that are there only as long as
    somebody waits: one keeps the time, one looks, and others tell those who wait.
    Thread-safe.
    """

    def __init__(self) -> None:
        # By process: a child has no thread of its parent's, and a fork in C tells
        # nobody.
        self._crews: dict[int, _Crew] = {}

    def do(self, step: Refresh, look: Callable[[Refresh], None]) -> Shared[None]:
        """Have a step done, together with those of others.

        Args:
            step: Its ``seconds`` are kept: then the future completes in any case.
            look: Brings the picture up to date; may raise and take its time.

        Raises:
            RuntimeError: No more threads.
        """

        # In a child that a signal handler forks, there once more.
        def enter() -> Shared[None]:
            waiter = _Waiter(step, look)
            self._crews.setdefault(os.getpid(), _Crew()).enter(waiter)
            return waiter.done

        return shielded(enter)

    def run(self, step: Refresh, look: Callable[[Refresh], None]) -> None:
        """As `do`, and block until it is done.

        Raises:
            redis.exceptions.ConnectionError: A signal handler has forked meanwhile, and
                this is the child.
        """
        self.do(step, look).wait()


class _Crew:
    """The threads of a refresher in one process."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._waiting: list[_Waiter] = []
        self._served: list[_Waiter] = []  # by the look that is under way
        self._over: deque[_Waiter] = deque()  # to be told so
        # When whoever tells them is taken for blocked, by a callback of the user's.
        self._blocked = 0.0
        self._looking = False
        self._running = False

    def enter(self, waiter: _Waiter) -> None:
        with self._changed:
            if not self._running:
                started(self._keep_time, "fastkv-refresh")
                self._running = True
            self._waiting.append(waiter)
            self._changed.notify()

    def _keep_time(self) -> None:
        while True:
            with self._changed:
                now = time.monotonic()
                self._over += _take(self._waiting, _DEADLINE, now)
                self._over += _take(self._served, _DEADLINE, now)
                due: list[_Waiter] = []
                if not self._looking:
                    due = _take(self._waiting, _DUE, now)
                    self._served = list(due)
                    self._looking = bool(due)
                tell = bool(self._over) and self._blocked <= now
                if tell:
                    self._blocked = now + _PATIENCE
                if not tell and not due:
                    if not self._waiting and not self._served and not self._over:
                        self._running = False
                        return
                    self._changed.wait(self._seconds_to_sleep(now))
                    continue
            if tell:
                _in_thread(self._tell)
            if due:
                _in_thread(partial(self._look, due))

    def _seconds_to_sleep(self, now: float) -> float | None:
        times = [one.deadline for one in (*self._waiting, *self._served)]
        if not self._looking:
            times += [one.due for one in self._waiting]
        if self._over:
            times.append(self._blocked)
        first = min(times)
        return None if first == math.inf else max(0.0, first - now)

    def _look(self, due: list[_Waiter]) -> None:
        error: Exception | None = None
        try:
            due[0].look(Refresh.of_all(one.step for one in due))
        except BaseException as failure:
            error = for_callers(failure)
        with self._changed:
            for waiter in self._served:
                waiter.error = error
            self._over += self._served
            self._served = []
            self._blocked = time.monotonic() + _PATIENCE
            # Before anybody is told: a callback may want the next look.
            self._looking = False
            self._changed.notify()
        self._tell()

    def _tell(self) -> None:
        while True:
            with self._changed:
                if not self._over:
                    self._blocked = 0.0
                    return
                waiter = self._over.popleft()
                self._blocked = time.monotonic() + _PATIENCE
            waiter.tell()


_DUE: Callable[[_Waiter], float] = attrgetter("due")
_DEADLINE: Callable[[_Waiter], float] = attrgetter("deadline")


def _take(
    waiters: list[_Waiter], time_of: Callable[[_Waiter], float], now: float
) -> list[_Waiter]:
    taken = [one for one in waiters if time_of(one) <= now]
    waiters[:] = [one for one in waiters if time_of(one) > now]
    return taken


def _in_thread(work: Callable[[], None]) -> None:
    try:
        started(work, "fastkv-refresh")
    except (RuntimeError, MemoryError):  # no more threads: what is next has to wait
        work()
