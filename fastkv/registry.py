"""Which node serves which pool, from the first `batch_tile_*` call of a client of the
pool to the close of its last client; and what happens to all of them at a fork.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from fastkv._core import Stats
from fastkv.connector import Pool, address_of
from fastkv.info import TileInfo, cluster_info, node_info
from fastkv.log import logger
from fastkv.node import Node
from fastkv.options import TileOptions

_nodes: weakref.WeakKeyDictionary[Pool, Node] = weakref.WeakKeyDictionary()
# Counts outlive nodes: those of a pool, or of a cluster client, there by node, "" being
# calls over all of them.
_stats: weakref.WeakKeyDictionary[Any, dict[str, Stats]] = weakref.WeakKeyDictionary()
# Reentrant: a signal handler may use a client while this thread holds it. Never taken
# by a garbage collection, which may run in the middle of anything, in any thread.
_lock = threading.RLock()


def node_of(
    client: Any, options: TileOptions, pool: Pool | None = None, name: str = ""
) -> Node:
    """The node of a client's pool, or of ``pool``, one of a cluster client's that is
    called ``name``; starts it if need be.

    Raises:
        ValueError: Another client of the pool has started it with other options.
        UnsupportedConnection: See `fastkv.connector.check_supported`.
    """
    # What share a cluster's node gets depends on who comes first.
    any_options = pool is not None
    stats = stats_of(client if any_options else client.connection_pool, name)
    pool = pool or client.connection_pool
    broken = None
    with _lock:
        node = _nodes.get(pool)
        if node is None or not node.usable:
            broken = node
            node = _nodes[pool] = Node(pool, options, stats, _close_unused)
            _watch(pool, node)
        elif not any_options and options not in (TileOptions(), node.options):
            raise ValueError(
                f"the pool's native connections were started with {node.options}, "
                f"this client has {options}"
            )
        node.users.add(client)
    if broken is not None:
        if not broken.closed:
            logger.error("a native worker has died; its client starts new ones")
        broken.close()
    return node


def stats_of(owner: Any, name: str = "") -> Stats:
    """Where batches are counted: see `_stats`. Starts nothing."""
    with _lock:
        return _stats.setdefault(owner, {}).setdefault(name, Stats())


def info_of_pool(pool: Pool) -> TileInfo:
    """See `fastkv.Redis.tile_info`."""
    with _lock:
        node = _nodes.get(pool)
        stats = stats_of(pool) if node is None else node.stats
    info = _info(stats, node)
    info["address"] = address_of(pool)
    return info


def info_of_cluster(client: Any, nodes: Mapping[str, Node]) -> TileInfo:
    """The totals, and what every node came to that the client has ever used; ``nodes``
    are those that it uses now.
    """
    with _lock:
        calls = stats_of(client)
        counted = dict(_stats[client])
    del counted[""]
    return cluster_info(
        calls, {name: _info(stats, nodes.get(name)) for name, stats in counted.items()}
    )


def _info(stats: Stats, node: Node | None) -> TileInfo:
    return node_info(stats) if node is None else node_info(stats, node.gauges())


def leave_node(client: Any, node: Node) -> None:
    """The client needs its node no longer; the last one closes it."""
    node.users.discard(client)
    _close_unused(node)


def drop_node(client: Any, node: Node) -> None:
    """As `leave_node`, for ``__del__``: takes no lock, joins nothing, returns at once.
    The node's own thread does the rest.
    """
    node.users.discard(client)
    node.wake_connector()


def _close_unused(node: Node) -> None:
    with _lock:
        if node.users:
            return
        pool = node.pool()
        if pool is not None and _nodes.get(pool) is node:
            del _nodes[pool]
            _unwatch(pool)
    # Not under the lock: it joins threads.
    node.close()


# What drops or re-authenticates a pool's connections must reach the native ones too.
_WATCHED = ("disconnect", "reset", "re_auth_callback")


def _watch(pool: Pool, node: Node) -> None:
    def watched(name: str) -> Callable[..., Any]:
        seen = weakref.ref(node)
        owner = weakref.ref(pool)

        def call(*args: Any, **kwargs: Any) -> Any:
            watcher, watched_pool = seen(), owner()
            if watcher is not None:
                # At the next connect the credential provider is asked again.
                watcher.retire_connections()
            return getattr(type(watched_pool), name)(watched_pool, *args, **kwargs)

        return call

    for name in _WATCHED:
        if hasattr(pool, name):
            setattr(pool, name, watched(name))


def _unwatch(pool: Pool) -> None:
    for name in _WATCHED:
        # Somebody may have put something else in its place since, such as a mock.
        if getattr(pool.__dict__.get(name), "__module__", None) == __name__:
            del pool.__dict__[name]


# --- fork and exit -------------------------------------------------------------------

_fork_lock = threading.Lock()  # two threads may fork at once
_forking: list[Node] = []


def _before_fork() -> None:
    _fork_lock.acquire()
    _forking[:] = [node for node in list(_nodes.values()) if not node.closed]
    for node in _forking:
        node.before_fork()


def _after_fork_in_parent() -> None:
    for node in _forking:
        node.after_fork_in_parent()
    _forking.clear()
    _fork_lock.release()


def _after_fork_in_child() -> None:
    global _fork_lock, _lock
    # Whoever held them does not exist here.
    _fork_lock = threading.Lock()
    _lock = threading.RLock()
    _forking.clear()
    # All, not only those of _before_fork: a fork in C does not call that.
    nodes = list(_nodes.items())
    _nodes.clear()
    _stats.clear()  # what happened so far is the parent's
    for pool, node in nodes:
        _unwatch(pool)
        node.after_fork_in_child()


def _close_all() -> None:
    for node in list(_nodes.values()):
        node.close()


# A worker must not run into the end of the interpreter.
atexit.register(_close_all)
os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
