"""What `fastkv doctor` says, and its rules for one server: from facts to evidence and
remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastkv.cli.facts import Refused, ServerFacts
from fastkv.cli.terminal import size_label

GOOD, NOTE, WARNING, PROBLEM, UNSEEN = "good", "note", "warning", "problem", "unseen"
_MIB = 1 << 20
_LARGEST = 128 * _MIB  # a chunk of KV cache


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        level: `GOOD`; `NOTE` is worth knowing; `WARNING` costs throughput or safety;
            `PROBLEM` makes loads or stores fail; `UNSEEN` could not be looked at.
        topic: What was looked at.
        evidence: What was found.
        remedy: What to do, or nothing.
    """

    level: str
    topic: str
    evidence: str
    remedy: str = ""

    @classmethod
    def unseen(cls, topic: str, refused: Refused) -> Finding:
        return cls(UNSEEN, topic, f"could not look: {refused.why}")


def check_servers(servers: Sequence[ServerFacts]) -> Iterator[Finding]:
    """What is the same on all servers is said once."""
    for topic, source, rule in _RULES:
        found: dict[Finding, list[str]] = {}
        for server in servers:
            facts = getattr(server, source)
            if isinstance(facts, Refused):
                finding = Finding.unseen(topic, facts)
            else:
                level, evidence, *remedy = rule(facts, server)
                finding = Finding(level, topic, evidence, *remedy)
            found.setdefault(finding, []).append(server.name)
        for finding, names in found.items():
            if len(found) > 1:
                where = ", ".join(names)
                finding = replace(finding, evidence=f"{where}: {finding.evidence}")
            yield finding


def _bytes(text: str | int) -> str:
    return size_label(int(text))


# --- rules: facts -> level, evidence, remedy -----------------------------------------

_Verdict = tuple[str, ...]


def _version(version: str, _: ServerFacts) -> _Verdict:
    name, number = version.split(" ", 1)
    major = int(number.split(".")[0])
    if (name, major) < ("Redis", 7):
        return WARNING, version, "fastkv is tested with Redis 7.0 and later: upgrade"
    return GOOD, version


def _threads(config: Mapping[str, str], _: ServerFacts) -> _Verdict:
    threads = config.get("io-threads", "1")
    evidence = f"io-threads {threads}"
    if threads == "1":
        return (
            NOTE,
            f"{evidence}: one thread copies every byte to its socket",
            "with idle cores and several connections, start the server with "
            "--io-threads 4 and compare by fastkv bench",
        )
    return GOOD, evidence


def _maxmemory(info: Mapping[str, Any], _: ServerFacts) -> _Verdict:
    used, most = info["used_memory"], info["maxmemory"]
    if not most:
        total = info["total_system_memory"]
        return (
            WARNING,
            f"maxmemory 0, {_bytes(used >> 20 << 20)} used of "
            f"{_bytes(total >> 20 << 20)}: the kernel will end a server that grows on",
            f"CONFIG SET maxmemory {total * 3 // 4 >> 20}mb (three quarters of its "
            "machine: replies need room too)",
        )
    return GOOD, f"maxmemory {_bytes(most)}, {used / most:.0%} used"


def _policy(info: Mapping[str, Any], _: ServerFacts) -> _Verdict:
    policy = info["maxmemory_policy"]
    if policy == "noeviction":
        return (
            WARNING if not info["maxmemory"] else PROBLEM,
            "maxmemory-policy noeviction: when it is full, every store fails (OOM)",
            "CONFIG SET maxmemory-policy allkeys-lru",
        )
    if policy.startswith("volatile"):
        return (
            NOTE,
            f"maxmemory-policy {policy}: only keys with an expiry are evicted",
            "store with ex=, or LMCache's chunks with ttl; else allkeys-lru",
        )
    return GOOD, f"maxmemory-policy {policy}"


def _bulk_length(config: Mapping[str, str], _: ServerFacts) -> _Verdict:
    length = int(config.get("proto-max-bulk-len", _LARGEST))
    evidence = f"proto-max-bulk-len {_bytes(length)}: no value can be larger"
    if length < _LARGEST:
        remedy = f"CONFIG SET proto-max-bulk-len {512 * _MIB}"
        return PROBLEM if length < 32 * _MIB else WARNING, evidence, remedy
    return GOOD, evidence


def _query_buffer(config: Mapping[str, str], _: ServerFacts) -> _Verdict:
    limit = int(config.get("client-query-buffer-limit", 1 << 30))
    evidence = f"client-query-buffer-limit {_bytes(limit)}: ends who stores more"
    if limit < _LARGEST:
        return PROBLEM, evidence, f"CONFIG SET client-query-buffer-limit {1 << 30}"
    return GOOD, evidence


def _output_buffer(config: Mapping[str, str], _: ServerFacts) -> _Verdict:
    words = config.get("client-output-buffer-limit", "normal 0 0 0").split()
    at = words.index("normal")
    limits = words[at + 1 : at + 4]
    evidence = f"client-output-buffer-limit normal {' '.join(limits)}"
    remedy = 'CONFIG SET client-output-buffer-limit "normal 0 0 0"'
    if any(0 < int(limit) < _LARGEST for limit in limits[:2]):
        ends = f"{evidence}: ends clients with larger values in their replies"
        return WARNING, ends, remedy
    if config.get("maxmemory-clients", "0") != "0":
        return (
            WARNING,
            f"maxmemory-clients {config['maxmemory-clients']}: ends the clients with "
            "the largest buffers, which are those that move KV caches",
            "CONFIG SET maxmemory-clients 0",
        )
    return GOOD, f"{evidence}, maxmemory-clients 0"


def _persistence(config: Mapping[str, str], server: ServerFacts) -> _Verdict:
    if (
        not isinstance(server.info, Refused)
        and server.info.get("rdb_last_bgsave_status") == "err"
    ):
        return (
            PROBLEM,
            "the last snapshot failed: stores are refused (MISCONF) while snapshots "
            "are on",
            'CONFIG SET save ""',
        )
    on, off = [], []
    if config.get("save"):
        on.append(f'save "{config["save"]}": snapshots, which copy what changes')
        off.append('CONFIG SET save ""')
    if config.get("appendonly") == "yes":
        on.append("appendonly yes: every value goes to disk as well")
        off.append("CONFIG SET appendonly no")
    if on:
        return WARNING, "; ".join(on), "for a cache: " + ", ".join(off)
    return GOOD, 'save "", appendonly no: a cache keeps nothing'


def _clients(info: Mapping[str, Any], server: ServerFacts) -> _Verdict:
    connected = info["connected_clients"]
    most = int(info.get("maxclients", 10000))
    evidence = f"maxclients {most:,}, {connected:,} connected"
    remedy = "raise maxclients (and the server's ulimit -n), or tile_connections less"
    refused = info.get("rejected_connections", 0)
    if refused:
        return WARNING, f"{evidence}, {refused:,} refused since its start", remedy
    if connected > 0.8 * most:
        return WARNING, evidence, remedy
    return GOOD, evidence


_Rule = Callable[[Any, ServerFacts], _Verdict]
_RULES: Sequence[tuple[str, str, _Rule]] = (
    ("server version", "version", _version),
    ("io-threads", "config", _threads),
    ("maxmemory", "info", _maxmemory),
    ("eviction", "info", _policy),
    ("value length", "config", _bulk_length),
    ("query buffer", "config", _query_buffer),
    ("output buffer", "config", _output_buffer),
    ("persistence", "config", _persistence),
    ("clients", "info", _clients),
)


def check_cluster(
    servers: Sequence[ServerFacts], slots: Mapping[str, int]
) -> Iterator[Finding]:
    """Versions side by side, and who has how much.

    Args:
        servers: All of the cluster.
        slots: That each primary owns.
    """
    versions: dict[str, list[str]] = {}
    for server in servers:
        versions.setdefault(server.version, []).append(server.name)
    if len(versions) > 1:
        parts = [f"{v} on {', '.join(names)}" for v, names in versions.items()]
        remedy = "upgrade the older ones; the slowest node holds up every batch"
        yield Finding(WARNING, "version skew", "; ".join(parts), remedy)
    else:
        evidence = f"{len(servers)} nodes, all {servers[0].version}"
        yield Finding(GOOD, "version skew", evidence)
    yield _slots(slots)
    yield _keys([server for server in servers if server.primary])


def _slots(slots: Mapping[str, int]) -> Finding:
    evidence = ", ".join(f"{name} {count:,}" for name, count in slots.items())
    missing = 16384 - sum(slots.values())
    if missing:
        evidence = f"{missing:,} slots are nobody's; {evidence}"
        remedy = "redis-cli --cluster fix HOST:PORT"
        return Finding(PROBLEM, "cluster slots", evidence, remedy)
    if max(slots.values()) > 1.25 * 16384 / len(slots):
        remedy = "redis-cli --cluster rebalance HOST:PORT"
        return Finding(WARNING, "cluster slots", evidence, remedy)
    return Finding(GOOD, "cluster slots", evidence)


def _keys(primaries: Sequence[ServerFacts]) -> Finding:
    counts = {}
    for server in primaries:
        if isinstance(server.keys, Refused):
            return Finding.unseen("cluster keys", server.keys)
        counts[server.name] = server.keys
    evidence = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    total = sum(counts.values())
    # Of a few keys, some node has more by chance.
    if total > 1000 and max(counts.values()) > 1.5 * total / len(counts):
        remedy = "rebalance slots, and look for hash tags, which put keys together"
        return Finding(WARNING, "cluster keys", evidence, remedy)
    return Finding(GOOD, "cluster keys", evidence)
