"""The door to LMCache's MP mode: a client for its ``native_plugin`` L2 adapter.

LMCache calls it under a lock of its own, so no method blocks and none raises; one
thread of LMCache's polls `NativeClient.event_fd` and drains. The contract is that of
``lmcache/v1/distributed/l2_adapters/native_connector_l2_adapter.py`` (LMCache 0.5.6).
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeAlias

from redis.exceptions import ConnectionError

from fastkv._core import CompletionQueue
from fastkv.lmcache.chunks import ChunkStore, Outcome, Request
from fastkv.lmcache.settings import Settings
from fastkv.node import Node

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: ``(id, ok, error, one bool a key)``
Completion: TypeAlias = tuple[int, bool, str, list[bool]]


class NativeClient:
    """LMCache's chunks in Redis or Valkey.

    In LMCache's configuration::

        {"type": "native_plugin", "module_path": "fastkv.lmcache",
         "class_name": "NativeClient",
         "adapter_params": {"url": "redis://127.0.0.1:6379", "ttl": 86400}}

    Every submit completes once, whatever happens. A server that is away, slow, full or
    wrong makes misses and failed stores; they are counted, see `counts`, and logged
    once in a while.

    Args:
        url: As `fastkv.Redis.from_url`'s, ``tile_*`` arguments included. All of the
            settings below may stand in its query too. ``fastkv://`` and ``fastkvs://``
            mean ``redis://`` and ``rediss://``.
        key_prefix: Stands before every key.
        ttl: Seconds after which a chunk expires, so that ``volatile-*`` policies can
            evict it. Default: never.
        immutable: Chunks of one key are all alike, as LMCache's are, whose keys are
            hashes of content: see `fastkv.Redis.batch_tile_get`.
        checksum: Store and check a checksum with each chunk: see
            `fastkv.lmcache.chunks`. Chunks stored without are misses.
        cluster: The URL is that of any node of a Redis Cluster, see
            `fastkv.RedisCluster`.
        timeout: Seconds for a batch of loads or deletes. Lookups get 2 at most, and 0.5
            after a failure until something succeeds. Stores go on as long as bytes
            move.
        metrics: Export what `fastkv.metrics.TileCollector` does, and `counts`, in
            prometheus_client's default registry, with this for the label ``client``.
        username: For an ACL user.
        password_env: Name of the environment variable with the password.
        password_file: Path of a file with it. Both are read again for each connection.
        **options: Other arguments of `fastkv.Redis.from_url`.

    Raises:
        TypeError, ValueError, redis.exceptions.DataError, OSError: A setting is wrong,
            or the password's file cannot be read.
        ImportError: ``checksum`` without the package xxhash, or ``metrics`` without
            prometheus_client.
        fastkv.UnsupportedConnection: See there.

    Nothing is raised for a server that cannot be reached, now or later. In a forked
    child nothing works, and all that was pending at the fork completes as failed.
    """

    def __init__(
        self,
        url: str,
        *,
        key_prefix: str = "",
        ttl: int | None = None,
        immutable: bool = True,
        checksum: bool = False,
        cluster: bool = False,
        timeout: float = 10.0,
        metrics: str | None = None,
        username: str | None = None,
        password_env: str | None = None,
        password_file: str | None = None,
        **options: Any,
    ) -> None:
        settings = Settings.of(
            url,
            {
                "key_prefix": key_prefix,
                "ttl": ttl,
                "immutable": immutable,
                "checksum": checksum,
                "cluster": cluster,
                "timeout": timeout,
                "metrics": metrics,
                "username": username,
                "password_env": password_env,
                "password_file": password_file,
                **options,
            },
        )
        self._store = ChunkStore(settings)
        # One for life: its descriptor is what LMCache polls.
        self._queue = CompletionQueue()
        self._ids = itertools.count(1)
        self._in_flight: dict[int, tuple[int, Request]] = {}  # by id of the batch
        self._ready: deque[Completion] = deque()  # completed without a batch to drain
        self._pid = os.getpid()
        # Of what is stored and of what was loaded: who loads must not wait for stores.
        self._hashers: list[ThreadPoolExecutor] = []
        if settings.checksum:
            self._hashers = [ThreadPoolExecutor(1, "fastkv-checksum") for _ in "sl"]

    # --- LMCache's interface ---------------------------------------------------------

    def event_fd(self) -> int:
        """A descriptor that is readable when there is something to drain."""
        return self._queue.fileno()

    def submit_batch_get(self, keys: Sequence[str], memories: Sequence[Buffer]) -> int:
        """Load chunks. The memories stay pinned until the batch is drained.

        Returns:
            The id that `drain_completions` will give.
        """
        return self._submit(len(keys), lambda: self._store.load(keys, memories))

    def submit_batch_set(self, keys: Sequence[str], memories: Sequence[Buffer]) -> int:
        """Store chunks; ``ok`` in the completion if all were. As `submit_batch_get`."""
        return self._submit(len(keys), lambda: self._store.store(keys, memories))

    def submit_batch_exists(self, keys: Sequence[str]) -> int:
        """Look chunks up. As `submit_batch_get`."""
        return self._submit(len(keys), lambda: self._store.exists(keys))

    def submit_batch_delete(self, keys: Sequence[str]) -> int:
        """Delete chunks; a bool says whether one was there. As `submit_batch_get`."""
        return self._submit(len(keys), lambda: self._store.delete(keys))

    def drain_completions(self) -> list[Completion]:
        """Return what has completed since the last call, each id once.

        Returns:
            ``(id, ok, error, bools)``, one bool a key, always. A true one of a get
            means that this memory holds this chunk, even if ``ok`` is false.
        """
        drained = self._store.carrier.drain(self._queue) if self._at_home() else []
        for batch in drained:
            future_id, request = self._in_flight.pop(batch.id)
            try:
                result: list[bool] | Exception = Node.result(batch)
            except Exception as error:
                result = error
            outcome = self._store.settle(request, result)
            if request.memories and any(outcome.hits) and not request.stores:
                self._hash(self._verify, future_id, request, outcome)
            else:
                self._ready.append(_completion(future_id, request, outcome))
        done = []
        try:
            while True:
                done.append(self._ready.popleft())
        except IndexError:  # another thread may drain, too
            return done

    def close(self) -> None:
        """Complete what is pending, with an error if need be: it can be drained still.
        The descriptor is given back. Idempotent.
        """
        if not self._at_home():
            return
        hashers, self._hashers = self._hashers, []
        for hasher in hashers:
            hasher.shutdown()
        self._store.close()
        self._ready.extend(self.drain_completions())
        self._queue.close()

    # --- for operators ---------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """Chunks by what became of them: see `fastkv.lmcache.chunks.ChunkStore`."""
        return self._store.counts()

    # --- details ---------------------------------------------------------------------

    def _at_home(self) -> bool:
        """False in a forked child, which must leave the parent's descriptor alone."""
        if self._pid == os.getpid():
            return True
        self._queue.close_after_fork()
        for future_id, request in list(self._in_flight.values()):
            self._ready.append(_failure(future_id, len(request.batch), _left_behind()))
        self._in_flight.clear()
        return False

    def _submit(self, keys: int, make: Callable[[], Request]) -> int:
        future_id = next(self._ids)
        if not self._at_home():
            self._fail(future_id, keys, _left_behind())
            return future_id
        try:
            request = make()
        except Exception as error:  # memory or a key that cannot be used
            self._fail(future_id, keys, error)
            return future_id
        if request.memories and request.stores:
            self._hash(self._seal_and_send, future_id, request)
        else:
            self._send(future_id, request)
        return future_id

    def _send(self, future_id: int, request: Request) -> None:
        self._in_flight[request.batch.id] = (future_id, request)
        try:
            self._store.carrier.submit_to(self._queue, request.batch, request.timeout)
        except Exception as error:  # closed, or a worker has died
            del self._in_flight[request.batch.id]
            outcome = self._store.settle(request, error)
            self._complete(_completion(future_id, request, outcome))

    def _seal_and_send(self, future_id: int, request: Request) -> None:
        self._store.seal(request)
        self._send(future_id, request)

    def _verify(self, future_id: int, request: Request, outcome: Outcome) -> None:
        self._store.verify(request, outcome)
        self._complete(_completion(future_id, request, outcome))

    def _hash(
        self, work: Callable[..., None], future_id: int, request: Request, *args: Any
    ) -> None:
        # It takes its time, and LMCache waits for whoever submits or drains.
        def guarded() -> None:
            try:
                work(future_id, request, *args)
            except Exception as error:  # out of memory, say
                self._fail(future_id, len(request.batch), error)

        hashers = self._hashers
        try:
            if hashers:
                hashers[0 if request.stores else 1].submit(guarded)
                return
        except RuntimeError:
            pass  # it is being shut down
        guarded()

    def _fail(self, future_id: int, keys: int, error: Exception) -> None:
        failure = _failure(future_id, keys, error)
        self._store.complain("failed", keys, failure[2])
        self._complete(failure)

    def _complete(self, completion: Completion) -> None:
        self._ready.append(completion)
        if self._pid == os.getpid():  # its mutex may be held for ever in a child
            self._queue.wake()


def _left_behind() -> ConnectionError:
    return ConnectionError("The client was made before a fork, in the parent.")


def _failure(future_id: int, keys: int, error: Exception) -> Completion:
    return (future_id, False, f"{type(error).__name__}: {error}", [False] * keys)


def _completion(future_id: int, request: Request, outcome: Outcome) -> Completion:
    ok = all(outcome.hits) if request.stores else outcome.answered
    return (future_id, ok, outcome.error, outcome.hits)
