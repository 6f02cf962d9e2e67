"""What `tile_info` gives: the names of the engine's counters."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TYPE_CHECKING, TypedDict

from fastkv._core import DURATION_BOUNDS, Command, Stats

if TYPE_CHECKING:
    from typing_extensions import NotRequired

# A key's outcomes, in the order of `Stats.command`.
_OUTCOMES = {
    Command.GET: ("unanswered", "hit", "miss", "wrong_size", "refused", "redirected"),
    Command.SET: ("unanswered", "stored", "not_stored", "", "refused", "redirected"),
    Command.EXISTS: ("unanswered", "found", "not_found", "", "refused", "redirected"),
    Command.UNLINK: (
        *("unanswered", "deleted", "not_deleted", "", "refused", "redirected"),
    ),
}
_NAMES = {
    Command.GET: "get",
    Command.SET: "set",
    Command.EXISTS: "exists",
    Command.UNLINK: "delete",
}
_RESULTS = ("ok", "timed_out", "cancelled", "failed")
_BOUNDS = (*DURATION_BOUNDS, math.inf)

#: For `Stats.count`.
OK, TIMED_OUT, CANCELLED, FAILED = range(4)


class Histogram(TypedDict):
    """How long batches took, in seconds. A bucket counts those up to its bound."""

    count: int
    sum: float
    buckets: dict[float, int]


class CommandInfo(TypedDict):
    """Of one ``batch_tile_*`` call: batches by result, keys by outcome."""

    batches: dict[str, int]
    keys: dict[str, int]
    seconds: Histogram


class TileInfo(TypedDict):
    """See `fastkv.Redis.tile_info`."""

    bytes_read: int
    bytes_written: int
    retries: int
    reconnects: int
    socket_timeouts: int
    connections: int
    queued: dict[str, int]
    commands: dict[str, CommandInfo]
    address: NotRequired[str]  # of a single server
    nodes: NotRequired[dict[str, TileInfo]]  # of a cluster


def node_info(
    stats: Stats, gauges: tuple[int, tuple[int, int, int]] = (0, (0, 0, 0))
) -> TileInfo:
    """The counts of one server; ``gauges`` are its engine's, if it has one."""
    connections, queued = gauges
    return {
        "bytes_read": stats.command(Command.GET)[2],
        "bytes_written": stats.command(Command.SET)[2],
        "retries": stats.retries,
        "reconnects": stats.reconnects,
        "socket_timeouts": stats.stalls,
        "connections": connections,
        "queued": dict(zip(("lookups", "loads", "stores"), queued, strict=True)),
        "commands": {
            name: _command_info(stats, command) for command, name in _NAMES.items()
        },
    }


def cluster_info(calls: Stats, nodes: dict[str, TileInfo]) -> TileInfo:
    """The totals of a cluster.

    Args:
        calls: Of whole batches, of which the nodes have parts.
        nodes: By name.
    """
    total = node_info(calls)
    total["nodes"] = nodes
    for node in nodes.values():
        total["retries"] += node["retries"]
        total["reconnects"] += node["reconnects"]
        total["socket_timeouts"] += node["socket_timeouts"]
        total["connections"] += node["connections"]
        for name, keys in node["queued"].items():
            total["queued"][name] += keys
    return total


def _command_info(stats: Stats, command: Command) -> CommandInfo:
    batches, keys, _, seconds, durations = stats.command(command)
    buckets = dict(zip(_BOUNDS, accumulate(durations), strict=True))
    outcomes = dict(zip(_OUTCOMES[command], keys, strict=True))
    outcomes.pop("", None)  # what this command cannot come to
    return {
        "batches": dict(zip(_RESULTS, batches, strict=True)),
        "keys": outcomes,
        "seconds": {"count": buckets[math.inf], "sum": seconds, "buckets": buckets},
    }
