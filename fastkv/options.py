"""The `tile_*` arguments, as keywords and in URLs."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote

_Init = TypeVar("_Init", bound=Callable[..., None])


@dataclass(frozen=True)
class TileOptions:
    """The `tile_*` arguments of the clients; `None` is the default.

    Attributes:
        workers: Native threads. Default: half the cores, 4 at most.
        connections: Connections that carry values; one more carries lookups. Default:
            4, or as many as there are workers. All together never more than the pool's
            `max_connections`.
        window_bytes: Value bytes that may be on their way on a connection. Default:
            512 KiB, but 256 KiB for loads from a server that answers within 0.2 ms.
        range_bytes: A value of half of this or more is read in ranges of this, the last
            of which may be half longer; 0: every value is read whole. Default: 512 KiB,
            or less for small values where the server's allocator is the C library's.
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

    def share(self, nodes: int, number: int) -> TileOptions:
        """Of the ``number``-th of ``nodes`` that have these together: workers and
        connections are divided, and none goes without.
        """
        workers, connections, _, _ = self.filled(1 << 30)

        def part(total: int) -> int:
            return max(1, total // nodes + (number % nodes < total % nodes))

        return replace(self, workers=part(workers), connections=part(connections - 1))

    def overridden(self, by: TileOptions) -> TileOptions:
        """These, but for those that ``by`` gives."""
        given = {k: v for k, v in vars(by).items() if v is not None}
        return replace(self, **given)

    def on_replica(self) -> TileOptions:
        """These, for a pool of replicas: there a key that expires while replication
        lags can defeat WATCH, so nothing is read in ranges unless it was asked for.
        """
        return self if self.range_bytes is not None else replace(self, range_bytes=0)

    @property
    def near_load_bytes(self) -> int:
        """`window_bytes` of loads from a server that answers within 0.2 ms."""
        return self.window_bytes or 256 << 10

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


_FIELDS = {f"tile_{field.name}": field.name for field in fields(TileOptions)}


def take_options(
    kwargs: dict[str, Any], base: TileOptions = TileOptions()
) -> tuple[TileOptions, dict[str, Any]]:
    """Split keyword arguments into the `tile_*` ones, over ``base``, and the rest."""
    taken = {_FIELDS[k]: v for k, v in kwargs.items() if k in _FIELDS}
    return replace(base, **taken), {k: v for k, v in kwargs.items() if k not in _FIELDS}


def signed_as(theirs: Callable[..., None]) -> Callable[[_Init], _Init]:
    """Make an ``__init__`` that passes redis-py's arguments on show them: their names
    and defaults can be asked for, and so can the `tile_*` ones.
    """
    shown = [
        inspect.Parameter(
            f"tile_{field.name}",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=field.type,
        )
        for field in fields(TileOptions)
    ]

    def sign(ours: _Init) -> _Init:
        signature = inspect.signature(theirs)
        parameters = list(signature.parameters.values())
        last = len(parameters)
        if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
            last -= 1
        parameters[last:last] = shown
        ours.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # functions take any
        return ours

    return sign


def options_of_url(
    url: str, kwargs: dict[str, Any]
) -> tuple[str, TileOptions, dict[str, Any]]:
    """Take the `tile_*` options out of a URL's query and of keyword arguments.

    The query wins, as in redis-py.

    Returns:
        The URL and the keyword arguments without them, and the options.
    """
    options, rest = take_options(kwargs)
    taken = {}
    # By hand, so that the rest stays as it is (urlunsplit would change unix:///path).
    head, mark, tail = url.partition("?")
    query, hash_sign, fragment = tail.partition("#")
    kept = []
    for item in query.split("&"):
        name = unquote(item.partition("=")[0])
        if not name.startswith("tile_"):
            kept.append(item)
            continue
        if name not in _FIELDS:
            raise ValueError(f"{name}: unknown; known are {', '.join(_FIELDS)}")
        value = dict(parse_qsl(item)).get(name, "")
        try:
            taken[_FIELDS[name]] = int(value)
        except ValueError:
            raise ValueError(f"{name}: expected an int, got {value!r}") from None
    url = head + mark + "&".join(kept) + hash_sign + fragment
    return url, replace(options, **taken), rest
