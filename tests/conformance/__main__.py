"""``python -m tests.conformance``: redis-py's own tests, with our classes."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tests.conformance import selection, source
from tests.conformance.comparison import Outcome, compare
from tests.conformance.servers import choose_server


def main(
    part: Annotated[
        list[str] | None, typer.Option(help="standalone, cluster, fast; default: all.")
    ] = None,
    path: Annotated[
        list[str] | None, typer.Option(help="Only these, such as tests/test_lock.py.")
    ] = None,
    server: Annotated[
        str, typer.Option(help="Beginning of its name and version.")
    ] = "redis",
    started: Annotated[
        bool, typer.Option(help="Start the native threads in __init__.")
    ] = False,
    hiredis: Annotated[bool, typer.Option(help="Let redis-py find hiredis.")] = False,
    logs: Annotated[Path, typer.Option(help="What pytest said.")] = source.CACHE
    / "logs",
) -> None:
    """Run redis-py's tests with redis-py and with fastkv, and compare."""
    # Else the servers would outlive us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console()
    binary = choose_server(server)
    folder = source.tests_of_redis()
    mode = "started" if started else "swapped"
    known = {p.name: p for p in (*selection.ALL, selection.FAST)}
    parts = [known[name] for name in part or ()] or list(selection.ALL)
    if path:
        parts = [selection.Part(p.name, p.cluster, tuple(path)) for p in parts]
    outcomes = []
    for one in parts:
        began = time.monotonic()
        outcome = compare(folder, binary, one, mode, logs, hiredis)
        outcomes.append(outcome)
        show(console, outcome, mode, str(binary), time.monotonic() - began)
        (logs / f"{one.name}-{mode}.json").write_text(
            json.dumps(
                {
                    "server": str(binary),
                    "baseline": outcome.baseline,
                    mode: outcome.swapped,
                    "different": outcome.different,
                    "unsteady": outcome.unsteady,
                },
                indent=1,
            )
        )
    console.print("Not run:")
    for what, why in selection.EXCLUDED.items():
        console.print(f"  {what}: {why}", markup=False)
    passed = [o.counts(o.baseline)["passed"] for o in outcomes]
    raise typer.Exit(int(any(o.different for o in outcomes) or not all(passed)))


def show(
    console: Console, outcome: Outcome, mode: str, server: str, seconds: float
) -> None:
    table = Table(title=f"{outcome.part.name}, {server}, {seconds:.0f} s")
    table.add_column("")
    for name in ("passed", "failed", "error", "skipped"):
        table.add_column(name, justify="right")
    for name, results in (("redis-py", outcome.baseline), (mode, outcome.swapped)):
        counts = outcome.counts(results)
        table.add_row(
            name, *(str(counts[n]) for n in ("passed", "failed", "error", "skipped"))
        )
    console.print(table)
    for test in outcome.unsteady:
        console.print(f"differed once, not again: {test}", markup=False)
    for test, why in outcome.different.items():
        said = "\n".join(why.splitlines()[-8:])
        console.print(f"FAILS ONLY WITH FASTKV: {test}\n{said}", markup=False)


typer.run(main)
