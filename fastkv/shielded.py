"""What a signal handler must not cut short.

Handlers run on the main thread, between any two steps, and may raise there.
"""

from __future__ import annotations

import _thread
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from operator import attrgetter
from typing import TypeVar

_Result = TypeVar("_Result")

# Held until a helper is done.
_pending: set[_thread.LockType] = set()


class Condition(threading.Condition):
    """One whose lock is not left locked if a handler raises on the way in or out: as
    it takes and releases it, no step is Python's. Of a future, say, which is waited for
    on the main thread and resolved on another.
    """

    __enter__ = property(attrgetter("_lock.__enter__"))
    __exit__ = property(attrgetter("_lock.__exit__"))

    def forked(self) -> None:
        """In a child, for good: who held the lock does not exist here, nor who would
        notify. This thread may wait, if a signal handler has forked: it goes on.
        """
        if not self._is_owned():  # type: ignore[attr-defined]
            self._lock._at_fork_reinit()  # type: ignore[attr-defined]
        woken = _Woken()
        for waiter in vars(self)["_waiters"]:
            woken.append(waiter)
        vars(self)["_waiters"] = woken


class _Woken(deque[_thread.LockType]):
    """Waiters that do not wait, whatever they have done so far."""

    def append(self, waiter: _thread.LockType) -> None:
        with suppress(RuntimeError):  # somebody has notified it
            waiter.release()


def started(run: Callable[[], None], name: str) -> threading.Thread:
    """A thread that does not keep the process alive.

    Raises:
        RuntimeError: The interpreter ends. (Python before 3.12 would wait for ever.)
    """
    if sys.is_finalizing():
        raise RuntimeError("can't create new thread at interpreter shutdown")
    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


def shielded(work: Callable[[], _Result]) -> _Result:
    """Return or raise what ``work`` does. If this is interrupted, ``work`` never
    begins, or goes on to its end without us.
    """
    # When the interpreter ends, Python before 3.12 makes threads that never run.
    if sys.is_finalizing() or threading.get_ident() != threading.main_thread().ident:
        return work()
    results: list[_Result] = []
    errors: list[BaseException] = []
    gone: list[bool] = []
    # A lock of the C level, which an interrupt leaves in order. One of Python's classes
    # it can leave locked for ever.
    done = _thread.allocate_lock()
    done.acquire()

    def run() -> None:
        try:
            # Or a late one would start anew what has been closed meanwhile.
            if not gone:
                results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            _let_go(done)

    try:
        _pending.add(done)
        try:
            # Not threading's: an interrupt in the middle of its start leaves traces.
            _thread.start_new_thread(run, ())
        except RuntimeError:  # no more threads, or the interpreter is about to end
            _pending.discard(done)
            return work()
        done.acquire()
    except BaseException:
        gone.append(True)
        raise
    if results:
        return results[0]
    if not errors:  # a signal handler has forked: the helper is the parent's
        return work()
    error = errors.pop()
    try:
        raise error
    finally:
        del error  # it holds this frame


def _let_go(done: _thread.LockType) -> None:
    _pending.discard(done)
    with suppress(RuntimeError):  # of `_after_fork_in_child`, too
        done.release()


def _after_fork_in_child() -> None:
    while _pending:
        _let_go(_pending.pop())


os.register_at_fork(after_in_child=_after_fork_in_child)
