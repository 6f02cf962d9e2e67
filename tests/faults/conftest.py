"""How long the fault tests may take, and what several of them have."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.clusters import ClusterServers
from tests.conftest import SERVERS

#: The long form, `make faults`. The short one, part of `make test`, draws fewer cases.
LONG = os.environ.get("FASTKV_FAULTS") == "long"

# Milliseconds. On a busy machine no node shall think that another one is dead.
CALM_NODES = "30000"

_BINARIES = [
    pytest.param(binary, id=str(binary))
    for binary in (SERVERS if LONG else SERVERS[:1])
] or [pytest.param(None, marks=pytest.mark.skip(reason="no server found"))]


@pytest.fixture(scope="module", params=_BINARIES)
def servers(request: pytest.FixtureRequest) -> Iterator[ClusterServers]:
    """A cluster for each module that wants one."""
    with ClusterServers(request.param, "--cluster-node-timeout", CALM_NODES) as servers:
        yield servers


@pytest.fixture(params=["tcp", "unix"])
def transport(request: pytest.FixtureRequest) -> str:
    """How the client reaches whatever stands before the server."""
    return str(request.param)
