"""`fastkv.RedisCluster`: redis-py's cluster client, and how it learns of changes."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import redis
from redis.cluster import ClusterNode, NodesManager

from fastkv import rounds
from fastkv._core import Batch
from fastkv.connector import Pool
from fastkv.node import TileFuture
from fastkv.options import options_of_url, signed_as, take_options
from fastkv.refresher import Refresh, Refresher
from fastkv.tiles import Tiles
from fastkv.topology import Routing

if TYPE_CHECKING:
    from redis._parsers.encoders import Encoder
    from typing_extensions import Self

# redis-py 7 takes no hints where to ask.
_HINTS = inspect.signature(NodesManager.initialize).parameters


class RedisCluster(Tiles, Routing, redis.RedisCluster):
    """redis-py's `redis.RedisCluster` with the calls of `fastkv.Redis`.

    A batch may have keys of all slots. Each node is asked for its own, at once; a key
    that has moved, or whose node was lost, is sent again, as often as the client's
    ``retry`` and redis-py's rules for redirections allow. ``read_from_replicas`` and
    ``load_balancing_strategy`` hold for ``batch_tile_get`` and ``batch_tile_exists``;
    from replicas, values are read in ranges only if ``immutable``.

    Args:
        tile_workers: Native threads of all nodes together, but each node has at least
            one. Default: half the cores, 4 at most.
        tile_connections: Connections that carry values, of all nodes together, but each
            node has at least one, and one more for lookups. Default: 4, or
            ``tile_workers`` if that is more.
        tile_window_bytes: As `fastkv.Redis`, as is the next.
        tile_range_bytes: As above.

    Threads and connections are divided by the number of primaries (of all nodes, with
    reads from replicas) at a node's first use.
    """

    @signed_as(redis.RedisCluster.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options, kwargs = take_options(kwargs)
        self._start_routing(options)
        self._tile_refresher = Refresher()
        if kwargs.get("url"):
            kwargs["url"], in_url, _ = options_of_url(kwargs["url"], {})
            self._tile_options = options.overridden(in_url)
        super().__init__(*args, **kwargs)

    @classmethod
    def from_url(cls, url: str, **kwargs: Any) -> Self:
        """As redis-py's; ``tile_*`` arguments may stand in the query too."""
        return cls(url=url, **kwargs)

    def close(self) -> None:
        """As redis-py's. Ends the native connections: what they still had to do fails
        with `redis.exceptions.ConnectionError`. The client can be used again.
        """
        self._leave_nodes()
        super().close()

    def __del__(self) -> None:
        # May run in the middle of anything, in any thread: no lock, no join.
        if hasattr(self, "_tile_nodes"):
            self._drop_nodes()
        super().__del__()  # type: ignore[no-untyped-call]  # redis-py's

    def _tile_encoder(self) -> Encoder:
        return self.encoder

    def _tile_run(self, batch: Batch, timeout: float | None) -> list[bool]:
        return rounds.run(self, batch, timeout)

    def _tile_submit(self, batch: Batch, timeout: float | None) -> TileFuture:
        return rounds.submit(self, batch, timeout)

    def _pool_of(self, cluster_node: ClusterNode) -> Pool:
        pool: Pool = self.get_redis_connection(cluster_node).connection_pool
        return pool

    def _tile_refresh(self, step: Refresh) -> None:
        """For `fastkv.rounds`: redis-py looks at the cluster again."""
        manager = self.nodes_manager
        for name in step.lost:
            if hasattr(manager, "move_node_to_end_of_cached_nodes"):
                manager.move_node_to_end_of_cached_nodes(name)
        if step.lost or step.down:
            self._initialize_nodes(last_failed_node_name=next(iter(step.lost), None))
        else:
            for error in step.moved.values():
                self.reinitialize_counter += 1
                if self._should_reinitialized():  # type: ignore[no-untyped-call]  # redis-py's
                    self._initialize_nodes(
                        additional_startup_nodes_info=[(error.host, error.port)]
                    )
                    self.reinitialize_counter = 0
                    break
                if hasattr(manager, "move_slot"):
                    manager.move_slot(error)
                else:  # redis-py 7: noted, and done by who asks next
                    manager.update_moved_exception(error)
                    manager.get_node_from_slot(error.slot_id)
        for host, port in step.asked:
            # A node that imports its first slot is in nobody's picture yet.
            if manager.get_node(host, port) is None:
                node = ClusterNode(host, port, "primary")
                manager.nodes_cache[node.name] = node
        self._forget_lost_nodes()

    def _initialize_nodes(self, **hints: Any) -> None:
        self.nodes_manager.initialize(
            **{name: hint for name, hint in hints.items() if name in _HINTS}
        )
