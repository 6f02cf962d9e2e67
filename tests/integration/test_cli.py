"""The commands, as somebody at a terminal and a script see them."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from matplotlib.figure import Figure
from typer.testing import CliRunner

import fastkv
from fastkv.cli import make_app
from fastkv.cli.clients import FastkvClient
from fastkv.cli.private_server import PrivateServer, ServerBinary
from fastkv.cli.target import Target
from fastkv.cli.terminal import FLOOR, Failure
from fastkv.cli.workload import Workload
from fastkv.lmcache import NativeClient
from tests.clusters import ClusterServers
from tests.conftest import SERVERS, Endpoint, eventually
from tests.tls import Authority, TlsServer

QUICK = ("--sizes", "4K,70001,1M", "--batch-bytes", "1M", "--connections", "1,3")
PROGRAM = "from fastkv.cli import main; main()"


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(make_app(), [str(argument) for argument in arguments])
    if not isinstance(result.exception, (SystemExit, type(None))):
        raise result.exception
    return result


def start(*arguments: object, **kwargs: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    return subprocess.Popen(command, text=True, **kwargs)


def findings(*arguments: object) -> dict[str, dict[str, str]]:
    result = run("doctor", *arguments, "--json")
    report = json.loads(result.stdout)
    found = {finding["topic"]: finding for finding in report["findings"]}
    bad = {"warning", "problem"} & {finding["level"] for finding in found.values()}
    assert result.exit_code == report["status"] == bool(bad)
    return found


@pytest.fixture(scope="module", autouse=True)
def _fonts(tmp_path_factory: pytest.TempPathFactory) -> None:
    # matplotlib keeps the files of its fonts open, which is no leak of ours.
    figure = Figure()
    figure.text(0, 0, "x")
    figure.savefig(tmp_path_factory.mktemp("fonts") / "x.png")


@pytest.fixture
def settings(plain: redis.Redis) -> Iterator[Callable[..., None]]:
    """Changes settings of the server for the time of the test."""
    before: dict[str, str] = {}

    def change(**given: str) -> None:
        for name, value in given.items():
            name = name.replace("_", "-")
            answer: Any = plain.config_get(name)
            before.setdefault(name, answer[name])
            plain.config_set(name, value)

    yield change
    for name, value in before.items():
        plain.config_set(name, value)


@pytest.fixture
def user(plain: redis.Redis) -> Iterator[str]:
    """May neither INFO nor CONFIG; the password is ``geheim``."""
    rules = ("on", ">geheim", "~*", "&*", "+@all", "-@admin", "-@dangerous")
    plain.execute_command("ACL", "SETUSER", "app", *rules)
    yield "app:geheim"
    plain.execute_command("ACL", "DELUSER", "app")


# --- any command ---------------------------------------------------------------------


@pytest.mark.parametrize("command", ["bench", "tune --model qwen3-8b", "doctor"])
@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis://127.0.0.1:1", "Connection refused"),
        ("unix:///nowhere.sock", "No such file"),
        ("http://localhost", "expected redis://"),
        ("redis://:geheim@localhost:geheim", "expected redis://"),
        ("redis://localhost?tile_conections=3", "known are tile_workers"),
        ("", "expected redis://"),
    ],
)
def test_a_bad_url_is_said_in_one_line(command: str, url: str, says: str) -> None:
    result = run(*command.split(), url)
    assert result.exit_code == (2 if command == "doctor" else 1)
    assert says in result.stderr
    assert result.stdout == "" and result.stderr.count("\n") == 1
    assert "geheim" not in result.output


def test_no_password_is_ever_shown(
    server: PrivateServer, plain: redis.Redis, user: str
) -> None:
    url = f"redis://{user}@127.0.0.1:{server.port}"
    wrong = run("bench", url.replace("geheim", "falsch"), *QUICK)
    assert wrong.exit_code == 1 and wrong.stderr.count("\n") == 1
    assert "invalid username-password pair" in wrong.stderr
    right = run("bench", url, *QUICK, "--seconds", 0.1, "--reads", "ranged")
    assert right.exit_code == 0 and "could not look: memory" in right.output
    tuned = run(
        *("tune", url, "--bytes-per-token", "4K", "--chunk-tokens", 16),
        *("--seconds", 0.1, "--batch-bytes", "256K"),
    )
    assert tuned.exit_code == 0 and "password_env: REDIS_PASSWORD" in tuned.output
    assert "username: app" in tuned.output
    for result in (wrong, right, tuned, run("doctor", url, "--seconds", 0)):
        assert not re.search("geheim|falsch", result.output)
    assert plain.dbsize() == 0


def test_a_pipe_gets_no_escape_codes_and_a_terminal_a_live_table(
    own_server: PrivateServer,
) -> None:
    url = f"unix://{own_server.unix_path}"
    arguments = ("bench", url, *QUICK, "--seconds", 0.5)
    piped = start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    said, errors = piped.communicate()
    assert piped.returncode == 0 and errors == ""
    assert "\x1b" not in said and "s left" not in said
    assert max(map(len, said.splitlines())) <= 100
    here, there = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    shown = start(*arguments, stdin=there, stdout=there, stderr=there, env=environment)
    os.close(there)
    output = b""
    while True:
        try:
            output += os.read(here, 65536)
        except OSError:  # the other end is closed
            break
    os.close(here)
    assert shown.wait() == 0
    assert b"s left" in output and b"\x1b[" in output


def test_a_server_without_room_is_left_alone(
    server: PrivateServer, plain: redis.Redis, settings: Any
) -> None:
    plain.set("somebody", "else's")
    settings(maxmemory="100mb", maxmemory_policy="allkeys-lru")
    url = f"redis://127.0.0.1:{server.port}"
    for command in (("bench",), ("tune", "--model", "llama-3.1-8b")):
        result = run(*command, url)
        assert result.exit_code == 1 and result.stderr.count("\n") == 1
        assert "lacks the memory" in result.stderr and "of 100 MiB" in result.stderr
    assert plain.keys() == [b"somebody"]
    # What fits, it has room for.
    assert run("bench", url, *QUICK, "--seconds", 0.1).exit_code == 0
    assert plain.keys() == [b"somebody"]


@pytest.mark.parametrize("command", ["bench", "tune", "doctor", "demo"])
def test_help_teaches_by_examples(command: str) -> None:
    said = run(command, "--help").output
    assert f"fastkv {command}" in said.partition("Examples")[2]


# --- bench ---------------------------------------------------------------------------


def test_bench_reports_every_setting_and_draws_them(
    endpoint: Endpoint, plain: redis.Redis, tmp_path: Path
) -> None:
    picture = tmp_path / "curve.png"
    result = run(
        *("bench", endpoint.url, *QUICK, "--workers", "1,2", "--seconds", 0.1),
        *("--baseline", "redis-py", "--plot", picture, "--json"),
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["complete"] and report["transport"] in ("TCP", "unix")
    cells = {
        (row["size"], row["client"], row["reads"], row["workers"], row["connections"])
        for row in report["rows"]
    }
    ours = {
        (size, "fastkv", reads, workers, connections)
        for size in (4096, 70001, 1 << 20)
        for reads in ("ranged", "plain")
        for workers in (1, 2)
        for connections in (1, 3)
    }
    # One connection has one worker, whatever is asked for: it is measured once.
    ours = {cell for cell in ours if cell[3] <= cell[4] + 1}
    assert cells == ours | {
        (size, "redis-py", "plain", 0, 1) for size in (4096, 70001, 1 << 20)
    }
    for row in report["rows"]:
        times = row["all_milliseconds"]
        assert row["batches"] == len(times) >= 3
        parts = row["milliseconds"]
        assert min(times) <= parts["p50"] <= parts["p99"] <= parts["p99.9"]
        assert parts["p99.9"] <= max(times) + 1e-3
        moved = (1 << 20) // row["size"] * row["size"]
        fastest, slowest = (moved / 1e6 / t for t in (min(times), max(times)))
        assert slowest * 0.99 < row["gb_per_second"] < fastest * 1.01
    assert plain.dbsize() == 0
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 20_000
    width, height = struct.unpack(">II", content[16:24])
    assert width > 1000 and height > 900  # two rows of panels


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_bench_interrupted_leaves_a_report_and_no_keys(
    own_server: PrivateServer, number: signal.Signals, status: int
) -> None:
    url = f"redis://127.0.0.1:{own_server.port}"
    ended = start("bench", url, *QUICK, "--json", stdout=subprocess.PIPE)
    with own_server.client() as plain:

        def moved() -> bool:
            sent: Any = plain.info("stats")
            return int(sent["total_net_output_bytes"]) > 200 << 20

        while not moved():
            assert ended.poll() is None
            time.sleep(0.01)
        assert plain.dbsize() > 0
        ended.send_signal(number)
        said, _ = ended.communicate()
        assert ended.returncode == status
        report = json.loads(said)
        assert report["complete"] is False
        assert len(report["rows"]) == 12
        assert plain.dbsize() == 0


def test_a_wrong_byte_ends_a_run(server: PrivateServer, plain: redis.Redis) -> None:
    target = Target.of(f"redis://127.0.0.1:{server.port}")
    with fastkv.Redis(port=server.port) as client:
        ours = FastkvClient(client)
        with Workload(target, [70001], 1 << 20) as workload:
            workload.store(ours, 70001)
            workload.load(ours, 70001)
            plain.setrange(workload.keys[70001][3], 70000, b"\0\0"[:1])
            plain.setrange(workload.keys[70001][3], 69999, b"\0")
            with pytest.raises(
                Failure, match=r":3: wrong byte at offset (69999|70000)"
            ):
                workload.load(ours, 70001)
    assert plain.dbsize() == 0


# --- tune ----------------------------------------------------------------------------


def test_what_tune_says_can_be_pasted(
    server: PrivateServer, plain: redis.Redis
) -> None:
    url = f"redis://127.0.0.1:{server.port}/0"
    arguments = (
        *("tune", url, "--bytes-per-token", "4K", "--chunk-tokens", "16,64"),
        *("--seconds", 0.5, "--batch-bytes", "512K"),
    )
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [row["bytes"] for row in report["chunks"]] == [64 << 10, 256 << 10]
    assert report["loads"]["low"] <= report["loads"]["ratio"] <= report["loads"]["high"]
    said = result.stderr
    assert ("Best here" if report["recommended"] else "Defaults are best here") in said
    choice = report["candidate" if report["recommended"] else "usual"]
    lines = [line.strip() for line in said.splitlines()]
    python = next(line for line in lines if line.startswith("fastkv.Redis.from_url("))
    with eval(python, {"fastkv": fastkv}) as client:
        assert client.ping()
        options = vars(client._tile_options)
        given = {f"tile_{k}": v for k, v in options.items() if v is not None}
        assert given == choice["settings"], python
    with fastkv.Redis.from_url(
        next(line for line in lines if line.startswith("redis://") and ";" not in line)
    ) as client:
        assert vars(client._tile_options) == options
    block = said[said.index("  chunk_size:") : said.index("LMCache server")]
    config = yaml.safe_load("\n".join(line[2:] for line in block.splitlines()))
    assert config["chunk_size"] == choice["chunk_tokens"]
    prefix = "remote_storage_plugin.fastkv."
    extra = {
        name.removeprefix(prefix): value
        for name, value in config["extra_config"].items()
        if name.startswith(prefix)
    }
    words = next(line for line in lines if line.startswith("lmcache server"))
    adapter = json.loads(words[words.index("{") : words.rindex("}") + 1])
    assert f"--chunk-size {choice['chunk_tokens']} " in words
    assert adapter["type"] == "native_plugin"
    assert extra.pop("module_path") == adapter["module_path"] == "fastkv.lmcache"
    assert extra.pop("class_name") == "FastKVAdapter"
    assert extra == adapter["adapter_params"]
    NativeClient(**extra).close()
    assert plain.dbsize() == 0


def test_tune_wants_to_know_whose_chunks() -> None:
    assert "--bytes-per-token" in run("tune", "redis://localhost").stderr
    unknown = run("tune", "redis://localhost", "--model", "gpt-1")
    assert "llama-3.1-8b" in unknown.stderr and unknown.exit_code == 1


# --- doctor --------------------------------------------------------------------------


def test_doctor_finds_what_is_wrong(server: PrivateServer, settings: Any) -> None:
    url = f"redis://127.0.0.1:{server.port}"
    settings(maxmemory="1gb", maxmemory_policy="allkeys-lru")
    with server.client() as plain:
        plain.config_resetstat()  # other tests' clients were refused, perhaps
    found = findings(url, "--seconds", 0)
    levels = {topic: finding["level"] for topic, finding in found.items()}
    assert levels.pop("8 MiB cliff") in ("warning", "unseen")  # by its settings
    # A machine that is busy with other tests answers late.
    carried = re.search(r"carry ([\d.]+) GB/s", found["round trip"]["evidence"])
    assert carried
    assert (levels.pop("round trip") == "warning") == (float(carried[1]) < 2 * FLOOR)
    assert levels.pop("throughput") == "unseen"
    assert levels.pop("io-threads") == "note"
    assert [finding for finding in levels.items() if finding[1] != "good"] == []
    settings(
        maxmemory_policy="noeviction",
        proto_max_bulk_len="1mb",
        client_query_buffer_limit="1mb",
        client_output_buffer_limit="normal 1mb 0 0",
        save="3600 1",
    )
    found = findings(url, "--seconds", 0)
    expected = {
        "eviction": "problem",
        "value length": "problem",
        "query buffer": "problem",
        "output buffer": "warning",
        "persistence": "warning",
    }
    for topic, level in expected.items():
        assert found[topic]["level"] == level and found[topic]["remedy"], topic
    assert "1 MiB" in found["value length"]["evidence"]
    assert "3600 1" in found["persistence"]["evidence"]
    settings(maxmemory="0")
    assert findings(url, "--seconds", 0)["maxmemory"]["level"] == "warning"


def test_doctor_lives_with_what_is_refused(server: PrivateServer, user: str) -> None:
    url = f"redis://{user}@127.0.0.1:{server.port}"
    found = findings(url, "--seconds", 0.1)
    for topic in ("maxmemory", "eviction", "persistence", "io-threads", "clients"):
        assert found[topic]["level"] == "unseen"
        assert "no permissions" in found[topic]["evidence"]
    assert found["server version"]["level"] == "good"
    assert "GB/s" in found["throughput"]["evidence"]


NO_CLIFF = "oversize_threshold:0,dirty_decay_ms:-1"


@pytest.mark.parametrize("environment", [{}, {"MALLOC_CONF", "JE_MALLOC_CONF"}])
def test_doctor_tells_a_server_with_the_cliff_from_one_without(
    binary: ServerBinary, environment: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in environment:
        monkeypatch.setenv(name, NO_CLIFF)
    arguments = ("--maxmemory", "1gb", "--maxmemory-policy", "allkeys-lru")
    with PrivateServer(binary, *arguments) as server:
        found = findings(f"unix://{server.unix_path}", "--seconds", 0.1)
        with server.client() as plain:
            memory: Any = plain.info("memory")
            assert plain.dbsize() == 0
        cliff = found["8 MiB cliff"]
        assert "GET of 16 MiB" in cliff["evidence"]
        faults = [int(n) for n in re.findall(r"(\d+) page faults", cliff["evidence"])]
        if memory["mem_allocator"] == "libc":
            assert cliff["level"] == "note"
        elif environment:
            assert cliff["level"] == "good" and max(faults) < 50
            assert "oversize_threshold 0" in cliff["evidence"]
        else:
            assert cliff["level"] == "warning" and faults[0] < 50 < 200 < faults[1]
            assert "JE_MALLOC_CONF" in cliff["remedy"]


# --- cluster, TLS --------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterServers]:
    with ClusterServers(SERVERS[0]) as cluster:
        yield cluster


# In this order: our own descriptors to the servers are there before it looks.
@pytest.fixture
def quiet_cluster(cluster: ClusterServers) -> ClusterServers:
    cluster.flush()
    return cluster


def test_a_clusters_url_leads_to_all_of_it(quiet_cluster: ClusterServers) -> None:
    cluster = quiet_cluster
    url = f"redis://127.0.0.1:{cluster.port}"
    result = run("bench", url, *QUICK, "--seconds", 0.1, "--json")
    report = json.loads(result.stdout)
    assert report["cluster"] and len(report["rows"]) == 12
    for member in cluster.primaries:
        assert member.calls("set") > 0 and member.calls("get") > 0
        assert member.admin.dbsize() == 0
    tuned = run(
        *("tune", url, "--bytes-per-token", "4K", "--chunk-tokens", 16),
        *("--seconds", 0.1, "--batch-bytes", "256K"),
    )
    assert "fastkv.RedisCluster.from_url(" in tuned.output
    assert "fastkv.cluster: true" in tuned.output and '"cluster": true' in tuned.output
    found = findings(url, "--seconds", 0.1)
    assert found["cluster slots"]["level"] == found["cluster keys"]["level"] == "good"
    assert found["version skew"]["evidence"].startswith("3 nodes, all ")
    assert "GB/s" in found["throughput"]["evidence"]
    for i in range(2000):
        cluster.primaries[0].admin.set(f"{{{_tag(cluster)}}}{i}", "")
    assert findings(url, "--seconds", 0)["cluster keys"]["level"] == "warning"
    named = run("bench", f"unix://{cluster.primaries[0].server.unix_path}")
    assert named.exit_code == 1 and "host and port" in named.stderr


def _tag(cluster: ClusterServers) -> str:
    """Puts keys on the first node."""
    first = cluster.primaries[0]
    return next(t for t in map(str, range(1000)) if cluster.owner(t) is first)


def test_over_tls(tls_binary: ServerBinary, tmp_path: Path) -> None:
    authority = Authority(tmp_path, "authority")
    ca = authority.identity
    assert ca is not None
    mine = authority.issue("server", hosts=("localhost", "127.0.0.1"))
    with TlsServer(tls_binary, mine, ca) as server:
        url = f"rediss://127.0.0.1:{server.tls_port}"
        stranger = run("bench", url, *QUICK)
        assert stranger.exit_code == 1 and "CERTIFICATE_VERIFY" in stranger.stderr
        url += f"?ssl_ca_certs={ca.cert_file}"
        result = run(
            "bench", url, *QUICK, "--sizes", "4K,70001", "--json", "--seconds", 0.1
        )
        assert json.loads(result.stdout)["transport"] == "TLS"
        found = findings(url, "--seconds", 0.1)
        assert found["TLS"]["level"] == "note"
        assert "GB/s" in found["throughput"]["evidence"]
        with server.client() as plain:
            assert eventually(lambda: plain.dbsize() == 0)
