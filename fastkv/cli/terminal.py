"""What all commands share towards the user: the console, how they end, figures in
words.
"""

from __future__ import annotations

import contextlib
import signal
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType

import redis
import typer
from rich.console import Console

FLOOR = 2.0  # GB/s; loading a KV cache more slowly does not outrun computing it
_PIPE_WIDTH = 100


class Failure(Exception):
    """Ends a command with one line and a non-zero exit status."""


def make_console(*, stderr: bool = False) -> Console:
    """No escape codes and no narrow columns where there is no terminal."""
    console = Console(highlight=False, stderr=stderr)
    if not console.is_terminal and console.width < _PIPE_WIDTH:
        console = Console(highlight=False, stderr=stderr, width=_PIPE_WIDTH)
    return console


def _end(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


@contextlib.contextmanager
def one_line_errors(status: int = 1) -> Iterator[None]:
    """What a command does runs in here: it cleans up after every signal, and says in
    one line what went wrong.

    Args:
        status: Exit status after an error.
    """
    # By default these end the process at once, and servers and keys would stay.
    before = {n: signal.signal(n, _end) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except (Failure, redis.exceptions.RedisError) as error:
        console = Console(stderr=True, highlight=False)
        text = " ".join(str(error).split())
        console.print(text, style="bold red", markup=False, soft_wrap=True)
        raise typer.Exit(status) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- figures in words ----------------------------------------------------------------

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_size(text: str) -> int:
    """Bytes of ``64K``, ``1M``, ``1MiB``, ``4096``. Raises `typer.BadParameter`."""
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = _UNITS.get(number[-1:], 1)
    try:
        size = int(float(number[:-1] if unit > 1 else number) * unit)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise typer.BadParameter(f"expected bytes such as 64K or 1M, got {text!r}")
    return size


def parse_counts(text: str, most: int) -> list[int]:
    """Whole numbers from 1 to ``most``, each once. Raises `typer.BadParameter`."""
    try:
        counts = list(dict.fromkeys(int(item) for item in text.split(",")))
    except ValueError:
        counts = [0]
    if not all(1 <= count <= most for count in counts):
        raise typer.BadParameter(
            f"expected whole numbers from 1 to {most} with commas between, got {text!r}"
        )
    return counts


def parse_choices(text: str, choices: Sequence[str]) -> None:
    """Some of some words. Raises `typer.BadParameter`."""
    for item in text.split(","):
        if item not in choices:
            raise typer.BadParameter(f"expected {' or '.join(choices)}, got {item!r}")


def size_label(size: int) -> str:
    if size % (1 << 30) == 0 and size:
        return f"{size >> 30} GiB"
    if size % (1 << 20) == 0:
        return f"{size >> 20} MiB"
    if size > 10 << 20:
        return f"{size / (1 << 20):.1f} MiB"
    return f"{size / 1024:.4g} KiB"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, and least to most."""
    median = statistics.median(values)
    return f"{median:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def percentiles(values: Iterable[float], parts: Iterable[float]) -> list[float]:
    """Of the values themselves, none between them."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return [ordered[min(last, round(part / 100 * last))] for part in parts]
