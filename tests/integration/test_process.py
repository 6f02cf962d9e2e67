"""Fork, exit and interrupts, in processes of their own."""

from __future__ import annotations

import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ConnectionError

import fastkv
from tests.conftest import Endpoint, open_fds
from tests.scripted import SilentPeer


@pytest.fixture(scope="module", autouse=True)
def warm_resource_tracker() -> None:
    """It keeps a pipe for ever from its first use on."""
    multiprocessing.resource_tracker.ensure_running()


def run(code: str, *args: object, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "dev", "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=30,
        **kwargs,
    )


def in_child(work: Any) -> None:
    """Run in a forked child; fails here if it fails or hangs there."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(20)  # its default action ends a child that hangs
            work()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_forked_child_gets_an_engine_of_its_own(
    client: fastkv.Redis, plain: Any
) -> None:
    value = os.urandom(3_000_000)
    client.batch_tile_set(["a"], [value])
    future = client.submit_batch_tile_exists(["a"])
    assert future.result(5) == [True]
    sockets = {target for target in open_fds().values() if target.startswith("socket")}

    def work() -> None:
        # No socket of the parent's native connections is held here.
        native = sockets & set(open_fds().values())
        assert len(native) < len(sockets)
        got = bytearray(len(value))
        assert client.batch_tile_get(["a"], [got]) == [True]
        assert got == value
        assert client.submit_batch_tile_exists(["a", "b"]).result(10) == [True, False]
        client.close()

    for _ in range(3):
        in_child(work)
        got = bytearray(len(value))
        assert client.batch_tile_get(["a"], [got]) == [True]
        assert got == value


def test_a_fork_in_the_middle_of_everything_disturbs_nobody(
    client: fastkv.Redis,
) -> None:
    keys = [f"k{i}" for i in range(20)]
    values = [os.urandom(100_000) for _ in keys]
    client.batch_tile_set(keys, values)
    stop = threading.Event()
    failed: list[BaseException] = []

    def load() -> None:
        try:
            while not stop.is_set():
                got = [bytearray(100_000) for _ in keys]
                assert all(client.batch_tile_get(keys, got))
                assert got == values
                assert all(client.submit_batch_tile_exists(keys).result(10))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()

    def work() -> None:
        assert client.batch_tile_exists(keys) == [True] * 20

    try:
        for _ in range(10):
            in_child(work)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed


def test_a_future_from_before_a_fork_fails_in_the_child(make: Any) -> None:
    with SilentPeer() as silent:
        client = make(port=silent.port)
        memory = bytearray(3)
        future = client.submit_batch_tile_get(["a"], [memory])
        assert silent.asked.wait(5)

        def work() -> None:
            with pytest.raises(ConnectionError, match="before a fork"):
                future.result(5)
            memory.append(1)  # no thread here could write it

        in_child(work)
        with pytest.raises(BufferError):
            memory.append(1)


def test_a_fork_while_futures_are_resolved_leaves_none_pending(
    client: fastkv.Redis,
) -> None:
    lock = threading.Lock()
    inside, go_on = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        inside.set()
        go_on.wait(10)

    def take(_: object) -> None:
        with lock:  # held at the fork, by a thread that the child does not have
            pass

    first = client.submit_batch_tile_exists(["a"])
    first.add_done_callback(hold)
    later = [client.submit_batch_tile_exists(["a"]) for _ in range(20)]
    for future in later:
        future.add_done_callback(take)
    assert inside.wait(5)

    def work() -> None:
        for future in later:
            error = future.exception(5)  # unless it was resolved before
            assert error is None or "before a fork" in str(error)

    with lock:
        in_child(work)
    go_on.set()
    assert [future.result(5) for future in later] == [[False]] * 20


def _in_worker(arguments: tuple[dict[str, Any], str]) -> list[bool]:
    kwargs, key = arguments
    return fastkv.Redis(**kwargs).batch_tile_exists([key, "no"])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing_pools_work(
    client: fastkv.Redis, endpoint: Endpoint, method: str
) -> None:
    client.batch_tile_set(["a"], [b"x"])
    with multiprocessing.get_context(method).Pool(2) as pool:
        found = pool.map(_in_worker, [(endpoint.kwargs, "a")] * 4)
    assert found == [[True, False]] * 4


@pytest.mark.parametrize(
    "ending",
    [
        "",
        "sys.exit(0)",
        "del client",
        "client.submit_batch_tile_get(['a'], [bytearray(1_000_000)])",
        "[client.submit_batch_tile_exists(['a'] * 10_000) for _ in range(50)]",
        "threading.Thread(target=lambda: [client.batch_tile_exists(['a'])"
        " for _ in range(20)]).start()",
        "cycle = [client]; cycle.append(cycle); del cycle",
    ],
)
def test_a_process_ends_silently_without_close(endpoint: Endpoint, ending: str) -> None:
    done = run(
        "import sys, threading, fastkv\n"
        "client = fastkv.Redis.from_url(sys.argv[1])\n"
        "client.batch_tile_set(['a'], [b'x' * 1_000_000])\n"
        "client.submit_batch_tile_exists(['a']).result()\n" + ending,
        endpoint.url,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_process_ends_silently_while_the_server_says_nothing() -> None:
    with SilentPeer() as silent:
        done = run(
            "import sys, fastkv\n"
            "client = fastkv.Redis(port=int(sys.argv[1]))\n"
            "future = client.submit_batch_tile_exists(['a'])\n",
            silent.port,
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_asyncio_process_ends_silently_without_aclose(endpoint: Endpoint) -> None:
    done = run(
        "import asyncio, sys, fastkv.asyncio\n"
        "async def main():\n"
        "    client = fastkv.asyncio.Redis.from_url(sys.argv[1])\n"
        "    assert await client.batch_tile_exists(['a']) == [False]\n"
        "    asyncio.ensure_future(client.batch_tile_exists(['a'] * 1000))\n"
        "    await asyncio.sleep(0)\n"
        "asyncio.run(main())\n",
        endpoint.url,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_out_of_descriptors_is_an_error_and_then_it_works(endpoint: Endpoint) -> None:
    done = run(
        "import os, resource, sys, fastkv\n"
        "client = fastkv.Redis.from_url(sys.argv[1])\n"
        "soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "open_now = len(os.listdir('/proc/self/fd'))\n"
        "for room in range(1, 12):\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + room, hard))\n"
        "    try:\n"
        "        client.batch_tile_exists(['a'], timeout=5)\n"
        "    except (OSError, RuntimeError, fastkv.client.redis.RedisError):\n"
        "        pass\n"
        "    client.close()\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))\n"
        "print(client.batch_tile_exists(['a']))\n",
        endpoint.url,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("[False]\n", "", 0)


def test_signals_are_for_the_threads_of_the_application(client: fastkv.Redis) -> None:
    """A native thread that took one would leave a call that waits without it."""
    client.batch_tile_exists(["a"])
    catchable = set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}
    found = 0
    for task in Path("/proc/self/task").iterdir():
        status = dict(
            line.split(":\t", 1) for line in (task / "status").read_text().splitlines()
        )
        if status["Name"] != "fastkv-worker":
            continue
        found += 1
        blocked = int(status["SigBlk"], 16)
        assert {s for s in catchable if not blocked >> (s - 1) & 1} == set()
    assert found > 0
