"""The part of redis-py's own tests that runs with ours: see `selection.FAST`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conformance import selection, source
from tests.conformance.comparison import compare, differing
from tests.conformance.servers import choose_server


@pytest.fixture(scope="module")
def tests_of_redis() -> Path:
    try:
        return source.tests_of_redis()
    except source.SourceError as error:
        if os.environ.get("FASTKV_REQUIRE_SERVER"):
            raise
        pytest.skip(str(error))


# They take a minute, and wait for real time; on a busy machine more.
@pytest.mark.timeout(400)
def test_what_passes_with_redis_py_passes_with_fastkv(tests_of_redis: Path) -> None:
    try:
        server = choose_server()
    except LookupError as error:
        pytest.skip(str(error))
    logs = source.CACHE / "logs"
    found = compare(tests_of_redis, server, selection.FAST, "swapped", logs, limit=180)
    assert found.different == {}, found.different
    assert found.counts(found.baseline)["passed"] > 1000


def test_what_did_not_pass_differs_also_if_it_never_ran() -> None:
    def results(**outcomes: str) -> dict[str, dict[str, str]]:
        return {name: {"outcome": outcome} for name, outcome in outcomes.items()}

    baseline = results(a="passed", b="passed", c="passed", d="failed", e="passed")
    swapped = results(a="passed", b="failed", c="skipped", d="error")
    assert differing(baseline, swapped) == ["b", "c", "e"]
