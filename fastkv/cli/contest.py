"""Which of some ways to load is the fastest, and whether that is more than noise.

Ways take turns; what is measured are paired rounds, so that what slows the machine
down slows both.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Way = TypeVar("Way")

_LEAST_ROUNDS = 3
_LEAST_GAIN = 1.02  # what is less is not worth a setting


@dataclass(frozen=True)
class Gain:
    """Of one way over another: the median of their ratios, round by round.

    Attributes:
        ratio: Above 1, if it is faster.
        low: The median is above this with 95 % confidence.
        high: And below this.
    """

    ratio: float
    low: float
    high: float

    @classmethod
    def of(cls, rates: Sequence[float], over: Sequence[float]) -> Gain:
        """Of rates of the same rounds."""
        ratios = sorted(a / b for a, b in zip(rates, over, strict=True))
        # The sign test's interval: so many of the sorted ratios are left out at an end.
        out = max(0, math.floor(len(ratios) / 2 - 0.98 * math.sqrt(len(ratios))))
        return cls(statistics.median(ratios), ratios[out], ratios[-1 - out])

    @property
    def real(self) -> bool:
        return self.low > 1.0 and self.ratio >= _LEAST_GAIN

    def __str__(self) -> str:
        low, high = ((x - 1) * 100 for x in (self.low, self.high))
        return f"{(self.ratio - 1) * 100:+.0f} % ({low:+.0f} to {high:+.0f} %)"


def take_turns(
    ways: Sequence[Way],
    measure: Callable[[Way], float],
    seconds: float,
    rates: dict[Way, list[float]],
    least: int = _LEAST_ROUNDS,
) -> None:
    """Rounds of all ways until the time is over, but ``least`` at least.

    Args:
        ways: To measure.
        measure: Gives the rate of one batch.
        seconds: To go on for.
        rates: Gets one rate a way and round more.
        least: Rounds.
    """
    end = time.monotonic() + seconds
    turn = 0
    while turn < least or time.monotonic() < end:
        first = turn % len(ways)
        for way in [*ways[first:], *ways[:first]]:
            rates.setdefault(way, []).append(measure(way))
        turn += 1


def find_fastest(
    ways: Sequence[Way], measure: Callable[[Way], float], seconds: float
) -> Way:
    """The one with the best median. The slower half falls out again and again, so that
    most of the time is for those that are close; the first way stays to the end.
    """
    left = list(ways)
    for way in left:
        measure(way)  # connects and warms up
    levels = max(1, math.ceil(math.log2(len(left))))
    rates: dict[Way, list[float]] = {}
    for _ in range(levels):
        take_turns(left, measure, seconds / levels, rates)
        best = _by_median(rates, left)
        keep = best[: math.ceil(len(best) / 2)]
        left = [way for way in left if way in keep or way is ways[0]]
    return _by_median(rates, left)[0]


def _by_median(rates: Mapping[Way, Sequence[float]], ways: Sequence[Way]) -> list[Way]:
    return sorted(ways, key=lambda way: -statistics.median(rates[way]))
