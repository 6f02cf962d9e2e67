"""Redis Clusters of private servers, made without redis-cli; and Sentinels."""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import redis

from fastkv._core import key_slot
from fastkv.cli.private_server import PrivateServer, ServerBinary

# Shorter, and a busy machine makes elections that no test has asked for.
NODE_TIMEOUT_MS = 2000


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(true: Callable[[], bool], seconds: float = 50.0) -> None:
    """For what tells nobody that it happens: gossip, an election."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


class Member:
    """A server of a cluster. With ``tls``, from `tests.tls.server_arguments`, it and
    the others speak TLS to each other.
    """

    def __init__(
        self,
        binary: ServerBinary,
        *arguments: str,
        tls: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        self.bus_port = free_port()
        if tls:
            tls_port = free_port()
            arguments += ("--tls-port", str(tls_port), "--tls-cluster", "yes")
            arguments += ("--tls-replication", "yes", *tls)
        self.server = PrivateServer(
            binary,
            *("--cluster-enabled", "yes", "--cluster-port", str(self.bus_port)),
            *("--cluster-node-timeout", str(NODE_TIMEOUT_MS)),
            *(
                "--cluster-replica-validity-factor",
                "0",
                "--repl-diskless-sync-delay",
                "0",
                # With the first ping a replica has something, see `wait_for_replicas`.
                "--repl-ping-replica-period",
                "1",
            ),
            *arguments,
            **kwargs,
        )
        self.port = tls_port if tls else self.server.port
        self.server.start()
        self.admin = self.server.client()
        self.id: str = self.call("MYID").decode()

    def call(self, *args: Any) -> Any:
        """A subcommand of CLUSTER, its reply not parsed."""
        connection = self.admin.connection_pool.get_connection()
        try:
            connection.send_command("CLUSTER", *args)
            return connection.read_response()
        finally:
            self.admin.connection_pool.release(connection)

    def info(self) -> dict[bytes, bytes]:
        lines = self.call("INFO").split(b"\r\n")
        return dict(line.split(b":", 1) for line in lines if b":" in line)

    def epoch_of(self, member_id: str) -> bytes:
        """The configuration epoch that it knows of another."""
        lines = self.call("NODES").splitlines()
        known = next(line for line in lines if line.startswith(member_id.encode()))
        epoch: bytes = known.split()[6]
        return epoch

    def calls(self, command: str) -> int:
        """How often it has run a command."""
        stats: dict[str, Any] = self.admin.info("commandstats")
        calls: int = stats.get(f"cmdstat_{command}", {"calls": 0})["calls"]
        return calls

    def stop(self) -> None:
        self.admin.close()
        self.server.__exit__(None, None, None)


class ClusterServers:
    """Three primaries, each with so many replicas, all slots covered."""

    def __init__(
        self, binary: ServerBinary, *arguments: str, replicas: int = 0, **kwargs: Any
    ) -> None:
        self.members: list[Member] = []
        try:
            for _ in range(3 + 3 * replicas):
                self.members.append(Member(binary, *arguments, **kwargs))
            self._join()
        except BaseException:
            self.stop()
            raise

    def _join(self) -> None:
        first = self.members[0]
        for epoch, member in enumerate(self.members):
            member.call("SET-CONFIG-EPOCH", epoch + 1)
            if member is not first:
                first.call("MEET", "127.0.0.1", member.port, member.bus_port)
        for i, member in enumerate(self.primaries):
            member.call("ADDSLOTSRANGE", *self.slots_of(i))
        count = b"%d" % len(self.members)
        wait_until(
            lambda: all(m.info()[b"cluster_known_nodes"] == count for m in self.members)
        )
        for i, member in enumerate(self.members[3:]):
            member.call("REPLICATE", self.primaries[i % 3].id)
        self.wait_ok()

    @staticmethod
    def slots_of(primary: int) -> tuple[int, int]:
        return primary * 16384 // 3, (primary + 1) * 16384 // 3 - 1

    @property
    def primaries(self) -> list[Member]:
        """Those that were primaries in the beginning."""
        return self.members[:3]

    @property
    def port(self) -> int:
        return self.members[0].port

    def wait_ok(self) -> None:
        def ok(member: Member) -> bool:
            try:
                info = member.info()
            except redis.exceptions.BusyLoadingError:
                return False
            return (
                info[b"cluster_state"] == b"ok"
                and info[b"cluster_slots_assigned"] == b"16384"
                and info[b"cluster_slots_ok"] == b"16384"
            )

        def linked(member: Member) -> bool:
            # A replica that has just started calls itself master in INFO, with no keys.
            lines = member.call("NODES").splitlines()
            mine = next(line for line in lines if b"myself" in line)
            if b"master" in mine.split()[2]:
                return True
            info: dict[str, Any] = member.admin.info("replication")
            return info.get("master_link_status") == "up"

        wait_until(lambda: all(ok(m) and linked(m) for m in self.members))

    def wait_for_replicas(self) -> None:
        """Until all know that the replicas have something. (Before, CLUSTER SLOTS does
        not name them.)
        """
        wait_until(
            lambda: all(len(r) > 3 for m in self.members for r in m.call("SLOTS"))
        )

    def owner(self, key: str) -> Member:
        """Of the slots as they were in the beginning."""
        slot = key_slot(key.encode())
        return next(
            member
            for i, member in enumerate(self.primaries)
            if self.slots_of(i)[0] <= slot <= self.slots_of(i)[1]
        )

    def flush(self) -> None:
        for member in self.primaries:
            member.admin.flushall()

    def begin_move(self, slot: int, source: Member, target: Member) -> None:
        """From here on the source answers ASK for keys that it does not have."""
        target.call("SETSLOT", slot, "IMPORTING", source.id)
        source.call("SETSLOT", slot, "MIGRATING", target.id)

    def move_keys(self, slot: int, source: Member, target: Member, most: int) -> int:
        keys = source.call("GETKEYSINSLOT", slot, most)
        if keys:
            source.admin.execute_command(
                *("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
            )
        return len(keys)

    def end_move(self, slot: int, target: Member) -> None:
        """From here on the source answers MOVED."""
        target.call("SETSLOT", slot, "NODE", target.id)
        for member in self.primaries:
            if member is not target:
                member.call("SETSLOT", slot, "NODE", target.id)
        # Two moves that do not know of each other would be of one epoch, and the slot
        # go to whoever has the greater id.
        epoch = target.info()[b"cluster_my_epoch"]
        wait_until(lambda: all(m.epoch_of(target.id) == epoch for m in self.members))

    def move(self, slot: int, source: Member, target: Member) -> None:
        self.begin_move(slot, source, target)
        while self.move_keys(slot, source, target, 100):
            pass
        self.end_move(slot, target)

    def stop(self) -> None:
        for member in self.members:
            member.stop()

    def __enter__(self) -> ClusterServers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


class SentinelServer:
    """One of the watchers; wants a file of its own to write to."""

    def __init__(
        self, binary: ServerBinary, master_port: int, tls: Sequence[str] = ()
    ) -> None:
        self.port = free_port()
        self._tls = bool(tls)
        self._folder = tempfile.TemporaryDirectory(prefix="fastkv-")
        config = Path(self._folder.name) / "sentinel.conf"
        port = f"port {self.port}\n"
        if tls:
            port = f"port 0\ntls-port {self.port}\ntls-replication yes\n"
            for name, value in zip(tls[::2], tls[1::2], strict=True):
                port += f"{name.removeprefix('--')} {value}\n"
        config.write_text(
            f"{port}bind 127.0.0.1\ndir {self._folder.name}\n"
            f"logfile {self._folder.name}/log\n"
            f"sentinel monitor mymaster 127.0.0.1 {master_port} 2\n"
            "sentinel down-after-milliseconds mymaster 400\n"
            "sentinel failover-timeout mymaster 3000\n"
        )
        self._process = subprocess.Popen(
            [binary.path, str(config), "--sentinel"],
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def call(self, *args: str) -> Any:
        with redis.Redis(
            port=self.port,
            retry=None,
            protocol=2,
            decode_responses=True,
            ssl=self._tls,
            ssl_cert_reqs="none",
        ) as client:
            return client.execute_command("SENTINEL", *args)

    def knows_all(self) -> bool:
        try:
            said = self.call("MASTER", "mymaster")
        except redis.exceptions.ConnectionError:
            return False
        known = dict(zip(said[::2], said[1::2], strict=True))
        return (known["num-other-sentinels"], known["num-slaves"]) == ("2", "1")

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


class SentinelServers:
    """A master with a replica, and three sentinels that watch it as ``mymaster``. With
    ``tls``, from `tests.tls.server_arguments`, all of them speak TLS, and nothing else.
    """

    def __init__(self, binary: ServerBinary, tls: Sequence[str] = ()) -> None:
        self._servers: list[PrivateServer | SentinelServer] = []
        self._tls = tls
        self._ports: dict[PrivateServer, int] = {}
        try:
            self.master = self._start(binary)
            self.replica = self._start(binary)
            with self.replica.client() as client:
                client.replicaof("127.0.0.1", self.port_of(self.master))
            wait_until(lambda: self.replication(self.replica).get("role") == "slave")
            self.wait_for_link()
            self.sentinels = []
            for _ in range(3):
                self.sentinels.append(
                    SentinelServer(binary, self.port_of(self.master), tls)
                )
                self._servers.append(self.sentinels[-1])
            wait_until(lambda: all(s.knows_all() for s in self.sentinels))
        except BaseException:
            self.stop()
            raise

    def _start(self, binary: ServerBinary) -> PrivateServer:
        arguments = ["--repl-diskless-sync-delay", "0"]
        if self._tls:
            arguments += ["--tls-port", str(free_port()), "--port", "0"]
            arguments += ["--tls-replication", "yes", *self._tls]
        server = PrivateServer(binary, *arguments)
        self._servers.append(server)
        server.start()
        if self._tls:
            self._ports[server] = int(arguments[3])
        return server

    def port_of(self, server: PrivateServer) -> int:
        """Where it listens."""
        return self._ports.get(server, server.port)

    @staticmethod
    def replication(server: PrivateServer) -> dict[str, Any]:
        try:
            with server.client() as client:
                said: Any = client.info("replication")
                return dict(said)
        except redis.exceptions.ConnectionError:  # Sentinel kills clients, us too
            return {}

    def wait_for_link(self) -> None:
        """Until the replica has caught up."""
        wait_until(
            lambda: self.replication(self.replica).get("master_link_status") == "up"
        )

    @property
    def addresses(self) -> list[tuple[str, int]]:
        return [("127.0.0.1", sentinel.port) for sentinel in self.sentinels]

    def stop(self) -> None:
        for server in self._servers:
            if isinstance(server, SentinelServer):
                server.stop()
            else:
                server.__exit__(None, None, None)
