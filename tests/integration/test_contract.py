"""What redis-py promises of its client class holds for ours, argument by argument.

redis-py's own tests hardly touch the constructor (they make pools, and clients of
pools), so this is checked here.
"""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
import redis.asyncio
from redis.backoff import AbstractBackoff, ConstantBackoff
from redis.retry import AbstractRetry, Retry

import fastkv
import fastkv.asyncio
from fastkv.cli.private_server import PrivateServer
from fastkv.connector import make_connection
from tests.conftest import Endpoint, open_fds

TLS = {"ssl": True}
OCSP = {**TLS, "ssl_validate_ocsp": True}


def connected(_: object) -> None: ...


class Provider(redis.CredentialProvider):
    def get_credentials(self) -> tuple[str]:
        return ("secret",)


def maint_config() -> Any:
    return redis.maint_notifications.MaintNotificationsConfig(enabled=False)


# Each argument of `redis.Redis.__init__`, once, with a value that is not its default,
# and what it needs beside it.
ARGUMENTS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "host": (lambda: "h", {}),
    "port": (lambda: 7, {}),
    "db": (lambda: 3, {}),
    "password": (lambda: "secret", {}),
    "socket_timeout": (lambda: 1.5, {}),
    "socket_connect_timeout": (lambda: 2.5, {}),
    "socket_read_size": (lambda: 4096, {}),
    "socket_keepalive": (lambda: False, {}),
    "socket_keepalive_options": (lambda: {socket.TCP_KEEPIDLE: 77}, {}),
    "connection_pool": (lambda: redis.ConnectionPool(host="h", db=2), {}),
    "unix_socket_path": (lambda: "/x", {}),
    "encoding": (lambda: "latin-1", {}),
    "encoding_errors": (lambda: "replace", {}),
    "decode_responses": (lambda: True, {}),
    "retry_on_timeout": (lambda: True, {}),
    "retry": (lambda: Retry(ConstantBackoff(0.5), 2), {}),
    "retry_on_error": (lambda: [redis.exceptions.ReadOnlyError], {}),
    "ssl": (lambda: True, {}),
    "ssl_keyfile": (lambda: "/key", TLS),
    "ssl_certfile": (lambda: "/cert", TLS),
    "ssl_cert_reqs": (lambda: "none", {**TLS, "ssl_check_hostname": False}),
    "ssl_include_verify_flags": (lambda: [ssl.VerifyFlags.VERIFY_X509_STRICT], TLS),
    "ssl_exclude_verify_flags": (lambda: [ssl.VerifyFlags.VERIFY_X509_STRICT], TLS),
    "ssl_ca_certs": (lambda: "/ca", TLS),
    "ssl_ca_path": (lambda: "/cas", TLS),
    "ssl_ca_data": (lambda: "-----BEGIN", TLS),
    "ssl_check_hostname": (lambda: False, TLS),
    "ssl_password": (lambda: "secret", TLS),
    "ssl_validate_ocsp": (lambda: True, TLS),
    "ssl_validate_ocsp_stapled": (lambda: True, TLS),
    "ssl_ocsp_context": (object, TLS),
    "ssl_ocsp_expected_cert": (lambda: "cert", TLS),
    "ssl_min_version": (lambda: ssl.TLSVersion.TLSv1_3, TLS),
    "ssl_ciphers": (lambda: "ALL", TLS),
    "max_connections": (lambda: 3, {}),
    "single_connection_client": (lambda: True, {}),
    "health_check_interval": (lambda: 9, {}),
    "client_name": (lambda: "me", {}),
    "lib_name": (lambda: "mine", {}),
    "lib_version": (lambda: "9", {}),
    "driver_info": (lambda: None, {}),
    "username": (lambda: "bob", {"password": "secret"}),
    "redis_connect_func": (lambda: connected, {}),
    "credential_provider": (Provider, {}),
    "protocol": (lambda: 2, {}),
    "legacy_responses": (lambda: False, {}),
    "cache": (lambda: redis.cache.DefaultCache(redis.cache.CacheConfig()), {}),
    "cache_config": (redis.cache.CacheConfig, {}),
    "event_dispatcher": (redis.event.EventDispatcher, {}),
    "maint_notifications_config": (maint_config, {}),
    "oss_cluster_maint_notifications_handler": (
        lambda: redis.maint_notifications.OSSMaintNotificationsHandler(
            SimpleNamespace(), maint_config()
        ),
        {},
    ),
    # Of asyncio.Redis only.
    "auto_close_connection_pool": (lambda: False, {}),
}
CLIENTS = [
    pytest.param(redis.Redis, fastkv.Redis, id="sync"),
    pytest.param(redis.asyncio.Redis, fastkv.asyncio.Redis, id="asyncio"),
]


def arguments_of(cls: type) -> list[str]:
    return [name for name in inspect.signature(cls).parameters if name != "self"]


# Objects that hold settings, and have no ``==`` of their own.
SETTINGS = (AbstractBackoff, AbstractRetry, redis.driver_info.DriverInfo)


def alike(ours: Any, theirs: Any) -> bool:
    """Equal; or of one class, where redis-py makes an object for each pool."""
    if ours is theirs or ours == theirs:
        return True
    plain = (str, bytes, int, float, list, dict, tuple, set, type(None), type)
    if isinstance(ours, plain) or type(ours) is not type(theirs):
        return False
    if isinstance(ours, SETTINGS):
        return differences(vars(ours), vars(theirs)) == []
    return True


def state_of(client: Any) -> dict[str, Any]:
    """Of client and pool, and the connection that the pool would make."""
    pool = client.connection_pool
    return {
        **{f"client {k}": v for k, v in vars(client).items() if "_tile" not in k},
        **{
            f"pool {key}": value
            for key, value in vars(pool).items()
            if key not in ("_pool_id", "_connection_kwargs")  # the latter are below
        },
        **{f"setting {k}": v for k, v in pool.connection_kwargs.items()},
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return sorted(
        key
        for key in one.keys() | other.keys()
        if key not in one or key not in other or not alike(one[key], other[key])
    )


@pytest.mark.parametrize(("theirs", "ours"), CLIENTS)
def test_every_argument_of_redis_py_is_looked_at(theirs: type, ours: type) -> None:
    assert set(arguments_of(theirs)) <= ARGUMENTS.keys()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (redis.Redis, fastkv.Redis),
        (redis.asyncio.Redis, fastkv.asyncio.Redis),
        (redis.RedisCluster, fastkv.RedisCluster),
        (redis.asyncio.RedisCluster, fastkv.asyncio.RedisCluster),
        (redis.sentinel.Sentinel, fastkv.Sentinel),
        (redis.asyncio.sentinel.Sentinel, fastkv.asyncio.Sentinel),
    ],
)
def test_arguments_and_defaults_can_be_asked_for(theirs: Any, ours: Any) -> None:
    expected = inspect.signature(theirs.__init__).parameters
    found = inspect.signature(ours.__init__).parameters
    added = [name for name in found if name not in expected]
    assert added and all(name.startswith("tile_") for name in added)
    assert [(name, found[name]) for name in found if name not in added] == list(
        expected.items()
    )


@pytest.mark.parametrize(("theirs", "ours"), CLIENTS)
def test_the_arguments_of_our_own_are_those_that_are_shown(
    theirs: Any, ours: Any
) -> None:
    shown = [name for name in arguments_of(ours) if name not in arguments_of(theirs)]
    options = {name: 100_000 if "bytes" in name else 3 for name in shown}
    assert list(vars(ours(**options)._tile_options).values()) == [*options.values()]


def is_refused_by(cls: type, kwargs: dict[str, Any]) -> str:
    try:
        cls(**kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# Deprecated arguments too.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("theirs", "ours"), CLIENTS)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_each_argument_arrives_as_in_redis_py(
    theirs: Any, ours: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name not in arguments_of(theirs):
        assert is_refused_by(ours, {name: 1}) == is_refused_by(theirs, {name: 1})
        return
    make, more = ARGUMENTS[name]
    value = make()
    if name == "connection_pool" and theirs is redis.asyncio.Redis:
        value = redis.asyncio.ConnectionPool(host="h", db=2)
    if name == "retry" and theirs is redis.asyncio.Redis:
        value = redis.asyncio.retry.Retry(ConstantBackoff(0.5), 2)
    # `single_connection_client` connects at once; here there is nothing to connect to.
    make_only = redis.ConnectionPool.make_connection
    monkeypatch.setattr(redis.ConnectionPool, "get_connection", make_only)
    expected = state_of(theirs(**{name: value}, **more))
    found = state_of(ours(**{name: value}, **more))
    assert differences(found, expected) == []
    places = {key for key, held in expected.items() if held is value}
    assert {key for key, held in found.items() if held is value} == places
    # Else this test would see nothing.
    assert places or differences(expected, state_of(theirs(**more)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", arguments_of(redis.Redis))
def test_each_argument_arrives_at_the_native_connections(name: str) -> None:
    make, more = ARGUMENTS[name]
    if name == "single_connection_client":
        pytest.skip("is about connections of redis-py's own")
    client = fastkv.Redis(**{name: make()}, **more)
    connection: Any = client.connection_pool.make_connection()
    connection = getattr(connection, "_conn", connection)  # what a cache wraps
    expected = vars(connection)
    found = vars(make_connection(client.connection_pool, lambda: None))
    # RESP2, no notifications, retried by the connector, under our name; and what
    # redis-py gives to connections of its own.
    assert [
        key
        for key in differences(found, expected)
        if key
        not in {
            "_connect_callbacks",  # a cache's: CLIENT TRACKING
            "_event_dispatcher",
            "_maint_notifications_connection_handler",
            "_maint_notifications_pool_handler",
            "driver_info",
            "himport_registry",
            "lib_name",
            "protocol",
            "retry",
        }
        and "maint" not in key
        and not key.startswith("orig_")
    ] == []


@pytest.mark.parametrize(("theirs", "ours"), CLIENTS)
@pytest.mark.parametrize(
    "url",
    [
        "redis://",
        "redis://bob:secret@h:7/3",
        "redis://h?db=4&protocol=2&legacy_responses=no",
        "redis://h?socket_timeout=1.5&socket_connect_timeout=2.5&socket_read_size=4096",
        "redis://h?socket_keepalive=no&health_check_interval=9&max_connections=3",
        "redis://h?client_name=me&encoding=latin-1&decode_responses=True",
        "rediss://h:7?ssl_cert_reqs=none&ssl_check_hostname=no&ssl_ca_certs=/ca",
        "rediss://h?ssl_min_version=772&ssl_ciphers=ALL&ssl_keyfile=/k",
        "unix:///x/y.sock?db=2",
        "unix://bob:secret@/x/y.sock",
        "redis://%5B::1%5D:7/0?client_name=a%20b%26c",
        "http://h",
        "redis://h?socket_timeout=soon",
    ],
)
def test_urls_mean_what_they_mean_in_redis_py(theirs: Any, ours: Any, url: str) -> None:
    def made(cls: Any, at: str, **kwargs: Any) -> Any:
        try:
            return state_of(cls.from_url(at, client_name="arg", **kwargs))
        except ValueError as error:
            return {"error": str(error)}

    expected = made(theirs, url)
    assert differences(made(ours, url), expected) == []
    assert differences(made(ours, url, tile_workers=1), expected) == []
    also = url + ("&" if "?" in url else "?") + "tile_connections=3"
    assert differences(made(ours, also), expected) == []


@pytest.mark.parametrize(("theirs", "ours"), CLIENTS)
def test_copies_pickles_and_representations_are_redis_pys(
    theirs: Any, ours: Any
) -> None:
    for refuse in (pickle.dumps, copy.deepcopy):
        said = []
        for cls in (theirs, ours):
            with pytest.raises(TypeError) as refused:
                refuse(cls())
            said.append(str(refused.value))
        assert said[0] == said[1]
    client = ours(password="secret")
    twin = copy.copy(client)
    assert type(twin) is ours
    assert twin.connection_pool is client.connection_pool
    shown = repr(client)
    assert shown == (
        f"<{ours.__module__}.Redis({client.connection_pool!r})>"  # as redis-py's
    )
    assert "secret" not in shown


def test_classes_are_redis_pys() -> None:
    for theirs, ours in (
        (redis.Redis, fastkv.Redis),
        (redis.asyncio.Redis, fastkv.asyncio.Redis),
    ):
        assert issubclass(ours, theirs)
        assert isinstance(ours(), theirs)
        assert type(type(ours)) is type(type(theirs))
        assert ours.__name__ == theirs.__name__
    with pytest.raises(TypeError):
        fastkv.asyncio.Redis("positional")  # type: ignore[misc]


class Cache(fastkv.Redis):
    """What users write: a name of their own, and settings that they always want."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, tile_workers=1, **kwargs)
        self.hits = 0

    def get(self, name: Any) -> Any:
        self.hits += 1
        return super().get(name)


class AsyncCache(fastkv.asyncio.Redis):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(tile_workers=1, **kwargs)


@pytest.mark.parametrize("how", ["arguments", "url", "pool", "client"])
def test_subclasses_keep_their_settings_however_they_are_made(
    endpoint: Endpoint, how: str
) -> None:
    client = Cache(**endpoint.kwargs)
    if how == "url":
        client = Cache.from_url(endpoint.url)
    elif how == "pool":
        client = Cache.from_pool(redis.ConnectionPool.from_url(endpoint.url))
    elif how == "client":
        client = Cache(**endpoint.kwargs).client()
    with client:
        assert type(client) is Cache
        assert client._tile_options.workers == 1
        client.set("a", "1")
        assert client.get("a") == b"1"
        assert client.hits == 1
        assert client.batch_tile_exists(["a"]) == [True]


def test_an_asyncio_subclass_keeps_its_settings_too() -> None:
    assert AsyncCache.from_url("redis://")._tile_options.workers == 1
    found = AsyncCache.from_url("redis://?tile_connections=2")._tile_options
    assert (found.workers, found.connections) == (1, 2)


# --- on the wire ---------------------------------------------------------------------


@pytest.fixture
def seen(
    make: Any, own_server: PrivateServer
) -> Iterator[Callable[..., dict[str, str]]]:
    """What the server says of a native connection of a client with such arguments."""
    with own_server.client() as admin:

        def ask(**kwargs: Any) -> dict[str, str]:
            client = make(port=own_server.port, tile_connections=1, **kwargs)
            client.batch_tile_exists(["a"])
            (found,) = [
                c
                for c in admin.client_list()
                if c["cmd"] == "exists" and c["resp"] == "2"
            ]
            client.close()
            return dict(found)

        yield ask


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_server_sees_the_identity_that_was_asked_for(
    seen: Callable[..., dict[str, str]], own_server: PrivateServer
) -> None:
    with own_server.client() as admin:
        admin.execute_command("ACL SETUSER bob on >pw ~* &* +@all")
    assert seen()["user"] == "default"
    assert seen(db=4)["db"] == "4"
    assert seen(client_name="me")["name"] == "me"
    assert seen(username="bob", password="pw")["user"] == "bob"
    if own_server.binary.version.startswith("7.0"):
        return  # knows no library names
    mine = seen(lib_name="mine", lib_version="9")
    assert (mine["lib-name"], mine["lib-ver"]) == ("mine", "9")
    assert seen()["lib-ver"] == redis.__version__
    info = redis.driver_info.DriverInfo().add_upstream_driver("other", "1.2.3")
    named = seen(driver_info=info)["lib-name"]
    assert named == f"redis-py(fastkv_v{fastkv.__version__};other_v1.2.3)"
    assert info.upstream_drivers == ["other_v1.2.3"]  # the user's own is as it was


def test_keepalive_is_set_as_redis_py_sets_it(
    make: Any, own_server: PrivateServer
) -> None:
    def options(**kwargs: Any) -> set[tuple[int, int]]:
        client = make(port=own_server.port, tile_connections=1, **kwargs)
        client.batch_tile_exists(["a"])
        found = set()
        for fd, kind in open_fds().items():
            if not kind.startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(fd)) as sock:
                try:
                    peer = sock.getpeername()
                except OSError:
                    continue  # a listening one
                if peer == ("127.0.0.1", own_server.port):
                    found.add(
                        (
                            sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                        )
                    )
        client.close()
        return found

    assert {on for on, _ in options(socket_keepalive=False)} == {0}
    assert options(socket_keepalive_options={socket.TCP_KEEPIDLE: 77}) == {(1, 77)}
    assert options() == {(1, 30)}


# --- types ---------------------------------------------------------------------------

_PROGRAM = """
import asyncio
{imports}

def use(client: redis.Redis) -> None:
    client.set("a", b"1", ex=5)

def main() -> None:
    client = {sync}.Redis(host="h", port=1, db=2, decode_responses=True)
    use(client)
    with {sync}.Redis("h", 1) as other, other.pipeline() as pipe:
        pipe.set("a", "1").get("a")
        pipe.execute()
    again: {sync}.Redis = {sync}.Redis.from_url("redis://h", socket_timeout=1.0)
    again.close()
    pool = redis.ConnectionPool(host="h")
    {sync}.Redis(connection_pool=pool).ping()
    {sync}.Redis.from_pool(pool).ping()

class Mine({sync}.Redis):
    def __init__(self, name: str) -> None:
        super().__init__(host=name)

async def amain() -> None:
    async with {aio}.Redis(host="h", port=1) as client:
        await client.get("a")
    other: redis.asyncio.Redis = {aio}.Redis.from_url("redis://h")
    await other.aclose()

main()
asyncio.run(amain())
"""
_OURS = """
def tiles(client: fastkv.Redis) -> list[bool]:
    client.batch_tile_set(["a"], [b"x"], ex=1)
    return client.batch_tile_get(["a"], [bytearray(1)])

async def atiles(client: fastkv.asyncio.Redis) -> list[bool]:
    return await client.batch_tile_exists(["a"])
"""


def test_a_strictly_typed_program_stays_so_when_it_swaps_the_class(
    tmp_path: Path,
) -> None:
    pytest.importorskip("mypy")
    theirs, ours = tmp_path / "theirs.py", tmp_path / "ours.py"
    imports = "import redis\nimport redis.asyncio"
    theirs.write_text(
        _PROGRAM.format(imports=imports, sync="redis", aio="redis.asyncio")
    )
    ours.write_text(
        _PROGRAM.format(
            imports=imports + "\nimport fastkv\nimport fastkv.asyncio",
            sync="fastkv",
            aio="fastkv.asyncio",
        )
        + _OURS
    )

    def complaints(program: Path) -> set[str]:
        said = subprocess.run(
            [
                *(sys.executable, "-m", "mypy", "--strict", "--no-error-summary"),
                *("--config-file=", f"--cache-dir={tmp_path}", program.name),
            ],
            cwd=tmp_path,
            env={**os.environ, "MYPYPATH": str(Path(fastkv.__file__).parents[1])},
            capture_output=True,
            text=True,
        )
        assert said.stderr == ""
        lines = [
            line for line in said.stdout.splitlines() if line.startswith(program.name)
        ]
        return {line.split(":", 2)[2] for line in lines}

    # What redis-py has not typed, it has not typed.
    assert complaints(ours) - complaints(theirs) == set()
