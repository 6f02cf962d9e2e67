"""The arithmetic of docs/scaling.md, held against closed forms. No server."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench import scaling_model as model
from bench.scaling_model import GBIT, KIB, MIB, Fleet

TRIALS = 40_000


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1)


@pytest.mark.parametrize(("cap", "expected"), [(5, 20), (10, 10), (7, 15), (200, 1)])
def test_streams_fill_the_link_and_one_fewer_does_not(cap: int, expected: int) -> None:
    count = model.streams(100 * GBIT, cap * GBIT)
    assert count == expected
    assert count * cap >= 100 > (count - 1) * cap


@pytest.mark.parametrize("rtt", [0.1e-3, 0.5e-3, 2e-3, 20e-3])
@pytest.mark.parametrize("cap", [5 * GBIT, 10 * GBIT])
def test_a_window_reaches_the_cap_and_one_range_less_does_not(
    cap: float, rtt: float
) -> None:
    window = model.window(cap, rtt)
    assert model.connection_rate(cap, rtt, window) == cap
    if window > model.RANGE:
        assert model.connection_rate(cap, rtt, window - model.RANGE) < cap


def test_a_window_between_two_ranges_counts_as_the_next() -> None:
    rates = [model.connection_rate(1e15, 1e-3, w * KIB) for w in (513, 1024)]
    assert rates == pytest.approx([MIB / 1e-3] * 2)


def test_two_requests_hide_a_round_trip_of_one_values_time() -> None:
    value, cap = MIB, 100e6
    assert model.two_requests_rate(cap, value / cap, value) == pytest.approx(cap)
    assert model.two_requests_rate(cap, 3 * value / cap, value) == pytest.approx(
        cap / 2
    )


def test_lookups_are_bound_by_round_trip_servers_or_client() -> None:
    assert model.lookups(1, 1, client=1e9) == pytest.approx(1024, rel=1e-3)
    assert model.lookups(3, 0, client=1e9, server=2e6) == pytest.approx(6e6)
    assert model.lookups(100, 1e-3, client=3e6) == 3e6


def test_the_slowest_of_n_exponentials_takes_the_harmonic_number(
    rng: np.random.Generator,
) -> None:
    for n in (1, 4, 30):
        loads = np.ones((TRIALS, n), np.int64)
        slowest = model.service_times(loads, 2.0, 1.0, rng).max(axis=1)
        harmonic = sum(1 / i for i in range(1, n + 1))
        assert slowest.mean() == pytest.approx(2 * harmonic, rel=0.02)


def test_times_have_the_mean_and_jitter_asked_for(rng: np.random.Generator) -> None:
    times = model.service_times(np.full((TRIALS, 1), 9), 1.0, 0.3, rng)
    assert times.mean() == pytest.approx(9, rel=0.01)
    assert times.std() == pytest.approx(0.3 * math.sqrt(9), rel=0.03)


def test_a_batch_over_two_nodes_waits_for_the_fuller_one(
    rng: np.random.Generator,
) -> None:
    keys, value, rate = 32, MIB, 1e9
    times = model.batch_times(Fleet(2, rate), keys, value, TRIALS, rng)
    fuller = keys / 2 + keys * math.comb(keys, keys // 2) / 2 ** (keys + 1)
    assert model.fullest(keys, 2, TRIALS, rng) == pytest.approx(fuller, rel=0.01)
    assert times.mean() == pytest.approx(fuller * value / rate, rel=0.01)


def test_a_replica_halves_what_a_slow_server_has_to_do(
    rng: np.random.Generator,
) -> None:
    alone = model.batch_times(Fleet(1, 1e9, slow=4), 32, MIB, 10, rng)
    helped = model.batch_times(Fleet(1, 1e9, slow=4, replicas=1), 32, MIB, 10, rng)
    assert helped == pytest.approx(alone / 2)


def test_no_key_is_lost_between_replicas(rng: np.random.Generator) -> None:
    loads = model.random_loads(37, 5, 100, rng)
    for replicas in (0, 1, 2):
        parts = model.split_over_replicas(loads, replicas)
        assert parts.shape == (100, 5, 1 + replicas)
        assert (parts.sum(axis=2) == loads).all() and (parts >= 0).all()


def test_the_clients_link_and_the_parts_count(rng: np.random.Generator) -> None:
    fleet = Fleet(1, 1e12, rtt=1.0, link=1e6, part_seconds=0.5)
    times = model.batch_times(fleet, 4, 10**6, 3, rng)
    assert times == pytest.approx([5.5] * 3)


@pytest.mark.parametrize(("chunks", "nodes"), [(32, 4), (32, 100), (1, 8)])
def test_usable_prefix_is_what_trials_say(
    chunks: int, nodes: int, rng: np.random.Generator
) -> None:
    tried = model.prefixes_after_loss(chunks, nodes, TRIALS, rng)
    assert tried.mean() == pytest.approx(model.usable_prefix(chunks, nodes), rel=0.02)


def test_a_cluster_client_divides_and_leaves_no_node_without() -> None:
    for total, nodes in ((4, 3), (20, 6), (4, 100)):
        each = [max(1, total // nodes + (i < total % nodes)) for i in range(nodes)]
        assert model.in_cluster(total, nodes) == sum(each)
