"""The files for a GPU machine, which no test can run: that they say what is meant."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastkv.lmcache import NativeClient
from fastkv.lmcache.settings import Settings

FOLDER = Path(__file__).parents[2] / "bench/vllm_cpu"


def load(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


@pytest.fixture
def services() -> Any:
    return load("docker-compose.yml")["services"]


def test_the_multiprocess_adapter_is_ours_and_its_parameters_are_settings(
    services: Any,
) -> None:
    adapter = json.loads(option(services["lmcache"]["command"], "--l2-adapter"))
    assert adapter.pop("type") == "native_plugin"
    module = importlib.import_module(adapter.pop("module_path"))
    assert getattr(module, adapter.pop("class_name")) is NativeClient
    params = adapter.pop("adapter_params")
    assert adapter == {}
    settings = Settings.of(params["url"], {k: params[k] for k in params if k != "url"})
    assert settings.url == "redis://127.0.0.1:6379"
    # Starts threads and connects to nothing yet: a wrong argument would raise.
    NativeClient(**params).close()


def test_vllm_looks_for_lmcache_where_it_listens(services: Any) -> None:
    transfer = json.loads(option(services["vllm"]["command"], "--kv-transfer-config"))
    assert transfer["kv_connector"] == "LMCacheMPConnector"
    extra = transfer["kv_connector_extra_config"]
    server = services["lmcache"]
    assert extra["lmcache.mp.host"] == f"tcp://{option(server['command'], '--host')}"
    assert extra["lmcache.mp.port"] == 5555  # LMCache's default
    for name in ("lmcache", "vllm", "vllm-in-process"):
        assert services[name]["ipc"] == services[name]["network_mode"] == "host"
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]


def test_redis_is_a_cache_and_keeps_nothing(services: Any) -> None:
    command = services["redis"]["command"]
    assert all(isinstance(word, str) for word in command)
    assert option(command, "--maxmemory-policy") == "allkeys-lru"
    assert "gb" in option(command, "--maxmemory")
    assert option(command, "--save") == ""
    assert option(command, "--appendonly") == "no"


def test_the_in_process_plugin_is_ours_and_its_parameters_are_settings(
    services: Any,
) -> None:
    config = load("lmcache.yaml")
    assert config["remote_storage_plugins"] == ["fastkv"]
    prefix = "remote_storage_plugin.fastkv."
    extra = dict(config["extra_config"])
    assert extra.pop("save_chunk_meta") is False
    given = {key.removeprefix(prefix): value for key, value in extra.items()}
    assert given.pop("module_path") == "fastkv.lmcache"
    assert given.pop("class_name") == "FastKVAdapter"
    NativeClient(**given).close()  # takes the same
    mounts = services["vllm-in-process"]["volumes"]
    assert f"./lmcache.yaml:{_config_file(services)}:ro" in mounts


def test_lmcache_knows_every_key_of_its_file() -> None:
    config = pytest.importorskip("lmcache.v1.config")
    made = config.LMCacheEngineConfig.from_file(str(FOLDER / "lmcache.yaml"))
    for key, value in load("lmcache.yaml").items():
        assert getattr(made, key) == value


def _config_file(services: Any) -> str:
    file: str = services["vllm-in-process"]["environment"]["LMCACHE_CONFIG_FILE"]
    return file
