"""Starts and ends what is measured: ``lmcache server`` and vLLM, each in a process of
its own, on free ports of this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

# A chunk of LMCache's, and what vLLM computes at a time: the last step of a prompt is
# then the same computation whether the chunks before it were computed or loaded. With
# other steps bfloat16 rounds otherwise, and an answer may have other tokens though all
# is right; vLLM's own prefix cache does that, too.
STEP_TOKENS = 256
# vLLM's own KV cache holds one long document. The next one drives it out, as many
# documents would on a machine of full size.
_BLOCK_TOKENS, _BLOCKS = 128, 80

_START_SECONDS = 180.0
_ROOT = Path(__file__).parents[2]  # of the `bench` that holds the liar
_ENVIRONMENT = {
    "LMCACHE_DISABLE_BANNER": "1",
    "LMCACHE_TRACK_USAGE": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; `_BLOCKS` need less
}


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@contextlib.contextmanager
def lmcache_server(redis_url: str, honest: bool, log: Path) -> Iterator[int]:
    """Run ``lmcache server`` with its L2 in Redis; yields the port for vLLM.

    Nothing stays in its memory once it is in L2, so what is loaded comes from there.

    Args:
        redis_url: Of the L2.
        honest: Through fastkv, or through a client that loads nothing.
        log: Where its output goes.
    """
    port, http, prometheus = free_ports(3)
    adapter = {
        "type": "native_plugin",
        "module_path": "fastkv.lmcache" if honest else "bench.vllm_cpu.liar",
        "class_name": "NativeClient" if honest else "Liar",
        "adapter_params": {"url": redis_url},
    }
    command = [str(Path(sys.executable).parent / "lmcache"), "server"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--http-host", "127.0.0.1", "--http-port", str(http)]
    command += ["--prometheus-port", str(prometheus)]
    command += ["--chunk-size", str(STEP_TOKENS), "--l1-size-gb", "0.5"]
    command += ["--no-l1-use-lazy", "--eviction-policy", "LRU"]
    # vLLM copies between its KV cache and memory that it shares with this server.
    command += ["--supported-transfer-mode", "engine_driven"]
    command += ["--shm-name", f"fastkv-bench-{os.getpid()}"]
    command += ["--l2-store-policy", "skip_l1", "--l2-adapter", json.dumps(adapter)]
    with _process(command, f"http://127.0.0.1:{http}", log):
        yield port


@contextlib.contextmanager
def vllm_server(
    model: Path, max_tokens: int, lmcache_port: int | None, log: Path
) -> Iterator[str]:
    """Run vLLM on the CPU; yields its URL.

    Args:
        model: Folder of the checkpoint.
        max_tokens: Of a prompt and its answer.
        lmcache_port: `None`: without LMCache.
        log: Where its output goes.
    """
    (port,) = free_ports(1)
    # Not `vllm serve`, which looks for a distribution named vllm, and finds vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--model", str(model)]
    command += ["--dtype", "bfloat16", "--max-model-len", str(max_tokens)]
    command += ["--max-num-seqs", "4", "--max-num-batched-tokens", str(STEP_TOKENS)]
    command += ["--block-size", str(_BLOCK_TOKENS)]
    command += ["--num-gpu-blocks-override", str(_BLOCKS), "--enforce-eager"]
    # What a step computes then depends on nothing that is still under way.
    command += ["--no-async-scheduling"]
    if lmcache_port is not None:
        transfer = {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "lmcache.mp.host": "tcp://127.0.0.1",
                "lmcache.mp.port": lmcache_port,
            },
        }
        command += ["--kv-transfer-config", json.dumps(transfer)]
    url = f"http://127.0.0.1:{port}"
    with _process(command, f"{url}/health", log):
        yield url


@contextlib.contextmanager
def _process(command: Sequence[str], probe: str, log: Path) -> Iterator[None]:
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            env={
                **os.environ,
                **_ENVIRONMENT,
                "VLLM_CPU_OMP_THREADS_BIND": _vllm_cores(),
                "PYTHONPATH": str(_ROOT),
            },
            stdout=out,
            stderr=subprocess.STDOUT,
            # vLLM's processes are a group, which can be ended as one.
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not _answers(probe):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[:3]} did not start, see {log}")
            time.sleep(0.2)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _vllm_cores() -> str:
    """All but one, which is left to Redis and LMCache. By itself vLLM keeps away from
    more cores with a connector than without, and other threads round otherwise.
    """
    cores = sorted(os.sched_getaffinity(0))
    return ",".join(map(str, cores[:-1] or cores))


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
