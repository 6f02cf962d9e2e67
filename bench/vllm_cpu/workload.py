"""Questions about long documents, asked of a vLLM server: a round in which all
documents are new, then one in which it has seen two of three.

Knows HTTP and Redis's counters; neither what serves behind them nor on which device.
Beside a running vLLM, for example on a GPU machine:

    python -m bench.vllm_cpu.workload --vllm http://localhost:8000 --redis redis://...
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import statistics
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

Row = dict[str, Any]

# Token ids that every vocabulary has, but for the special ones in front.
_FIRST_TOKEN, _TOKENS = 1024, 7168
_QUESTION_TOKENS = 24
_ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Document:
    """A document with its question.

    Attributes:
        number: Documents of one number and length are equal, in every process.
        prompt: Token ids.
    """

    number: int
    prompt: list[int]


def make_documents(count: int, shortest: int, longest: int) -> list[Document]:
    """Random documents of lengths, in tokens, that are spread evenly."""
    made = []
    for number in range(count):
        source = random.Random(number)
        length = source.randint(shortest, longest) + _QUESTION_TOKENS
        prompt = [_FIRST_TOKEN + source.randrange(_TOKENS) for _ in range(length)]
        made.append(Document(number, prompt))
    return made


def make_rounds(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """The two rounds out of four thirds of a round. Of each three documents of the
    second, the first is new: it drives the last one of the first round out of vLLM's
    own cache.
    """
    third = len(documents) // 4
    first, new = documents[: 3 * third], documents[3 * third :]
    second = []
    for at in range(third):
        second += [new[at], *first[2 * at : 2 * at + 2]]
    return list(first), second


class Target:
    """A vLLM server, and the Redis behind it.

    Args:
        vllm: Its URL.
        redis_url: `None`: nothing is behind it.
    """

    def __init__(self, vllm: str, redis_url: str | None) -> None:
        self._vllm = vllm
        self._redis = redis.Redis.from_url(redis_url) if redis_url else None
        with urllib.request.urlopen(f"{vllm}/v1/models") as answer:
            self._model: str = json.load(answer)["data"][0]["id"]

    def ask(self, document: Document) -> Row:
        """One answer, with the seconds to its first token and to its last."""
        body = {
            "model": self._model,
            "prompt": document.prompt,
            "max_tokens": _ANSWER_TOKENS,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "return_token_ids": True,
        }
        request = urllib.request.Request(
            f"{self._vllm}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        tokens: list[int] = []
        ttft = 0.0
        start = time.monotonic()
        with urllib.request.urlopen(request) as lines:
            for line in lines:
                if not line.startswith(b"data: {"):
                    continue
                for choice in json.loads(line[len(b"data: ") :])["choices"]:
                    ttft = ttft or time.monotonic() - start
                    tokens += choice["token_ids"] or []
        if len(tokens) != _ANSWER_TOKENS:
            raise RuntimeError(f"expected {_ANSWER_TOKENS} tokens, got {len(tokens)}")
        return {
            "document": document.number,
            "prompt_tokens": len(document.prompt),
            "ttft": ttft,
            "seconds": time.monotonic() - start,
            "tokens": tokens,
        }

    def counters(self) -> dict[str, int]:
        """What has been counted since its start: tokens of KV cache that vLLM had
        itself and that came from L2, bytes between LMCache and Redis.
        """
        with urllib.request.urlopen(f"{self._vllm}/metrics") as answer:
            metrics = answer.read().decode()
        counters = {
            "own_hit_tokens": _metric(metrics, "vllm:prefix_cache_hits_total"),
            "l2_hit_tokens": _metric(metrics, "vllm:external_prefix_cache_hits_total"),
        }
        if self._redis is not None:
            stats: Any = self._redis.info("stats")
            counters["l2_bytes_read"] = stats["total_net_output_bytes"]
            counters["l2_bytes_written"] = stats["total_net_input_bytes"]
        return counters


def ask_all(
    targets: dict[str, Target],
    documents: Sequence[Document],
    seen: Sequence[Document] = (),
) -> list[Row]:
    """A round of each target, by its name. Each question is put to one after the other,
    so that what else the machine does meanwhile meets all of them alike.
    """
    numbers = {document.number for document in seen}
    before = {name: target.counters() for name, target in targets.items()}
    answers: dict[str, list[Row]] = {name: [] for name in targets}
    for at, document in enumerate(documents):
        for name in sorted(targets, reverse=at % 2 == 1):
            answer = targets[name].ask(document)
            answer["seen"] = document.number in numbers
            answers[name].append(answer)
    rows = []
    for name, target in targets.items():
        after = target.counters()
        rows.append(
            {
                "round": name,
                "seconds": sum(answer["seconds"] for answer in answers[name]),
                "answers": answers[name],
                **{key: after[key] - before[name][key] for key in after},
            }
        )
    return rows


def _metric(metrics: str, name: str) -> int:
    values = re.findall(rf"^{name}\{{.*\}} (\S+)$", metrics, re.MULTILINE)
    return int(sum(float(value) for value in values))


def same_tokens(row: Row, reference: Row) -> tuple[int, int]:
    """How many answers are those of another round, and of how many documents both
    have one.
    """
    expected = {a["document"]: a["tokens"] for a in reference["answers"]}
    both = [a for a in row["answers"] if a["document"] in expected]
    return sum(a["tokens"] == expected[a["document"]] for a in both), len(both)


def p99(seconds: Sequence[float]) -> float:
    """The nearest rank; of less than 100 values the largest."""
    return sorted(seconds)[math.ceil(0.99 * len(seconds)) - 1]


def table(rows: Sequence[Row]) -> str:
    """Rounds, as Markdown."""
    lines = [
        "| round | documents | tokens from vLLM's cache | from L2 | read from L2 | "
        "TTFT mean, s | p99 | mean of seen documents | round, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ttft = [a["ttft"] for a in row["answers"]]
        seen = [a["ttft"] for a in row["answers"] if a["seen"]]
        read = row.get("l2_bytes_read")
        cells = [
            row["round"],
            f"{len(ttft)}, {len(seen)} seen",
            f"{row['own_hit_tokens']:,}",
            f"{row['l2_hit_tokens']:,}",
            "" if read is None else f"{read / 1e6:,.0f} MB",
            f"{statistics.mean(ttft):.2f}",
            f"{p99(ttft):.2f}",
            f"{statistics.mean(seen):.2f}" if seen else "",
            f"{row['seconds']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def arguments(description: str) -> argparse.ArgumentParser:
    """What the workload can be told."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--documents", type=int, default=12, help="in a round")
    parser.add_argument("--shortest", type=int, default=2000, help="tokens")
    parser.add_argument("--longest", type=int, default=8000, help="tokens")
    return parser


def main() -> int:
    """Run the two rounds against a server that is there."""
    parser = arguments("long documents, asked about twice")
    parser.add_argument("--vllm", default="http://localhost:8000")
    parser.add_argument("--redis", help="to count what is read from it")
    parser.add_argument("--output", type=Path, help="for a report as JSON")
    given = parser.parse_args()
    target = Target(given.vllm, given.redis)
    documents = make_documents(given.documents // 3 * 4, given.shortest, given.longest)
    first, second = make_rounds(documents)
    (cold,) = ask_all({"cold": target}, first)
    (warm,) = ask_all({"warm": target}, second, first)
    print(table([cold, warm]))
    same, both = same_tokens(warm, cold)
    print(f"same tokens: {same} of {both}")
    if given.output:
        given.output.write_text(json.dumps({"rows": [cold, warm]}))
    return int(same != both)


if __name__ == "__main__":
    sys.exit(main())
