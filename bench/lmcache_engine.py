"""A whole LMCacheEngine in this process, on CPU tensors: for tests and for
``make bench-lmcache``. Needs LMCache and torch.

LMCache's own GPU connectors want CUDA, and its mock copies nothing; `CpuConnector` is
one whose "GPU" is a tensor in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import Iterator
from typing import Any

# Before LMCache is imported: it prints a banner and reports its use over the network.
os.environ.setdefault("LMCACHE_LOG_LEVEL", "WARNING")
os.environ.setdefault("LMCACHE_DISABLE_BANNER", "1")
os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")

import torch
from lmcache.v1.cache_engine import LMCacheEngineBuilder
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.gpu_connector.gpu_connectors import GPUConnectorInterface
from lmcache.v1.metadata import LMCacheMetadata

# Copies between chunks and "GPU" by more threads than there are idle cores would take
# ten times as long.
torch.set_num_threads(1)

_HIDDEN = 1024  # bfloat16 elements a token, layer, and K or V
_LAYERS = 8
TOKEN_BYTES = 2 * _LAYERS * _HIDDEN * 2


class CpuConnector(GPUConnectorInterface):  # type: ignore[misc]  # LMCache is untyped
    """Copies between chunks and the tensor that a call names as ``kv``, of shape
    ``(2, layers, tokens, hidden)``.
    """

    def from_gpu(self, memory_obj: Any, start: int, end: int, **kwargs: Any) -> None:
        memory_obj.tensor.copy_(kwargs["kv"][:, :, start:end])

    def to_gpu(self, memory_obj: Any, start: int, end: int, **kwargs: Any) -> None:
        kwargs["kv"][:, :, start:end].copy_(memory_obj.tensor)

    def batched_from_gpu(
        self, memory_objs: Any, starts: Any, ends: Any, **kwargs: Any
    ) -> None:
        for memory, start, end in zip(memory_objs, starts, ends, strict=True):
            self.from_gpu(memory, start, end, **kwargs)

    def batched_to_gpu(
        self, memory_objs: Any, starts: Any, ends: Any, **kwargs: Any
    ) -> None:
        for memory, start, end in zip(memory_objs, starts, ends, strict=True):
            self.to_gpu(memory, start, end, **kwargs)

    def get_shape(self, num_tokens: int) -> torch.Size:
        return torch.Size([2, _LAYERS, num_tokens, _HIDDEN])


def random_kv(tokens: int, seed: int) -> torch.Tensor:
    """KV cache of a prompt: incompressible bytes, as bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, _LAYERS, tokens, _HIDDEN * 2)
    noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return noise.view(torch.bfloat16)


def fastkv_plugin(url: str, **settings: Any) -> dict[str, Any]:
    """The part of LMCache's configuration that names fastkv."""
    prefix = "remote_storage_plugin.fastkv"
    extra = {
        f"{prefix}.module_path": "fastkv.lmcache",
        f"{prefix}.class_name": "FastKVAdapter",
        f"{prefix}.url": url,
        "save_chunk_meta": False,
    }
    extra |= {f"{prefix}.{name}": value for name, value in settings.items()}
    return {"remote_storage_plugins": ["fastkv"], "extra_config": extra}


def allocated(engine: Any) -> int:
    """Bytes of LMCache's memory that somebody holds: 0 when all stores are over."""
    allocator = remote_backend(engine).local_cpu_backend.memory_allocator
    size: int = allocator.pin_allocator.address_manager.total_allocated_size
    return size


def remote_backend(engine: Any) -> Any:
    """Its only tier."""
    (backend,) = (
        backend
        for name, backend in engine.storage_manager.storage_backends.items()
        if name.startswith("RemoteBackend")
    )
    return backend


def poison(engine: Any) -> None:
    """Overwrite all memory that the engine has free. Else what nobody has filled would
    still hold the chunks that were stored from it.
    """
    backend = remote_backend(engine)
    local, connector = (
        backend.local_cpu_backend,
        backend.connection.getWrappedConnector(),
    )
    free = []
    while True:
        memory = local.allocate(
            connector.meta_shapes, connector.meta_dtypes, busy_loop=False
        )
        if memory is None:
            break
        memory.raw_data.fill_(0x5A)
        free.append(memory)
    assert free, "all memory is taken"
    for memory in free:
        memory.ref_count_down()


@contextlib.contextmanager
def engine(
    chunk_tokens: int, memory_bytes: int = 1 << 30, **config: Any
) -> Iterator[Any]:
    """An engine whose only tier is the remote one, so that each retrieve goes there.

    Args:
        chunk_tokens: Length of a chunk; a token has `TOKEN_BYTES`.
        memory_bytes: For chunks on their way.
        **config: More of LMCache's configuration.
    """
    name = f"fastkv-{uuid.uuid4()}"
    configuration = LMCacheEngineConfig.from_defaults(
        chunk_size=chunk_tokens,
        local_cpu=False,
        max_local_cpu_size=memory_bytes / (1 << 30),
        **config,
    )
    metadata = LMCacheMetadata(
        model_name="fastkv-bench",
        world_size=1,
        local_world_size=1,
        worker_id=0,
        local_worker_id=0,
        kv_dtype=torch.bfloat16,
        kv_shape=(_LAYERS, 2, chunk_tokens, 8, _HIDDEN // 8),
        chunk_size=chunk_tokens,
    )
    made = LMCacheEngineBuilder.get_or_create(
        name, configuration, metadata, CpuConnector(), lambda t, s: t, lambda o, s: o
    )
    try:
        made.post_init()
        if remote_backend(made).remote_url.startswith("resp://"):
            _mend_lookups(remote_backend(made).connection.getWrappedConnector().client)
        yield made
    finally:
        backend = remote_backend(made)
        if backend.remote_url.startswith(("resp://", "mock://")):
            # Their close() waits for ever, for the event loop that it runs on.
            backend.close = lambda: None
            if backend.remote_url.startswith("resp://"):
                backend.connection.getWrappedConnector().client.close()
        LMCacheEngineBuilder.destroy(name)


def _mend_lookups(client: Any) -> None:
    # LMCache's own looks for an answer only when it may have come and gone already,
    # and then waits for ever. On the event loop nothing comes in between.
    def batch_exists_sync(keys: list[str]) -> Any:
        looking = client.batch_exists(keys)
        return asyncio.run_coroutine_threadsafe(looking, client.loop).result()

    client.batch_exists_sync = batch_exists_sync
