"""How long the fault tests may take."""

from __future__ import annotations

import os

import pytest

#: The long form, `make faults`. The short one, part of `make test`, draws fewer cases.
LONG = os.environ.get("FASTKV_FAULTS") == "long"


@pytest.fixture(params=["tcp", "unix"])
def transport(request: pytest.FixtureRequest) -> str:
    """How the client reaches whatever stands before the server."""
    return str(request.param)
