"""Any sequence of calls, overwrites and faults on one client, against a dict."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)
from redis.exceptions import ConnectionError, TimeoutError

from fastkv.cli.private_server import PrivateServer
from tests.conftest import eventually
from tests.faults.calls import WAYS, is_pinned, memory
from tests.faults.conftest import LONG
from tests.faults.proxy import Fault, Proxy

# The length of a key's values; those from 2048 on are read in ranges.
SIZES = {f"k{size}": size for size in (0, 1, 100, 2049, 5000, 70_000, 300_000)}

keys = st.lists(st.sampled_from(list(SIZES)), min_size=1, max_size=5, unique=True)
faults = st.builds(
    Fault,
    kind=st.sampled_from(["cut", "reset", "stall", "delay", "split"]),
    at=st.one_of(st.integers(0, 300), st.integers(0, 400_000)),
    up=st.booleans(),
    times=st.integers(1, 3),
    seconds=st.floats(0, 0.01),
    length=st.integers(1, 3000),
)


class Machine(RuleBasedStateMachine):
    """A key has one of several states when a call that was to change it has failed: the
    server may or may not have done it, or may still do it, until nothing is on its way.

    Attributes:
        proxy: Before the server.
        plain: redis-py, of the server itself.
    """

    proxy: Proxy
    plain: Any

    def __init__(self) -> None:
        super().__init__()
        self.proxy.drop_all()
        self.plain.flushall()
        #: What the key may hold. None: nothing.
        self.now: dict[str, set[bytes | None]] = {key: {None} for key in SIZES}
        #: What may come on top of it.
        self.late: dict[str, set[bytes | None]] = {key: set() for key in SIZES}
        self.given: list[tuple[bytearray, int]] = []
        self.fault = False
        self.retried = 0

    @hypothesis.stateful.initialize(
        way=st.sampled_from(list(WAYS)),
        workers=st.integers(1, 4),
        connections=st.integers(1, 4),
        range_bytes=st.sampled_from([0, 64, 4096, 65536]),
        window_bytes=st.sampled_from([1, 65536]),
        retries=st.sampled_from([0, 3, 50]),
        seed=st.integers(0, 1 << 32),
    )
    def begin(
        self,
        way: str,
        workers: int,
        connections: int,
        range_bytes: int,
        window_bytes: int,
        retries: int,
        seed: int,
    ) -> None:
        self.random = random.Random(seed)
        self.caller = WAYS[way](
            **self.proxy.kwargs,
            tile_workers=workers,
            tile_connections=connections,
            tile_range_bytes=range_bytes,
            tile_window_bytes=window_bytes,
            socket_timeout=0.2,
        )
        self.caller.retries(retries)

    def values(self, names: list[str]) -> list[bytes]:
        return [self.random.randbytes(SIZES[name]) for name in names]

    def possible(self, name: str) -> set[bytes | None]:
        return self.now[name] | self.late[name]

    def found(self, name: str, states: set[bytes | None]) -> None:
        """It was seen in one of these states."""
        assert states, f"{name} cannot be so"
        self.now[name] = states

    def call(
        self, name: str, names: list[str], *buffers: list[bytearray], **kwargs: Any
    ) -> list[bool] | None:
        """None: it failed, as it may if there was a fault."""
        result = None
        try:
            result = self.caller(f"batch_tile_{name}", names, *buffers, **kwargs)
        except (ConnectionError, TimeoutError) as error:
            # A busy machine is silent for a while, too.
            late = isinstance(error, TimeoutError) or "is unknown" in str(error)
            assert self.fault or late
            self.fault = True
        retried = self.caller.client.tile_info()["retries"]
        self.fault |= retried > self.retried
        self.retried = retried
        return result

    def give_back(self, buffers: list[bytearray]) -> None:
        """The caller does with it what it likes."""
        for buffer in buffers:
            assert not is_pinned(buffer)
            pattern = self.random.randrange(256)
            buffer[:] = bytes([pattern]) * len(buffer)
            self.given.append((buffer, pattern))

    # --- what the client does --------------------------------------------------------

    @rule(names=keys, immutable=st.booleans(), timeout=st.sampled_from([None, 0.02]))
    def get(self, names: list[str], immutable: bool, timeout: float | None) -> None:
        buffers = [memory(value) for value in self.values(names)]
        hits = self.call("get", names, buffers, immutable=immutable, timeout=timeout)
        for name, buffer, hit in zip(
            names, buffers, hits or [], strict=hits is not None
        ):
            got = bytes(buffer) if hit else None
            self.found(name, {got} & self.possible(name))
        self.give_back(buffers)

    @rule(
        names=keys,
        when=st.sampled_from([None, None, "nx", "xx"]),
        timeout=st.sampled_from([None, 0.02]),
    )
    def set(self, names: list[str], when: str | None, timeout: float | None) -> None:
        new = self.values(names)
        buffers = [memory(value) for value in new]
        options = {when: True} if when else {}
        hits = self.call("set", names, buffers, timeout=timeout, **options)
        assert buffers == new
        self.give_back(buffers)
        for i, (name, value) in enumerate(zip(names, new, strict=True)):
            fits = {
                state
                for state in self.possible(name)
                if when is None or (state is None) == (when == "nx")
            }
            if hits is None:
                # When it comes, if it does, `when` may be true.
                self.late[name].add(value)
            elif hits[i]:
                assert fits
                self.now[name] = {value}
                if self.fault:
                    self.late[name].add(value)
            else:
                assert when
                self.found(name, self.possible(name) - fits)

    @rule(names=keys)
    def exists(self, names: list[str]) -> None:
        hits = self.call("exists", names)
        for name, hit in zip(names, hits or [], strict=hits is not None):
            self.found(name, {s for s in self.possible(name) if (s is not None) == hit})

    @rule(names=keys)
    def delete(self, names: list[str]) -> None:
        hits = self.call("delete", names)
        for i, name in enumerate(names):
            was = self.possible(name)
            if self.fault:
                self.late[name].add(None)
            if hits is None:
                self.now[name] = was | {None}
                continue
            # An earlier attempt of the same call may have done it, its answer lost.
            assert any(state is not None for state in was) or not hits[i]
            assert None in was or hits[i] or self.fault
            self.now[name] = {None}

    # --- what happens to it ----------------------------------------------------------

    @rule(fault=faults)
    def strike(self, fault: Fault) -> None:
        self.fault = True
        self.proxy.inject(fault)

    @rule()
    def drop(self) -> None:
        """While idle, which is no loss."""
        self.proxy.drop_all()

    @rule(names=keys)
    def overwrite(self, names: list[str]) -> None:
        for name, value in zip(names, self.values(names), strict=True):
            self.plain.set(name, value)
            self.now[name] = {value}

    @rule()
    def resume(self) -> None:
        """What was stalled arrives, late."""
        self.proxy.heal()

    @rule()
    def heal(self) -> None:
        """Afterwards nothing is on its way: it has arrived, or is lost."""
        self.proxy.heal()
        self.proxy.inject(Fault("refuse"))
        self.proxy.drop_all()
        # The server has read all that came on them, and only we are left.
        assert eventually(lambda: self.plain.info("clients")["connected_clients"] == 1)
        self.proxy.heal()
        for name in SIZES:
            self.now[name] = self.possible(name)
            self.late[name].clear()
        self.fault = False

    @invariant()
    def memory_is_the_callers(self) -> None:
        for buffer, pattern in self.given[-20:]:
            assert buffer.count(pattern) == len(buffer), "written after the return"

    def teardown(self) -> None:
        if not hasattr(self, "caller"):
            return
        try:
            self.heal()
            self.get(list(SIZES), False, None)
            for buffer, pattern in self.given:
                assert buffer.count(pattern) == len(buffer), "written after the return"
        finally:
            self.caller.close()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_a_client_is_a_dict_whatever_the_network_does(
    own_server: PrivateServer, tmp_path: Path, transport: str
) -> None:
    target = (
        own_server.unix_path if transport == "unix" else ("127.0.0.1", own_server.port)
    )
    with own_server.client() as plain, Proxy(target, str(tmp_path)) as proxy:
        Machine.proxy, Machine.plain = proxy, plain
        run_state_machine_as_test(
            Machine,
            settings=hypothesis.settings(
                max_examples=300 if LONG else 40,
                stateful_step_count=40 if LONG else 20,
                deadline=None,
                suppress_health_check=list(hypothesis.HealthCheck),
            ),
        )
