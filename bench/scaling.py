"""``python -m bench.scaling``: the tables of docs/scaling.md, for other figures too.

With ``--check``, what can be measured on this machine beside what the model says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated

import numpy as np
import typer

from bench import scaling_check
from bench import scaling_model as model
from bench.scaling_model import GBIT, KIB, MIB, Fleet

_NODES = (1, 4, 10, 30, 100)


def _table(title: str, *head: str) -> Iterator[str]:
    yield ""
    yield title
    yield ""
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _size(count: float) -> str:
    if count < MIB:
        return f"{count / KIB:.0f} KiB"
    return (
        f"{count / MIB:.1f} MiB" if count < 1024 * MIB else f"{count / 2**30:.1f} GiB"
    )


def link_table(link: float) -> Iterator[str]:
    """What one client needs to fill its link."""
    yield from _table(
        f"**One client, {link / GBIT:.0f} Gbit/s**",
        *("cap of a flow, Gbit/s", "RTT, ms", "connections", "window of each"),
        *("workers", "servers", "client's memory", "unread, most"),
    )
    for cap in (5 * GBIT, 10 * GBIT):
        for rtt in (0.1e-3, 0.5e-3, 2e-3):
            connections = model.streams(link, cap)
            window = model.window(cap, rtt)
            yield _row(
                f"{cap / GBIT:.0f}",
                f"{rtt * 1e3:g}",
                connections,
                _size(window),
                model.cores(link, model.CLIENT_CPU),
                model.cores(link, model.SERVER_CPU),
                _size(model.client_memory(connections)),
                _size(model.unread_memory(connections, window)),
            )


def cluster_table(link: float, cap: float, rtt: float, clients: int) -> Iterator[str]:
    """What grows with the number of nodes."""
    yield from _table(
        f"**{clients} clients of a cluster, {link / GBIT:.0f} Gbit/s each, flows of "
        f"{cap / GBIT:.0f} Gbit/s, RTT {rtt * 1e3:g} ms**",
        *("nodes", "a client's threads", "a client's connections"),
        *("a node's connections", "a node's replies, most"),
        *("all servers, GB/s", "lookups/s of a client"),
    )
    window = model.window(cap, rtt)
    streams = model.streams(link, cap)
    workers = model.cores(link, model.CLIENT_CPU)
    for nodes in _NODES:
        values = model.in_cluster(streams, nodes)
        at_node = clients * values // nodes
        yield _row(
            nodes,
            model.in_cluster(workers, nodes),
            values + nodes,
            at_node + clients,
            _size(model.unread_memory(at_node, window)),
            f"{nodes / model.SERVER_CPU / 1e9:.1f}",
            f"{model.lookups(nodes, rtt) / 1e6:.1f} million",
        )


def tail_table(
    link: float, cap: float, rtt: float, trials: int, rng: np.random.Generator
) -> Iterator[str]:
    """Batches over n nodes."""
    keys, value, slow, jitter = 128, 8 * MIB, 4, 0.3
    yield from _table(
        f"**A batch of {keys} x {_size(value)} over n nodes, ms, p50 / p99** "
        f"(the link alone: {keys * value / link * 1e3:.0f} ms)",
        *("nodes", "keys on the fullest", "connections", "all well"),
        *(f"one {slow} times slower", "with a replica each, and twice the connections"),
    )
    streams = model.streams(link, cap)
    for nodes in _NODES:
        full = model.fullest(keys, nodes, trials, rng)
        least = model.in_cluster(streams, nodes)
        enough = nodes * math.ceil(streams * full / keys)
        for connections in sorted({least, enough}):
            cells = []
            for slowness, replicas in ((1, 0), (slow, 0), (slow, 1)):
                rate = min(connections // nodes * cap, 1 / model.SERVER_CPU)
                fleet = Fleet(nodes, rate, rtt, link, slowness, replicas, jitter)
                times = model.batch_times(fleet, keys, value, trials, rng) * 1e3
                cells.append("{:.0f} / {:.0f}".format(*np.percentile(times, (50, 99))))
            yield _row(nodes, f"{full:.1f}", connections, *cells)


def loss_table(
    link: float, prefill: float, trials: int, rng: np.random.Generator
) -> Iterator[str]:
    """One node of n comes back empty."""
    chunks, tokens, value = 32, 256, 32 * MIB
    load = value / link
    compute = tokens / prefill
    yield from _table(
        f"**One node lost; prompts of {chunks} chunks of {tokens} tokens and "
        f"{_size(value)}; a chunk is loaded in {load * 1e3:.1f} ms and computed in "
        f"{compute * 1e3:.1f} ms**",
        *("nodes", "keys missed", "prompts whole", "usable prefix", "the same, tried"),
        *("more for a prompt", "the same, if a prompt's keys share a slot"),
    )
    for nodes in _NODES[1:]:
        prefix = model.usable_prefix(chunks, nodes)
        tried = model.prefixes_after_loss(chunks, nodes, trials, rng).mean()
        yield _row(
            nodes,
            f"{100 / nodes:.0f} %",
            f"{100 * (1 - 1 / nodes) ** chunks:.2g} %",
            f"{prefix:.1f}",
            f"{tried:.1f}",
            f"{(chunks - prefix) * (compute - load):.2f} s",
            f"{chunks / nodes * (compute - load):.2f} s",
        )


def main(
    check: Annotated[
        bool, typer.Option("--check", help="Measure here, on private servers.")
    ] = False,
    only: Annotated[str, typer.Option(help="Only checks that contain this.")] = "",
    rounds: Annotated[int, typer.Option(help="Of each check.")] = 5,
    link: Annotated[float, typer.Option(help="Of a client, Gbit/s.")] = 100,
    cap: Annotated[float, typer.Option(help="Of a flow, Gbit/s.")] = 5,
    rtt: Annotated[float, typer.Option(help="Milliseconds.")] = 0.5,
    clients: Annotated[int, typer.Option(help="Of a cluster.")] = 100,
    prefill: Annotated[float, typer.Option(help="Tokens/s that a GPU computes.")] = 1e4,
    trials: Annotated[int, typer.Option(help="Of each simulation.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 1,
) -> None:
    """Print what a deployment needs and how long its batches take, in Markdown."""
    if check:
        for line in scaling_check.run(rounds, seed, only):
            typer.echo(line)
        return
    rng = np.random.default_rng(seed)
    for lines in (
        link_table(link * GBIT),
        cluster_table(link * GBIT, cap * GBIT, rtt / 1e3, clients),
        tail_table(link * GBIT, cap * GBIT, rtt / 1e3, trials, rng),
        loss_table(link * GBIT, prefill, trials, rng),
    ):
        for line in lines:
            typer.echo(line)


if __name__ == "__main__":
    typer.run(main)
