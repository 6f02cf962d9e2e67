"""Which node serves which pool, from the first `batch_tile_*` call of a client of the
pool to the close of its last client; and what happens to all of them at a fork.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

from fastkv import forking
from fastkv._core import Stats, after_fork_in_parent
from fastkv.connector import Pool, address_of
from fastkv.info import TileInfo, cluster_info, node_info
from fastkv.log import logger
from fastkv.node import Node
from fastkv.options import TileOptions
from fastkv.shielded import shielded

_Result = TypeVar("_Result")

_nodes: weakref.WeakKeyDictionary[Pool, Node] = weakref.WeakKeyDictionary()
# Those that somebody is about to close, too: a fork has to know all.
_alive: weakref.WeakValueDictionary[int, Node] = weakref.WeakValueDictionary()
# Counts outlive nodes: those of a pool, or of a cluster client, there by node, "" being
# calls over all of them.
_stats: weakref.WeakKeyDictionary[Any, dict[str, Stats]] = weakref.WeakKeyDictionary()
# Never taken by the main thread, whose signal handlers may use a client in the middle
# of anything, nor by a garbage collection, which may run there in any thread.
_lock = threading.RLock()
_pid = os.getpid()


def node_of(
    client: Any, options: TileOptions, pool: Pool | None = None, name: str = ""
) -> Node:
    """The node of a client's pool, or of ``pool``, one of a cluster client's that is
    called ``name``; starts it if need be.

    Raises:
        ValueError: Another client of the pool has started it with other options.
        UnsupportedConnection: See `fastkv.connector.check_supported`.
    """
    _check_fork()
    # What share a cluster's node gets depends on who comes first.
    any_options = pool is not None
    stats = stats_of(client if any_options else client.connection_pool, name)
    of_pool: Pool = pool or client.connection_pool

    def start() -> Node:
        broken = None
        with _lock:
            node = _nodes.get(of_pool)
            if node is None or not node.usable:
                broken = node
                node = Node(of_pool, options, stats, _close_unused)
                try:
                    _alive[id(node)] = node  # first: a fork may come
                    node.begin()
                    _watch(of_pool, node)
                    _nodes[of_pool] = node
                except BaseException:  # no memory, or no more threads
                    node.close()
                    raise
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

    return _shielded(start)


def _shielded(work: Callable[[], _Result]) -> _Result:
    """`shielded`, but not while this thread forks: a helper might wait for that."""
    if forking.is_here():
        forking.let_go()
        return work()
    return shielded(work)


def stats_of(owner: Any, name: str = "") -> Stats:
    """Where batches are counted: see `_stats`. Starts nothing, takes no lock."""
    return _stats.setdefault(owner, {}).setdefault(name, Stats())


def info_of_pool(pool: Pool) -> TileInfo:
    """See `fastkv.Redis.tile_info`."""
    node = _nodes.get(pool)
    stats = stats_of(pool) if node is None else node.stats
    info = _info(stats, node)
    info["address"] = address_of(pool)
    return info


def info_of_cluster(client: Any, nodes: Mapping[str, Node]) -> TileInfo:
    """The totals, and what every node came to that the client has ever used; ``nodes``
    are those that it uses now.
    """
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
    _check_fork()
    try:
        node.users.discard(client)
        _shielded(partial(_close_unused, node))
    except BaseException:
        node.wake_connector()  # it will see to it
        raise


def registered_node(client: Any) -> Node | None:
    """The node of a client's pool that counts the client among its users: one that an
    interrupt kept it from hearing of, perhaps.
    """
    node = _nodes.get(client.connection_pool)
    return node if node is not None and client in node.users else None


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
            if watched_pool is None:
                return None  # a garbage collection has come so far
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


def _living() -> list[Node]:
    """At once: other threads start nodes meanwhile."""
    nodes = [ref() for ref in _alive.valuerefs()]
    return [node for node in nodes if node is not None]


_MOST_LOOKS = 20  # at sockets in the making: a name's resolution may take long


def _before_fork() -> None:
    forking.lock.acquire()
    nodes = _living()
    for node in nodes:
        forking.held.append(node)
        node.before_fork()
    # Last, and all at once: while this sleeps, or waits for a node, sockets are made.
    for _ in range(_MOST_LOOKS):
        looks = [node.look_before_fork() for node in nodes]
        if all(looks):
            break
        time.sleep(0.0002)


def _after_fork_in_child() -> None:
    global _lock, _pid
    # Whoever held them does not exist here.
    forking.lock._at_fork_reinit()  # type: ignore[attr-defined]
    _lock = threading.RLock()
    forking.held.clear()
    _stats.clear()  # what happened so far is the parent's
    # Not only those of _before_fork: a fork in C does not call that. Nor all: a signal
    # handler may have started some before we came so far.
    pid = os.getpid()
    nodes = [node for node in _living() if node.pid != pid]
    for node in nodes:
        _alive.pop(id(node), None)
        pool = node.pool()
        if pool is not None and _nodes.get(pool) is node:
            _nodes.pop(pool, None)
            _unwatch(pool)
    _pid = pid  # from here on others may start nodes
    with ExitStack() as each:  # though one raises
        for node in nodes:
            each.callback(node.after_fork_in_child)


# By process: what the parent's threads held, nobody lets go in a child.
_checks: dict[int, threading.RLock] = {}


def _check_fork() -> None:
    """A fork in C may have told nobody."""
    pid = os.getpid()
    if _pid != pid:
        with _checks.setdefault(pid, threading.RLock()):
            if _pid != pid:
                _after_fork_in_child()


def _close_all() -> None:
    _check_fork()
    for node in _living():
        node.close()


# A worker must not run into the end of the interpreter.
atexit.register(_close_all)
os.register_at_fork(
    before=_before_fork,
    after_in_parent=partial(after_fork_in_parent, forking.held, forking.lock),
    after_in_child=_after_fork_in_child,
)
