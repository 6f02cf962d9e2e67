"""Whether a server has the memory for what is about to be stored.

Storing in a server that is full evicts somebody else's keys, or fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import redis
from redis.exceptions import RedisError

from fastkv.cli.target import Plain, Target, members
from fastkv.cli.terminal import Failure, size_label

_SLACK = 4 << 20  # connections, keys, the server's own


def check_room(
    target: Target, plain: Plain, keys: Mapping[int, Sequence[str]], on_its_way: int
) -> str:
    """Refuse what does not fit.

    Args:
        target: Of the server.
        plain: redis-py's client of it.
        keys: Of values, by their bytes.
        on_its_way: Bytes of requests and replies that it may have to hold beside them.

    Returns:
        What could not be looked at, or nothing.

    Raises:
        Failure: It does not fit.
    """
    needed: Counter[str] = Counter()
    for size, names in keys.items():
        for name in names:
            needed[_owner(plain, name)] += _allocated(size)
    unseen = ""
    total = 0
    for member in members(plain):
        if member.name not in needed:
            continue
        need = needed[member.name] + on_its_way + _SLACK
        total += need
        try:
            info: Any = member.client.info("memory")
        except RedisError as error:
            unseen = f"memory of the server: {error}"
            continue
        used, most = info["used_memory"], info["maxmemory"]
        if most:
            _compare(member.name, need, most - used, f"of {_mib(most)} (maxmemory)")
        else:
            most = info["total_system_memory"]
            left = most - info["used_memory_rss"]
            _compare(member.name, need, left, f"of {_mib(most)} on its machine")
    if target.local:
        # Ours: what is sent, and what is received into.
        _compare("", total + 2 * on_its_way, _available(), "available on this machine")
    return unseen


def _compare(name: str, need: int, left: int, of: str) -> None:
    if need > left:
        raise Failure(
            f"The server {name + ' ' if name else ''}lacks the memory: "
            f"{_mib(need)} needed, {_mib(max(0, left))} left {of}. Nothing was stored. "
            "Give smaller or fewer values."
        )


def _owner(plain: Plain, name: str) -> str:
    if isinstance(plain, redis.Redis):
        return ""
    node = plain.get_node_from_key(name)
    if node is None:
        raise Failure(f"No node of the cluster serves the slot of {name}")
    return str(node.name)


def _allocated(size: int) -> int:
    """Bytes that jemalloc takes for a value: a quarter of a power of two more."""
    size += 64
    step = max(64, 1 << (size - 1).bit_length() - 3)
    return -(-size // step) * step + 128


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62


def _mib(size: int) -> str:
    return size_label(size >> 20 << 20)
