"""From redis-py's picture of a cluster to our nodes: which serves a key, and how many
threads and connections each may have. Shared by the blocking and the asyncio client.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from redis.cluster import LoadBalancingStrategy

from fastkv._core import Batch, Command, SlotMap, Stats
from fastkv.connector import Pool
from fastkv.info import TileInfo
from fastkv.node import Node
from fastkv.options import TileOptions
from fastkv.refresher import Address
from fastkv.registry import (
    drop_node,
    info_of_cluster,
    leave_node,
    node_of,
    stats_of,
)
from fastkv.rounds import Part

_NOBODY = 0xFFFF


class _Owners:
    """redis-py's slots cache, as the native router wants it.

    Attributes:
        source: The cache it was made from; redis-py replaces it at each refresh.
        nodes: For each number of the map, the cache's own list of nodes, primary first.
    """

    def __init__(self, slots_cache: dict[int, list[Any]]) -> None:
        self.source = slots_cache
        self.nodes: list[list[Any]] = []
        numbers: dict[int, int] = {}  # a range of slots shares one list
        owners = array("H", [_NOBODY]) * 16384
        for slot, nodes in list(slots_cache.items()):
            number = numbers.get(id(nodes))
            if number is None:
                if not nodes:
                    continue
                number = numbers[id(nodes)] = len(self.nodes)
                self.nodes.append(nodes)
            owners[slot] = number
        self.map = SlotMap(owners)


class Routing:
    """Mixed into redis-py's cluster clients; see `fastkv.rounds.Cluster`.

    Nothing here does I/O, but starting and ending threads.
    """

    # redis-py's.
    nodes_manager: Any
    read_from_replicas: bool
    load_balancing_strategy: LoadBalancingStrategy | None

    def _start_routing(self, options: TileOptions) -> None:
        self._tile_options = options
        self._tile_nodes: dict[str, Node] = {}  # by redis-py's names
        self._tile_replaced: list[Node] = []
        self._tile_owners: _Owners | None = None
        self._tile_closes = 0

    def tile_info(self) -> TileInfo:
        """As `fastkv.Redis.tile_info`, in total and, under ``nodes``, for each node
        that the client has used, by redis-py's name of it.

        The totals of ``commands``, ``bytes_read`` and ``bytes_written`` are of whole
        calls. A node counts its part of a call as one batch; keys that it had
        ``redirected`` or left ``unanswered`` were sent again, there or to another.
        """
        return info_of_cluster(self, self._tile_nodes)

    def _tile_calls(self) -> Stats:
        return stats_of(self)

    def _pool_of(self, cluster_node: Any) -> Pool:
        raise NotImplementedError

    def _tile_remap(self, address: Address) -> Address:
        remapped: Address = self.nodes_manager.remap_host_port(*address)
        return remapped

    def _tile_route(
        self,
        batch: Batch,
        indices: Sequence[int],
        asked: dict[int, Address],
        failed: set[str],
    ) -> tuple[list[Part], list[int]]:
        if self._tile_replaced:
            self._leave_replaced()
        parts: list[Part] = []
        if asked:
            by_address: dict[Address, list[int]] = {}
            for index, address in asked.items():
                by_address.setdefault(address, []).append(index)
            for address, some in by_address.items():
                node = self.nodes_manager.get_node(*address)
                if node is None:  # a refresh of somebody else's has dropped it
                    continue
                parts.append(self._part(batch, node, some))
                parts[-1].batch.ask()
                indices = sorted(set(indices) - set(some))
        slots_cache = self.nodes_manager.slots_cache
        owners = self._tile_owners
        if owners is None or owners.source is not slots_cache:
            owners = self._tile_owners = _Owners(slots_cache)
        uncovered: list[int] = []
        chosen: dict[tuple[str, bool], tuple[Any, list[int]]] = {}
        for number, some in owners.map.route(batch, indices):
            if number is None:
                uncovered = some
                continue
            nodes = list(owners.nodes[number])  # redis-py reorders it at a failover
            for place, share in self._spread(batch, nodes, some, failed):
                key = (nodes[place].name, place > 0)
                chosen.setdefault(key, (nodes[place], []))[1].extend(share)
        for (_, replica), (node, some) in chosen.items():
            part = self._part(batch, node, some)
            if replica and not batch.immutable:
                # A key that expires while replication lags can defeat WATCH there.
                part.batch.read_whole()
            parts.append(part)
        return parts, uncovered

    def _spread(
        self,
        batch: Batch,
        nodes: Sequence[Any],
        indices: list[int],
        failed: set[str],
    ) -> Iterator[tuple[int, list[int]]]:
        """Which of a shard's nodes get which of its keys: ``(place in nodes, keys)``.

        With reads from replicas, as many stretches as there are nodes, each to the one
        that redis-py's balancer names, or to another if that has failed: balanced, a
        stretch that was lost would be cut up again, and a part of it lost each time.
        """
        strategy = self.load_balancing_strategy
        if strategy is None and self.read_from_replicas:
            strategy = LoadBalancingStrategy.ROUND_ROBIN
        reads = batch.command in (Command.GET, Command.EXISTS)
        if strategy is None or not reads or len(nodes) == 1:
            yield 0, indices
            return
        balancer = self.nodes_manager.read_load_balancer
        names = [node.name for node in nodes]
        if failed.issuperset(names):  # one of them may have come back
            failed.difference_update(names)
        others = [i for i, name in enumerate(names) if name not in failed]
        size = math.ceil(len(indices) / len(nodes))
        for at in range(0, len(indices), size):
            place = balancer.get_server_index(names[0], len(nodes), strategy)
            if names[place] in failed:
                place = others[-1]  # the primary, the first, is the last resort
            yield place, indices[at : at + size]

    def _part(self, batch: Batch, cluster_node: Any, indices: list[int]) -> Part:
        pool = self._pool_of(cluster_node)
        node = self._node_of(cluster_node.name, pool)
        return Part(node, cluster_node.name, pool, batch.part(indices))

    def _node_of(self, name: str, pool: Pool) -> Node:
        node = self._tile_nodes.get(name)
        if node is not None and node.usable and node.pool() is pool:
            return node
        old, node = node, node_of(self, self._share(), pool, name)
        self._tile_nodes[name] = node
        if old is not None and old is not node:
            self._tile_replaced.append(old)
            self._leave_replaced()
        return node

    def _leave_replaced(self) -> None:
        # One that still carries parts of batches must not be closed under them.
        replaced, self._tile_replaced = self._tile_replaced, []
        for node in replaced:
            if node.usable and not node.idle:
                self._tile_replaced.append(node)
            else:
                drop_node(self, node)  # joins no threads: this may be an event loop

    def _share(self) -> TileOptions:
        """A new node's, of the cluster as it is now."""
        all_nodes = list(self.nodes_manager.nodes_cache.values())
        if not (self.read_from_replicas or self.load_balancing_strategy):
            all_nodes = [node for node in all_nodes if node.server_type == "primary"]
        return self._tile_options.share(max(1, len(all_nodes)), len(self._tile_nodes))

    def _forget_lost_nodes(self) -> None:
        """After a refresh: what is not in the cluster any more needs no threads."""
        self._tile_owners = None  # redis-py may have changed the cache in place
        for name, node in list(self._tile_nodes.items()):
            gone = name not in self.nodes_manager.nodes_cache
            if gone and self._tile_nodes.pop(name, None) is node:
                self._tile_replaced.append(node)
        self._leave_replaced()

    def _leave_nodes(self) -> None:
        """Close them, unless other clients use them."""
        self._tile_closes += 1
        for node in self._take_nodes():
            leave_node(self, node)

    def _take_nodes(self) -> Iterator[Node]:
        while True:
            try:
                yield self._tile_nodes.popitem()[1]
            except KeyError:  # another thread may be at it, too
                break
        replaced, self._tile_replaced = self._tile_replaced, []
        yield from replaced

    def _drop_nodes(self) -> None:
        """As `_leave_nodes`, for ``__del__``."""
        self._tile_closes += 1
        for node in self._take_nodes():
            drop_node(self, node)
