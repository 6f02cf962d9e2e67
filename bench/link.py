"""A long link on one machine: the program ``link``, see there."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import TracebackType


class LongLink:
    """Runs from ``with`` to its end.

    Args:
        program: Compiled.
        port: Of the server behind it, on 127.0.0.1.
        delay: Seconds, in each direction.
        bytes_per_second: Of one connection, in each direction.

    Attributes:
        port: To connect to.
    """

    def __init__(
        self, program: Path, port: int, delay: float, bytes_per_second: float
    ) -> None:
        self._command = [str(program), str(port), str(delay), str(bytes_per_second)]
        self.port = 0

    def __enter__(self) -> LongLink:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate("")
