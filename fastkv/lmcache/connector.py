"""The door to LMCache's in-process mode: a connector for ``remote_storage_plugins``.

Needs LMCache. The contract is that of
``lmcache/v1/storage_backend/connector/base_connector.py`` and of its caller,
``remote_backend.py`` (LMCache 0.5.6). Coroutines run on LMCache's event loop, the
others on whatever thread calls them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from lmcache.v1.storage_backend.connector import ConnectorAdapter, ConnectorContext
from lmcache.v1.storage_backend.connector.base_connector import RemoteConnector
from redis.exceptions import ConnectionError

from fastkv.lmcache.chunks import ChunkStore, Outcome, Request
from fastkv.lmcache.settings import Settings

if TYPE_CHECKING:
    from lmcache.utils import CacheEngineKey
    from lmcache.v1.memory_management import MemoryObj

# (The connector has a method that is called list.)
Hits: TypeAlias = list[bool]
Keys: TypeAlias = "Sequence[CacheEngineKey]"
Loaded: TypeAlias = "list[MemoryObj | None]"
Objects: TypeAlias = "list[MemoryObj]"

_PLUGIN = "plugin://"
_SCHEMES = ("fastkv://", "fastkvs://")
# Of LMCache's own time-out for a load. After that one it would not take our answer any
# more, nor give back the memory of it.
_SHARE_OF_TIMEOUT = 0.9


class FastKVAdapter(ConnectorAdapter):  # type: ignore[misc]  # LMCache is untyped
    """Makes a `FastKVConnector` from LMCache's configuration::

        remote_storage_plugins: ["fastkv"]
        extra_config:
          remote_storage_plugin.fastkv.module_path: fastkv.lmcache
          remote_storage_plugin.fastkv.class_name: FastKVAdapter
          remote_storage_plugin.fastkv.url: redis://127.0.0.1:6379

    Any setting of `fastkv.lmcache.NativeClient` may stand beside the ``url``. Also
    answers ``fastkv://`` and ``fastkvs://`` URLs.
    """

    def __init__(self) -> None:
        super().__init__("plugin://fastkv")

    def can_parse(self, url: str) -> bool:
        plugin = url.removeprefix(_PLUGIN).partition(".")[0]
        return url.startswith(_SCHEMES) or (url != plugin and plugin == "fastkv")

    def create_connector(self, context: ConnectorContext) -> FastKVConnector:
        """Raises `ValueError` or `TypeError` for what cannot work; not for a server
        that is away.
        """
        config = context.config
        extra = dict(config.extra_config or {}) if config is not None else {}
        if config is None or context.metadata is None:
            raise ValueError("fastkv: expected LMCache's config and metadata, got none")
        if extra.get("save_chunk_meta"):
            raise ValueError(
                "save_chunk_meta: expected false, as a chunk is stored as it is"
            )
        if config.use_layerwise:
            raise ValueError("use_layerwise: expected false, as chunks have one length")
        if config.remote_serde not in (None, "naive"):
            raise ValueError(
                f"remote_serde: expected naive, got {config.remote_serde!r}"
            )
        name = context.plugin_name or "fastkv"
        prefix = f"remote_storage_plugin.{name}."
        given = {
            key.removeprefix(prefix): value
            for key, value in extra.items()
            # (What has another dot belongs to another backend, "fastkv.b" say.)
            if key.startswith(prefix) and "." not in key.removeprefix(prefix)
        }
        for key in ("module_path", "class_name"):
            given.pop(key, None)
        url = given.pop("url", None)
        if context.url.startswith(_SCHEMES):
            url = context.url
        if url is None:
            raise ValueError(f"{prefix}url: expected redis://..., got nothing")
        return FastKVConnector(context, Settings.of(url, given))


class FastKVConnector(RemoteConnector):  # type: ignore[misc]  # LMCache is untyped
    """LMCache's chunks in Redis or Valkey, over the native connections of one client.

    A server that is away, slow, full or wrong makes misses and failed stores; they are
    counted, see `counts`, and logged once in a while. `ping` tells the truth.
    """

    def __init__(self, context: ConnectorContext, settings: Settings) -> None:
        super().__init__(context.config, context.metadata)
        self._memory = context.local_cpu_backend
        self._partial = bool(context.config.save_unfull_chunk)
        # LMCache's keys begin so, and an ACL may allow no other.
        self._probe = f"{context.metadata.model_name}@fastkv-ping"
        self._patience = _SHARE_OF_TIMEOUT * context.config.blocking_timeout_secs
        self._store = ChunkStore(settings)

    def counts(self) -> dict[str, int]:
        """Chunks by what became of them: see `fastkv.lmcache.chunks.ChunkStore`."""
        return self._store.counts()

    # --- lookups ---------------------------------------------------------------------

    async def exists(self, key: CacheEngineKey) -> bool:
        return (await self._hits(self._store.exists([key.to_string()])))[0]

    def exists_sync(self, key: CacheEngineKey) -> bool:
        return self._hits_sync(self._store.exists([key.to_string()]))[0]

    def support_batched_contains(self) -> bool:
        return True

    def batched_contains(self, keys: Keys) -> int:
        """Count the keys before the first that is not there."""
        return _prefix(self._hits_sync(self._store.exists(_names(keys))))

    def support_batched_async_contains(self) -> bool:
        return True

    async def batched_async_contains(
        self, lookup_id: str, keys: Keys, pin: bool = False
    ) -> int:
        """Count the keys before the first that is not there."""
        return _prefix(await self._hits(self._store.exists(_names(keys))))

    def support_ping(self) -> bool:
        return True

    async def ping(self) -> int:
        """Look up a key that nobody stores: 0 if there was an answer, else 1.

        (A PING would succeed for a user who may not read.)
        """
        outcome = await self._run(self._store.probe(self._probe))
        return 1 if outcome.error else 0

    # --- loads -----------------------------------------------------------------------

    async def get(self, key: CacheEngineKey) -> MemoryObj | None:
        return (await self.batched_get([key]))[0]

    def support_batched_get(self) -> bool:
        return True

    async def batched_get(self, keys: Keys) -> Loaded:
        """Load chunks into new memory of LMCache's, which is the caller's then.

        Returns:
            One entry a key; `None` for a miss, and for all keys that LMCache had no
            memory for.
        """
        names = _names(keys)
        ends = time.monotonic() + self._patience
        objects: Objects = []
        loaded: Loaded = []
        try:
            self._allocate(len(keys), objects)
            memories = [memory.byte_array for memory in objects]
            outcome = await self._load(
                names[: len(objects)], memories, ends, self._partial
            )
            if self._partial and outcome.sizes:
                await self._load_partial(names, objects, ends, outcome)
            loaded = [
                memory if hit else None
                for memory, hit in zip(objects, outcome.hits, strict=True)
            ]
        except GeneratorExit:
            # Thrown away with its event loop: nobody can say when the last thread has
            # let go of the memory, so it must never be used again.
            objects.clear()
            raise
        finally:
            # No thread of ours touches them any more, also when this was cancelled.
            for i, memory in enumerate(objects):
                if not loaded or loaded[i] is None:
                    memory.ref_count_down()
        return loaded + [None] * (len(keys) - len(objects))

    def support_batched_get_non_blocking(self) -> bool:
        return True

    async def batched_get_non_blocking(self, lookup_id: str, keys: Keys) -> Loaded:
        """Load chunks; return those before the first miss."""
        loaded = await self.batched_get(keys)
        count = _prefix([memory is not None for memory in loaded])
        for memory in loaded[count:]:
            if memory is not None:
                memory.ref_count_down()
        return loaded[:count]

    # --- stores ----------------------------------------------------------------------

    async def put(self, key: CacheEngineKey, memory_obj: MemoryObj) -> None:
        """Store a chunk.

        Raises:
            redis.exceptions.ConnectionError: It is not stored; LMCache counts that.
        """
        outcome = await self._save([key], [memory_obj])
        if not outcome.hits[0]:
            raise ConnectionError(f"{key.to_string()} was not stored: {outcome.error}")

    def support_batched_put(self) -> bool:
        return True

    async def batched_put(self, keys: Keys, memory_objs: Sequence[MemoryObj]) -> None:
        """Store chunks, as far as it goes."""
        await self._save(keys, memory_objs)

    def remove_sync(self, key: CacheEngineKey) -> bool:
        return self._hits_sync(self._store.delete([key.to_string()]))[0]

    # --- life ------------------------------------------------------------------------

    async def list(self) -> Sequence[str]:
        """All keys under the prefix, without it: a SCAN of the whole server."""
        return await asyncio.to_thread(self._store.keys)

    async def close(self) -> None:
        """Complete what is pending as misses, and end all connections. Idempotent."""
        await asyncio.to_thread(self._store.close)

    # --- details ---------------------------------------------------------------------

    def _allocate(self, count: int, objects: Objects) -> None:
        # As many as there are. Waiting for more would stop the event loop, and with it
        # those who would give memory back.
        while len(objects) < count:
            memory = self._memory.allocate(
                self.meta_shapes, self.meta_dtypes, self.meta_fmt, busy_loop=False
            )
            if memory is None:
                missing = count - len(objects)
                text = f"LMCache has no memory for {missing} of {count} chunks"
                self._store.complain("no_memory", missing, text)
                return
            objects.append(memory)

    async def _load(
        self,
        names: Sequence[str],
        memories: Sequence[Any],
        ends: float,
        sizes_vary: bool,
    ) -> Outcome:
        within = max(ends - time.monotonic(), 0.001)
        request = self._store.load(
            names, memories, within=within, sizes_vary=sizes_vary
        )
        outcome = await self._run(request)
        if request.memories and any(outcome.hits):
            await _in_thread(self._store.verify, request, outcome)
        return outcome

    async def _load_partial(
        self,
        names: Sequence[str],
        objects: Sequence[MemoryObj],
        ends: float,
        outcome: Outcome,
    ) -> None:
        # The last chunk of a prompt may be shorter; LMCache knows no length in advance.
        partial = []
        for index, size in outcome.sizes.items():
            if (
                size <= 0
                or size % self.single_token_size
                or size > self.full_chunk_size_bytes
            ):
                text = f"{names[index]!r} has {size} bytes, no whole number of tokens"
                self._store.complain("wrong_size", 1, text)
                continue
            self.reshape_partial_chunk(objects[index], size)
            partial.append(index)
        again = await self._load(
            [names[i] for i in partial],
            [objects[i].byte_array for i in partial],
            ends,
            False,
        )
        for index, hit in zip(partial, again.hits, strict=True):
            outcome.hits[index] = hit

    async def _save(
        self, keys: Sequence[CacheEngineKey], objects: Sequence[MemoryObj]
    ) -> Outcome:
        request = self._store.store(_names(keys), [m.byte_array for m in objects])
        if request.memories:
            await _in_thread(self._store.seal, request)
        return await self._run(request)

    async def _hits(self, request: Request) -> Sequence[bool]:
        return (await self._run(request)).hits

    def _hits_sync(self, request: Request) -> Sequence[bool]:
        result: Hits | Exception
        try:
            result = self._store.carrier.run(request.batch, request.timeout)
        except Exception as error:
            result = error
        return self._store.settle(request, result).hits

    async def _run(self, request: Request) -> Outcome:
        result: Hits | Exception
        try:
            result = await self._store.carrier.wait(request.batch, request.timeout)
        except Exception as error:
            result = error
        return self._store.settle(request, result)


async def _in_thread(work: Callable[..., None], *args: Any) -> None:
    """Await work in a thread. When cancelled, not before it has ended: the memory that
    it looks at is given back then.
    """
    working = asyncio.ensure_future(asyncio.to_thread(work, *args))
    try:
        await asyncio.shield(working)
    except asyncio.CancelledError:
        while not working.done():
            try:
                await asyncio.wait([working])
            except asyncio.CancelledError:
                pass  # one is raised in any case
        raise


def _names(keys: Sequence[CacheEngineKey]) -> list[str]:
    return [key.to_string() for key in keys]


def _prefix(hits: Sequence[bool]) -> int:
    """How many there are before the first that is false."""
    return next((i for i, hit in enumerate(hits) if not hit), len(hits))
