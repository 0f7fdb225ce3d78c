"""`ledger.json`: what a run's gradients owed, what was issued, what was sent, and whether they agree."""

from typing import Literal, NotRequired, TypedDict


class LayerJson(TypedDict):
    """What a layer's gradients weigh. Weight and bias of a module are one layer."""

    name: str
    """Dotted name of the module."""
    bytes: int
    """Bytes of its gradients in one step, before compression."""
    share: float
    """Fraction of the model's gradient bytes; the shares of all layers sum to 1."""


class BucketJson(TypedDict):
    """A bucket of gradients that DDP reduces together; its times are medians over this attempt's steps.

    Times are seconds from the start of the step's last backward pass, the only one whose gradients travel.
    """

    index: int
    """DDP's number of the bucket, from 0."""
    bytes: int
    """Bytes of its gradients, before compression."""
    num_parameters: int
    """Number of parameters in it."""
    ready_seconds: float | None
    """When DDP handed the bucket over because its gradients were complete."""
    sent_seconds: float | None
    """When its (first) all-reduce was issued, after any compression."""
    done_seconds: float | None
    """When its reduced gradients were there, decompression included."""


class CollectiveJson(TypedDict):
    """Collectives of one kind that one attempt issued, added up, as rank 0 recorded them."""

    op: str
    """Operation: `all_reduce`, `broadcast`, `barrier`, ..."""
    origin: str
    """Who asked for it: `gradients`, `buffers`, `parameters`, `metrics`, `lightning` or `other`; in a program under
    `meter` else the function that did, as `__main__.average`."""
    group: NotRequired[str]
    """The group of some of the ranks that issued it; absent: the group of all."""
    phase: str
    """Phase of the run: `startup`, `train`, `validation` or `checkpoint`."""
    attempt: int
    """Number of the attempt that issued it."""
    committed: bool
    """False: training that belongs to no committed step, so that the run's totals are without it."""
    num_calls: int
    """Number of collectives."""
    payload_bytes: int
    """Bytes of rank 0's input to all of them together."""


class MeasuredRowJson(TypedDict):
    """One phase of one attempt: bytes predicted by the wire formulas beside bytes counted by the kernel."""

    phase: str
    """Phase of the run: `startup`, `train`, `validation` or `checkpoint`."""
    committed: bool
    """False: training that belongs to no committed step."""
    predicted_bytes_per_rank: list[int] | None
    """Bytes each rank should have handed to TCP; null where a collective has no exact formula."""
    measured_bytes_per_rank: list[int]
    """Bytes each rank handed to TCP on its connections to other ranks, each byte once."""
    predicted_egress_bytes: list[int] | None
    """Of the predicted bytes, those that leave each server for another one."""
    measured_egress_bytes: list[int]
    """Of the measured bytes, those that left each server for another one."""
    residual_bytes_per_rank: list[int] | None
    """Measured minus predicted bytes of each rank; null where nothing could be predicted."""


class InterfaceJson(TypedDict):
    """The network card of a server against the connections that use it, since training was set up."""

    server: int
    """Index of the server, from 0."""
    interface: str
    """Name of the network interface that carries the job."""
    segmentation_offload: bool | None
    """Whether the kernel leaves cutting into segments to the card (TSO or GSO); null where it does not say."""
    interface_bytes: int
    """Bytes that the card sent, whoever asked for it."""
    tcp_bytes: int
    """Data bytes of the job's connections and the store's that left the server, retransmissions included."""
    header_bytes: int
    """Bytes of Ethernet, IP and TCP headers: those of a segment times the packets that the card sent."""
    retransmitted_bytes: NotRequired[int]
    """Of `tcp_bytes`, those that TCP sent again."""
    sack_bytes_at_most: NotRequired[int]
    """What else may be in TCP's headers: selective acknowledgements, at most 28 bytes a packet, which no counter of the
    kernel has. 0 where nothing was sent again, or arrived twice or out of order."""
    residual_fraction: float | None
    """Fraction of the card's bytes that the connections do not explain; null where the card sent nothing."""


class MeasuredJson(TypedDict):
    """What all ranks of an attempt had counted when they last compared."""

    num_steps: int
    """Committed steps of the run at that time."""
    rows: list[MeasuredRowJson]
    """One row for each phase in which something was sent or owed."""
    retransmitted_bytes_per_rank: list[int]
    """Bytes that each rank's TCP sent again, in all phases."""
    store_bytes_per_rank: list[int]
    """Bytes each rank sent over the ranks' store, in all phases; they are no collective's."""
    interfaces: list[InterfaceJson]
    """One row for each server whose card could be read."""


class AttemptJson(TypedDict):
    """One start of the run."""

    attempt: int
    """Number of the attempt, from 1."""
    first_step: int
    """Committed steps before it."""
    lost_payload_bytes: int | None
    """Payload bytes of its training that no committed step owns."""
    measured: MeasuredJson | None
    """What its ranks counted when they last compared; of an earlier attempt, as of its checkpoint or its last word."""


class TransportJson(TypedDict):
    """Bytes handed to TCP in all committed training steps, by rank."""

    predicted_bytes_per_rank: list[int] | None
    """Bytes by the wire formulas."""
    measured_bytes_per_rank: list[int] | None
    """Bytes by the kernel's counters (TCP_INFO), each byte once."""
    retransmitted_bytes_per_rank: list[int] | None
    """Bytes that TCP sent again, in all phases."""
    residual_bytes_per_rank: list[int] | None
    """Measured minus predicted bytes."""


class ServersJson(TypedDict):
    """Bytes that left each server for another one in all committed training steps."""

    predicted_egress_bytes: list[int] | None
    """Bytes by the wire formulas, by server."""
    measured_egress_bytes: list[int] | None
    """Bytes by the kernel's counters, by server."""
    counter: str | None
    """What `measured_egress_bytes` was read from."""
    interface: list[str] | None
    """Name of the network interface of each server that carries the job."""
    residual_fraction: list[float | None] | None
    """Fraction of each server's card's bytes that the job's connections do not explain."""


class CallJson(TypedDict):
    """A collective of one step, with all that a wire formula needs, for any number of ranks."""

    op: str
    """Operation: `all_reduce`, `broadcast`, `barrier`, ..."""
    origin: str
    """Who asked for it: `gradients`, `buffers`, `parameters`, `metrics`, `lightning` or `other`."""
    payload_bytes: int
    """Bytes of rank 0's input."""
    itemsize: int
    """Bytes per element; 1 where there is no tensor."""
    root: int
    """Root rank; -1 where the operation has none."""
    num_calls: int
    """How often the step issued it."""


class PerStepJson(TypedDict):
    """What the last committed step exchanged; validation and checkpoints are not in it."""

    payload_bytes: int | None
    """Bytes of rank 0's input to all collectives."""
    transport_bytes_per_rank: list[int] | None
    """Bytes each rank hands to TCP, by the wire formulas."""
    server_egress_bytes: list[int] | None
    """Bytes that leave each server for another one, by the wire formulas."""
    calls: list[CallJson] | None
    """Every collective of the step as rank 0 issued it."""


class StepSecondsJson(TypedDict):
    """Seconds of an optimiser step, data included."""

    p50: float | None
    """Median in seconds."""
    p90: float | None
    """90th percentile in seconds."""


class TimeJson(TypedDict):
    """Times of a step in this attempt; medians over its steps unless they say otherwise; but
    with comm.period, where most steps exchange nothing, means.
    """

    step_seconds: StepSecondsJson
    """Seconds of a whole step."""
    data_wait_seconds: float | None
    """Seconds a step waits for data, mean over the steps."""
    forward_seconds: float | None
    """Seconds in the forward passes of all micro-batches, without what they waited for other ranks."""
    backward_seconds: float | None
    """Seconds in the backward passes of all micro-batches: computation only."""
    communication_seconds: float | None
    """Seconds in which something was being exchanged, overlapping exchanges counted once."""
    exposed_seconds: float | None
    """Seconds of communication in which the rank did nothing else."""
    overlapped_seconds: float | None
    """Seconds of communication that the rank spent computing."""
    bus_bandwidth_bytes_per_second: float | None
    """Payload of the gradient buckets over the time they were under way, times 2(n-1)/n, as nccl-tests defines it."""


class LedgerJson(TypedDict):
    """`ledger.json`: the accounts of a run over all its attempts, as rank 0 keeps them."""

    schema: Literal[1]
    """Version of this format."""
    closed: bool | None
    """Whether every rank sent exactly the bytes that the recorded collectives explain; null: not compared."""
    run: str
    """Name of the run."""
    model: str
    """Name of the model."""
    backend: str
    """Backend of the process group: `gloo` or `nccl`; `none` where there is no group."""
    algorithm: str | None
    """All-reduce algorithm behind the prediction: `ring`, or NCCL's pinned algorithm and protocol."""
    hook: str
    """Gradient compression (`comm.hook`)."""
    world_size: int
    """Number of ranks."""
    num_servers: int
    """Number of servers."""
    server_of_rank: list[int]
    """Index of each rank's server, from 0."""
    placement: Literal["measured", "assumed"]
    """`measured`: by the ranks' hosts; `assumed`: each rank is taken as a server of its own."""
    num_steps: int
    """Committed optimiser steps over all attempts."""
    global_batch: int | None
    """Pictures per step over all ranks."""
    gradient_bytes: int | None
    """Bytes of gradients that the model owes per step, before compression."""
    layers: list[LayerJson]
    """Gradient bytes by layer, in the model's order."""
    buckets: list[BucketJson]
    """DDP's buckets by index."""
    collectives: list[CollectiveJson]
    """Every collective of every attempt, added up by kind."""
    attempts: list[AttemptJson]
    """Every start of the run, in order."""
    transport: TransportJson
    """Bytes by rank, committed steps only."""
    servers: ServersJson
    """Bytes by server, committed steps only."""
    per_step: PerStepJson
    """The last committed step."""
    time: TimeJson
    """Times of a step."""
    meter_overhead_fraction: float | None
    """Fraction of a step that rank 0 spends in the meter's own code, of a program under `meter`; null in a training,
    where a benchmark measures it."""
    null_reasons: dict[str, str]
    """Why a value is null, by its dotted path (`buckets.0.ready_seconds`)."""
