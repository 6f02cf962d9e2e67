"""Which of redis-py's tests run, and against what. All that does not run stands here.

A test that runs and fails with plain redis-py too (it wants a newer server, say) needs
no place here: it does not count.
"""

from __future__ import annotations

from dataclasses import dataclass

# Not run in either mode: pytest's arguments, and why.
EXCLUDED: dict[str, str] = {
    "-m not redismod": "wants Redis Stack on a second port",
    "-m not cp_integration": "wants an Entra ID tenant",
    "-m not multidb_integration": "wants a second cluster from docker-compose",
    "--ignore=tests/test_scenario": "wants Redis Enterprise and a fault injector",
    "--ignore=tests/test_asyncio/test_scenario": "likewise",
}


@dataclass(frozen=True)
class Part:
    """Files of redis-py's tests, and the kind of server that they run against."""

    name: str
    cluster: bool
    paths: tuple[str, ...]

    @property
    def arguments(self) -> list[str]:
        """pytest's, for all tests of this part."""
        marks = ["not onlynoncluster" if self.cluster else "not onlycluster"]
        rest = []
        for argument in EXCLUDED:
            if argument.startswith("-m "):
                marks.append(argument.removeprefix("-m "))
            else:
                rest.append(argument)
        return ["-m", " and ".join(marks), *rest]


ALL = (
    Part("standalone", cluster=False, paths=("tests",)),
    Part("cluster", cluster=True, paths=("tests",)),
)

# What `make test` runs of it, a minute: what makes clients, pools and connections, and
# what a client gives (pipelines, subscriptions, locks, Sentinel's clients, caches).
FAST = Part(
    "fast",
    cluster=False,
    paths=(
        "tests/test_cache.py",
        "tests/test_client.py",
        "tests/test_commands.py",
        "tests/test_connection_pool.py",
        "tests/test_credentials.py",
        "tests/test_defaults.py",
        "tests/test_driver_info.py",
        "tests/test_encoding.py",
        "tests/test_event.py",
        "tests/test_legacy_responses_arg.py",
        "tests/test_lock.py",
        "tests/test_max_connections_error.py",
        "tests/test_monitor.py",
        "tests/test_multiprocessing.py",
        "tests/test_pipeline.py",
        "tests/test_retry.py",
        "tests/test_scripting.py",
        "tests/test_sentinel.py",
        "tests/test_sentinel_managed_connection.py",
        "tests/test_utils.py",
        "tests/test_asyncio/test_client.py",
        "tests/test_asyncio/test_connection_pool.py",
        "tests/test_asyncio/test_credentials.py",
        "tests/test_asyncio/test_encoding.py",
        "tests/test_asyncio/test_pipeline.py",
        "tests/test_asyncio/test_retry.py",
        "tests/test_asyncio/test_scripting.py",
        "tests/test_asyncio/test_sentinel.py",
        "tests/test_asyncio/test_usage_counter.py",
        "tests/test_asyncio/test_utils.py",
    ),
)
