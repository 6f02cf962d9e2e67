"""Two runs of redis-py's tests, plain and swapped, and what differs between them.

Tests of redis-py that wait for real time, or that bind a port of their own, fail now
and then with plain redis-py too. So a test that differs is run alone, in both modes, up
to twice; it counts if it passes with redis-py and not with ours each time. It is shown
in any case. (Tests of our own are never retried.)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastkv.cli.private_server import ServerBinary
from tests.conformance import servers
from tests.conformance.certificates import make_certificates
from tests.conformance.selection import Part

_RERUNS = 2
# Where redis-py 8.1 has its two client classes; else the swap would prove nothing.
_PLACES = 30
_PLUGIN = Path(__file__).with_name("swap_plugin.py")
Results = dict[str, dict[str, Any]]  # what the plugin wrote, by test id


@dataclass
class Outcome:
    """Of one part.

    Attributes:
        baseline: With plain redis-py.
        swapped: With our classes.
        different: Tests that pass with redis-py and not with ours.
        unsteady: Tests that differed once and not again.
    """

    part: Part
    baseline: Results
    swapped: Results
    different: dict[str, str] = field(default_factory=dict)
    unsteady: list[str] = field(default_factory=list)

    def counts(self, results: Results) -> Counter[str]:
        return Counter(test["outcome"] for test in results.values())


class Runner:
    """Runs tests in one mode, with servers of its own: the same binary with the same
    arguments in each mode.
    """

    def __init__(
        self, source: Path, mode: str, hiredis: bool, ports: dict[int, int]
    ) -> None:
        self.mode = mode
        self._hiredis = hiredis
        self._process: subprocess.Popen[bytes] | None = None
        self._source = source
        self._ports = ports

    def run(self, part: Part, tests: Sequence[str], log: Path, limit: float) -> Results:
        """Run them in one process; what it wrote goes to ``log``.

        A process that crashes or hangs leaves tests out, and those have not passed.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fastkv-") as folder:
            report = Path(folder) / "report"
            report.touch()
            task = {
                "mode": self.mode,
                "ports": self._ports,
                "hiredis": self._hiredis,
                "report": str(report),
            }
            environment = {
                **os.environ,
                "FASTKV_CONFORMANCE": json.dumps(task),
                "PYTHONPATH": os.pathsep.join(
                    filter(None, (str(_PLUGIN.parent), os.environ.get("PYTHONPATH")))
                ),
            }
            command = [
                *(sys.executable, "-m", "pytest", "-p", _PLUGIN.stem),
                *("-q", "-p", "no:cacheprovider", "--tb=native"),
                *("-p", "no:hypothesispytest", "--color=no"),
                *part.arguments,
                *self._server_arguments(part),
                *tests,
            ]
            with log.open("w") as output:
                process = self._process = subprocess.Popen(
                    command,
                    cwd=self._source,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
                try:
                    process.wait(limit)
                except subprocess.TimeoutExpired:
                    output.write(f"\nkilled after {limit:g} s\n")
                finally:
                    process.kill()
                    process.wait()
            lines = [json.loads(line) for line in report.read_text().splitlines()]
        places = [line["places"] for line in lines if "places" in line]
        if lines and self.mode != "baseline" and (not places or places[0] < _PLACES):
            raise AssertionError(f"our classes are in {places} places, not {_PLACES}")
        return {line["id"]: line for line in lines if "outcome" in line}

    def stop(self) -> None:
        """Let a `run` in another thread return."""
        if self._process is not None:
            self._process.kill()

    def _server_arguments(self, part: Part) -> list[str]:
        first = self._ports[16379 if part.cluster else 6379]
        sentinels = [p for port, p in self._ports.items() if 26379 <= port <= 26381]
        arguments = [f"--redis-url=redis://localhost:{first}/0"]
        if sentinels:
            at = ",".join(f"localhost:{port}" for port in sentinels)
            arguments.append(f"--sentinels={at}")
        if servers.TLS_PORT in self._ports:
            at = f"localhost:{self._ports[servers.TLS_PORT]}"
            arguments.append(f"--redis-ssl-url=rediss://{at}")
        return arguments


@contextmanager
def stopping(pair: tuple[Runner, Runner]) -> Iterator[None]:
    """End their runs when we are interrupted: else their threads are waited for."""
    try:
        yield
    except BaseException:
        for runner in pair:
            runner.stop()
        raise


@contextmanager
def runners(
    source: Path, binary: ServerBinary, part: Part, mode: str, hiredis: bool
) -> Iterator[tuple[Runner, Runner]]:
    """For the baseline and for ``mode``."""
    start = servers.cluster if part.cluster else servers.standalone
    certificates = make_certificates(source)
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(start(binary, certificates)) for _ in range(2)
        )
        yield (
            Runner(source, "baseline", hiredis, first),
            Runner(source, mode, hiredis, second),
        )


def compare(
    source: Path,
    binary: ServerBinary,
    part: Part,
    mode: str,
    logs: Path,
    hiredis: bool = False,
    limit: float = 3600.0,
) -> Outcome:
    """Run the part in both modes, side by side, and again what differs."""

    def both(tests: Sequence[str], name: str, seconds: float) -> list[Results]:
        with ThreadPoolExecutor() as pool, stopping(pair):
            return list(
                pool.map(
                    lambda runner: runner.run(
                        part,
                        tests,
                        logs / f"{part.name}-{name}-{runner.mode}.log",
                        seconds,
                    ),
                    pair,
                )
            )

    with runners(source, binary, part, mode, hiredis) as pair:
        outcome = Outcome(part, *both(part.paths, "all", limit))
        for test in differing(outcome.baseline, outcome.swapped):
            for attempt in range(_RERUNS):
                name = f"again-{attempt + 1}-{len(outcome.different)}"
                again = both([test], name, 120.0)
                if not differing(*again):
                    outcome.unsteady.append(test)
                    break
            else:
                last = again[1].get(test) or {"outcome": "did not end"}
                outcome.different[test] = last.get("why", last["outcome"])
    return outcome


def differing(baseline: Results, swapped: Results) -> list[str]:
    """What passed in the first and not in the second."""
    return [
        test
        for test, result in baseline.items()
        if result["outcome"] == "passed"
        and swapped.get(test, {}).get("outcome") != "passed"
    ]
