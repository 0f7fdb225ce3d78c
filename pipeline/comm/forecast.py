"""From one measured step to steps elsewhere: other links, servers, algorithms, compressions and batches. Pure.

The model. A rank computes forward and backward; while it computes backward, DDP hands over buckets of gradients, bucket
i at its measured time. A server's card carries one bucket after the other: bucket i starts when it is ready and the one
before it is done. Cards that divide themselves among several buckets end no later and no earlier, so for the end of the
step the order does not matter. What is left of the last bucket when the backward pass ends is exposed.

    done_i  = max(ready_i, done_(i-1)) + seconds_i
    exposed = max(0, done_last - ready_last) + waits
    step    = forward + backward + exposed + the rest (optimiser, records); no wait for data

The waits are for small exchanges and for ranks that are late: what the measured run exposed beyond its buckets.

An all-reduce takes the time its bytes need through the busiest server's card, plus for each of its rounds the link's
latency and what a message costs between two idle hosts. While a rank still computes, its own work on the bytes (copies,
sums, TCP) competes with that and adds what the measured run shows of it; afterwards the link is what takes the time:

    ring              2(n-1) rounds; bytes exactly as gloo sends them
    hierarchical      2(m-1) rounds between servers; rings inside a server cost what the hosts' work costs
    tree              up and down level by level, a level when the one below is done: FireCaffe's reduction tree
                      (arXiv 1511.00175), not the pipelined double tree of NCCL
    halving_doubling  2 log2(m) rounds between servers
    parameter_server  all workers to the server, then back: its card carries n payloads in, then n out

n ranks on m servers. Bytes come from wire/gloo.py (ring) and wire/algorithms.py (the others), frame headers are added.
What the model leaves out: other traffic on the links, congestion inside the switch, ranks that differ from one another.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from pipeline.comm.wire import algorithms, gloo
from pipeline.comm.wire.gloo import Links, NotDerivable

FRAME_HEADER_BYTES = 66  # Ethernet 14, IPv4 20, TCP with timestamps 32
SEGMENT_BYTES = 1448  # data in a frame of 1,500 bytes
HEADER_SHARE = FRAME_HEADER_BYTES / SEGMENT_BYTES
ALGORITHMS = algorithms.PLANS
ROUND_SECONDS = 1e-4
"""Of one round of a small gloo all-reduce between hosts that do nothing else (python -m benchmarks.forecast)."""


@dataclass(frozen=True, slots=True)
class Network:
    """Every server's link to a switch that is never the limit."""

    bandwidth_bits_per_second: float | None
    """In each direction; None: never the limit."""
    latency_seconds: float = 0.0
    """One way, on top of what the measured run had."""

    def seconds(self, num_bytes: float) -> float:
        """Return the seconds that `num_bytes` handed to TCP take through one card in one direction, frames included."""
        if self.bandwidth_bits_per_second is None:
            return 0.0
        return 8 * num_bytes * (1 + HEADER_SHARE) / self.bandwidth_bits_per_second


@dataclass(frozen=True, slots=True)
class Host:
    """What an all-reduce costs beyond its bytes on the link."""

    seconds_per_byte: float = 0.0
    """Seconds per byte that the busiest rank hands on while it also computes."""
    seconds_per_round: float = 0.0
    """Seconds of a message so small that only its way through two hosts counts."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Gradients handed over together."""

    payload_bytes: int
    """Bytes as they travel, after compression."""
    itemsize: int
    ready_seconds: float
    """Seconds from the start of the step's last backward pass until the bucket is complete."""


@dataclass(frozen=True, slots=True)
class Step:
    """One rank's optimiser step without the network."""

    forward_seconds: float
    """Seconds of the forward passes of all micro-batches."""
    backward_seconds: float
    other_seconds: float
    """Seconds of the optimiser, metrics and records: everything but passes, exchanges and the wait for data."""
    buckets: tuple[Bucket, ...]
    num_micro_batches: int = 1
    blocking_all_reduces: int = 0
    """Number of small all-reduces that a step waits for: metrics."""
    blocking_broadcasts: int = 0
    """Number of broadcasts that a step waits for: buffers, Lightning's own."""
    waiting_seconds: float = 0.0
    """Seconds that the measured run waited for those exchanges and for ranks that were late."""

    @property
    def compute_seconds(self) -> float:
        """Seconds that one rank alone would take."""
        return self.forward_seconds + self.backward_seconds + self.other_seconds

    def scaled(self, factor: float) -> "Step":
        """Return a step that computes `factor` times as long and sends the same bytes."""
        return replace(
            self,
            forward_seconds=self.forward_seconds * factor,
            backward_seconds=self.backward_seconds * factor,
            other_seconds=self.other_seconds * factor,
            buckets=tuple(replace(bucket, ready_seconds=bucket.ready_seconds * factor) for bucket in self.buckets),
        )

    def with_batch(self, factor: float) -> "Step":
        """Return a step of `factor` times as many pictures: passes grow in proportion, the rest does not."""
        return replace(self.scaled(factor), other_seconds=self.other_seconds)

    def accumulating(self, num_micro_batches: int) -> "Step":
        """Return a step of so many micro-batches of the measured size; gradients travel with the last one."""
        factor = num_micro_batches / self.num_micro_batches
        return replace(
            self,
            forward_seconds=self.forward_seconds * factor,
            backward_seconds=self.backward_seconds * factor,
            num_micro_batches=num_micro_batches,
        )

    def compressed(self, factor: float, itemsize: int) -> "Step":
        """Return a step whose buckets travel as `factor` of their bytes; (de)compressing takes no time."""
        return replace(
            self,
            buckets=tuple(
                replace(bucket, payload_bytes=round(bucket.payload_bytes * factor), itemsize=itemsize)
                for bucket in self.buckets
            ),
        )


@dataclass(frozen=True, slots=True)
class StepForecast:
    """One optimiser step elsewhere."""

    step_seconds: float
    exposed_seconds: float
    """Seconds spent waiting for buckets, small exchanges and late ranks."""
    communication_seconds: float
    """Seconds in which the cards are busy with buckets, and those spent waiting."""
    egress_bytes: int
    """Gradient bytes that the busiest server sends to others, gloo's message headers included for its ring."""


def forecast(
    step: Step,
    algorithm: str,
    server_of_rank: Sequence[int],
    network: Network,
    host: Host,
    measured_ranks: int = 2,
) -> StepForecast | NotDerivable:
    """Forecast the step on a cluster.

    Args:
        step: The step without the network.
        algorithm: One of ALGORITHMS.
        server_of_rank: Index of each rank's server, from 0.
        network: The servers' links.
        host: What an all-reduce costs beyond its bytes.
        measured_ranks: Number of ranks of the run from which `step` and `host` come.

    Returns:
        The forecast, or why the algorithm does not fit the cluster.
    """
    placement = tuple(server_of_rank)
    end, busy, egress = 0.0, 0.0, 0
    last_ready = max((bucket.ready_seconds for bucket in step.buckets), default=0.0)
    for bucket in step.buckets:
        found = all_reduce(algorithm, bucket.payload_bytes, bucket.itemsize, placement)
        if isinstance(found, NotDerivable):
            return found
        start = max(bucket.ready_seconds, end)
        end = _end(found, start, last_ready, network, host)
        busy += end - start
        egress += found.egress_bytes
    waiting = 0.0
    if len(placement) > 1:
        # As in the measured run, each round delayed by the latency, and the rounds that it did not have.
        rounds = _blocking_rounds(step, algorithm, placement)
        more = max(0, rounds - _blocking_rounds(step, "ring", range(measured_ranks)))
        waiting = step.waiting_seconds + rounds * network.latency_seconds + more * host.seconds_per_round
    exposed = max(0.0, end - last_ready) + waiting
    return StepForecast(step.compute_seconds + exposed, exposed, busy + waiting, egress)


def _end(found: "AllReduce", start: float, last_ready: float, network: Network, host: Host) -> float:
    """Return when an all-reduce that starts at `start` is done; until `last_ready` ranks compute as well."""
    alone = found.seconds(network, host)
    together = alone + found.host_bytes * host.seconds_per_byte
    if start >= last_ready:
        return start + alone
    if start + together <= last_ready:
        return start + together
    return last_ready + (1 - (last_ready - start) / together) * alone


def _blocking_rounds(step: Step, algorithm: str, server_of_rank: Sequence[int]) -> int:
    """Count the rounds of a step's small exchanges: all-reduces by `algorithm`, broadcasts down a binomial tree."""
    found = all_reduce(algorithm, 4, 4, tuple(server_of_rank))
    assert isinstance(found, AllReduce)  # buckets have gone this way before
    return step.blocking_all_reduces * found.num_messages + step.blocking_broadcasts * _depth(len(server_of_rank))


def _depth(num_ranks: int) -> int:
    """Return the depth of a binary tree over so many ranks: ceil(log2(num_ranks))."""
    return (num_ranks - 1).bit_length()


# --- one all-reduce ---


@dataclass(frozen=True, slots=True)
class AllReduce:
    """What one all-reduce asks of cards and hosts."""

    card_bytes: int
    """Bytes through the busiest card in one direction, one phase after the other."""
    egress_bytes: int
    """Bytes out of the busiest server."""
    payload_bytes: int
    num_rounds: int
    """Number of rounds between servers that follow one another."""
    num_messages: int
    """Number of rounds, those inside servers included."""
    num_ranks: int

    @property
    def host_bytes(self) -> float:
        """Bytes that the busiest rank hands on: those across its card, no less than a ring's share of the payload."""
        return max(self.card_bytes, 2 * (self.num_ranks - 1) / self.num_ranks * self.payload_bytes)

    def seconds(self, network: Network, host: Host) -> float:
        """Return the seconds from the first byte to the last, on hosts that do nothing else."""
        return (
            network.seconds(self.card_bytes)
            + self.num_rounds * network.latency_seconds
            + self.num_messages * host.seconds_per_round
        )


@lru_cache(maxsize=4096)
def all_reduce(
    algorithm: str, payload_bytes: int, itemsize: int, server_of_rank: tuple[int, ...]
) -> AllReduce | NotDerivable:
    """Return what one all-reduce asks of cards and hosts, or why it cannot be done that way.

    Args:
        algorithm: One of ALGORITHMS.
        payload_bytes: Bytes of one rank's input.
        itemsize: Bytes per element.
        server_of_rank: Index of each rank's server, from 0.
    """
    num_ranks = len(server_of_rank)
    num_servers = len(set(server_of_rank))
    if num_ranks == 1:
        return AllReduce(0, 0, payload_bytes, 0, 0, 1)
    if algorithm == "ring":
        found: Links | NotDerivable = gloo.gloo_ring_all_reduce(payload_bytes, itemsize, num_ranks)
    else:
        found = algorithms.links(algorithm, payload_bytes, itemsize, server_of_rank)
    if isinstance(found, NotDerivable):
        return found
    placed = algorithms.placed(algorithm, server_of_rank)
    egress = max(gloo.egress_bytes_per_server(found, placed))
    match algorithm:
        case "ring":
            card = egress
            rounds = messages = 2 * (num_ranks - 1)
        case "hierarchical":
            card, rounds = egress, 2 * (num_servers - 1)
            messages = rounds + 2 * (num_ranks // num_servers - 1)
        case "halving_doubling":
            card, rounds, messages = egress, 2 * _depth(num_servers), 2 * _depth(num_ranks)
        case "tree":
            levels = tree_levels(num_ranks, server_of_rank)
            card, rounds, messages = 2 * payload_bytes * sum(levels), 2 * len(levels), 2 * _depth(num_ranks)
        case _:  # a parameter server: all in, then all out
            card = 2 * egress
            rounds = messages = 2
    return AllReduce(card, egress, payload_bytes, rounds if num_servers > 1 else 0, messages, num_ranks)


def tree_levels(num_ranks: int, server_of_rank: Sequence[int]) -> list[int]:
    """Count the payloads through the busiest card at each level of the tree that crosses servers, from the leaves up.

    Rank r's parent is (r - 1) // 2; level k holds ranks 2^k - 1 to 2^(k+1) - 2.
    """
    levels: list[int] = []
    first = 1
    while first < num_ranks:
        received: dict[int, int] = {}
        sent: dict[int, int] = {}
        for rank in range(first, min(2 * first + 1, num_ranks)):
            here, there = server_of_rank[rank], server_of_rank[(rank - 1) // 2]
            if here != there:
                sent[here] = sent.get(here, 0) + 1
                received[there] = received.get(there, 0) + 1
        levels.append(max([*sent.values(), *received.values()], default=0))
        first = 2 * first + 1
    return [level for level in reversed(levels) if level]


# --- from the measured run ---


@dataclass(frozen=True, slots=True)
class MeasuredBucket:
    """One bucket of the measured run; times are seconds from the start of the last backward pass."""

    payload_bytes: int
    itemsize: int
    ready_seconds: float
    sent_seconds: float
    done_seconds: float


def fit_host(
    buckets: Sequence[MeasuredBucket],
    algorithm: str,
    server_of_rank: Sequence[int],
    network: Network,
    seconds_per_round: float,
) -> Host:
    """Fit the hosts' work on all-reduces while they also compute.

    It is what those all-reduces that ended before the last bucket was ready took beyond bytes and rounds on the link of
    the measured run, by bytes: charged to rounds, of which a ring of a thousand ranks has a thousand times as many, it
    would forecast what was never measured. Buckets under way at the same time share the card, so their time is that of
    all of them together.

    Args:
        buckets: The measured run's buckets.
        algorithm: By which they were reduced.
        server_of_rank: Index of each rank's server in the measured run, from 0.
        network: The measured run's links.
        seconds_per_round: Seconds of a small message between two idle hosts.
    """
    placement = tuple(server_of_rank)
    busy, end, explained, num_bytes = 0.0, 0.0, 0.0, 0.0
    last_ready = max((bucket.ready_seconds for bucket in buckets), default=0.0)
    for bucket in sorted(buckets, key=lambda bucket: bucket.sent_seconds):
        found = all_reduce(algorithm, bucket.payload_bytes, bucket.itemsize, placement)
        assert isinstance(found, AllReduce), found
        if bucket.done_seconds > last_ready:
            break
        busy += max(0.0, bucket.done_seconds - max(end, bucket.sent_seconds))
        end = max(end, bucket.done_seconds)
        explained += network.seconds(found.card_bytes) + found.num_messages * seconds_per_round
        num_bytes += found.host_bytes
    return Host(max(0.0, busy - explained) / num_bytes if num_bytes else 0.0, seconds_per_round)


def calibrated(
    step: Step, host: Host, server_of_rank: Sequence[int], network: Network, exposed_seconds: float
) -> tuple[Step, Host]:
    """Return step and host such that the forecast of the measured run itself exposes what was measured.

    What buckets do not explain becomes the step's `waiting_seconds`. Where they explain too much, the hosts' work was
    seen on the first buckets alone and is less on the others.

    Args:
        step: The measured step without the network.
        host: What `fit_host` found.
        server_of_rank: Index of each rank's server in the measured run, from 0.
        network: The measured run's links.
        exposed_seconds: Seconds that the measured run waited for communication.
    """

    def explained(seconds_per_byte: float) -> float:
        tried = replace(host, seconds_per_byte=seconds_per_byte)
        found = forecast(step, "ring", server_of_rank, network, tried, len(server_of_rank))
        assert isinstance(found, StepForecast)  # a ring
        return found.exposed_seconds

    low, high = 0.0, host.seconds_per_byte
    if explained(high) > exposed_seconds:
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if explained(middle) > exposed_seconds else (middle, high)
        host = replace(host, seconds_per_byte=low)
    waiting = max(0.0, exposed_seconds - explained(host.seconds_per_byte))
    return replace(step, waiting_seconds=waiting), host
