"""What the clients of one pool have in common: which node is theirs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from fastkv._core import Batch
from fastkv.node import Node
from fastkv.options import TileOptions
from fastkv.registry import drop_node, node_of, registered_node


class Pooled:
    """Mixed into redis-py's clients."""

    connection_pool: Any  # redis-py's; may be set anew at any time

    def _start_pooled(self, options: TileOptions) -> None:
        self._tile_options = options
        self._tile_node: Node | None = None
        self._tile_pool: Any = None  # its; it connects for what is in flight
        self._tile_replaced: list[tuple[Node, Any]] = []  # of earlier pools, and those

    def _node(self) -> Node:
        if self._tile_replaced:
            self._leave_replaced()
        node = self._tile_node
        pool = self.connection_pool
        if node is None or not node.usable or node.pool() is not pool:
            if node is not None:  # first: an interrupt may come
                self._tile_replaced.append((node, self._tile_pool))
            node = node_of(self, self._tile_options)
            self._tile_node, self._tile_pool = node, pool
            self._leave_replaced()
        return node

    def _was_ended(self, node: Node, batch: Batch) -> bool:
        """Whether a batch was refused by the node that this thread had just taken: a
        call of another thread's, for a new pool, has ended it, or a signal handler has
        forked and this is the child.
        """
        if batch.in_flight or batch.drained or batch.ended:
            return False  # it was accepted
        return node.pool() is not self.connection_pool or node.pid != os.getpid()

    def _leave_replaced(self) -> None:
        # One that still carries batches must not be closed under them.
        for node, _ in list(self._tile_replaced):
            if node is not self._tile_node:  # or its pool has come back
                if node.usable and not node.idle:
                    continue
                drop_node(self, node)  # joins no threads: this may be an event loop
            self._forget_replaced(node)

    def _nodes_to_leave(self) -> Iterator[Node]:
        """All of ours, with one that an interrupt kept us from hearing of, now or when
        we were last here.
        """
        return self._taken(registered_node(self))

    def _drop_nodes(self) -> None:
        """For ``__del__``, also of one that is half made."""
        if hasattr(self, "_tile_replaced"):
            for node in self._taken():
                drop_node(self, node)

    def _taken(self, *registered: Node | None) -> Iterator[Node]:
        current, self._tile_node = self._tile_node, None  # the next call starts anew
        self._tile_pool = None
        for node in dict.fromkeys((current, *registered)):
            if node is not None:
                yield node
        for node, _ in list(self._tile_replaced):
            yield node
            self._forget_replaced(node)  # last: nothing else finds it

    def _forget_replaced(self, node: Node) -> None:
        for entry in list(self._tile_replaced):
            if entry[0] is node:
                with suppress(ValueError):  # another thread was first
                    self._tile_replaced.remove(entry)
