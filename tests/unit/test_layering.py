"""Dependencies point one way."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# What each part may include or import, of ours. Later layers may use earlier ones only.
CPP = {
    "status": set(),
    "fd": set(),
    "resp": {"status", "fd"},
    "ranged_value": {"status"},
    "slots": set(),
    "session": {"status", "fd", "resp", "ranged_value"},
    "session_ranges": {"session"},
    "stream": {"status", "fd"},
    "tls": {"status", "fd", "stream"},
    "tls_missing": {"tls"},
    "completion_queue": {"status", "fd"},
    "batch": {"status", "fd", "resp", "session", "slots", "completion_queue"},
    "stats": {"status", "session", "slots", "batch"},
    "inbox": {"fd", "batch", "stream"},
    "schedule": {"status", "fd", "batch", "completion_queue", "stats", "inbox"},
    "worker": {"status", "fd", "session", "stream", "batch", "inbox", "schedule"},
    "engine": {
        "status",
        "fd",
        "batch",
        "completion_queue",
        "schedule",
        "stats",
        "stream",
        "worker",
    },
}
PYTHON = {
    "_version": set(),
    "_core": set(),
    "errors": {"_core"},
    "buffers": {"_core"},
    "commands": {"_core", "buffers", "errors"},
    "tls": {"_core", "errors"},
    "awaited": set(),
    "log": set(),
    "connector": {"_core", "_version", "awaited", "errors", "log", "shielded", "tls"},
    "forking": set(),
    "options": set(),
    "shielded": set(),
    "telemetry": {"_core", "connector"},
    "node": {
        *("_core", "commands", "connector", "errors", "forking", "log", "options"),
        *("shielded", "telemetry"),
    },
    "info": {"_core"},
    "registry": {
        *("_core", "connector", "forking", "info", "log", "node", "options"),
        "shielded",
    },
    "refresher": {"errors", "log", "shielded"},
    "rounds": {"_core", "commands", "errors", "info", "node", "refresher"},
    "topology": {
        *("_core", "connector", "info", "node", "options", "refresher", "registry"),
        "rounds",
    },
    "tiles": {"_core", "buffers", "commands", "node"},
    "pooled": {"_core", "node", "options", "registry"},
    "client": {"_core", "info", "node", "options", "pooled", "registry", "tiles"},
    "cluster": {
        *("_core", "connector", "node", "options", "refresher", "rounds", "tiles"),
        "topology",
    },
    "sentinel": {"client", "options"},
    "asyncio": {
        *("_core", "buffers", "commands", "connector", "info", "node", "options"),
        *("pooled", "refresher", "registry", "rounds", "topology"),
    },
    "metrics": {"info"},
    "lmcache": {
        *("_core", "client", "cluster", "commands", "connector", "errors", "info"),
        *("log", "metrics", "node", "refresher", "rounds", "shielded"),
    },
    # The command line stands on top and uses the package as its users do, too.
    "cli": {"", "_version", "_core", "options"},
}


def test_cpp_files_include_what_the_table_allows() -> None:
    files = sorted((ROOT / "fastkv_ext/cpp").glob("*.?pp"))
    assert {file.stem for file in files} == set(CPP)
    for file in files:
        included = set(re.findall(r'#include "(\w+)\.hpp"', file.read_text()))
        assert included - {file.stem} <= CPP[file.stem], file


def test_protocol_files_know_no_sockets_threads_or_clocks() -> None:
    forbidden = re.compile(
        r"<(thread|mutex|chrono|sys/socket\.h|unistd\.h|sys/epoll\.h)>"
    )
    for stem in ("resp", "ranged_value", "slots", "session"):
        for suffix in ("hpp", "cpp"):
            text = (ROOT / f"fastkv_ext/cpp/{stem}.{suffix}").read_text()
            assert not forbidden.search(text), stem


def test_workers_never_touch_python() -> None:
    for file in (ROOT / "fastkv_ext").rglob("*.[cphx]*"):
        assert "with gil" not in file.read_text(), file


def test_python_modules_import_what_the_table_allows() -> None:
    for file in sorted((ROOT / "fastkv").rglob("*.py")):
        part = file.relative_to(ROOT / "fastkv").parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        used = set()
        for item in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(item, ast.ImportFrom) and item.module:
                names = [item.module]
                if item.module == "fastkv":
                    names = [f"fastkv.{alias.name}" for alias in item.names]
            elif isinstance(item, ast.Import):
                names = [alias.name for alias in item.names]
            used |= {
                n.removeprefix("fastkv").strip(".").split(".")[0]
                for n in names
                if n.split(".")[0] == "fastkv"
            }
        public = used - set(PYTHON)  # names of the package itself
        used = (used & set(PYTHON)) | ({""} if public else set())
        assert used - {part} <= PYTHON[part], file
