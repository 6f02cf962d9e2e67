"""Batches in redis-py's OpenTelemetry metrics, where the user has switched those on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from fastkv._core import Command

if TYPE_CHECKING:
    from fastkv.connector import Pool

try:
    from redis.observability.providers import get_observability_instance
    from redis.observability.recorder import (
        record_error_count,
        record_operation_duration,
    )
except ImportError:  # redis-py before 7.2
    get_observability_instance = None  # type: ignore[assignment]


def record(
    command: int,
    find_pool: Callable[[], Pool | None],
    began: float,
    error: Exception | None,
) -> None:
    """Tell of a batch that is over.

    As OpenTelemetry has it for batches of one operation, its name is ``BATCH GET``: it
    must not count as one GET among redis-py's.

    Args:
        command: What it did, a `Command`.
        find_pool: Gives what knows where the server is, unless it is gone.
        began: `time.monotonic` at its start.
        error: What it raises.
    """
    if get_observability_instance is None:
        return
    if get_observability_instance().get_provider_manager() is None:
        return
    pool = find_pool()
    if pool is None:
        return
    kwargs = pool.connection_kwargs
    host, port = kwargs.get("host") or kwargs.get("path"), kwargs.get("port")
    record_operation_duration(
        command_name=f"BATCH {Command(command).name}",
        duration_seconds=time.monotonic() - began,
        server_address=host,
        server_port=port,
        db_namespace=str(kwargs.get("db", 0)),
        error=error,
    )
    if error is not None:
        record_error_count(
            server_address=host,
            server_port=port,
            network_peer_address=host,
            network_peer_port=port,
            error_type=error,
            is_internal=False,
        )
