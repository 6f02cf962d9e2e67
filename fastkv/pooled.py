"""What the clients of one pool have in common: which node is theirs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastkv.node import Node
from fastkv.options import TileOptions
from fastkv.registry import drop_node, node_of, registered_node


class Pooled:
    """Mixed into redis-py's clients."""

    connection_pool: Any  # redis-py's; may be set anew at any time

    def _start_pooled(self, options: TileOptions) -> None:
        self._tile_options = options
        self._tile_node: Node | None = None
        self._tile_replaced: list[Node] = []  # of earlier pools

    def _node(self) -> Node:
        if self._tile_replaced:
            self._leave_replaced()
        node = self._tile_node
        pool = self.connection_pool
        if node is None or not node.usable or node.pool() is not pool:
            old, node = node, node_of(self, self._tile_options)
            self._tile_node = node
            if old is not None and old is not node:
                self._tile_replaced.append(old)
                self._leave_replaced()
        return node

    def _leave_replaced(self) -> None:
        # One that still carries batches must not be closed under them.
        replaced, self._tile_replaced = self._tile_replaced, []
        for node in replaced:
            if node is self._tile_node:
                continue  # its pool has come back
            if node.usable and not node.idle:
                self._tile_replaced.append(node)
            else:
                drop_node(self, node)  # joins no threads: this may be an event loop

    def _take_nodes(self) -> Iterator[Node]:
        """Those to leave; the next call starts anew."""
        node, self._tile_node = self._tile_node, None
        if node is not None:
            yield node
        replaced, self._tile_replaced = self._tile_replaced, []
        yield from replaced

    def _nodes_to_leave(self) -> Iterator[Node]:
        """With one that an interrupt kept us from hearing of."""
        self._tile_node = self._tile_node or registered_node(self)
        return self._take_nodes()

    def _drop_nodes(self) -> None:
        """For ``__del__``, also of one that is half made."""
        if hasattr(self, "_tile_replaced"):
            for node in self._take_nodes():
                drop_node(self, node)
