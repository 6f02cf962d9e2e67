"""What a user of `fastkv tune` pastes where."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from fastkv.cli.contest import Gain
from fastkv.cli.target import Target

_PLUGIN = "remote_storage_plugin.fastkv."


def pastes(target: Target, result: Mapping[str, Any]) -> dict[str, str]:
    """By what it is, with the gain it brings."""
    choice = result["candidate" if result["recommended"] else "usual"]
    settings: dict[str, int] = choice["settings"]
    alone, together = "", ""
    if result["recommended"]:
        loads, stores = Gain(**result["loads"]), Gain(**result["stores"])
        together = f": loads {loads}, stores {stores}"
        if result["settings"]:
            alone = f": loads {Gain(**result['settings'])}"
    if not settings:
        alone = ": the defaults are best here"
    kind = "RedisCluster" if target.cluster else "Redis"
    arguments = "".join(f", {name}={value}" for name, value in settings.items())
    query = "&".join(f"{name}={value}" for name, value in settings.items())
    blocks = {
        f"Python{alone}": f'fastkv.{kind}.from_url("{target.shown}"{arguments})',
        f"URL{alone}": target.shown + (f"?{query}" if query else ""),
    }
    tokens = choice["chunk_tokens"]
    adapter = {
        "type": "native_plugin",
        "module_path": "fastkv.lmcache",
        "class_name": "NativeClient",
        "adapter_params": {**_connection(target), **settings},
    }
    server = f"lmcache server --chunk-size {tokens} --l2-adapter"
    blocks[f"LMCache in vLLM, YAML{together}"] = _yaml(target, tokens, settings)
    blocks[f"LMCache server, JSON{together}"] = f"{server} '{json.dumps(adapter)}'"
    return blocks


def _connection(target: Target) -> dict[str, Any]:
    """LMCache logs its configuration, so a password does not stand in it."""
    given: dict[str, Any] = {"url": target.shown}
    if target.cluster:
        given["cluster"] = True
    if target.has_password:
        user = urlsplit(target.url).username
        if user:
            given["username"] = user
        given["password_env"] = "REDIS_PASSWORD"
    return given


def _yaml(target: Target, tokens: int, settings: Mapping[str, int]) -> str:
    lines = [
        f"chunk_size: {tokens}",
        'remote_storage_plugins: ["fastkv"]',
        "extra_config:",
        f"  {_PLUGIN}module_path: fastkv.lmcache",
        f"  {_PLUGIN}class_name: FastKVAdapter",
    ]
    for name, value in {**_connection(target), **settings}.items():
        written = "true" if value is True else value
        lines.append(f"  {_PLUGIN}{name}: {written}")
    return "\n".join([*lines, "  save_chunk_meta: false"])
