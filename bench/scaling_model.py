"""The arithmetic of docs/scaling.md: what a deployment of any size needs, and how long
its batches take.

Bytes, seconds, and bytes per second throughout. Knows no server and no clock:
`scaling_check` holds it against what can be measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

KIB, MIB = 1 << 10, 1 << 20
GBIT = 1e9 / 8

# What one core does, bench/README.md: TCP over loopback, GET. Put yours.
CLIENT_CPU = 0.156e-9  # seconds a byte: 6.4 GB/s a worker
SERVER_CPU = 0.289e-9  # 3.5 GB/s a server, whose commands run on one thread
CLIENT_LOOKUPS = 2.8e6  # keys/s of one batch at a time
SERVER_LOOKUPS = 2.8e6

# fastkv's: fastkv/{options,node}.py, fastkv_ext/cpp/session.hpp, stream.cpp.
RANGE = 512 * KIB
WINDOW = 512 * KIB
WINDOW_REQUESTS = 1024
SCRATCH = 64 * KIB
LOW_WATER = 128 * KIB  # a connection wakes for no fewer bytes of a value

Loads = npt.NDArray[np.int64]
Times = npt.NDArray[np.float64]


# --- one client, one link ------------------------------------------------------------


def streams(link: float, flow_cap: float) -> int:
    """Connections that fill a link when a network caps each flow."""
    return math.ceil(link / flow_cap)


def cores(rate: float, cpu: float) -> int:
    """Cores, of workers or of servers, that a rate keeps busy."""
    return math.ceil(rate * cpu)


def window(rate: float, rtt: float, range_bytes: int = RANGE) -> int:
    """The least window, in whole ranges, with which a connection reaches ``rate``."""
    return math.ceil((rate * rtt + LOW_WATER) / range_bytes) * range_bytes


def connection_rate(
    flow_cap: float, rtt: float, window: int = WINDOW, piece: int = RANGE
) -> float:
    """Of one connection that reads pieces: ranges, or values that are read whole.

    It asks for the next piece when fewer than ``window`` bytes are unread. That is when
    it wakes because a piece begins to arrive, so the piece that stands
    ``ceil(window / piece)`` behind that one is on its way a round trip later.
    """
    turn = rtt + min(piece, LOW_WATER) / flow_cap
    return min(flow_cap, math.ceil(window / piece) * piece / turn)


def two_requests_rate(flow_cap: float, rtt: float, value: int) -> float:
    """Of one connection whose window is smaller than a value that is read whole.

    Two are always on their way, and the next is asked for when one has arrived.
    """
    return min(flow_cap, 2 * value / (rtt + value / flow_cap))


def lookups(
    nodes: int,
    rtt: float,
    client: float = CLIENT_LOOKUPS,
    server: float = SERVER_LOOKUPS,
) -> float:
    """Keys/s of one client. Each node has one connection for them, and what is on its
    way there comes back as one burst: the server idles meanwhile.
    """
    return min(client, nodes / (rtt / WINDOW_REQUESTS + 1 / server))


def client_memory(connections: int) -> int:
    """Of the process, beside the caller's buffers."""
    return connections * SCRATCH


def unread_memory(connections: int, window: int, range_bytes: int = RANGE) -> int:
    """At most so many bytes were asked for and not read: in the server's replies, its
    socket buffers, the network, and the client's socket buffers together. (Half a range
    more for each connection if the values are no multiples of one.)
    """
    return connections * (window + range_bytes)


# --- many nodes ----------------------------------------------------------------------


def in_cluster(total: int, nodes: int) -> int:
    """Workers, or connections that carry values, of a cluster client: those asked for
    are divided, and no node goes without.
    """
    return max(total, nodes)


def parts_until_fixed_cost(batch: float, link: float, part_seconds: float) -> float:
    """Nodes at which handing out a batch takes as long as moving its bytes."""
    return batch / (link * part_seconds)


def usable_prefix(chunks: int, nodes: int) -> float:
    """Mean number of chunks before the first that was on a lost node.

    A prompt's cache is used up to its first miss, and its chunks lie on random nodes.
    """
    return (nodes - 1) * (1 - (1 - 1 / nodes) ** chunks)


@dataclass(frozen=True)
class Fleet:
    """The servers of a cluster, as one client sees them.

    Attributes:
        nodes: Primaries, each with the same share of keys.
        rate: Bytes/s from one server.
        rtt: Seconds.
        link: Bytes/s into the client.
        slow: So many times longer takes the first server, a primary.
        replicas: Of each primary; its keys are read from them and it in equal parts.
        jitter: Standard deviation of a key's time, as a part of its mean.
        part_seconds: To hand one server its part of a batch.
    """

    nodes: int
    rate: float
    rtt: float = 0.0
    link: float = math.inf
    slow: float = 1.0
    replicas: int = 0
    jitter: float = 0.0
    part_seconds: float = 0.0


def random_loads(keys: int, nodes: int, trials: int, rng: np.random.Generator) -> Loads:
    """How many keys of a batch each node has, of shape ``(trials, nodes)``."""
    return rng.multinomial(keys, np.full(nodes, 1 / nodes), trials)


def fullest(keys: int, nodes: int, trials: int, rng: np.random.Generator) -> float:
    """Mean number of a batch's keys on the node that has most of them."""
    return float(random_loads(keys, nodes, trials, rng).max(axis=1).mean())


def split_over_replicas(loads: Loads, replicas: int) -> Loads:
    """Of shape ``(..., 1 + replicas)``: equal stretches; the last may be short."""
    share = -(-loads // (1 + replicas))
    begins = share[..., None] * np.arange(1 + replicas)
    return np.clip(loads[..., None] - begins, 0, share[..., None])


def service_times(
    loads: Loads, key_seconds: float, jitter: float, rng: np.random.Generator
) -> Times:
    """For a server to deliver so many keys, one after the other."""
    times: Times = loads.astype(np.float64)
    if jitter > 0:
        # The sum of n gamma variables of one scale is one of n times their shape.
        times = rng.gamma(times / jitter**2) * jitter**2
    return times * key_seconds


def times_of_loads(
    fleet: Fleet, loads: Loads, value: int, rng: np.random.Generator
) -> Times:
    """Seconds until the last key of each batch is there, of ``(batches, nodes)``."""
    servers = split_over_replicas(loads, fleet.replicas)
    times = service_times(servers, value / fleet.rate, fleet.jitter, rng)
    times[:, 0, 0] *= fleet.slow
    parts = np.count_nonzero(servers, axis=(1, 2))
    through_link = loads.sum(axis=1) * value / fleet.link
    last = np.maximum(times.max(axis=(1, 2)), through_link)
    batches: Times = fleet.rtt + parts * fleet.part_seconds + last
    return batches


def batch_times(
    fleet: Fleet, keys: int, value: int, trials: int, rng: np.random.Generator
) -> Times:
    """The same for batches of so many random keys."""
    loads = random_loads(keys, fleet.nodes, trials, rng)
    return times_of_loads(fleet, loads, value, rng)


def prefixes_after_loss(
    chunks: int, nodes: int, trials: int, rng: np.random.Generator
) -> Loads:
    """Chunks before the first on a lost node, by trial rather than by formula."""
    lost = rng.integers(0, nodes, (trials, chunks)) == 0
    return np.where(lost.any(axis=1), lost.argmax(axis=1), chunks)
