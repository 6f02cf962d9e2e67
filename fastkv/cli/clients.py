"""The same work by fastkv and by redis-py, as their callers do it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from fastkv.cli.target import Fast, Plain

# Llama 3.1 8B: layers, K and V, KV heads, head size; an element is a bfloat16.
_LAYERS, _KV, _HEADS, _HEAD_SIZE = 32, 2, 8, 128
TOKEN_BYTES = _LAYERS * _KV * _HEADS * _HEAD_SIZE * 2

_EXPIRE_SECONDS = 3600  # who is killed leaves nothing behind for longer
# For redis-py. Its set() makes an int of it, and if Ctrl-C comes while hiredis (3.5)
# packs an int into a command, the process crashes.
EXPIRE = ("EX", str(_EXPIRE_SECONDS))

Memory: TypeAlias = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Chunks:
    """Memory of values, seen in two ways.

    Attributes:
        octets: Of shape ``(values, bytes)``.
        tensor: What a caller of fastkv has: any array whose first axis runs over the
            values.
    """

    octets: Memory
    tensor: Any  # of one of two libraries

    @classmethod
    def cut(cls, memory: Memory, tokens: int) -> Chunks:
        """See ``memory`` as chunks of so many tokens of a prompt: a tensor of
        PyTorch's bfloat16 or its bits in numpy, ``(chunks, K and V, layers, tokens,
        heads, head size)``.
        """
        try:
            torch = importlib.import_module("torch")
            elements: Any = torch.from_numpy(memory).view(torch.bfloat16)
        except (ImportError, OSError):  # OSError: it is there, a library of it is not
            elements = memory.view(np.uint16)
        shape = (-1, _KV, _LAYERS, tokens, _HEADS, _HEAD_SIZE)
        octets = memory.reshape(-1, tokens * TOKEN_BYTES)
        return cls(octets, elements.reshape(shape))

    def part(self, which: slice) -> Chunks:
        return Chunks(self.octets[which], self.tensor[which])


class FastkvClient:
    def __init__(self, redis: Fast) -> None:
        self.redis = redis

    def store(self, keys: Sequence[str], chunks: Chunks) -> list[bool]:
        return self.redis.batch_tile_set(keys, chunks.tensor, ex=_EXPIRE_SECONDS)

    def lookup(self, keys: Sequence[str]) -> list[bool]:
        return self.redis.batch_tile_exists(keys)

    def retrieve(self, keys: Sequence[str], chunks: Chunks) -> list[bool]:
        return self.redis.batch_tile_get(keys, chunks.tensor, immutable=True)


class RedisPyClient:
    def __init__(self, redis: Plain) -> None:
        self.redis: Any = redis  # some methods of a cluster's have no types

    def store(self, keys: Sequence[str], chunks: Chunks) -> list[bool]:
        return [
            bool(self.redis.execute_command("SET", key, octets.data, *EXPIRE))
            for key, octets in zip(keys, chunks.octets, strict=True)
        ]

    def lookup(self, keys: Sequence[str]) -> list[bool]:
        with self.redis.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.exists(key)
            return [bool(count) for count in pipeline.execute()]

    def retrieve(self, keys: Sequence[str], chunks: Chunks) -> list[bool]:
        found = []
        for key, octets in zip(keys, chunks.octets, strict=True):
            value = cast("bytes | None", self.redis.get(key))
            if value is not None:
                octets[:] = np.frombuffer(value, np.uint8)
            found.append(value is not None)
        return found


Client: TypeAlias = FastkvClient | RedisPyClient
