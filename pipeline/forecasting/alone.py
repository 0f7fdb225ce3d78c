"""What a forecast starts from where no network was measured: a run on one rank alone, or a model's name and its speed.

What one rank computes and when its buckets are ready is known, or estimated; what a step would exchange with others
follows from the model. What hosts add to the bytes on a link is not known and is taken as nothing.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.comm import forecast as pure
from pipeline.comm.all_reduce import ROUND_SECONDS, Host, Network
from pipeline.config.model import ModelConfig
from pipeline.core.errors import ConfigError
from pipeline.core.schemas.ledger import CallJson
from pipeline.forecasting.source import (
    Source,
    architecture_of,
    compute_seconds,
    measured_buckets,
    num_blocking,
    shapes_of,
    step_of,
    wire_itemsize,
)
from pipeline.models import zoo
from pipeline.reporting.runs import RunRecord

if TYPE_CHECKING:
    from torch import nn

MIB = 2**20
FIRST_BUCKET_MEGABYTES, BUCKET_MEGABYTES = 1.0, 25.0  # torch's defaults: kDefaultFirstBucketBytes, bucket_cap_mb
FORWARD_SHARE = 1 / 3
"""Of a step's multiply-adds: the backward pass has one product for the inputs and one for the weights of each layer."""
METRICS_BYTES, LIGHTNING_BYTES = 32, 8
"""Loss, hits and pictures of a step as four float64, and Lightning's int64 before every micro-batch."""


# --- a run on one rank ---


def read_alone(run: RunRecord, compute: Sequence[RunRecord] = (), round_seconds: float = ROUND_SECONDS) -> Source:
    """Return the step of a run on one rank alone, ready to be sent through links that it has not seen.

    Args:
        run: A run on one rank, its passes timed.
        compute: Runs on one rank each, made side by side, whose time to compute replaces that of `run`.
        round_seconds: Seconds of a message between two idle hosts.

    Raises:
        ConfigError: The run did not record what a forecast needs, or `compute` computed something else.
    """
    ledger, time = run.ledger, run.ledger["time"]
    batch = run.batch  # refuses what is no training of ours
    itemsize = wire_itemsize(run)
    forward, backward = time.get("forward_seconds"), time.get("backward_seconds")
    measured = measured_buckets(ledger, itemsize)
    if forward is None or backward is None or not measured:
        why = ledger["null_reasons"].get("time.forward_seconds", "it lists no bucket")
        raise ConfigError(
            f"{run.directory} does not say when its gradients are ready ({why.rstrip('.')}): repeat it with this"
            " version of the program, which times one rank alone too, with comm.meter and comm.timeline on and for at"
            " least 2 steps."
        )
    architecture = architecture_of(run)
    calls = owed_calls(
        shapes_of(architecture), [bucket.payload_bytes for bucket in measured], itemsize, batch.num_micro_batches
    )
    step = step_of(run, measured, calls, forward, backward)
    if compute:
        step = step.scaled(compute_seconds(compute, run) / step.compute_seconds)
    return Source(
        name=ledger["run"],
        model=ledger["model"],
        step=step,
        host=Host(0.0, round_seconds),
        calls=calls,
        hook=ledger["hook"],
        batch_per_rank=batch.per_rank,
        num_ranks=1,
        ranks_per_server=1,
        network=Network(None),
        architecture=architecture,
        bucket_megabytes=run.setting("comm.bucket_megabytes"),
        readiness="alone",
    )


def owed_calls(
    network: "nn.Module", bucket_bytes: Sequence[int], itemsize: int, num_micro_batches: int
) -> tuple[CallJson, ...]:
    """Return the collectives of a step of ours on several ranks, of which one rank alone issues none.

    Args:
        network: The model; its buffers are broadcast, those of one type together.
        bucket_bytes: Of each bucket, as it travels.
        itemsize: Bytes of a gradient's element on the wire.
        num_micro_batches: Before each of which Lightning broadcasts a number.
    """
    buffers: dict[int, int] = {}
    for buffer in network.buffers():
        buffers[buffer.itemsize] = buffers.get(buffer.itemsize, 0) + buffer.nbytes
    return (
        *(_call("broadcast", "buffers", size, width) for width, size in buffers.items()),
        *(_call("all_reduce", "gradients", size, itemsize) for size in bucket_bytes),
        _call("broadcast", "lightning", LIGHTNING_BYTES, 8, num_micro_batches),
        _call("all_reduce", "metrics", METRICS_BYTES, 8),
    )


def _call(op: str, origin: str, payload_bytes: int, itemsize: int, num_calls: int = 1) -> CallJson:
    root = 0 if op == "broadcast" else -1
    return {
        "op": op, "origin": origin, "payload_bytes": payload_bytes, "itemsize": itemsize, "root": root,
        "num_calls": num_calls,
    }  # fmt: skip


# --- a model that was not run ---


def estimate_source(
    model: ModelConfig,
    images_per_second: float,
    batch_per_rank: int,
    *,
    bucket_megabytes: float | None = 1.0,
    round_seconds: float = ROUND_SECONDS,
) -> Source:
    """Return the step of a model of which nothing is known but how fast one rank trains it.

    A step is 1/3 forward and 2/3 backward, of which a layer takes its share of the multiply-adds.

    Args:
        model: The model, and the pictures that it is given.
        images_per_second: Of one rank alone.
        batch_per_rank: Pictures of a step on a rank at that speed.
        bucket_megabytes: DDP's bucket_cap_mb; None: torch's default.
        round_seconds: Seconds of a message between two idle hosts.

    Raises:
        ConfigError: There is no such model, or pictures of this size do not survive it.
    """
    from pipeline.models.cost import cost

    network = shapes_of(model)
    layers = [layer for layer in cost(network, model.input.size).layers if layer.num_parameters]
    label = zoo.format_spec(model.name, model.metaparameters)
    seconds = batch_per_rank / images_per_second
    backward = (1 - FORWARD_SHARE) * seconds
    variables = estimate_variables(network, {layer.name: layer.macs for layer in layers}, backward)
    buckets = fill_buckets(variables, bucket_megabytes)
    calls = owed_calls(network, [bucket.payload_bytes for bucket in buckets], 4, 1)
    return Source(
        name=label,
        model=label,
        step=pure.Step(
            forward_seconds=FORWARD_SHARE * seconds,
            backward_seconds=backward,
            other_seconds=0.0,
            buckets=buckets,
            blocking_all_reduces=num_blocking(calls, "all_reduce"),
            blocking_broadcasts=num_blocking(calls, "broadcast"),
            variables=variables,
        ),
        host=Host(0.0, round_seconds),
        calls=calls,
        hook="none",
        batch_per_rank=batch_per_rank,
        num_ranks=1,
        ranks_per_server=1,
        network=Network(None),
        architecture=model,
        bucket_megabytes=bucket_megabytes,
        readiness="estimated",
    )


def estimate_variables(network: "nn.Module", macs: dict[str, int], backward_seconds: float) -> tuple[pure.Bucket, ...]:
    """Return the parameters from the last to the first, each ready when its layer's share of the pass is over.

    Args:
        network: The model; its modules stand in the order in which they run.
        macs: Multiply-adds of each module that has parameters of its own.
        backward_seconds: Seconds of the whole pass.
    """
    total = sum(macs.values())
    done, found = 0, list[pure.Bucket]()
    for name, module in reversed(list(network.named_modules())):
        done += macs.get(name, 0)
        ready = backward_seconds * (done / total if total else 1.0)
        own = [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
        found += [pure.Bucket(parameter.nbytes, parameter.itemsize, ready) for parameter in reversed(own)]
    return tuple(found)


def fill_buckets(variables: Sequence[pure.Bucket], bucket_megabytes: float | None) -> tuple[pure.Bucket, ...]:
    """Return DDP's buckets: parameters as they become ready, each bucket closed once it has reached its size.

    Args:
        variables: Parameters in the order in which they become ready.
        bucket_megabytes: Size of every bucket in MiB; None: torch's default, a first bucket of 1 and 25 after it.
    """
    limit = FIRST_BUCKET_MEGABYTES if bucket_megabytes is None else bucket_megabytes
    found, size = list[pure.Bucket](), 0
    for position, variable in enumerate(variables):
        size += variable.payload_bytes
        if size >= limit * MIB or position == len(variables) - 1:
            found.append(pure.Bucket(size, variable.itemsize, variable.ready_seconds))
            size, limit = 0, BUCKET_MEGABYTES if bucket_megabytes is None else bucket_megabytes
    return tuple(found)
