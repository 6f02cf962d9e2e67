"""From the engine's codes and the server's error lines to `redis.exceptions`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from redis._parsers.base import BaseParser
from redis.exceptions import (
    AskError,
    ConnectionError,
    InvalidResponse,
    RedisError,
    ResponseError,
    TimeoutError,
)

from fastkv._core import Code


class ValueSizeError(RedisError):
    """The value of a key has another length than the buffer it was to be read into.

    Attributes:
        expected: Bytes in the buffer.
        actual: Bytes in the value.
    """

    # The message alone makes one: pickle and copy do so, and set the attributes then.
    def __init__(self, message: str, expected: int = 0, actual: int = 0) -> None:
        super().__init__(message)
        self.expected = expected
        self.actual = actual


class UnsupportedConnection(RedisError):
    """The client's connections cannot carry ``batch_tile_*``; other commands work."""


class TileError(RedisError):
    """A batch ran to its end, and for some keys the server had an error.

    Attributes:
        outcomes: One entry a key, in the order of the keys: what the call would have
            returned for it, or the exception. A ``True`` is as good as in a call that
            returned: the buffer holds the value, or the value is stored.
        errors: The exceptions alone, by index of their keys: `ValueSizeError`, or what
            redis-py raises for the server's error reply.
    """

    def __init__(
        self,
        message: str,
        outcomes: Sequence[bool | RedisError] = (),
        errors: Mapping[int, RedisError] | None = None,
    ) -> None:
        super().__init__(message)
        self.outcomes = list(outcomes)
        self.errors = dict(errors or {})


def size_error(expected: int, actual: int) -> ValueSizeError:
    """For a value of ``actual`` bytes and a buffer of ``expected``."""
    return ValueSizeError(
        f"expected a value of {expected} bytes, the buffer's length; "
        f"the server has {actual} bytes",
        expected,
        actual,
    )


def tile_error(
    keys: Sequence[object], hits: Sequence[bool], errors: dict[int, RedisError]
) -> TileError:
    """For a batch with some ``errors``, by index of their keys."""
    index, first = next(iter(errors.items()))
    said = str(first)
    if isinstance(first, AskError):  # a slot and a node; MovedError is one, too
        said = f"{type(first).__name__} {said} (for a cluster: fastkv.RedisCluster)"
    return TileError(
        f"{len(errors)} of {len(keys)} keys failed; the first is {keys[index]!r}: "
        f"{said}",
        [errors.get(i, hit) for i, hit in enumerate(hits)],
        errors,
    )


def error_of_reply(line: str) -> RedisError:
    """What redis-py raises for an error reply (the line without its ``-`` and CRLF)."""
    try:
        error = BaseParser.parse_error(line)
    except ValueError:  # a MOVED or ASK that names no node
        error = ResponseError(line)
    assert isinstance(error, RedisError)
    return error


def error_of_code(code: int, detail: str, keys: int, timeout: float) -> RedisError:
    """What redis-py raises, or would, when a batch failed as a whole."""
    if code == Code.TIMED_OUT:
        return TimeoutError(f"{keys} keys were not all answered within {timeout:g} s")
    if code == Code.STALLED:
        return TimeoutError(detail)
    if code == Code.PROTOCOL_ERROR:
        return InvalidResponse(f"Protocol Error: {detail}")
    if code == Code.UNKNOWN_OUTCOME:
        return ConnectionError(
            f"{detail} A SET with nx or xx had been sent and was not answered: "
            "whether it was done is unknown.".lstrip()
        )
    if code == Code.CLOSED:
        return ConnectionError("The client was closed before the batch was complete.")
    if code == Code.INTERNAL_ERROR:
        return RedisError(f"fastkv worker died: {detail}")
    # LOADING, NOAUTH: what the server said to one key ended the connection of others.
    error = error_of_reply(detail)
    if isinstance(error, ConnectionError):
        return error
    return ConnectionError(detail or "Connection closed by server.")


def for_callers(error: BaseException) -> Exception:
    """What those who wait for a connection raise, on their own threads: SystemExit of a
    hook, or asyncio.CancelledError, was not meant for them.
    """
    if isinstance(error, Exception):
        return error
    wrapped = ConnectionError(f"A hook of the connection has raised {error!r}")
    wrapped.__cause__ = error
    return wrapped
