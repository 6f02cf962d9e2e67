"""TLS means what it means in redis-py, and carries what TCP carries."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import select
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import redis
import redis.asyncio
from redis.backoff import ConstantBackoff, NoBackoff
from redis.exceptions import ConnectionError, RedisError, TimeoutError
from redis.retry import Retry

import fastkv
import fastkv.asyncio
from fastkv import tls as fastkv_tls
from fastkv.cli.private_server import PrivateServer, ServerBinary
from fastkv.lmcache import NativeClient
from tests.conftest import eventually, fastkv_threads
from tests.scripted import SilentPeer
from tests.tls import (
    PASSWORD,
    Authority,
    HelloServer,
    Identity,
    TlsServer,
)

ONCE = Retry(NoBackoff(), 0)


@dataclass
class Identities:
    """Of everybody in these tests."""

    ca: Identity
    stranger: Identity
    server: Identity
    elsewhere: Identity
    expired: Identity
    self_signed: Identity
    client: Identity
    common_name: Identity
    ca_folder: str
    ca_with_revocations: str


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Identities:
    folder = tmp_path_factory.mktemp("certificates")
    authority = Authority(folder, "authority")
    ca = authority.identity
    stranger = Authority(folder, "stranger").identity
    assert ca is not None
    assert stranger is not None
    both = folder / "with-revocations"
    both.write_text(ca.pem + authority.revocations())
    here = ("localhost", "127.0.0.1")
    return Identities(
        ca,
        stranger,
        authority.issue("server", here),
        authority.issue("elsewhere", ("elsewhere.example", "10.1.2.3")),
        authority.issue("expired", here, expired=True),
        authority.issue("self-signed", here, self_signed=True),
        authority.issue("client"),
        authority.issue("localhost"),
        authority.hashed_folder(folder / "hashed"),
        str(both),
    )


@pytest.fixture(scope="module")
def tls_running(tls_binary: ServerBinary, ids: Identities) -> Iterator[TlsServer]:
    with TlsServer(tls_binary, ids.server, ids.ca) as server:
        yield server


@pytest.fixture
def server(tls_running: TlsServer, ids: Identities) -> TlsServer:
    """One server for all, empty, that shows the right certificate."""
    tls_running.show(ids.server)
    with tls_running.client() as admin:
        admin.flushall()
    return tls_running


@pytest.fixture
def own_server(tls_binary: ServerBinary, ids: Identities) -> Iterator[TlsServer]:
    with TlsServer(tls_binary, ids.server, ids.ca) as server:
        yield server


@pytest.fixture
def secure(server: TlsServer, ids: Identities) -> dict[str, Any]:
    """Arguments of a client that trusts the server, and only this one."""
    return {"port": server.tls_port, "ssl": True, "ssl_ca_certs": ids.ca.cert_file}


# --- data ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 5000, 2 << 20])
def test_a_reply_that_ends_with_a_turn_of_the_worker_does_not_wait_for_more(
    server: TlsServer, make: Any, secure: dict[str, Any], size: int
) -> None:
    # What is left of it may lie in OpenSSL's memory, with nothing in the socket.
    client = make(**secure, tile_range_bytes=0)
    stored = [os.urandom(size) for _ in range(4)]
    keys = list("abcd")
    assert all(client.batch_tile_set(keys, stored))
    for turn in range(60):
        keys, stored = [*keys[1:], keys[0]], [*stored[1:], stored[0]]
        count = 1 + 3 * (turn % 2)
        got = [bytearray(size) for _ in range(count)]
        assert all(client.batch_tile_get(keys[:count], got, timeout=3.0))
        assert got == stored[:count]


def test_lmcaches_chunks_go_over_tls(server: TlsServer, ids: Identities) -> None:
    url = f"fastkvs://127.0.0.1:{server.tls_port}/1"
    value, got = os.urandom(1 << 20), bytearray(1 << 20)
    for trusted, answered in ((ids.ca, True), (ids.stranger, False)):
        lmcache = NativeClient(f"{url}?ssl_ca_certs={trusted.cert_file}")
        try:
            for submit, memory in (
                (lmcache.submit_batch_set, value),
                (lmcache.submit_batch_get, got),
            ):
                future_id = submit(["a"], [memory])
                assert select.select([lmcache.event_fd()], [], [], 20)[0]
                ((done, ok, error, bools),) = lmcache.drain_completions()
                assert (done, ok, bools) == (future_id, answered, [answered])
                assert ("certificate verify failed" in error) is not answered
        finally:
            lmcache.close()
    assert got == value


@pytest.mark.parametrize("size", [0, 1, 5, 4096, 16384, 100_000, 1 << 20, 32 << 20])
@pytest.mark.parametrize("immutable", [False, True])
def test_values_come_and_go_byte_for_byte(
    make: Any, server: TlsServer, secure: Any, size: int, immutable: bool
) -> None:
    client = make(**secure)
    keys = [f"k{i}" for i in range(4 if size > 1 << 20 else 40)]
    values = [os.urandom(size) for _ in keys]
    assert client.batch_tile_set(keys, values) == [True] * len(keys)
    with server.client() as plain:
        assert [plain.get(key) for key in keys] == values
    got = [bytearray(size) for _ in keys]
    found = client.batch_tile_get(
        [*keys, "no"], [*got, bytearray(size)], immutable=immutable
    )
    assert found == [True] * len(keys) + [False]
    assert got == values
    assert client.batch_tile_exists([*keys, "no"]) == [True] * len(keys) + [False]
    assert client.batch_tile_delete([*keys, "no"]) == [True] * len(keys) + [False]
    assert client.batch_tile_exists(keys) == [False] * len(keys)


def test_whole_values_are_read_and_many_small_ones(make: Any, secure: Any) -> None:
    client = make(**secure, tile_range_bytes=0)
    value = os.urandom(20 << 20)
    got = bytearray(len(value))
    assert client.batch_tile_set(["big"], [value]) == [True]
    assert client.batch_tile_get(["big"], [got]) == [True]
    assert got == value
    keys = [f"k{i}" for i in range(20_000)]
    small = [os.urandom(10) for _ in keys]
    assert all(client.batch_tile_set(keys, small))
    rooms = [bytearray(10) for _ in keys]
    assert all(client.batch_tile_get(keys, rooms))
    assert rooms == small


def test_wrong_lengths_and_errors_keep_the_connections(
    make: Any, server: TlsServer, secure: Any
) -> None:
    client = make(**secure, tile_connections=1)
    with server.client() as plain:
        plain.lpush("list", "x")
        client.batch_tile_set(["a", "b"], [b"12345", os.urandom(1 << 20)])
        before = {c["id"] for c in plain.client_list() if c["resp"] == "2"}
        for _ in range(5):
            rooms = [bytearray(4), bytearray(100), bytearray(1)]
            with pytest.raises(fastkv.TileError) as caught:
                client.batch_tile_get(["a", "b", "list"], rooms)
            assert set(caught.value.errors) == {0, 1, 2}
        client.batch_tile_exists(["a"])
        after = {c["id"] for c in plain.client_list() if c["resp"] == "2"}
        assert before <= after


def test_settings_reach_the_native_connections(
    make: Any, server: TlsServer, secure: Any
) -> None:
    with server.client() as plain:
        plain.execute_command("ACL SETUSER bob on >pw ~* &* +@all")
        client = make(
            **secure,
            db=3,
            username="bob",
            password="pw",
            client_name="me",
            tile_connections=2,
        )
        client.batch_tile_set(["a"] * 50, [b"x"] * 50)
        found = [c for c in plain.client_list() if c["resp"] == "2" and c["name"]]
        assert found
        for one in found:
            assert (one["name"], one["db"], one["user"]) == ("me", "3", "bob")
        wrong = make(**secure, username="bob", password="no", retry=ONCE)
        with pytest.raises(redis.AuthenticationError):
            wrong.batch_tile_exists(["a"])
        plain.execute_command("ACL DELUSER bob")


@pytest.mark.parametrize("how", ["url", "pool", "single"])
def test_every_way_to_make_a_client_works(
    make: Any, server: TlsServer, secure: Any, ids: Identities, how: str
) -> None:
    if how == "url":
        url = (
            f"rediss://127.0.0.1:{server.tls_port}/1?ssl_ca_certs={ids.ca.cert_file}"
            "&tile_connections=2"
        )
        client = fastkv.Redis.from_url(url)
    elif how == "pool":

        class Mine(redis.SSLConnection):
            pass

        pool = redis.BlockingConnectionPool(
            connection_class=Mine,
            port=server.tls_port,
            ssl_ca_data=ids.ca.pem,
        )
        client = fastkv.Redis.from_pool(pool)
    else:
        client = make(**secure, single_connection_client=True)
    with client:
        assert client.batch_tile_set(["a"], [b"x"]) == [True]
        assert client.get("a") == b"x"


def test_on_an_event_loop(server: TlsServer, secure: Any, ids: Identities) -> None:
    values = [os.urandom(1 << 20) for _ in range(8)]
    keys = [f"k{i}" for i in range(8)]

    async def use(client: fastkv.asyncio.Redis) -> None:
        async with client:
            assert all(await client.batch_tile_set(keys, values))
            got = [bytearray(1 << 20) for _ in keys]
            assert all(await client.batch_tile_get(keys, got))
            assert got == values
            assert await client.get("k0") == values[0]

    async def main() -> None:
        await use(fastkv.asyncio.Redis(**secure))
        await use(
            fastkv.asyncio.Redis.from_url(
                f"rediss://localhost:{server.tls_port}?ssl_ca_certs={ids.ca.cert_file}"
            )
        )
        server.show(ids.elsewhere)
        errors = []
        for module in (redis.asyncio, fastkv.asyncio):
            arguments = {**secure, "retry": redis.asyncio.retry.Retry(NoBackoff(), 0)}
            async with module.Redis(**arguments) as client:
                with pytest.raises(ConnectionError) as caught:
                    if module is redis.asyncio:
                        await client.ping()
                    else:
                        await client.batch_tile_exists(["a"])
                errors.append(type(caught.value))
        assert errors[0] is errors[1]

    asyncio.run(main())


# --- what is trusted -----------------------------------------------------------------

Arguments = dict[str, Any]


def answers(
    make: Any, port: int, arguments: Arguments
) -> tuple[RedisError | None, RedisError | None]:
    """What redis-py raises, and what we do."""

    def error_of(call: Callable[[], object]) -> RedisError | None:
        try:
            call()
        except RedisError as error:
            return error
        return None

    arguments = {"port": port, "ssl": True, "retry": ONCE, **arguments}
    with redis.Redis(**arguments) as theirs:
        first = error_of(theirs.ping)
    ours = make(**arguments)
    return first, error_of(lambda: ours.batch_tile_exists(["a"]))


@dataclass(frozen=True)
class Case:
    """A server, a client, and what becomes of it.

    Attributes:
        shown: The server's identity.
        arguments: Of the client.
        refused: What the exception says; empty: there is none; None: as redis-py.
        settings: Of the server.
    """

    shown: str
    arguments: Callable[[Identities], Arguments]
    refused: str | None = ""
    settings: tuple[tuple[str, str], ...] = ()


def trusting(identity: str, **more: Any) -> Callable[[Identities], Arguments]:
    return lambda i: {"ssl_ca_certs": getattr(i, identity).cert_file, **more}


def showing(key: str, **more: Any) -> Callable[[Identities], Arguments]:
    return lambda i: {
        "ssl_ca_certs": i.ca.cert_file,
        "ssl_certfile": i.client.cert_file,
        "ssl_keyfile": getattr(i.client, key),
        **more,
    }


UNKNOWN = "self-signed certificate in certificate chain"
OLD = (("tls_protocols", "TLSv1.2"),)
ASKS = (("tls_auth_clients", "yes"),)
FLAGS = ssl.VerifyFlags
CASES = {
    "trusted": Case("server", trusting("ca")),
    "an address": Case("server", trusting("ca", host="127.0.0.1")),
    "only the system is trusted": Case("server", lambda i: {}, UNKNOWN),
    "a stranger is trusted": Case("server", trusting("stranger"), UNKNOWN),
    "another name": Case(
        "elsewhere",
        trusting("ca"),
        "Hostname mismatch, certificate is not valid for 'localhost'",
    ),
    "another address": Case(
        "elsewhere",
        trusting("ca", host="127.0.0.1"),
        "IP address mismatch, certificate is not valid for '127.0.0.1'",
    ),
    "another name is fine": Case("elsewhere", trusting("ca", ssl_check_hostname=False)),
    "a common name alone": Case("common_name", trusting("ca")),
    "expired": Case("expired", trusting("ca"), "certificate has expired"),
    "self-signed": Case("self_signed", trusting("ca"), "self-signed certificate"),
    "self-signed and known": Case("self_signed", trusting("self_signed")),
    "anybody": Case("self_signed", lambda i: {"ssl_cert_reqs": "none"}),
    "anybody, as a number": Case(
        "expired", lambda i: {"ssl_cert_reqs": ssl.CERT_NONE, "host": "127.0.0.1"}
    ),
    "optional": Case(
        "self_signed",
        lambda i: {"ssl_cert_reqs": "optional"},
        "self-signed certificate",
    ),
    "data": Case("server", lambda i: {"ssl_ca_data": i.stranger.pem + i.ca.pem}),
    "data in DER": Case("server", lambda i: {"ssl_ca_data": i.stranger.der + i.ca.der}),
    "data of a stranger": Case(
        "server", lambda i: {"ssl_ca_data": i.stranger.pem}, UNKNOWN
    ),
    "data that is none": Case(
        "server", lambda i: {"ssl_ca_data": "x"}, "no start line"
    ),
    "no such file": Case(
        "server", lambda i: {"ssl_ca_certs": "/no/such/file"}, "No such file"
    ),
    # Python has changed its mind with 3.13.
    "a leaf for an authority": Case("server", trusting("server"), None),
    "a leaf, by a partial chain": Case(
        "server",
        trusting("server", ssl_include_verify_flags=[FLAGS.VERIFY_X509_PARTIAL_CHAIN]),
    ),
    "a leaf, without one": Case(
        "server",
        trusting("server", ssl_exclude_verify_flags=[FLAGS.VERIFY_X509_PARTIAL_CHAIN]),
        UNKNOWN,
    ),
    "strictly": Case(
        "server",
        trusting("ca", ssl_include_verify_flags=[FLAGS.VERIFY_X509_STRICT]),
        None,
    ),
    "revocations are unknown": Case(
        "server",
        trusting("ca", ssl_include_verify_flags=[FLAGS.VERIFY_CRL_CHECK_LEAF]),
        "unable to get certificate CRL",
    ),
    "revocations are known": Case(
        "server",
        lambda i: {
            "ssl_ca_certs": i.ca_with_revocations,
            "ssl_include_verify_flags": [FLAGS.VERIFY_CRL_CHECK_LEAF],
        },
    ),
    "a folder": Case("server", lambda i: {"ssl_ca_path": i.ca_folder}),
    "a folder without": Case(
        "self_signed", lambda i: {"ssl_ca_path": i.ca_folder}, "self-signed certificate"
    ),
    "ciphers": Case(
        "server",
        trusting("ca", ssl_ciphers="ECDHE-ECDSA-CHACHA20-POLY1305"),
        settings=OLD,
    ),
    "ciphers that the server has not": Case(
        "server", trusting("ca", ssl_ciphers="aRSA"), "handshake failure", OLD
    ),
    "ciphers that there are not": Case(
        "server", trusting("ca", ssl_ciphers="NOPE"), "No cipher can be selected"
    ),
    "an old server": Case("server", trusting("ca"), settings=OLD),
    "too old a server": Case(
        "server",
        trusting("ca", ssl_min_version=ssl.TLSVersion.TLSv1_3),
        "protocol version",
        OLD,
    ),
    "a client's certificate": Case("server", showing("key_file"), settings=ASKS),
    "a client's encrypted key": Case(
        "server", showing("encrypted_key_file", ssl_password=PASSWORD), settings=ASKS
    ),
    "a client's key by a wrong password": Case(
        "server",
        showing("encrypted_key_file", ssl_password="another secret"),
        None,
        ASKS,
    ),
    "a client without a certificate": Case("server", trusting("ca"), None, ASKS),
    "an old client without one": Case("server", trusting("ca"), None, ASKS + OLD),
}


@pytest.mark.parametrize("name", CASES)
def test_what_redis_py_trusts_is_trusted_and_nothing_else(
    make: Any, server: TlsServer, ids: Identities, name: str
) -> None:
    case = CASES[name]
    server.show(getattr(ids, case.shown), **dict(case.settings))
    arguments = case.arguments(ids)
    theirs, ours = answers(make, server.tls_port, arguments)
    assert type(ours) is type(theirs)
    if case.refused is not None:
        assert (ours is None) == (case.refused == "")
        # Where OpenSSL says why, Python adds its own source's line.
        assert case.refused in str(ours)
        assert case.refused in str(theirs)
    for secret in (PASSWORD, "another secret"):
        assert secret not in repr((theirs, ours))
    if ours is not None and "CERTIFICATE_VERIFY_FAILED" in str(theirs):
        assert "[SSL: CERTIFICATE_VERIFY_FAILED]" in str(ours)


def test_a_wrong_name_that_is_no_name_is_the_same_error(make: Any) -> None:
    for host in ("", ".dot", "x" * 70):
        arguments = {"host": host, "ssl": True, "retry": ONCE, "port": 1}
        raised = []
        for client in (redis.Redis(**arguments), make(**arguments)):
            with pytest.raises(Exception) as caught:
                if isinstance(client, fastkv.Redis):
                    client.batch_tile_exists(["a"])
                else:
                    client.ping()
            raised.append((type(caught.value), str(caught.value)))
            client.close()
        assert raised[0] == raised[1]


def test_the_systems_authorities_are_pythons(
    make: Any, server: TlsServer, ids: Identities, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", ids.ca.cert_file)
    assert answers(make, server.tls_port, {}) == (None, None)
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such/file")
    monkeypatch.setenv("SSL_CERT_DIR", f"/no/such:{ids.ca_folder}")
    assert answers(make, server.tls_port, {}) == (None, None)
    monkeypatch.setenv("SSL_CERT_DIR", "/no/such")
    for error in answers(make, server.tls_port, {}):
        assert UNKNOWN in str(error)


def test_a_key_that_needs_a_password_and_gets_none_is_an_error(
    make: Any, server: TlsServer, ids: Identities
) -> None:
    server.show(ids.server, tls_auth_clients="yes")
    client = make(
        host="localhost",
        port=server.tls_port,
        ssl=True,
        **showing("encrypted_key_file")(ids),
    )
    with pytest.raises(ValueError, match="expected ssl_password, got none"):
        client.batch_tile_exists(["k"])


def test_a_password_may_be_asked_for(
    make: Any, server: TlsServer, ids: Identities
) -> None:
    server.show(ids.server, tls_auth_clients="yes")
    for password in (PASSWORD.encode(), bytearray(PASSWORD, "ascii"), lambda: PASSWORD):
        arguments = showing("encrypted_key_file", ssl_password=password)(ids)
        assert answers(make, server.tls_port, arguments) == (None, None)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"host": "127.0.0.1"},
        {"ssl_ciphers": "ECDHE+AESGCM:!aRSA"},
        {"ssl_ciphers": "ALL:@SECLEVEL=0"},
        {"ssl_min_version": ssl.TLSVersion.TLSv1_3},
    ],
)
def test_the_server_is_greeted_as_redis_py_does(
    make: Any, ids: Identities, arguments: Arguments
) -> None:
    with HelloServer(ids.server) as server:
        arguments = {"ssl_ca_certs": ids.ca.cert_file, **arguments}
        for error in answers(make, server.port, arguments):
            assert type(error) is ConnectionError  # it hangs up
        theirs, ours = server.hellos
        assert ours == theirs
        name = arguments.get("host", "localhost")
        assert ours.server_name == (None if name == "127.0.0.1" else name)


# --- what is refused by name ---------------------------------------------------------


@pytest.mark.parametrize(
    "argument",
    [
        {"ssl_validate_ocsp": True},
        {"ssl_validate_ocsp_stapled": True},
        {"ssl_ocsp_context": object()},
        {"ssl_ocsp_expected_cert": "x"},
    ],
)
def test_certificate_status_is_refused_by_name(make: Any, argument: Any) -> None:
    client = make(ssl=True, **argument)
    with pytest.raises(fastkv.UnsupportedConnection, match=next(iter(argument))):
        client.batch_tile_exists(["a"])


def test_sockets_that_are_wrapped_in_another_way_are_refused_by_name(make: Any) -> None:
    class Pinned(redis.SSLConnection):
        def _wrap_socket_with_ssl(self, sock: Any) -> Any:
            return super()._wrap_socket_with_ssl(sock)

    client = make(connection_pool=redis.ConnectionPool(connection_class=Pinned))
    with pytest.raises(fastkv.UnsupportedConnection, match="Pinned wraps its sockets"):
        client.batch_tile_exists(["a"])


def test_another_kind_of_context_is_refused_by_name(
    make: Any, secure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Context(ssl.SSLContext):
        pass

    monkeypatch.setattr(
        ssl, "create_default_context", lambda **_: Context(ssl.PROTOCOL_TLS_CLIENT)
    )
    with pytest.raises(fastkv.UnsupportedConnection, match=r"test_tls\.Context"):
        make(**secure).batch_tile_exists(["a"])


def test_a_build_without_tls_says_so(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastkv_tls, "has_tls", lambda: False)
    with pytest.raises(fastkv.UnsupportedConnection, match=r"this build .* has none"):
        make(ssl=True).batch_tile_exists(["a"])


# --- faults --------------------------------------------------------------------------

KEYS = [f"k{i}" for i in range(64)]
VALUES = [os.urandom(200_000) for _ in KEYS]


def test_killing_connections_under_load_changes_no_answer(
    own_server: TlsServer, make: Any, ids: Identities
) -> None:
    client = make(
        port=own_server.tls_port,
        ssl=True,
        ssl_ca_certs=ids.ca.cert_file,
        retry=Retry(NoBackoff(), 50),
    )
    client.batch_tile_set(KEYS, VALUES)
    stop = threading.Event()

    def kill() -> None:
        served = 0
        with own_server.client() as admin:
            while not stop.wait(0.05):
                now = admin.info("stats")["total_net_output_bytes"]
                if now - served < 1 << 20:
                    continue  # they have not been of use yet
                admin.client_kill_filter(_type="normal", skipme=True)
                served = now

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        for _ in range(10):
            got = [bytearray(200_000) for _ in KEYS]
            found = client.batch_tile_get([*KEYS, "no"], [*got, bytearray(1)])
            assert found == [True] * 64 + [False]
            assert got == VALUES
            assert all(client.batch_tile_set(KEYS[:8], VALUES[:8]))
    finally:
        stop.set()
        killer.join()


def test_a_stale_idle_connection_is_replaced_even_without_retries(
    server: TlsServer, ids: Identities
) -> None:
    url = f"rediss://localhost:{server.tls_port}?ssl_ca_certs={ids.ca.cert_file}"
    with fastkv.Redis.from_url(url) as client, server.client() as admin:
        for _ in range(5):
            client.batch_tile_set(["a"], [b"x"])
            client.batch_tile_exists(["a"])
            admin.client_kill_filter(_type="normal", skipme=True)
            assert client.batch_tile_exists(["a"]) == [True]
            assert client.batch_tile_get(["a"], [bytearray(1)]) == [True]


def test_a_restarted_server_is_found_again(
    own_server: TlsServer, make: Any, ids: Identities
) -> None:
    client = make(
        port=own_server.tls_port,
        ssl=True,
        ssl_ca_certs=ids.ca.cert_file,
        retry=Retry(ConstantBackoff(0.02), 100),
    )
    for _ in range(2):
        assert all(client.batch_tile_set(KEYS, VALUES))
        own_server.stop()
        restart = threading.Timer(0.2, own_server.start)
        restart.start()
        assert client.batch_tile_exists(KEYS) == [False] * 64
        restart.join()


class MutePeer(SilentPeer):
    """Reads and says nothing, not even TLS's own."""

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                while connection.recv(1000):
                    self.asked.set()
            except OSError:
                pass


def test_a_server_that_never_greets_times_out_and_close_does_not_wait(
    make: Any,
) -> None:
    with MutePeer() as peer:
        client = make(port=peer.port, ssl=True, socket_timeout=0.2, retry=ONCE)
        with pytest.raises(TimeoutError, match="Timeout connecting to server"):
            client.batch_tile_exists(["a"])
        client.close()
        peer.asked.clear()
        client = make(port=peer.port, ssl=True, socket_timeout=None, retry=ONCE)
        future = client.submit_batch_tile_exists(["a"])
        assert peer.asked.wait(10)  # in the middle of the handshake
        begin = time.monotonic()
        client.close()
        assert time.monotonic() - begin < 0.3
        assert fastkv_threads() == []
        with pytest.raises(ConnectionError):
            future.result(1)


def test_a_server_that_speaks_no_tls_is_the_same_error(
    make: Any, tls_binary: ServerBinary
) -> None:
    with PrivateServer(tls_binary) as server:
        # It waits for the end of a line.
        theirs, ours = answers(make, server.port, {"socket_timeout": 0.3})
        assert type(ours) is type(theirs) is TimeoutError


def test_a_stopped_server_is_a_time_out(
    own_server: TlsServer, make: Any, ids: Identities
) -> None:
    client = make(
        port=own_server.tls_port,
        ssl=True,
        ssl_ca_certs=ids.ca.cert_file,
        socket_timeout=0.3,
        retry=ONCE,
    )
    client.batch_tile_set(["a"], [b"x"])
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(TimeoutError):
            client.batch_tile_get(["a"], [bytearray(1)])
        with pytest.raises(TimeoutError):
            client.batch_tile_set(KEYS, VALUES)
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    assert client.batch_tile_get(["a"], [bytearray(1)]) == [True]


def test_an_idle_connection_is_checked(
    own_server: TlsServer, make: Any, ids: Identities
) -> None:
    client = make(
        port=own_server.tls_port,
        ssl=True,
        ssl_ca_certs=ids.ca.cert_file,
        health_check_interval=1,
        tile_connections=1,
    )
    client.batch_tile_set(["a"], [b"x"])
    with own_server.client() as admin:
        pings = admin.info("commandstats")["cmdstat_ping"]["calls"]
        time.sleep(1.1)  # idle is the point
        assert client.batch_tile_get(["a"], [bytearray(1)]) == [True]
        assert admin.info("commandstats")["cmdstat_ping"]["calls"] == pings + 1


def test_a_forked_child_leaves_the_parents_connections_alone(
    make: Any, server: TlsServer, secure: Any
) -> None:
    client = make(**secure, tile_connections=1, client_name="ours")
    client.batch_tile_set(["a"], [b"x"])
    client.batch_tile_exists(["a"])

    def child() -> None:
        assert client.batch_tile_exists(["a"]) == [True]
        client.close()

    with server.client() as admin:

        def native() -> set[str]:
            return {c["id"] for c in admin.client_list() if c["name"] == "ours"}

        before = native()
        assert len(before) == 2
        context = multiprocessing.get_context("fork")
        for _ in range(3):
            process = context.Process(target=child)
            process.start()
            process.join(20)
            assert process.exitcode == 0
            assert client.batch_tile_get(["a"], [bytearray(1)]) == [True]
            assert client.batch_tile_exists(["a"]) == [True]
        assert eventually(lambda: native() == before)
