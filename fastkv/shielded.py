"""What a signal handler must not cut short.

Handlers run on the main thread, between any two steps, and may raise there.
"""

from __future__ import annotations

import _thread
import sys
import threading
from collections.abc import Callable
from operator import attrgetter
from typing import TypeVar

_Result = TypeVar("_Result")


class Condition(threading.Condition):
    """One whose lock is not left locked if a handler raises on the way in or out: as
    it takes and releases it, no step is Python's. Of a future, say, which is waited for
    on the main thread and resolved on another.
    """

    __enter__ = property(attrgetter("_lock.__enter__"))
    __exit__ = property(attrgetter("_lock.__exit__"))


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
    """Return or raise what ``work`` does. If this is interrupted, ``work`` has not
    begun, or goes on to its end without us.
    """
    # When the interpreter ends, Python before 3.12 makes threads that never run.
    if sys.is_finalizing() or threading.get_ident() != threading.main_thread().ident:
        return work()
    results: list[_Result] = []
    errors: list[BaseException] = []
    # A lock of the C level, which an interrupt leaves in order. One of Python's classes
    # it can leave locked for ever.
    done = _thread.allocate_lock()
    done.acquire()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            done.release()

    try:
        # Not threading's: an interrupt in the middle of its start leaves traces.
        _thread.start_new_thread(run, ())
    except RuntimeError:  # no more threads, or the interpreter is about to end
        return work()
    done.acquire()
    if results:
        return results[0]
    error = errors.pop()
    try:
        raise error
    finally:
        del error  # it holds this frame
