"""A fork that is going on: what is held for it, and how its own thread lets go.

Other hooks and signal handlers run on that thread meanwhile, and may use clients.
"""

from __future__ import annotations

import threading
from typing import Protocol


class Held(Protocol):
    """What keeps still while a process forks."""

    def after_fork_in_parent(self) -> None:
        """Go on. May be called again."""


# Two threads may fork at once, and a signal handler while its thread does. It knows its
# owner: where an exception of a handler's comes is not known, and the fork goes on in
# spite of it.
lock = threading.RLock()
#: By the thread that has the lock.
held: list[Held] = []


def is_here() -> bool:
    """Whether this thread is forking."""
    owned: bool = lock._is_owned()  # type: ignore[attr-defined]
    return owned


def let_go() -> None:
    """If this thread forks: who waited for us now would wait for ever. The child finds
    less in order, as after a fork that nobody was told of.
    """
    if is_here():
        for one in list(held):
            one.after_fork_in_parent()
