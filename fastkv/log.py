"""The logger ``fastkv``, its children, and how not to flood them."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger("fastkv")
#: Of the connections. Callers learn by exceptions what concerns them: where no log is
#: set up, nothing is written to stderr.
connections = logger.getChild("connections")
connections.addHandler(logging.NullHandler())

# Between two lines about one kind of trouble.
_SECONDS = 30.0


class Limited:
    """Says each kind of trouble once in a while. Any thread; takes no lock, which a
    fork could leave locked: at worst two threads say the same at the same time.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._said: dict[str, tuple[float, int]] = {}

    def say(self, level: int, kind: str, text: str) -> None:
        now = time.monotonic()
        when, silent = self._said.get(kind, (-_SECONDS, 0))
        if now - when < _SECONDS:
            self._said[kind] = (when, silent + 1)
            return
        self._said[kind] = (now, 0)
        more = f" ({silent} more like it since the last line)" if silent else ""
        try:
            self._logger.log(level, "%s: %s%s", kind, text, more)
        except BaseException:
            # A handler of the user's that raises; the thread that reports a trouble
            # has to see to it next.
            pass
