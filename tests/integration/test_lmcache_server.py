"""LMCache's MP mode as it is run: ``lmcache server`` and its own benchmarks, which
check the bytes, over `fastkv.lmcache.NativeClient`. Each with a client that fails them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastkv.cli.private_server import PrivateServer
from tests.conftest import SERVERS

pytest.importorskip("torch")
pytest.importorskip("lmcache")

LMCACHE = str(Path(sys.executable).parent / "lmcache")
# Leaves what a right client would have filled, and says that all of it was.
LIAR = """
from fastkv.lmcache import NativeClient

class Liar(NativeClient):
    def submit_batch_get(self, keys, memories):
        for memory in memories:
            memory.cast("B")[:] = bytes(memory.nbytes)
        return self.submit_batch_exists(keys)
"""


@pytest.fixture(params=[pytest.param(s, id=str(s)) for s in SERVERS[-1:]])
def server(request: pytest.FixtureRequest, running: Any) -> PrivateServer:
    """One server is enough: LMCache takes its time to start."""
    server: PrivateServer = running(request.param)
    with server.client() as client:
        client.flushall()
    return server


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "liar.py").write_text(LIAR)
    return {
        **os.environ,
        "LMCACHE_LOG_LEVEL": "WARNING",
        "LMCACHE_DISABLE_BANNER": "1",
        "LMCACHE_TRACK_USAGE": "false",
        "PYTHONPATH": str(tmp_path),
    }


def adapter(url: str, honest: bool, **params: Any) -> str:
    return json.dumps(
        {
            "type": "native_plugin",
            "module_path": "fastkv.lmcache" if honest else "liar",
            "class_name": "NativeClient" if honest else "Liar",
            "adapter_params": {"url": url, **params},
        }
    )


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class LMCacheServer:
    """``lmcache server`` with its L2 in ours."""

    def __init__(self, spec: str, environment: dict[str, str], log: Path) -> None:
        rpc, http, metrics = free_ports(3)
        self.rpc = f"tcp://127.0.0.1:{rpc}"
        self.http = f"http://127.0.0.1:{http}"
        self.log = log
        self._environment = environment
        arguments = [LMCACHE, "server", "--host", "127.0.0.1", "--port", str(rpc)]
        arguments += ["--http-host", "127.0.0.1", "--http-port", str(http)]
        arguments += ["--prometheus-port", str(metrics), "--chunk-size", "256"]
        arguments += ["--l1-size-gb", "0.25", "--no-l1-use-lazy"]
        arguments += ["--eviction-policy", "LRU", "--supported-transfer-mode", "auto"]
        # Nothing stays in L1, so that what comes back has been in L2.
        arguments += ["--l2-store-policy", "skip_l1", "--l2-adapter", spec]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                arguments, env=environment, stdout=out, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(self.http, timeout=5).close()
                return
            except urllib.error.HTTPError:
                return
            except OSError:
                assert self.process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)

    def bench(self, start: int, end: int) -> int:
        """Run LMCache's own benchmark: it stores prompts, loads them, and compares
        checksums. Returns how many were right.
        """
        arguments = [LMCACHE, "bench", "server", "--mode", "cpu"]
        arguments += ["--rpc-url", self.rpc, "--url", self.http]
        arguments += ["--num-tokens", "1024", "--interval", "0.05"]
        report = self.log.with_suffix(".json")
        arguments += ["--format", "json", "--output", str(report)]
        arguments += ["--kvcache-shape-spec", "(2,256,16,4,64):bfloat16:8"]
        arguments += ["--start", str(start), "--end", str(end)]
        ran = subprocess.run(
            arguments, env=self._environment, capture_output=True, text=True, timeout=90
        )
        assert ran.returncode == 0, ran.stderr
        right: int = json.loads(report.read_text())["metrics"]["results"]["checksum_ok"]
        return right

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def lmcache_server(environment: dict[str, str], tmp_path: Path) -> Iterator[Any]:
    started: list[LMCacheServer] = []

    def start(spec: str) -> LMCacheServer:
        started.append(LMCacheServer(spec, environment, tmp_path / "log"))
        return started[-1]

    yield start
    for one in started:
        one.stop()


# 2 x 8 layers x 256 tokens x 4 heads x 64 elements of bfloat16
CHUNK_BYTES = 2 * 8 * 256 * 4 * 64 * 2


def test_prompts_come_back_also_after_a_restart(
    own_server: PrivateServer, lmcache_server: Any
) -> None:
    one = lmcache_server(adapter(f"redis://127.0.0.1:{own_server.port}", True))
    with own_server.client() as plain:
        assert one.bench(0, 2) == 2
        assert plain.dbsize() == 2 * 4
        assert plain.strlen(plain.randomkey()) == CHUNK_BYTES
    own_server.stop()
    # What cannot be stored stays in LMCache's own memory; nothing hangs.
    assert one.bench(2, 3) == 1
    own_server.start()
    with own_server.client() as plain:
        assert one.bench(3, 4) == 1
        assert plain.dbsize() == 4
    assert "Traceback" not in one.log.read_text()


def test_with_checksums_and_a_password_that_is_in_no_log(
    own_server: PrivateServer, environment: dict[str, str], lmcache_server: Any
) -> None:
    environment["FASTKV_PASSWORD"] = "hush-hush"
    environment["LMCACHE_LOG_LEVEL"] = "DEBUG"
    with own_server.client() as plain:
        plain.config_set("requirepass", "hush-hush")
        one = lmcache_server(
            adapter(
                f"redis://127.0.0.1:{own_server.port}",
                True,
                checksum=True,
                password_env="FASTKV_PASSWORD",
            )
        )
        assert one.bench(0, 2) == 2
        assert plain.strlen(plain.randomkey()) == CHUNK_BYTES + 8
    said = one.log.read_text()
    assert "NativeClient" in said
    assert "hush-hush" not in said


def test_a_client_that_returns_wrong_bytes_fails_it(
    server: PrivateServer, lmcache_server: Any
) -> None:
    one = lmcache_server(adapter(f"redis://127.0.0.1:{server.port}", False))
    assert one.bench(0, 2) == 0


@pytest.mark.parametrize("honest", [True, False])
def test_the_benchmark_of_adapters_verifies_the_data(
    server: PrivateServer, environment: dict[str, str], honest: bool
) -> None:
    spec = adapter(f"redis://127.0.0.1:{server.port}", honest)
    arguments = [LMCACHE, "bench", "l2", "--l2-adapter", spec, "--no-skip-verify"]
    arguments += ["--data-size-kb", "1024", "--num-keys", "16", "--rounds", "2"]
    ran = subprocess.run(
        arguments, env=environment, capture_output=True, text=True, timeout=90
    )
    verified = re.findall(r"All (\d+) keys data verified OK", ran.stdout)
    assert ran.returncode == (0 if honest else 1), ran.stdout + ran.stderr
    assert verified == (["16"] if honest else [])
