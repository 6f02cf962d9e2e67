"""The bulk data commands, each defined once: how a batch is made, how its outcome is
read.

Knows nothing of threads or event loops: how to wait is the client's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeAlias

from redis._parsers import Encoder
from redis.commands.core import BasicKeyCommands
from redis.exceptions import ConnectionError, RedisError
from redis.typing import KeyT

from fastkv._core import Batch, Code, Command
from fastkv.buffers import Buffers, pin
from fastkv.errors import error_of_code, error_of_reply, size_error, tile_error

if TYPE_CHECKING:
    from redis._parsers.encoders import Encoder as EncoderT

Key: TypeAlias = "KeyT | bytearray | int | float"
Keys: TypeAlias = "Iterable[Key]"
Seconds: TypeAlias = "int | timedelta"
When: TypeAlias = "int | datetime"


def get(encoder: EncoderT, keys: Keys, buffers: Buffers, immutable: bool) -> Batch:
    batch = _batch(Command.GET, encoder, keys)
    if immutable:
        batch.promise_immutable()
    pin(batch, buffers, writable=True)
    return batch


def set(
    encoder: EncoderT,
    keys: Keys,
    buffers: Buffers,
    ex: Seconds | None,
    px: Seconds | None,
    exat: When | None,
    pxat: When | None,
    keepttl: bool,
    nx: bool,
    xx: bool,
) -> Batch:
    batch = _batch(Command.SET, encoder, keys)
    # redis-py's own check and spelling of the options, with nothing behind it.
    options = BasicKeyCommands.set(
        _RECORDER,
        "",
        "",
        ex=ex,
        px=px,
        exat=exat,
        pxat=pxat,
        keepttl=keepttl,
        nx=nx,
        xx=xx,
    )
    for option in options:
        batch.add_set_option(bytes(encoder.encode(option)))
    if nx or xx:
        batch.forbid_repeat()
    pin(batch, buffers, writable=False)
    return batch


def exists(encoder: EncoderT, keys: Keys) -> Batch:
    return _batch(Command.EXISTS, encoder, keys)


def delete(encoder: EncoderT, keys: Keys) -> Batch:
    return _batch(Command.UNLINK, encoder, keys)


def check_timeout(timeout: float | None) -> float:
    """Seconds for the engine, for which 0 is no limit."""
    if timeout is None:
        return 0.0
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout: expected seconds, got {type(timeout).__name__}")
    if not timeout > 0:
        raise ValueError(f"timeout: expected seconds above 0, or None, got {timeout}")
    return min(float(timeout), 1e9)


def finish(
    batch: Batch,
    timeout: float,
    connect_error: Callable[[], Exception],
    error_of_reply: Callable[[str], RedisError] = error_of_reply,
) -> list[bool]:
    """Read the outcome of a drained batch.

    Args:
        batch: Drained.
        timeout: As it was submitted with.
        connect_error: Gives the exception of the last connection that failed.
        error_of_reply: Gives the exception of an error line.

    Raises:
        TileError, redis.exceptions.RedisError: See the clients' methods.
    """
    code = batch.code
    if code == Code.CONNECT_FAILED:
        raise connect_error()
    if code != Code.OK:
        raise error_of_code(code, batch.detail, len(batch), timeout)
    hits = batch.hits()
    errors: dict[int, RedisError] = {}
    for index, expected, actual, line in batch.failures():
        error = size_error(expected, actual) if line is None else error_of_reply(line)
        # LOADING, NOAUTH: no answer about a key, though it came as one.
        if isinstance(error, ConnectionError):
            raise error
        errors[index] = error
    if errors:
        raise tile_error(batch.keys, hits, errors)
    return hits


def _batch(command: Command, encoder: EncoderT, keys: Keys) -> Batch:
    if isinstance(keys, (str, bytes, bytearray, memoryview)) or not isinstance(
        keys, Iterable
    ):
        raise TypeError(f"keys: expected a sequence of keys, got {type(keys).__name__}")
    names = list(keys)  # a copy: errors name keys long after the call
    utf8 = (
        type(encoder) is Encoder
        and encoder.encoding.lower() in ("utf-8", "utf8")
        and encoder.encoding_errors == "strict"
    )
    return Batch(command, names, encoder.encode, utf8)


class _SetRecorder:
    """Stands in for a client: gives the arguments of SET after the value."""

    def execute_command(self, *args: object, **options: object) -> tuple[object, ...]:
        return args[3:]


_RECORDER: Any = _SetRecorder()
