"""LMCache's MP mode without LMCache: what drives a `fastkv.lmcache.NativeClient`."""

from __future__ import annotations

import ctypes
import select
import time
from collections.abc import Sequence
from typing import Any

from fastkv.lmcache import NativeClient

PATIENCE = 20.0


class Demux:
    """What LMCache's demux thread does: polls the descriptor, drains, keeps by id."""

    def __init__(self, url: str, **settings: Any) -> None:
        self.client = NativeClient(url, **settings)
        self.done: dict[int, tuple[bool, str, list[bool]]] = {}
        self._poll = select.poll()
        self._poll.register(self.client.event_fd(), select.POLLIN)

    def wait(self, future_id: int) -> tuple[bool, str, list[bool]]:
        deadline = time.monotonic() + PATIENCE
        while future_id not in self.done:
            left = deadline - time.monotonic()
            assert left > 0, f"{future_id} has not completed"
            if self._poll.poll(left * 1000):
                self.take()
        return self.done.pop(future_id)

    def take(self) -> None:
        for future_id, ok, error, bools in self.client.drain_completions():
            assert future_id not in self.done, "completed twice"
            self.done[future_id] = (ok, error, bools)

    def set(self, keys: Sequence[str], values: Sequence[Any]) -> list[bool]:
        return self.wait(self.client.submit_batch_set(keys, values))[2]

    def get(self, keys: Sequence[str], memories: Sequence[Any]) -> list[bool]:
        return self.wait(self.client.submit_batch_get(keys, memories))[2]

    def exists(self, keys: Sequence[str]) -> list[bool]:
        return self.wait(self.client.submit_batch_exists(keys))[2]


def memory(size: int) -> memoryview:
    """As LMCache's: a view of bytes with format ``<B``."""
    view = memoryview((ctypes.c_ubyte * size)())
    assert view.format == "<B"
    return view


def key(i: int) -> str:
    return f"model/name@00000001@0@{i:064x}"
