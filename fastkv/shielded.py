"""What a signal handler must not cut short.

Handlers run on the main thread, between any two steps, and may raise there.
"""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable
from typing import TypeVar

_Result = TypeVar("_Result")


def shielded(work: Callable[[], _Result]) -> _Result:
    """Return or raise what ``work`` does. If this is interrupted, ``work`` has not
    begun, or goes on to its end without us.
    """
    if threading.get_ident() != threading.main_thread().ident:
        return work()
    results: list[_Result] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    try:
        # Not threading's: an interrupt in the middle of its start leaves traces.
        _thread.start_new_thread(run, ())
    except RuntimeError:  # no more threads, or the interpreter is about to end
        return work()
    done.wait()
    if results:
        return results[0]
    error = errors.pop()
    try:
        raise error
    finally:
        del error  # it holds this frame
