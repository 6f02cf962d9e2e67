"""vLLM, LMCache and fastkv on this machine's CPU, end to end: does a document that was
read once come back from Redis, how fast, and with the same answer?

Needs what `run.sh` installs. Writes a report, a table and a plot.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.run import machine
from bench.vllm_cpu import checkpoint, plot
from bench.vllm_cpu.services import STEP_TOKENS, lmcache_server, vllm_server
from bench.vllm_cpu.workload import (
    Document,
    Row,
    Target,
    arguments,
    ask_all,
    make_documents,
    make_rounds,
    same_tokens,
    table,
)
from fastkv.cli.private_server import PrivateServer, find_servers

# Names of the rounds.
COLD, WARM = "cold, fastkv", "warm, fastkv"
ALONE, ALONE_AGAIN = "cold, without LMCache", "warm, without LMCache"
RESTARTED = "warm, fastkv, after a restart of all but Redis"
LIED = "control: a client that returns zeros"

# Of a document and its question and answer there are less more than the longest.
_ROOM_TOKENS = 448
# Asked about again after everything but Redis was started anew.
_AGAIN = 3
# Equal tokens, as no document has.
_WARM_UP = Document(-1, [1000] * 300)


class Bench:
    """One run.

    Args:
        folder: For the report, logs and the checkpoint.
        longest: Of a document, in tokens.
        redis_url: Of the L2.
    """

    def __init__(self, folder: Path, longest: int, redis_url: str) -> None:
        self._folder = folder
        self._max_tokens = longest + _ROOM_TOKENS
        self._redis_url = redis_url
        self._model = folder / f"model-{self._max_tokens}"
        checkpoint.write(self._model, self._max_tokens)

    @contextlib.contextmanager
    def alone(self) -> Iterator[Target]:
        """VLLM without LMCache."""
        with self._vllm("alone", None) as url:
            yield _warm(Target(url, None))

    @contextlib.contextmanager
    def cached(self, name: str, honest: bool = True) -> Iterator[Target]:
        """VLLM with LMCache and Redis behind it, through fastkv or the liar."""
        log = self._folder / f"lmcache-{name}.log"
        with lmcache_server(self._redis_url, honest, log) as port:
            with self._vllm(name, port) as url:
                yield _warm(Target(url, self._redis_url))

    def _vllm(
        self, name: str, port: int | None
    ) -> contextlib.AbstractContextManager[str]:
        log = self._folder / f"vllm-{name}.log"
        return vllm_server(self._model, self._max_tokens, port, log)

    def measure(
        self, first: Sequence[Document], second: Sequence[Document]
    ) -> dict[str, Row]:
        """All rounds, by name."""
        with self.alone() as alone, self.cached("fastkv") as cached:
            rows = ask_all({COLD: cached, ALONE: alone}, first)
            rows += ask_all({WARM: cached, ALONE_AGAIN: alone}, second, first)
        again = first[:_AGAIN]
        with self.cached("restarted") as target:
            rows += ask_all({RESTARTED: target}, again, first)
        with self.cached("liar", honest=False) as target:
            rows += ask_all({LIED: target}, again, first)
        return {row["round"]: row for row in rows}


def _warm(target: Target) -> Target:
    """The first question takes longer, whatever it is."""
    target.ask(_WARM_UP)
    return target


def check(rows: dict[str, Row]) -> list[tuple[str, bool]]:
    """What must hold, and whether it does."""
    checks = []
    for name, reference in (
        (WARM, COLD),
        (RESTARTED, COLD),
        (COLD, ALONE),
        (WARM, ALONE_AGAIN),
        (LIED, COLD),
    ):
        same, both = same_tokens(rows[name], rows[reference])
        what = f"{name}: tokens of {reference!r} for {same} of {both} documents"
        if name == LIED:
            checks.append((f"{what}; must be none", same == 0))
        else:
            checks.append((what, same == both > 0))
    for name in (WARM, RESTARTED):
        row = rows[name]
        seen = [a["prompt_tokens"] for a in row["answers"] if a["seen"]]
        # What is left of a prompt is less than a chunk.
        tokens = sum(length // STEP_TOKENS * STEP_TOKENS for length in seen)
        read, loaded = row["l2_bytes_read"], tokens * checkpoint.TOKEN_BYTES
        checks.append(
            (
                f"{name}: of {tokens:,} tokens in whole chunks of seen documents "
                f"{row['l2_hit_tokens']:,} came from L2, {row['own_hit_tokens']} from "
                f"vLLM's own cache; {read:,} bytes left Redis, {loaded:,} of KV cache",
                row["l2_hit_tokens"] == tokens
                and row["own_hit_tokens"] == 0
                and loaded <= read < 1.02 * loaded,
            )
        )
    return checks


def main() -> int:
    """Returns 1 if a check fails."""
    parser = arguments("vLLM, LMCache and fastkv on this machine's CPU")
    parser.add_argument("--output", type=Path, default=Path("build/bench-vllm"))
    given = parser.parse_args()
    folder: Path = given.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    binary = next(b for b in find_servers() if b.name == "redis")
    documents = make_documents(given.documents // 3 * 4, given.shortest, given.longest)
    load = [os.getloadavg()[0]]
    with PrivateServer(binary) as server:
        bench = Bench(folder, given.longest, f"redis://127.0.0.1:{server.port}")
        rounds = bench.measure(*make_rounds(documents))
    load.append(os.getloadavg()[0])
    checks = check(rounds)
    rows = list(rounds.values())
    about = machine()
    for package in ("vllm-cpu", "torch"):
        about["versions"][package] = importlib.metadata.version(package)
    report = {
        "machine": about,
        "server": str(binary),
        "settings": {k: v for k, v in vars(given).items() if k != "output"},
        "load": load,
        "rows": rows,
        "checks": [{"what": what, "holds": holds} for what, holds in checks],
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    (folder / "table.md").write_text(table(rows) + "\n")
    plot.draw(report, folder / "ttft.png")
    print(table(rows))
    for what, holds in checks:
        print("ok  " if holds else "FAIL", what)
    print(f"report, table, plot and logs: {folder}")
    return int(not all(holds for _, holds in checks))


if __name__ == "__main__":
    sys.exit(main())
