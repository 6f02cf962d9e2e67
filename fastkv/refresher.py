"""One look at a cluster for all batches that wait for it, however many there are."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TypeAlias

from redis.exceptions import MovedError

from fastkv.shielded import Condition

Address: TypeAlias = "tuple[str, int]"


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


class _Waiter:
    def __init__(self, step: Refresh, look: Callable[[Refresh], None]) -> None:
        now = time.monotonic()
        self.step = step
        self.look = look
        self.due = now + step.pause
        self.deadline = now + step.seconds if step.seconds else math.inf
        self.done: Future[None] = Future()


class Refresher:
    """Has the looks done, one at a time, by threads that are there only as long as
    somebody waits: one keeps the time, the other one looks. Thread-safe.
    """

    def __init__(self) -> None:
        self._start_anew()

    def _start_anew(self) -> None:
        self._pid = os.getpid()
        self._changed = Condition()
        self._waiting: list[_Waiter] = []
        self._served: list[_Waiter] = []  # by the look that is under way
        self._looking = False
        self._running = False

    def do(self, step: Refresh, look: Callable[[Refresh], None]) -> Future[None]:
        """Have a step done, together with those of others.

        Args:
            step: Its ``seconds`` are kept: then the future completes in any case.
            look: Brings the picture up to date; may raise and take its time.
        """
        if self._pid != os.getpid():  # the threads are the parent's
            self._start_anew()
        waiter = _Waiter(step, look)
        with self._changed:
            if not self._running:
                _start_thread(self._keep_time)
                self._running = True
            self._waiting.append(waiter)
            self._changed.notify()
        return waiter.done

    def _keep_time(self) -> None:
        while True:
            with self._changed:
                now = time.monotonic()
                late = _take(self._waiting, _DEADLINE, now)
                late += _take(self._served, _DEADLINE, now)
                due: list[_Waiter] = []
                if not self._looking:
                    due = _take(self._waiting, _DUE, now)
                    self._served = list(due)
                    self._looking = bool(due)
                if not late and not due:
                    if not self._waiting and not self._served:
                        self._running = False
                        return
                    self._changed.wait(self._seconds_to_sleep(now))
                    continue
            for waiter in late:
                waiter.done.set_result(None)
            if due:
                try:
                    _start_thread(self._look, due)
                except RuntimeError:  # no more threads: the time has to wait
                    self._look(due)

    def _seconds_to_sleep(self, now: float) -> float | None:
        times = [one.deadline for one in (*self._waiting, *self._served)]
        if not self._looking:
            times += [one.due for one in self._waiting]
        first = min(times)
        return None if first == math.inf else max(0.0, first - now)

    def _look(self, due: list[_Waiter]) -> None:
        error: BaseException | None = None
        try:
            due[0].look(Refresh.of_all(one.step for one in due))
        except BaseException as failure:
            error = failure
        with self._changed:
            served, self._served = self._served, []
        for waiter in served:
            if error is None:
                waiter.done.set_result(None)
            else:
                waiter.done.set_exception(error)
        with self._changed:
            self._looking = False
            self._changed.notify()


_DUE: Callable[[_Waiter], float] = attrgetter("due")
_DEADLINE: Callable[[_Waiter], float] = attrgetter("deadline")


def _take(
    waiters: list[_Waiter], time_of: Callable[[_Waiter], float], now: float
) -> list[_Waiter]:
    taken = [one for one in waiters if time_of(one) <= now]
    waiters[:] = [one for one in waiters if time_of(one) > now]
    return taken


def _start_thread(target: Callable[..., None], *args: object) -> None:
    threading.Thread(
        target=target, args=args, name="fastkv-refresh", daemon=True
    ).start()
