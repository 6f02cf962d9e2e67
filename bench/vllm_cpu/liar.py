"""A client that must fail the benchmark: it fills zeros and calls them a hit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastkv.lmcache import NativeClient

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Liar(NativeClient):
    """Loads nothing."""

    def submit_batch_get(self, keys: Sequence[str], memories: Sequence[Buffer]) -> int:
        for memory in memories:
            view = memoryview(memory).cast("B")
            view[:] = bytes(view.nbytes)
        return self.submit_batch_exists(keys)
