"""No memory, no descriptors: an error in time, and then it works again."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import time

import pytest

from tests.faults.conftest import LONG
from tests.faults.held import RANGED_BYTES, HeldServer
from tests.faults.native import built
from tests.faults.short_of_memory_shim import SHIM


class Server(HeldServer):
    """Has what tests.faults.short_of_memory asks for."""

    def __init__(self) -> None:
        super().__init__(1)
        self.data |= {
            b"plain": bytes(i * i % 253 for i in range(5000)),
            b"ranged": bytes(i * i % 251 for i in range(RANGED_BYTES)),
        }
        self.errors[b"wrong"] = b"WRONGTYPE of a value"

    def answer(self, connection: socket.socket, command: list[bytes]) -> bool:
        if command[1:2] == [b"lost"]:
            return False
        if command[1:2] == [b"late"]:
            time.sleep(0.01)  # the slow server itself, no wait for something
        return super().answer(connection, command)


@pytest.mark.parametrize("kind", ["one new", "all news", "one object"])
def test_each_allocation_may_fail(kind: str) -> None:
    step = 1 if LONG else 7
    at = random.randint(1, step)
    with Server() as server:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "tests.faults.short_of_memory", built(SHIM)),
                *(kind, str(server.port), str(step), str(at)),
            ],
            capture_output=True,
            text=True,
            timeout=100,
        )
    assert done.returncode == 0, f"step {step} from {at}\n{done.stderr[-5000:]}"
    assert int(done.stdout) > 50
