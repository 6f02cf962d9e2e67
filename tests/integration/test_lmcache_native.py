"""`NativeClient` as LMCache's MP mode drives it, without LMCache. Each row of what
LMCache's own client does wrong is a test here: one that hangs there ends in time here.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import xxhash
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fastkv.cli.private_server import PrivateServer, ServerBinary
from tests.conftest import Endpoint
from tests.demux import key, memory
from tests.scripted import SilentPeer

KIB = 1024

# --- the job -------------------------------------------------------------------------


def test_chunks_come_back_and_are_plain_values(
    endpoint: Endpoint, plain: redis.Redis, demux: Any
) -> None:
    lm = demux(endpoint.url)
    sizes = [1, 99, 100, 64 * KIB, 1 << 20, (8 << 20) + 5]
    values = [os.urandom(size) for size in sizes]
    keys = [key(i) for i in range(len(sizes))]
    assert lm.set(keys, values) == [True] * 6
    assert [plain.get(name) for name in keys] == values
    assert lm.exists([*keys, key(99)]) == [True] * 6 + [False]
    got = [memory(size) for size in sizes]
    assert lm.get(keys, got) == [True] * 6
    assert [bytes(view) for view in got] == values
    ok, error, bools = lm.wait(lm.client.submit_batch_delete([*keys, key(99)]))
    assert (ok, error, bools) == (True, "", [True] * 6 + [False])
    assert lm.exists(keys) == [False] * 6
    assert plain.dbsize() == 0
    assert lm.client.counts() == {
        "stored": 6,
        "found": 6,
        "not_found": 7,
        "loaded": 6,
        "deleted": 6,
        "not_deleted": 1,
    }


def test_an_empty_batch_completes_too(server: PrivateServer, demux: Any) -> None:
    lm = demux(f"unix://{server.unix_path}")
    for submit in (lm.client.submit_batch_get, lm.client.submit_batch_set):
        assert lm.wait(submit([], [])) == (True, "", [])
    assert lm.wait(lm.client.submit_batch_exists([])) == (True, "", [])


def test_the_descriptor_is_quiet_after_a_drain(
    server: PrivateServer, demux: Any
) -> None:
    lm = demux(f"redis://127.0.0.1:{server.port}")
    for _ in range(50):
        assert lm.exists(["a"]) == [False]
        assert not select.select([lm.client.event_fd()], [], [], 0)[0]
        assert lm.client.drain_completions() == []


def test_prefix_and_ttl(server: PrivateServer, plain: redis.Redis, demux: Any) -> None:
    lm = demux(f"redis://127.0.0.1:{server.port}?key_prefix=tenant-1:&ttl=500")
    other = demux(f"redis://127.0.0.1:{server.port}", key_prefix="tenant-2:")
    assert lm.set(["a"], [b"x"]) == [True]
    assert plain.keys() == [b"tenant-1:a"]
    assert 490 < plain.ttl("tenant-1:a") <= 500
    assert other.exists(["a"]) == [False]
    assert other.set(["a"], [b"y"]) == [True]
    assert plain.ttl("tenant-2:a") == -1
    got = memory(1)
    assert lm.get(["a"], [got]) == [True]
    assert bytes(got) == b"x"


@pytest.mark.parametrize("immutable", [True, False])
def test_chunks_are_read_without_watching_them_unless_they_may_change(
    own_server: PrivateServer, demux: Any, immutable: bool
) -> None:
    lm = demux(f"redis://127.0.0.1:{own_server.port}", immutable=immutable)
    lm.set(["a"], [bytes(1 << 20)])
    assert lm.get(["a"], [memory(1 << 20)]) == [True]
    with own_server.client() as admin:
        stats = admin.info("commandstats")
    assert "cmdstat_getrange" in stats
    assert ("cmdstat_watch" in stats) is not immutable


def test_many_threads_submit_and_each_completes_once(
    server: PrivateServer, demux: Any
) -> None:
    lm = demux(f"redis://127.0.0.1:{server.port}")
    value = os.urandom(50_000)
    lm.set([key(i) for i in range(8)], [value] * 8)
    expected: dict[int, list[bool]] = {}

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(50):
            names = [key(int(i)) for i in rng.integers(0, 16, 8)]
            there = [name < key(8) for name in names]
            if rng.random() < 0.5:
                expected[lm.client.submit_batch_exists(names)] = there
            else:
                got = [memory(50_000) for _ in names]
                expected[lm.client.submit_batch_get(names, got)] = there

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(expected) == 200
    for future_id, there in expected.items():
        assert lm.wait(future_id) == (True, "", there)
    assert lm.done == {}


# --- what the peer does wrong, row by row --------------------------------------------


@pytest.mark.parametrize("size", [1, 9, 10, 99, 100, 5000, 1 << 20])
def test_rows_1_and_3_a_missing_key_is_a_miss(
    server: PrivateServer, demux: Any, size: int
) -> None:
    lm = demux(f"redis://127.0.0.1:{server.port}")
    value = os.urandom(size)
    lm.set(["there"], [value])
    for _ in range(20):  # more than there are workers, or connections
        got = [memory(size) for _ in range(3)]
        assert lm.get(["no", "there", "nor"], got) == [False, True, False]
        assert bytes(got[1]) == value


def test_row_2_eviction_between_lookup_and_load(
    own_server: PrivateServer, demux: Any
) -> None:
    lm = demux(f"redis://127.0.0.1:{own_server.port}")
    with own_server.client() as admin:
        admin.config_set("maxmemory", "40mb")
        admin.config_set("maxmemory-policy", "allkeys-lru")
    values = [bytes([i]) * (1 << 20) for i in range(64)]
    missed = 0
    for round_ in range(30):
        names = [key(round_ * 8 + i) for i in range(8)]
        lm.client.submit_batch_set(
            [key(10_000 + round_ * 8 + i) for i in range(8)], values[:8]
        )
        lm.set(names, values[:8])
        lm.exists(names)
        got = [memory(1 << 20) for _ in names]
        hits = lm.get(names, got)
        missed += hits.count(False)
        for hit, view, value in zip(hits, got, values, strict=False):
            assert not hit or bytes(view) == value
        old = [key(i) for i in range(8)]
        hits = lm.get(old, got)
        missed += hits.count(False)
        for hit, view, value in zip(hits, got, values, strict=False):
            assert not hit or bytes(view) == value
    assert missed > 0


def test_rows_4_and_5_another_length_is_a_miss_and_harms_nothing(
    server: PrivateServer, plain: redis.Redis, demux: Any
) -> None:
    lm = demux(f"redis://127.0.0.1:{server.port}")
    # What is left over looks like the reply to the next command.
    plain.set("long", b"x" * 100 + b"\r\n$8\r\nBADBADBA\r\n" * 20)
    plain.set("short", b"x" * 10)
    plain.set("right", b"goodgood")
    for _ in range(20):
        around = np.full(300, 7, np.uint8)
        middle = memoryview(around)[100:200]
        got = memory(8)
        hits = lm.get(["long", "right", "short"], [middle, got, memory(100)])
        assert hits == [False, True, False]
        assert bytes(got) == b"goodgood"
        assert (around[:100] == 7).all()
        assert (around[200:] == 7).all()
    assert lm.client.counts()["wrong_size"] == 40


def test_row_6_an_error_reply_is_named_and_over_when_its_cause_is(
    own_server: PrivateServer, demux: Any
) -> None:
    lm = demux(f"redis://127.0.0.1:{own_server.port}")
    with own_server.client() as admin:
        admin.lpush("list", "x")
        lm.set(["a"], [b"before"])
        ok, error, bools = lm.wait(
            lm.client.submit_batch_get(["list", "a"], [memory(6), memory(6)])
        )
        assert (ok, bools) == (True, [False, True])
        assert "WRONGTYPE" in error
        admin.config_set("maxmemory", "1")
        ok, error, bools = lm.wait(lm.client.submit_batch_set(["b"], [b"full"]))
        assert (ok, bools) == (False, [False])
        assert "maxmemory" in error
        admin.config_set("maxmemory", "0")
        assert lm.set(["b"], [b"room"]) == [True]
        assert lm.client.counts()["refused"] == 2


def test_row_7_one_refused_store_does_not_stop_the_others(
    own_server: PrivateServer, demux: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with own_server.client() as admin:
        admin.acl_setuser(
            "lm", enabled=True, passwords=["+pw"], keys=["a*"], commands=["+@all"]
        )
        monkeypatch.setenv("LM_PASSWORD", "pw")
        lm = demux(
            f"redis://127.0.0.1:{own_server.port}",
            username="lm",
            password_env="LM_PASSWORD",
        )
        ok, error, bools = lm.wait(
            lm.client.submit_batch_set(["a1", "b", "a2"], [b"1", b"2", b"3"])
        )
        assert (ok, bools) == (False, [True, False, True])
        assert "'b'" in error
        assert sorted(admin.keys()) == [b"a1", b"a2"]


def test_rows_8_and_9_a_server_that_dies_makes_misses_and_is_found_again(
    own_server: PrivateServer, demux: Any
) -> None:
    lm = demux(f"redis://127.0.0.1:{own_server.port}")
    names = [key(i) for i in range(64)]
    value = os.urandom(1 << 20)
    for _ in range(3):
        assert lm.set(names, [value] * 64) == [True] * 64
        got = [memory(1 << 20) for _ in names]
        loading = lm.client.submit_batch_get(names, got)
        own_server.stop()
        _, _, bools = lm.wait(loading)
        assert len(bools) == 64
        for hit, view in zip(bools, got, strict=True):
            assert not hit or view == value
        ok, error, bools = lm.wait(lm.client.submit_batch_exists(names))
        assert (ok, bools) == (False, [False] * 64)
        assert "ConnectionError" in error
        assert lm.set(names[:2], [value] * 2) == [False] * 2
        own_server.start()
        assert lm.exists(names) == [False] * 64
    assert lm.set(names, [value] * 64) == [True] * 64
    assert lm.get(names, got) == [True] * 64


def test_row_9_a_connection_that_the_server_has_closed_is_replaced(
    server: PrivateServer, plain: redis.Redis, demux: Any
) -> None:
    lm = demux(f"redis://127.0.0.1:{server.port}")
    for _ in range(5):
        assert lm.set(["a"], [b"x"]) == [True]
        assert lm.get(["a"], [memory(1)]) == [True]
        plain.client_kill_filter(_type="normal", skipme=True)
        assert lm.get(["a"], [memory(1)]) == [True]


def test_row_10_a_wrong_password_is_a_miss_until_it_is_right(
    binary: ServerBinary, demux: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = tmp_path / "password"
    secret.write_text("wrong-one\n")
    with PrivateServer(
        binary, "--requirepass", "right-one", password="right-one"
    ) as server:
        with caplog.at_level(logging.DEBUG):
            lm = demux(f"redis://127.0.0.1:{server.port}", password_file=str(secret))
            ok, error, bools = lm.wait(lm.client.submit_batch_exists(["a"]))
        assert (ok, bools) == (False, [False])
        assert "AuthenticationError" in error
        assert "wrong-one" not in error + caplog.text
        secret.write_text("right-one\n")
        assert lm.exists(["a"]) == [False]
        assert lm.set(["a"], [b"x"]) == [True]


def test_a_server_that_repeats_the_password_does_not_get_it_into_the_log(
    binary: ServerBinary,
    demux: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LM_PASSWORD", "hush-hush")
    with PrivateServer(binary, "--rename-command", "AUTH", "") as server:
        lm = demux(f"redis://127.0.0.1:{server.port}", password_env="LM_PASSWORD")
        _, error, _ = lm.wait(lm.client.submit_batch_exists(["a"]))
    assert "unknown command" in error
    assert "hush" not in error + caplog.text


def test_row_10_a_refused_connection_or_an_unknown_host_is_a_miss(
    demux: Any,
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # and does not listen
        for url in (
            f"redis://127.0.0.1:{probe.getsockname()[1]}",
            "redis://no-such-host.invalid:6379",
            "unix:///no/such/socket",
        ):
            lm = demux(url)
            ok, error, bools = lm.wait(lm.client.submit_batch_exists(["a"]))
            assert (ok, bools) == (False, [False])
            assert "ConnectionError" in error
            assert lm.get(["a"], [memory(9)]) == [False]
            assert lm.set(["a"], [b"x"]) == [False]


def test_row_11_unix_sockets_ipv6_and_databases(
    server: PrivateServer, demux: Any
) -> None:
    lm = demux(f"unix://{server.unix_path}?db=3")
    assert lm.set(["a"], [b"x"]) == [True]
    with server.client(db=3) as third:
        assert third.get("a") == b"x"
    lm = demux(f"redis://127.0.0.1:{server.port}/3")
    assert lm.exists(["a"]) == [True]
    if socket.has_ipv6:
        lm = demux("redis://[::1]:1/3")  # nobody is there; an address it is
        assert "Error 111" in lm.wait(lm.client.submit_batch_exists(["a"]))[1]


def test_row_13_a_silent_server_costs_its_time_out_and_then_less(demux: Any) -> None:
    with SilentPeer() as peer:
        lm = demux(f"redis://127.0.0.1:{peer.port}", socket_timeout=60, timeout=3.0)
        begin = time.monotonic()
        ok, error, bools = lm.wait(lm.client.submit_batch_exists(["a"]))
        first = time.monotonic() - begin
        assert (ok, bools) == (False, [False])
        assert "TimeoutError" in error
        assert lm.exists(["a"]) == [False]
        assert time.monotonic() - begin - first < first / 2
        begin = time.monotonic()
        assert lm.get(["a"], [memory(5)]) == [False]
        assert 2.9 < time.monotonic() - begin < 20


def test_row_13_a_stopped_server_is_found_again(
    own_server: PrivateServer, demux: Any
) -> None:
    lm = demux(f"redis://127.0.0.1:{own_server.port}", socket_timeout=0.3)
    names = [key(i) for i in range(8)]
    value = os.urandom(1 << 20)
    assert lm.set(names, [value] * 8) == [True] * 8
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        waiting = [
            lm.client.submit_batch_exists(names),
            lm.client.submit_batch_get(names, [memory(1 << 20) for _ in names]),
            lm.client.submit_batch_set(["new"], [value]),
        ]
        for future_id in waiting:
            ok, error, bools = lm.wait(future_id)
            assert not ok
            assert "TimeoutError" in error
            assert not any(bools)
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    assert lm.exists(names) == [True] * 8
    got = [memory(1 << 20) for _ in names]
    assert lm.get(names, got) == [True] * 8
    assert all(view == value for view in got)


def test_row_14_close_completes_what_is_pending(demux: Any) -> None:
    with SilentPeer() as peer:
        lm = demux(f"redis://127.0.0.1:{peer.port}")
        ids = [lm.client.submit_batch_exists([f"k{i}"]) for i in range(100)]
        ids += [lm.client.submit_batch_get(["a"], [memory(9)]) for _ in range(100)]
        assert peer.asked.wait(10)
        lm.client.close()
        lm.take()
        for future_id in ids:
            ok, error, _ = lm.done[future_id]
            assert not ok
            assert "closed" in error
        assert lm.client.event_fd() == -1
        lm.client.close()
        late = lm.client.submit_batch_set(["a"], [b"x"])
        lm.take()
        assert lm.done[late][2] == [False]


@pytest.mark.parametrize("checksum", [False, True])
def test_row_14_a_forked_child_hangs_neither_itself_nor_its_parent(
    server: PrivateServer, demux: Any, checksum: bool
) -> None:
    lm = demux(f"redis://127.0.0.1:{server.port}", checksum=checksum)
    assert lm.set(["a"], [b"x"]) == [True]
    pending = [lm.client.submit_batch_exists(["a"]) for _ in range(2)]
    # Completed, and not drained yet, when the child is made.
    assert select.select([lm.client.event_fd()], [], [], 10)[0]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            pending += [
                lm.client.submit_batch_exists(["a"]),
                lm.client.submit_batch_set(["a"], [b"x"]),
                lm.client.submit_batch_get(["a"], [memory(1)]),
            ]
            done = lm.client.drain_completions()
            lm.client.close()
            failed = [future_id for future_id, ok, _, _ in done if not ok]
            code = 0 if sorted(failed) == pending else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    for future_id in pending:
        assert lm.wait(future_id) == (True, "", [True])
    assert lm.exists(["a"]) == [True]


def test_a_child_of_a_client_that_was_not_used_yet_fails_and_the_parent_works(
    server: PrivateServer, demux: Any
) -> None:
    lm = demux(f"redis://127.0.0.1:{server.port}")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(30)  # ends a child that hangs
            future_id = lm.client.submit_batch_set(["a"], [b"x"])
            done = lm.client.drain_completions()
            lm.client.close()
            code = 0 if [one[:2] for one in done] == [(future_id, False)] else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert lm.exists(["a"]) == [False]
    assert lm.set(["a"], [b"x"]) == [True]


def test_a_fork_while_another_thread_counts_leaves_the_counts_readable(
    server: PrivateServer, demux: Any
) -> None:
    inside, go_on = threading.Event(), threading.Event()

    class Slow(Counter[str]):
        def __setitem__(self, kind: str, chunks: int) -> None:
            inside.set()
            assert go_on.wait(30)
            super().__setitem__(kind, chunks)

    lm = demux(f"redis://127.0.0.1:{server.port}")
    lm.client._store._counts = Slow()
    thread = threading.Thread(target=lm.exists, args=(["a"],))
    thread.start()
    assert inside.wait(30)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends a child that hangs
        signal.alarm(10)
        os._exit(0 if lm.client.counts() == {} else 2)
    status = os.waitpid(child, 0)[1]
    go_on.set()
    thread.join()
    assert status == 0
    assert lm.client.counts() == {"not_found": 1}


def test_a_signal_handler_may_want_the_counts_while_its_thread_counts(
    server: PrivateServer, demux: Any
) -> None:
    class Interrupted(Counter[str]):
        def __setitem__(self, kind: str, chunks: int) -> None:
            if not seen:
                signal.raise_signal(signal.SIGUSR1)
            super().__setitem__(kind, chunks)

    def handler(*_: object) -> None:
        seen.append(lm.client.counts())

    seen: list[dict[str, int]] = []
    lm = demux(f"redis://127.0.0.1:{server.port}")
    lm.client._store._counts = Interrupted()
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        assert lm.exists(["a"]) == [False]
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [{}]
    assert lm.client.counts() == {"not_found": 1}


# --- memory --------------------------------------------------------------------------


def test_memory_that_cannot_be_used_is_a_failure_of_its_batch_alone(
    server: PrivateServer, demux: Any
) -> None:
    lm = demux(f"redis://127.0.0.1:{server.port}")
    lm.set(["a", "b"], [b"12345678"] * 2)
    for wrong, text in (
        (b"read-only", "writable"),
        (memoryview(bytearray(16))[::2], "contiguous"),
        ("text", "expected a buffer"),
    ):
        ok, error, bools = lm.wait(
            lm.client.submit_batch_get(["a", "b"], [memory(8), wrong])
        )
        assert (ok, bools) == (False, [False, False])
        assert text in error
        assert "'b'" in error
    ok, error, _ = lm.wait(lm.client.submit_batch_get(["a", "b"], [memory(8)]))
    assert not ok
    assert "expected 2 buffers" in error
    # Bytes count, not elements.
    wide = np.zeros(4, np.uint16)
    assert lm.get(["a"], [wide.data]) == [True]
    assert wide.tobytes() == b"12345678"


def test_memory_is_pinned_until_the_batch_is_drained(demux: Any) -> None:
    with SilentPeer() as peer:
        lm = demux(f"redis://127.0.0.1:{peer.port}", timeout=0.2)
        held = bytearray(9)
        future_id = lm.client.submit_batch_get(["a"], [held])
        with pytest.raises(BufferError):
            held.append(0)
        assert lm.wait(future_id)[2] == [False]
        held.append(0)


# --- checksums -----------------------------------------------------------------------


def test_a_checksum_stands_in_the_last_8_bytes(
    endpoint: Endpoint, plain: redis.Redis, demux: Any
) -> None:
    lm = demux(endpoint.url, checksum=True)
    values = [os.urandom(size) for size in (1, 5000, 3 << 20)]
    names = [key(i) for i in range(3)]
    assert lm.set(names, values) == [True] * 3
    for name, value in zip(names, values, strict=True):
        assert plain.get(name) == value + xxhash.xxh3_64_digest(value)
    got = [memory(len(value)) for value in values]
    assert lm.get([*names, "no"], [*got, memory(5)]) == [True] * 3 + [False]
    assert [bytes(view) for view in got] == values


def test_a_changed_byte_is_a_miss_and_counted(
    server: PrivateServer, plain: redis.Redis, demux: Any
) -> None:
    lm = demux(f"redis://127.0.0.1:{server.port}", checksum=True)
    value = os.urandom(1000)
    lm.set(["a", "b"], [value] * 2)
    for at in (0, 500, 999, 1000, 1007):
        changed = bytearray(value + xxhash.xxh3_64_digest(value))
        changed[at] ^= 1
        plain.set("a", bytes(changed))
        assert lm.get(["a", "b"], [memory(1000), memory(1000)]) == [False, True]
    assert lm.client.counts()["corrupt"] == 5
    assert lm.client.counts()["loaded"] == 5


def test_plain_and_checked_chunks_are_not_taken_for_each_other(
    server: PrivateServer, demux: Any
) -> None:
    checked = demux(f"redis://127.0.0.1:{server.port}", checksum=True)
    plain = demux(f"redis://127.0.0.1:{server.port}")
    assert plain.set(["p"], [b"x" * 100]) == [True]
    assert checked.set(["c"], [b"x" * 100]) == [True]
    assert checked.get(["p", "c"], [memory(100), memory(100)]) == [False, True]
    assert plain.get(["p", "c"], [memory(100), memory(100)]) == [True, False]
    assert checked.client.counts()["wrong_size"] == 1


def test_closing_completes_what_waits_for_its_checksum(
    server: PrivateServer, demux: Any
) -> None:
    lm = demux(f"redis://127.0.0.1:{server.port}", checksum=True)
    value = os.urandom(8 << 20)
    ids = [lm.client.submit_batch_set([key(i)], [value]) for i in range(16)]
    lm.client.close()
    lm.take()
    assert sorted(lm.done) == ids


# --- for operators -------------------------------------------------------------------


def test_trouble_is_logged_once_in_a_while(
    demux: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        lm = demux(f"redis://127.0.0.1:{probe.getsockname()[1]}")
        with caplog.at_level(logging.WARNING, "fastkv"):
            for _ in range(20):
                assert lm.exists(["a", "b"]) == [False, False]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith("cannot connect: 127.0.0.1:")
    assert "failed: EXISTS of 2: ConnectionError" in lines[1]
    assert lm.client.counts() == {"failed": 40}


def test_what_lmcache_serves_has_our_numbers(demux: Any, endpoint: Endpoint) -> None:
    def samples(name: str, client: str) -> dict[str, float]:
        return {
            sample.labels["outcome"]: sample.value
            for family in text_string_to_metric_families(generate_latest().decode())
            for sample in family.samples
            if sample.name == name and sample.labels["client"] == client
        }

    stores = [demux(endpoint.url, metrics="a"), demux(endpoint.url + "?metrics=b")]
    for number, lm in enumerate(stores):
        assert lm.exists(["x", "y"][number:]) == [False, False][number:]
    assert samples("fastkv_chunks_total", "a") == {"not_found": 2}
    assert samples("fastkv_chunks_total", "b") == {"not_found": 1}
    assert samples("fastkv_keys_total", "a")["not_found"] == 2
    # LMCache makes a new one when it has given up the old one.
    demux(endpoint.url, metrics="a").exists(["x"])
    assert samples("fastkv_chunks_total", "a") == {"not_found": 1}
