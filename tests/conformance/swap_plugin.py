"""A pytest plugin for redis-py's own tests: they get our classes and our servers.

Loaded with ``-p`` before redis-py's conftest, in a process of its own, in the baseline
run too. Knows nothing of the tests and nothing of who compares the two runs. What it
shall do stands in the environment variable ``FASTKV_CONFORMANCE``, as JSON:

    mode    "baseline": redis-py as it is; "swapped": our classes in its place;
            "started": likewise, and each client starts its native threads at once
    ports   {"6379": 40123}: where the ports are that the tests have in their text
    hiredis whether redis-py may find hiredis
    report  a file that gets a line of JSON for each test
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import pkgutil
import socket
import sys
import tracemalloc
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

_TASK = json.loads(os.environ["FASTKV_CONFORMANCE"])
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_FIRST_EPHEMERAL = 32768

# Ours by redis-py's place; what fastkv does not have (yet) is left as it is.
_CLASSES = (
    ("redis.client", "Redis", "fastkv"),
    ("redis.asyncio.client", "Redis", "fastkv.asyncio"),
    ("redis.cluster", "RedisCluster", "fastkv"),
    ("redis.asyncio.cluster", "RedisCluster", "fastkv.asyncio"),
    ("redis.sentinel", "Sentinel", "fastkv"),
    ("redis.asyncio.sentinel", "Sentinel", "fastkv.asyncio"),
)


# --- the classes ---------------------------------------------------------------------


def replacements() -> dict[type, type]:
    found = {}
    for module, name, ours in _CLASSES:
        theirs: type = getattr(importlib.import_module(module), name)
        new = getattr(importlib.import_module(ours), name, None)
        if new is not None:
            assert issubclass(new, theirs)
            found[theirs] = new
    return found


def _redis_modules() -> list[types.ModuleType]:
    """All of them: what is imported later would bring redis-py's class back."""
    import redis

    for info in pkgutil.walk_packages(redis.__path__, "redis."):
        try:
            importlib.import_module(info.name)
        except ImportError:
            pass  # wants a library that is not installed
    return [
        module
        for name, module in list(sys.modules.items())
        if name == "redis" or name.startswith("redis.")
    ]


def _functions_of(value: Any) -> Iterator[types.FunctionType]:
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        for part in (value.fget, value.fset, value.fdel):
            yield from _functions_of(part)
    value = inspect.unwrap(value) if callable(value) else value
    if isinstance(value, types.FunctionType):
        yield value


def swap() -> int:
    """Rebind each global, class attribute, dataclass field and default argument of
    redis-py that is one of its client classes.

    What it keeps: the bases of its own classes (its ``Pipeline`` derives from its
    ``Redis``), and the namespace in which `redis.commands.helpers` asks ``isinstance``,
    of pipelines too. For a user, who swaps one name in one import, those hold as well.

    Returns:
        In how many places.
    """
    swapped = replacements()
    count = 0

    def new(value: Any) -> Any:
        try:
            return swapped.get(value)
        except TypeError:  # not hashable, so no class
            return None

    def rebind(owner: Any, name: str, value: Any) -> None:
        nonlocal count
        if new(value) is not None:
            setattr(owner, name, new(value))
            count += 1
        for function in _functions_of(value):
            defaults = function.__defaults__ or ()
            if any(new(v) for v in defaults):
                function.__defaults__ = tuple(new(v) or v for v in defaults)
                count += 1
            for key, default in (function.__kwdefaults__ or {}).items():
                if new(default):
                    function.__kwdefaults__[key] = new(default)
                    count += 1

    modules = _redis_modules()
    _keep_isinstance()
    classes = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__.split(".")[0] == "redis"
    }
    for module in modules:
        for name, value in list(vars(module).items()):
            rebind(module, name, value)
    for cls in classes:
        for name, value in list(vars(cls).items()):
            rebind(cls, name, value)
        for field in vars(cls).get("__dataclass_fields__", {}).values():
            rebind(field, "default", field.default)
    return count


def _keep_isinstance() -> None:
    import redis
    from redis.commands import helpers

    helpers.redis = types.SimpleNamespace(  # type: ignore[attr-defined]
        Redis=redis.Redis,
        RedisCluster=redis.RedisCluster,
        asyncio=types.SimpleNamespace(
            Redis=redis.asyncio.Redis,
            RedisCluster=redis.asyncio.RedisCluster,
            cluster=redis.asyncio.cluster,
        ),
        cluster=redis.cluster,
    )


def start_in_init() -> None:
    """Make each of our clients start its native threads when it is made. No test of
    redis-py calls ``batch_tile_*``, so that they would never be there.
    """
    import redis.asyncio

    import fastkv
    import fastkv.asyncio

    real_pools = (redis.ConnectionPool, redis.asyncio.ConnectionPool)

    def started(init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            init(self, *args, **kwargs)
            # Not `isinstance`, for which a Mock is what its spec is.
            if issubclass(type(self.connection_pool), real_pools):
                try:
                    self._node()
                except fastkv.UnsupportedConnection:
                    pass  # a connection class of the test's

        return __init__

    for cls in (fastkv.Redis, fastkv.asyncio.Redis):
        cls.__init__ = started(cls.__init__)  # type: ignore[method-assign]


# --- the servers ---------------------------------------------------------------------


def redirect(ports: dict[int, int]) -> None:
    """Where the tests' text has a port of docker-compose's, go to a private server; and
    where they listen on one of their text, let the system choose it, as another run
    may be there.
    """
    original_connect, original_bind = socket.socket.connect, socket.socket.bind

    def connect(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] in _LOOPBACK:
            port = ports.get(address[1], address[1])
            address = (address[0], port, *address[2:])
        return original_connect(self, address)

    def bind(self: socket.socket, address: Any) -> None:
        in_text = (
            isinstance(address, tuple)
            and address[0] in _LOOPBACK
            and 0 < address[1] < _FIRST_EPHEMERAL
        )
        if not in_text:
            return original_bind(self, address)
        original_bind(self, (address[0], 0, *address[2:]))
        ports[address[1]] = self.getsockname()[1]
        return None

    socket.socket.connect = connect  # type: ignore[method-assign]
    socket.socket.bind = bind  # type: ignore[method-assign]


# --- the report ----------------------------------------------------------------------

_phases: dict[str, dict[str, Any]] = {}


def _write(line: dict[str, Any]) -> None:
    # Line by line: what ran before a crash is known.
    with open(_TASK["report"], "a") as report:
        report.write(json.dumps(line) + "\n")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    test = _phases.setdefault(
        report.nodeid, {"id": report.nodeid, "outcome": "passed", "seconds": 0.0}
    )
    test["seconds"] += report.duration
    if report.outcome != "passed" and test["outcome"] == "passed":
        broken = report.failed and report.when != "call"
        test["outcome"] = "error" if broken else report.outcome
        test["why"] = str(report.longrepr)[-3000:]
    if report.when == "teardown":
        _write(_phases.pop(report.nodeid))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        why = str(report.longrepr)[-3000:]
        _write({"id": report.nodeid, "outcome": "error", "seconds": 0.0, "why": why})


# redis-py's conftest traces each allocation, of which no test makes use: half the time.
tracemalloc.start = lambda *_: None
redirect({int(port): at for port, at in _TASK["ports"].items()})
if not _TASK["hiredis"]:
    sys.modules["hiredis"] = None  # type: ignore[assignment]
if _TASK["mode"] != "baseline":
    if _TASK["mode"] == "started":
        start_in_init()
    _write({"id": "swapped", "places": swap()})
