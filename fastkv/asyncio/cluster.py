"""`fastkv.asyncio.RedisCluster`: redis-py's, and how it learns of changes."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import weakref
from typing import TYPE_CHECKING, Any

import redis.asyncio
from redis.asyncio.cluster import ClusterNode, NodesManager
from redis.auth.token import TokenInterface
from redis.exceptions import ConnectionError
from redis.utils import str_if_bytes

from fastkv import rounds
from fastkv._core import Batch
from fastkv.asyncio.tiles import Tiles
from fastkv.connector import NOT_FOR_LANES, Pool
from fastkv.options import options_of_url, signed_as, take_options
from fastkv.refresher import Refresh
from fastkv.topology import Routing

if TYPE_CHECKING:
    from redis._parsers.encoders import Encoder
    from typing_extensions import Self

# As in fastkv.cluster.
_HINTS = inspect.signature(NodesManager.initialize).parameters

# redis-py's commands and pipelines close and reopen the client when the cluster has
# changed.
_inside_command: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "fastkv_inside_command", default=False
)


class _Pipeline(redis.asyncio.cluster.ClusterPipeline):
    async def execute(self, *args: Any, **kwargs: Any) -> list[Any]:
        token = _inside_command.set(True)
        try:
            return await super().execute(*args, **kwargs)
        finally:
            _inside_command.reset(token)


class RedisCluster(Tiles, Routing, redis.asyncio.RedisCluster):  # type: ignore[misc]  # redis-py's own bases disagree
    """redis-py's `redis.asyncio.RedisCluster` with the calls of `fastkv.RedisCluster`
    as coroutines. See there for the arguments. As redis-py's, it belongs to one event
    loop.
    """

    @signed_as(redis.asyncio.RedisCluster.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options, kwargs = take_options(kwargs)
        self._start_routing(options)
        # redis-py's nodes here have no pool; these say how to connect, no more.
        self._tile_pools: dict[str, Pool] = {}
        self._tile_node_class = _class_of_nodes(self)
        super().__init__(*args, **kwargs)

    @classmethod
    def from_url(cls, url: str, **kwargs: Any) -> Self:
        """As redis-py's; ``tile_*`` arguments may stand in the query too."""
        url, options, kwargs = options_of_url(url, kwargs)
        client = super().from_url(url, **kwargs)
        assert isinstance(client, cls)
        client._tile_options = options
        return client

    async def aclose(self) -> None:
        """As redis-py's. Ends the native connections as `fastkv.RedisCluster.close`."""
        if not _inside_command.get():
            # Joins threads, which may take a moment.
            await asyncio.get_running_loop().run_in_executor(None, self._leave_nodes)
        await super().aclose()

    def pipeline(
        self, transaction: Any | None = None, shard_hint: Any | None = None
    ) -> redis.asyncio.cluster.ClusterPipeline:
        """As redis-py's."""
        if shard_hint:  # it says what is wrong with that
            return super().pipeline(transaction, shard_hint)
        return _Pipeline(self, transaction)  # type: ignore[abstract]  # so is redis-py's own

    async def _execute_command(self, *args: Any, **kwargs: Any) -> Any:
        token = _inside_command.set(True)
        try:
            return await super()._execute_command(*args, **kwargs)
        finally:
            _inside_command.reset(token)

    def __del__(self, *args: Any, **kwargs: Any) -> None:
        # May run in the middle of anything, in any thread: no lock, no join.
        if hasattr(self, "_tile_nodes"):
            self._drop_nodes()
        super().__del__(*args, **kwargs)

    def _tile_encoder(self) -> Encoder:
        return self.encoder

    async def _tile_wait(self, batch: Batch, timeout: float | None) -> list[bool]:
        if self._initialize:
            await self.initialize()
        return await rounds.wait(self, batch, timeout)

    def _pool_of(self, cluster_node: ClusterNode) -> Pool:
        pool = self._tile_pools.get(cluster_node.name)
        if pool is None:
            kwargs = {
                name: value
                for name, value in cluster_node.connection_kwargs.items()
                if name not in NOT_FOR_LANES
            }
            if kwargs.get("redis_connect_func") is not None:
                kwargs["redis_connect_func"] = _read_only  # what redis-py's does
            pool = self._tile_pools[cluster_node.name] = redis.asyncio.ConnectionPool(
                cluster_node.connection_class, cluster_node.max_connections, **kwargs
            )
            cluster_node.__class__ = self._tile_node_class
        return pool

    async def _tile_refresh(self, step: Refresh) -> None:
        """For `fastkv.rounds`: redis-py looks at the cluster again."""
        await asyncio.sleep(step.pause)
        manager = self.nodes_manager
        for name in step.lost:
            if hasattr(manager, "move_node_to_end_of_cached_nodes"):
                manager.move_node_to_end_of_cached_nodes(name)
        if step.lost or step.down:
            await self._initialize_nodes(
                last_failed_node_name=next(iter(step.lost), None)
            )
        else:
            for error in step.moved.values():
                self.reinitialize_counter += 1
                due = (
                    self.reinitialize_steps
                    and self.reinitialize_counter % self.reinitialize_steps == 0
                )
                if due:
                    await self._initialize_nodes(
                        additional_startup_nodes_info=[(error.host, error.port)]
                    )
                    self.reinitialize_counter = 0
                    break
                if hasattr(manager, "move_slot"):
                    await manager.move_slot(error)
                else:
                    manager.update_moved_exception(error)
                    manager.get_node_from_slot(error.slot_id)
        for host, port in step.asked:
            # A node that imports its first slot is in nobody's picture yet.
            if manager.get_node(host, port) is None:
                node = ClusterNode(host, port, "primary", **self.connection_kwargs)
                manager.nodes_cache[node.name] = node
        self._forget_lost_nodes()
        for name in self._tile_pools.keys() - self._tile_nodes.keys():
            del self._tile_pools[name]

    async def _initialize_nodes(self, **hints: Any) -> None:
        await self.nodes_manager.initialize(
            **{name: hint for name, hint in hints.items() if name in _HINTS}
        )


def _class_of_nodes(client: RedisCluster) -> type[ClusterNode]:
    """redis-py's nodes, who tell our connections of a new token, too. (Their attributes
    are fixed; a class for each client knows whose they are.)
    """
    owner = weakref.ref(client)

    class Node(ClusterNode):
        __slots__ = ()

        async def re_auth_callback(self, token: TokenInterface) -> None:
            cluster = owner()
            pool = cluster and cluster._tile_pools.get(self.name)
            if pool:
                await pool.re_auth_callback(token)
            await super().re_auth_callback(token)

    return Node


def _read_only(connection: Any) -> None:
    connection.on_connect()
    connection.send_command("READONLY")
    if str_if_bytes(connection.read_response()) != "OK":
        raise ConnectionError("READONLY command failed")
