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
    parameter_server  all workers to the server, then back: its card carries n payloads in, then n out; of several
                      servers each holds whole variables, and the step waits for the card that is done last, a
                      holder's or a worker's, which every variable crosses

n ranks on m servers. What one all-reduce asks of cards and switches is in all_reduce.py.
What the model leaves out: other traffic on the links, congestion inside a switch, ranks that differ from one another.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pipeline.comm.all_reduce import AllReduce, Host, Network, all_reduce, depth, through_workers
from pipeline.comm.wire.gloo import NotDerivable


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
    variables: tuple[Bucket, ...] = ()
    """The parameters as parameter servers place them, each whole, in the order in which they become ready."""

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
            **self._each(lambda bucket: replace(bucket, ready_seconds=bucket.ready_seconds * factor)),
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
            **self._each(
                lambda bucket: replace(bucket, payload_bytes=round(bucket.payload_bytes * factor), itemsize=itemsize)
            ),
        )

    def _each(self, change: Callable[[Bucket], Bucket]) -> dict[str, tuple[Bucket, ...]]:
        """Return what is sent, each part changed."""
        return {"buckets": tuple(map(change, self.buckets)), "variables": tuple(map(change, self.variables))}


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
    parameter_servers: int = 1,
) -> StepForecast | NotDerivable:
    """Forecast the step on a cluster.

    Args:
        step: The step without the network.
        algorithm: One of ALGORITHMS.
        server_of_rank: Index of each rank's server, from 0.
        network: The servers' links.
        host: What an all-reduce costs beyond its bytes.
        measured_ranks: Number of ranks of the run from which `step` and `host` come.
        parameter_servers: How many share the variables, where `algorithm` is that of parameter servers.

    Returns:
        The forecast, or why the algorithm does not fit the cluster.
    """
    placement = tuple(server_of_rank)
    last_ready = max((bucket.ready_seconds for bucket in step.buckets), default=0.0)
    held = queues(step, algorithm, parameter_servers)
    # Whoever holds them, all variables cross the card of every server with workers.
    crossing = [(queue, False) for queue in held] + ([(step.variables, True)] if len(held) > 1 else [])
    end, busy, egress = 0.0, 0.0, 0
    for queue, is_of_workers in crossing:
        end_here, busy_here, egress_here = 0.0, 0.0, 0
        for bucket in queue:
            found = all_reduce(algorithm, bucket.payload_bytes, bucket.itemsize, placement, network.servers_per_rack)
            if isinstance(found, NotDerivable):
                return found
            if is_of_workers:
                found = through_workers(found, placement)
            start = max(bucket.ready_seconds, end_here)
            end_here = _end(found, start, last_ready, network, host)
            busy_here += end_here - start
            egress_here += found.egress_bytes
        end, busy, egress = max(end, end_here), max(busy, busy_here), max(egress, egress_here)
    waiting = 0.0
    if len(placement) > 1:
        # As in the measured run, each round delayed by the latency, and the rounds that it did not have.
        rounds = _blocking_rounds(step, algorithm, placement)
        more = max(0, rounds - _blocking_rounds(step, "ring", range(measured_ranks)))
        waiting = step.waiting_seconds + rounds * network.latency_seconds + more * host.seconds_per_round
    exposed = max(0.0, end - last_ready) + waiting
    return StepForecast(step.compute_seconds + exposed, exposed, busy + waiting, egress)


def queues(step: Step, algorithm: str, parameter_servers: int) -> list[tuple[Bucket, ...]]:
    """Return what travels one after the other: the buckets, or each parameter server's own variables.

    In the order of the model, each variable goes whole to the server that holds least so far, as in tf_cnn_benchmarks
    (`ParamServerDeviceSetter` in variable_mgr.py).
    """
    if algorithm != "parameter_server" or parameter_servers == 1:
        return [step.buckets]
    assert step.variables
    held = [0] * parameter_servers
    placed: list[list[Bucket]] = [[] for _ in held]
    for variable in reversed(step.variables):  # which stand in the order of the backward pass
        server = held.index(min(held))
        held[server] += variable.payload_bytes
        placed[server].append(variable)
    return [tuple(reversed(own)) for own in placed]


def _end(found: AllReduce, start: float, last_ready: float, network: Network, host: Host) -> float:
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
    return step.blocking_all_reduces * found.num_messages + step.blocking_broadcasts * depth(len(server_of_rank))


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
