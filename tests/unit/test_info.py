"""Names and buckets of the counters, without an engine."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest

from fastkv._core import DURATION_BOUNDS, Batch, Command, Stats
from fastkv.info import FAILED, OK, node_info


def batch(*keys: bytes, command: int = Command.EXISTS) -> Batch:
    return Batch(command, keys, None, True)


@pytest.mark.parametrize("bound", DURATION_BOUNDS)
def test_a_bucket_holds_what_took_up_to_its_bound(bound: float) -> None:
    stats = Stats()
    stats.count(batch(b"a"), OK, bound)
    stats.count(batch(b"a"), OK, bound + 1e-6)
    seconds = node_info(stats)["commands"]["exists"]["seconds"]
    for le, count in seconds["buckets"].items():
        assert count == (le >= bound) + (le > bound), le
    assert seconds["count"] == 2
    assert seconds["sum"] == pytest.approx(2 * bound, abs=2e-6)


def test_the_bounds_double_from_50_microseconds_to_13_seconds() -> None:
    assert DURATION_BOUNDS[0] == 5e-05
    assert 13 < DURATION_BOUNDS[-1] < 14
    for lower, upper in itertools.pairwise(DURATION_BOUNDS):
        assert upper == pytest.approx(2 * lower)


@pytest.mark.parametrize("seconds", [0.0, -1.0, 1e9])
def test_a_clock_that_says_nonsense_does_no_harm(seconds: float) -> None:
    stats = Stats()
    stats.count(batch(b"a"), OK, seconds)
    buckets = node_info(stats)["commands"]["exists"]["seconds"]["buckets"]
    assert buckets[math.inf] == 1
    assert buckets[DURATION_BOUNDS[-1]] == (seconds <= 0)


def test_keys_that_nobody_was_asked_for_are_unanswered() -> None:
    stats = Stats()
    stats.count(batch(b"a", b"b", command=Command.GET), FAILED, 1.0)
    info = node_info(stats)
    assert info["commands"]["get"]["keys"]["unanswered"] == 2
    assert info["commands"]["get"]["batches"] == {
        "ok": 0,
        "timed_out": 0,
        "cancelled": 0,
        "failed": 1,
    }
    assert sum(info["commands"]["set"]["keys"].values()) == 0
    assert info["bytes_read"] == 0


def test_metrics_say_which_package_they_need() -> None:
    code = (
        "import sys; sys.modules['prometheus_client.core'] = None\n"
        "import fastkv\n"
        "try: import fastkv.metrics\n"
        "except ImportError as error: print(error)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "expected the package prometheus_client, as fastkv[metrics]" in said.stdout
