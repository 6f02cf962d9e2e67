"""Chunks in a server, for callers to whom every trouble is a miss: what to send, and
what became of it. How to wait is the caller's.

A chunk is a plain Redis string under LMCache's own key, so ``resp://`` reads what this
writes, and the other way round. With ``checksum`` its last 8 bytes are the XXH3 hash
(64 bits, seed 0) of what is before them, most significant byte first, as
``xxhash.xxh3_64_digest`` gives it: https://github.com/Cyan4973/xxHash. A chunk without
them has another length, so neither kind is taken for the other.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError

from fastkv import commands
from fastkv._core import Batch, Command
from fastkv.client import Redis
from fastkv.errors import TileError, ValueSizeError
from fastkv.info import TileInfo
from fastkv.lmcache.carriers import Carrier, Cluster, OneServer
from fastkv.lmcache.settings import Secret, Settings
from fastkv.log import Limited, logger

if TYPE_CHECKING:
    from typing_extensions import Buffer

CHECKSUM_BYTES = 8

# Whoever looks up a prompt is better off computing it again than waiting longer.
_LOOKUP_SECONDS = 2.0
# ... and from a failure until the next success: a server that is away must not cost
# every prompt those. (Loads follow lookups that have hit.)
_SUSPECT_SECONDS = 0.5


@dataclass
class Request:
    """A batch of chunks, before and while it is on its way.

    Attributes:
        batch: What to submit.
        timeout: What to submit it with; seconds, `None`: no limit.
        memories: The chunks, with ``checksum``; empty otherwise.
        checksums: `CHECKSUM_BYTES` for each of them.
        sizes_vary: Another length is no trouble.
        counted: It is a chunk that somebody wants.
    """

    batch: Batch
    timeout: float | None
    memories: Sequence[Buffer] = ()
    checksums: bytearray = field(default_factory=bytearray)
    sizes_vary: bool = False
    counted: bool = True

    @property
    def stores(self) -> bool:
        """Whether it writes chunks."""
        return self.batch.command == Command.SET

    def checksum(self, index: int) -> memoryview:
        """Where the checksum of a chunk lies."""
        at = index * CHECKSUM_BYTES
        return memoryview(self.checksums)[at : at + CHECKSUM_BYTES]


@dataclass
class Outcome:
    """What became of a request.

    Attributes:
        hits: One a key: loaded, stored, there, deleted. Never for memory that was not
            filled.
        answered: The server has answered for each key.
        error: The first error, or nothing.
        sizes: Of chunks that have another length than was asked for, by index; bytes
            without the checksum.
    """

    hits: list[bool]
    answered: bool
    error: str
    sizes: dict[int, int] = field(default_factory=dict)


class ChunkStore:
    """See the module. Thread-safe.

    Attributes:
        carrier: Who carries the requests.
    """

    def __init__(self, settings: Settings) -> None:
        """Connects at the first request.

        Raises:
            TypeError, ValueError, redis.exceptions.DataError: A setting is wrong.
        """
        self.settings = settings
        if settings.checksum:
            _xxh3(b"")  # says now that it is not installed
        arguments = settings.client_arguments()
        self._secret: Secret | None = arguments.get("credential_provider")
        try:
            self._client = Redis.from_url(settings.url, **arguments)
        except ValueError as error:
            if "Port could not be cast" not in str(error):
                raise
            # What it says may be part of a password.
            raise ValueError(
                "url: expected a number as port; in a password, / ? # @ must be encoded"
            ) from None
        self._encoder = self._client.get_encoder()
        self._suspect = False
        self._counts: Counter[str] = Counter()
        # By process: one that a thread of the parent's had, nobody lets go in a child.
        # Reentrant: a signal handler may use the store in the middle of anything.
        self._locks: dict[int, threading.RLock] = {}
        self._log = Limited(logger)
        try:
            # redis-py would find out about a wrong argument at the first connect.
            kwargs = self._client.connection_pool.connection_kwargs
            for name in ("socket_timeout", "socket_connect_timeout"):
                _check_seconds(name, kwargs.get(name))
            if settings.cluster:
                _check_for_cluster(kwargs)
                self.carrier: Carrier = Cluster(settings.url, arguments)
            else:
                self.carrier = OneServer(self._client)
            if settings.metrics:
                # Not above: it imports us, and prometheus_client, which may be missing.
                from fastkv.lmcache.exported import export

                export(settings.metrics, self)
        except BaseException:
            self._client.close()
            raise

    def close(self) -> None:
        """Complete what is pending with an error, join the threads. Idempotent."""
        self.carrier.close()

    def counts(self) -> dict[str, int]:
        """Chunks since the start, by what became of them: ``loaded``, ``missed``,
        ``found``, ``not_found``, ``stored``, ``deleted``, ``not_deleted``,
        ``wrong_size``, ``corrupt`` (a wrong checksum), ``refused`` (an error reply),
        ``no_memory`` (LMCache had none to load into) and ``failed`` (no answer).
        """
        with self._lock():
            return dict(self._counts)

    def tile_info(self) -> TileInfo:
        """Of its client."""
        return self.carrier.tile_info()

    def keys(self) -> list[str]:
        """All keys under the prefix, without it. Slow: looks at all of the server's."""
        prefix = self.settings.key_prefix
        pattern = re.sub(r"([\\*?\[\]^-])", r"\\\1", prefix) + "*"
        found = self.carrier.client().scan_iter(match=pattern, count=1000)
        names = (
            k if isinstance(k, str) else k.decode("utf-8", "replace") for k in found
        )
        return [name[len(prefix) :] for name in names]

    # --- requests --------------------------------------------------------------------

    def load(
        self,
        keys: Sequence[str],
        memories: Sequence[Buffer],
        *,
        within: float = float("inf"),
        sizes_vary: bool = False,
    ) -> Request:
        """To read chunks into ``memories``, which stay pinned until it is complete.

        Args:
            keys: LMCache's.
            memories: One writable buffer a key, of the chunk's length.
            within: Seconds, if less than what the settings say.
            sizes_vary: The caller copes with other lengths, see `Outcome.sizes`.
        """
        return self._valued(Command.GET, keys, memories, within, sizes_vary)

    def store(self, keys: Sequence[str], memories: Sequence[Buffer]) -> Request:
        """To write chunks. With ``checksum``, `seal` it before it is submitted."""
        return self._valued(Command.SET, keys, memories)

    def exists(self, keys: Sequence[str]) -> Request:
        """To look chunks up."""
        batch = commands.exists(self._encoder, self._names(keys))
        seconds = _SUSPECT_SECONDS if self._suspect else _LOOKUP_SECONDS
        return Request(batch, min(seconds, self.settings.timeout))

    def probe(self, key: str) -> Request:
        """To see whether the server answers a lookup."""
        request = self.exists([key])
        request.counted = False
        return request

    def delete(self, keys: Sequence[str]) -> Request:
        """To delete chunks."""
        batch = commands.delete(self._encoder, self._names(keys))
        return Request(batch, self.settings.timeout)

    def _names(self, keys: Sequence[str]) -> list[str]:
        prefix = self.settings.key_prefix
        return [prefix + key for key in keys] if prefix else list(keys)

    def _valued(
        self,
        command: Command,
        keys: Sequence[str],
        memories: Sequence[Buffer],
        within: float = float("inf"),
        sizes_vary: bool = False,
    ) -> Request:
        checksums = bytearray()
        values: Sequence[Buffer | tuple[Buffer, Buffer]] = memories
        if self.settings.checksum:
            checksums = bytearray(CHECKSUM_BYTES * len(memories))
            parts = memoryview(checksums)
            values = [
                (memory, parts[i * CHECKSUM_BYTES : (i + 1) * CHECKSUM_BYTES])
                for i, memory in enumerate(memories)
            ]
        names = self._names(keys)
        if command == Command.GET:
            batch = commands.get(
                self._encoder, names, values, immutable=self.settings.immutable
            )
            timeout: float | None = min(within, self.settings.timeout)
        else:
            batch = commands.set(
                self._encoder,
                names,
                values,
                ex=self.settings.ttl,
                px=None,
                exat=None,
                pxat=None,
                keepttl=False,
                nx=False,
                xx=False,
            )
            # Nobody waits for it: as long as it gets on, let it.
            timeout = None
        sealed = memories if self.settings.checksum else ()
        return Request(batch, timeout, sealed, checksums, sizes_vary)

    # --- checksums, which take their time: not where nobody may block ----------------

    def seal(self, request: Request) -> None:
        """Work out the checksums of chunks that are to be stored."""
        for index, memory in enumerate(request.memories):
            request.checksum(index)[:] = _xxh3(memory)

    def verify(self, request: Request, outcome: Outcome) -> None:
        """Make misses of loaded chunks whose checksum is wrong."""
        for index, memory in enumerate(request.memories):
            if outcome.hits[index] and request.checksum(index) != _xxh3(memory):
                outcome.hits[index] = False
                name = request.batch.keys[index]
                self.complain("corrupt", 1, f"the checksum of {name!r} is wrong")
                self._count("loaded", -1)

    # --- outcomes --------------------------------------------------------------------

    def settle(self, request: Request, result: list[bool] | Exception) -> Outcome:
        """Say what became of a request, count it, and complain once in a while.

        Args:
            request: Its batch is drained, or was never submitted.
            result: What the node has returned or raised.
        """
        keys = len(request.batch)
        command = Command(request.batch.command)
        yes, no = _NAMES[command]
        outcome = Outcome([False] * keys, True, "")
        troubles = 0
        if isinstance(result, TileError):
            outcome.error = self._redacted(str(result))
            outcome.hits = [entry is True for entry in result.outcomes]
            self._settle_errors(request, outcome, result)
            troubles = len(result.errors)
        elif isinstance(result, Exception):
            outcome.answered = False
            outcome.error = self._redacted(f"{type(result).__name__}: {result}")
            text = f"{command.name} of {keys}: {outcome.error}"
            self.complain("failed", keys if request.counted else 0, text)
            troubles = keys
        else:
            outcome.hits = result
        hits = sum(outcome.hits)
        if request.counted:
            self._count(yes, hits)
            self._count(no, keys - hits - troubles)
        if keys > 0:
            self._suspect = not outcome.answered
        return outcome

    def _settle_errors(
        self, request: Request, outcome: Outcome, result: TileError
    ) -> None:
        by_kind: dict[str, list[RedisError]] = {"wrong_size": [], "refused": []}
        extra = CHECKSUM_BYTES if self.settings.checksum else 0
        for index, error in result.errors.items():
            if not isinstance(error, ValueSizeError):
                by_kind["refused"].append(error)
                continue
            outcome.sizes[index] = error.actual - extra
            if not request.sizes_vary:
                by_kind["wrong_size"].append(error)
        for kind, errors in by_kind.items():
            if errors:
                counted = len(errors) if request.counted else 0
                self.complain(kind, counted, outcome.error)

    def _lock(self) -> threading.RLock:
        return self._locks.setdefault(os.getpid(), threading.RLock())

    def _count(self, kind: str, chunks: int) -> None:
        if chunks:
            with self._lock():
                self._counts[kind] += chunks

    def _redacted(self, text: str) -> str:
        # A server that does not know AUTH repeats what was sent with it.
        password = self._client.connection_pool.connection_kwargs.get("password")
        for secret in (password, self._secret and self._secret.last):
            if secret:
                text = text.replace(str(secret), "***")
        return text

    def complain(self, kind: str, chunks: int, text: str) -> None:
        """Count a trouble, and log it once in a while."""
        self._count(kind, chunks)
        self._log.say(logging.WARNING, kind, text)


# What an answer means, and what a key without one.
_NAMES = {
    Command.GET: ("loaded", "missed"),
    Command.SET: ("stored", "not_stored"),
    Command.EXISTS: ("found", "not_found"),
    Command.UNLINK: ("deleted", "not_deleted"),
}


def _check_seconds(name: str, value: object) -> None:
    # Without a time-out, a server that says nothing would keep a store for ever.
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not value > 0:  # type: ignore[operator]  # mypy loses the number
        raise ValueError(f"{name}: expected seconds above 0, got {value!r}")


def _check_for_cluster(kwargs: Mapping[str, Any]) -> None:
    if "path" in kwargs:
        raise ValueError(
            "url: expected redis:// or rediss:// with cluster, got unix://"
        )
    if kwargs.get("db"):
        raise ValueError(f"db: expected 0 with cluster, got {kwargs['db']!r}")


def _xxh3(data: Buffer) -> bytes:
    try:
        import xxhash
    except ImportError:
        raise ImportError(
            "checksum: expected the package xxhash, as fastkv[lmcache] installs it"
        ) from None
    return xxhash.xxh3_64_digest(data)
