"""The `tile_*` arguments, as keywords and in URLs."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import parse_qsl, unquote


@dataclass(frozen=True)
class TileOptions:
    """The `tile_*` arguments of the clients; `None` is the default.

    Attributes:
        workers: Native threads. Default: half the cores, 4 at most.
        connections: Connections that carry values; one more carries lookups. Default:
            4, or as many as there are workers. All together never more than the pool's
            `max_connections`.
        window_bytes: Value bytes that may be on their way on a connection. Default:
            512 KiB.
        range_bytes: A value of half of this or more is read in ranges of this; 0: every
            value is read whole. Default: 512 KiB.
    """

    workers: int | None = None
    connections: int | None = None
    window_bytes: int | None = None
    range_bytes: int | None = None

    def __post_init__(self) -> None:
        for field, least, most in (
            ("workers", 1, 64),
            ("connections", 1, 1024),
            ("window_bytes", 1, 1 << 40),
            ("range_bytes", 0, 1 << 40),
        ):
            value = getattr(self, field)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(
                    f"tile_{field}: expected an int, got {type(value).__name__}"
                )
            if not least <= value <= most:
                raise ValueError(
                    f"tile_{field}: expected {least} to {most}, got {value}"
                )

    def filled(self, max_connections: int) -> tuple[int, int, int, int]:
        """No default left.

        Returns:
            ``(workers, connections with the lookup one, window_bytes, range_bytes)``.
        """
        workers = self.workers or max(1, min(4, (os.cpu_count() or 1) // 2))
        connections = min((self.connections or max(4, workers)) + 1, max_connections)
        return (
            min(workers, connections),
            connections,
            self.window_bytes or 512 << 10,
            512 << 10 if self.range_bytes is None else self.range_bytes,
        )


def options_of_url(
    url: str, kwargs: dict[str, Any]
) -> tuple[str, TileOptions, dict[str, Any]]:
    """Take the `tile_*` options out of a URL's query and of keyword arguments.

    The query wins, as in redis-py.

    Returns:
        The URL and the keyword arguments without them, and the options.
    """
    given = {f"tile_{field.name}": field.name for field in fields(TileOptions)}
    taken = {given[k]: v for k, v in kwargs.items() if k in given}
    rest = {k: v for k, v in kwargs.items() if k not in given}
    # By hand, so that the rest stays as it is (urlunsplit would change unix:///path).
    head, mark, tail = url.partition("?")
    query, hash_sign, fragment = tail.partition("#")
    kept = []
    for item in query.split("&"):
        name = unquote(item.partition("=")[0])
        if not name.startswith("tile_"):
            kept.append(item)
            continue
        if name not in given:
            raise ValueError(f"{name}: unknown; known are {', '.join(given)}")
        value = dict(parse_qsl(item)).get(name, "")
        try:
            taken[given[name]] = int(value)
        except ValueError:
            raise ValueError(f"{name}: expected an int, got {value!r}") from None
    url = head + mark + "&".join(kept) + hash_sign + fragment
    return url, TileOptions(**taken), rest
