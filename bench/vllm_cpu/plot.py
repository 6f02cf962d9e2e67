"""The plot of a report."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib as mpl

from bench.vllm_cpu.workload import Row, p99

mpl.use("Agg")
import matplotlib.pyplot as plt


def draw(report: Row, path: Path) -> None:
    """TTFT over the length of the prompt, and by round.

    Args:
        report: Its first four rows are cold and warm, each with fastkv and without
            LMCache.
        path: Of the file.
    """
    cold, alone, warm, again = report["rows"][:4]
    new = cold["answers"] + [a for a in warm["answers"] if not a["seen"]]
    seen = [a for a in warm["answers"] if a["seen"]]
    groups = [
        ("without LMCache", alone["answers"] + again["answers"], "tab:gray", "x"),
        ("fastkv, new document", new, "tab:blue", "o"),
        ("fastkv, seen document: from Redis", seen, "tab:red", "o"),
    ]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for label, answers, color, marker in groups:
        left.scatter(
            [a["prompt_tokens"] for a in answers],
            [a["ttft"] for a in answers],
            color=color,
            marker=marker,
            s=22,
            label=f"{label} ({len(answers)})",
        )
    left.set_yscale("log")
    left.set_xlabel("tokens of the prompt")
    left.set_ylabel("time to the first token, seconds")
    left.legend(fontsize=8, loc="center right")
    left.grid(alpha=0.3, which="both")

    bars = [
        ("all new,\nwithout LMCache", alone, "tab:gray"),
        ("all new,\nfastkv", cold, "tab:blue"),
        ("2 of 3 seen,\nwithout LMCache", again, "tab:gray"),
        ("2 of 3 seen,\nfastkv", warm, "tab:red"),
    ]
    for at, (_, row, color) in enumerate(bars):
        ttft = [a["ttft"] for a in row["answers"]]
        for value, shift, alpha in (
            (statistics.mean(ttft), -0.2, 1.0),
            (p99(ttft), 0.2, 0.45),
        ):
            bar = right.bar(at + shift, value, 0.38, color=color, alpha=alpha)
            right.bar_label(bar, fmt="%.1f", fontsize=8)
    labels = [f"{label}\nround: {row['seconds']:.0f} s" for label, row, _ in bars]
    right.set_xticks(range(len(bars)), labels, fontsize=8)
    right.set_ylabel("TTFT, seconds: mean (dark), p99 (light)")
    right.grid(alpha=0.3, axis="y")
    machine, settings = report["machine"], report["settings"]
    versions = machine["versions"]
    figure.suptitle(
        f"{settings['documents']} documents of {settings['shortest']} to "
        f"{settings['longest']} tokens a round, one question at a time",
        fontsize=11,
    )
    figure.text(
        0.01,
        0.01,
        f"{machine['cpu']}, {machine['cores']} cores; a random Llama of 0.1 billion "
        f"parameters; vLLM {versions['vllm-cpu']} on CPU, LMCache "
        f"{versions['lmcache']}, {report['server']}",
        fontsize=7,
        color="gray",
    )
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
