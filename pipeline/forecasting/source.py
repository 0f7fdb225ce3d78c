"""A measured run read back for a forecast: what a rank computes and sends, and what its link and hosts add to that."""

import statistics
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

from pipeline.comm import forecast as pure
from pipeline.comm.all_reduce import ROUND_SECONDS, Host, Network
from pipeline.config.hooks import ITEMSIZES
from pipeline.config.model import ModelConfig
from pipeline.core.errors import ConfigError
from pipeline.core.schemas.ledger import CallJson, LedgerJson
from pipeline.core.typed import require
from pipeline.core.units import bits_per_second
from pipeline.reporting.runs import RunRecord

if TYPE_CHECKING:
    from torch import nn

NUM_CLASSES = 1000  # ImageNet's
Readiness = Literal["measured", "alone", "estimated"]
"""How it is known when buckets are ready: from ranks that exchanged them, from one alone, from a model's layers."""


@dataclass(frozen=True)
class Source:
    """A measured run, or what stands for one, ready to be asked about other clusters."""

    name: str
    model: str
    step: pure.Step
    host: Host
    calls: tuple[CallJson, ...]
    """Collectives of a step, as its ledger lists them."""
    hook: str
    batch_per_rank: int
    """Pictures of one micro-batch on a rank."""
    num_ranks: int
    ranks_per_server: int
    network: Network
    architecture: ModelConfig
    bucket_megabytes: float | None
    """comm.bucket_megabytes."""
    readiness: Readiness = "measured"

    @property
    def global_batch(self) -> int:
        """Pictures of a step over all ranks."""
        return self.num_ranks * self.batch_per_rank * self.step.num_micro_batches

    @cached_property
    def shapes(self) -> "nn.Module":
        """The network without memory."""
        return shapes_of(self.architecture)


def architecture_of(run: RunRecord) -> ModelConfig:
    """Return what a run's configuration says of its network."""
    told = run.config["model"]
    keys = ("name", "num_classes", "allow_code", "metaparameters")
    return ModelConfig(**{key: told[key] for key in keys if key in told})


def shapes_of(architecture: ModelConfig) -> "nn.Module":
    """Return a network without memory; of ImageNet's classes where it says no number."""
    from pipeline.models import zoo

    num_classes = architecture.num_classes or NUM_CLASSES
    return zoo.build_shapes(
        architecture.name, num_classes, allow_code=architecture.allow_code, **architecture.metaparameters
    )


def read_source(
    run: RunRecord,
    measured_bandwidth: str | None,
    compute: Sequence[RunRecord] = (),
    round_seconds: float = ROUND_SECONDS,
) -> Source:
    """Return the measured step of `run`.

    Args:
        run: A run on at least 2 ranks, its buckets timed.
        measured_bandwidth: Bandwidth of its links, if the run itself does not tell (a lab's does).
        compute: Runs on one rank each, made side by side, whose time to compute replaces that of `run`.
        round_seconds: Seconds of a message between two idle hosts.

    Raises:
        ConfigError: the run did not measure what a forecast needs, or `compute` computed something else.
    """
    if run.is_local:
        raise ConfigError(f"{run.rounds_sentence}: a forecast needs a run that exchanged gradients in every step.")
    ledger = run.ledger
    times, calls = _require_times(run), ledger["per_step"].get("calls")
    itemsize = wire_itemsize(run)
    if calls is None:
        raise ConfigError(
            f"{run.directory} does not list the collectives of a step: repeat it with this version of the program."
        )
    network = Network(_link_of(run, measured_bandwidth))
    measured = measured_buckets(ledger, itemsize)
    step = step_of(run, measured, calls, times.forward_seconds, times.backward_seconds, times.exposed_seconds)
    placement = ledger["server_of_rank"]
    host = pure.fit_host(measured, "ring", placement, network, round_seconds)
    step, host = pure.calibrated(step, host, placement, network, times.exposed_seconds)
    if compute:
        step = step.scaled(compute_seconds(compute, run) / step.compute_seconds)
    return Source(
        name=ledger["run"],
        model=ledger["model"],
        step=step,
        host=host,
        calls=tuple(calls),
        hook=ledger["hook"],
        batch_per_rank=run.batch.per_rank,
        num_ranks=ledger["world_size"],
        ranks_per_server=ledger["world_size"] // ledger["num_servers"] or 1,
        network=network,
        architecture=architecture_of(run),
        bucket_megabytes=run.setting("comm.bucket_megabytes"),
    )


def step_of(
    run: RunRecord,
    measured: Sequence[pure.MeasuredBucket],
    calls: Sequence[CallJson],
    forward_seconds: float,
    backward_seconds: float,
    exposed_seconds: float = 0.0,
) -> pure.Step:
    """Return the step of a run as it was timed.

    Args:
        run: The run.
        measured: Its buckets.
        calls: Collectives of a step on several ranks.
        forward_seconds: Of its forward passes.
        backward_seconds: Of its backward passes, without waiting.
        exposed_seconds: Waiting for communication.

    Raises:
        ConfigError: It recorded no step time.
    """
    if run.step_seconds is None:
        raise ConfigError(f"{run.directory} recorded no step time: a forecast needs at least 2 steps.")
    itemsize = wire_itemsize(run)
    known_seconds = forward_seconds + backward_seconds + exposed_seconds
    wait_seconds = run.ledger["time"]["data_wait_seconds"] or 0.0
    return pure.Step(
        forward_seconds=forward_seconds,
        backward_seconds=backward_seconds,
        other_seconds=max(0.0, run.step_seconds - wait_seconds - known_seconds),
        buckets=tuple(pure.Bucket(bucket.payload_bytes, itemsize, bucket.ready_seconds) for bucket in measured),
        num_micro_batches=run.batch.num_micro_batches,
        blocking_all_reduces=num_blocking(calls, "all_reduce"),
        blocking_broadcasts=num_blocking(calls, "broadcast"),
        variables=variables_of(run.ledger, measured, itemsize),
    )


@dataclass(frozen=True)
class _Times:
    """Seconds of a step that a forecast starts from."""

    forward_seconds: float
    backward_seconds: float
    exposed_seconds: float


def _require_times(run: RunRecord) -> _Times:
    """Return the run's times of a step, or refuse a run that has none."""
    ledger, time = run.ledger, run.ledger["time"]
    assert run.global_batch  # else refused: no training of ours
    forward, backward, exposed = (time.get(f"{name}_seconds") for name in ("forward", "backward", "exposed"))
    if ledger["world_size"] < 2 or forward is None or not ledger.get("buckets"):
        why = ledger["null_reasons"].get("time.forward_seconds", "one rank alone")
        raise ConfigError(
            f"{run.directory} did not time its buckets ({why}): a forecast needs a run of at least 2 ranks with"
            " comm.meter and comm.timeline on."
        )
    assert backward is not None and exposed is not None  # the timeline knows all three or none
    return _Times(forward, backward, exposed)


def wire_itemsize(run: RunRecord) -> int:
    """Return the bytes of a gradient's element on the wire.

    Raises:
        ConfigError: They depend on the layers' shapes.
    """
    itemsize = ITEMSIZES.get(run.ledger["hook"])
    if itemsize is None:
        raise ConfigError(
            f"{run.directory} was made with comm.hook={run.ledger['hook']}: a forecast needs a run with none, fp16 or"
            " bf16."
        )
    return itemsize


def measured_buckets(ledger: LedgerJson, itemsize: int) -> list[pure.MeasuredBucket]:
    """Return the buckets that were timed, as they travelled."""
    measured = []
    for bucket in ledger["buckets"]:
        ready, sent, done = (bucket.get(f"{name}_seconds") for name in ("ready", "sent", "done"))
        if ready is not None and sent is not None and done is not None:
            payload_bytes = round(bucket["bytes"] * itemsize / 4)
            measured.append(pure.MeasuredBucket(payload_bytes, itemsize, ready, sent, done))
    return measured


def variables_of(ledger: LedgerJson, buckets: Sequence[pure.MeasuredBucket], itemsize: int) -> tuple[pure.Bucket, ...]:
    """Return each layer's parameters from the last to the first, ready with the bucket in which they end.

    Args:
        ledger: Of the run, its layers in the model's order.
        buckets: As they were timed, filled from the last layer on.
        itemsize: Bytes of a gradient's element on the wire.
    """
    ends = list(accumulate(bucket.payload_bytes for bucket in buckets))
    found, end = list[pure.Bucket](), 0
    for layer in reversed(ledger["layers"]):
        size = layer["bytes"] * itemsize // 4
        end += size
        bucket = buckets[min(bisect_left(ends, end), len(buckets) - 1)]
        found.append(pure.Bucket(size, itemsize, bucket.ready_seconds))
    return tuple(found)


def num_blocking(calls: Sequence[CallJson], op: str) -> int:
    """Count the small exchanges of a step that it waits for."""
    return sum(call["num_calls"] for call in calls if call["op"] == op and call["origin"] != "gradients")


def _link_of(run: RunRecord, measured_bandwidth: str | None) -> float | None:
    """Return the bandwidth of a server's link in the measured run, None where nothing limited it."""
    lab = run.environment.get("lab")
    if measured_bandwidth is not None:
        require(not lab, f"measured_bandwidth={measured_bandwidth}: {run.directory} ran in a lab, which tells itself.")
        return bits_per_second(measured_bandwidth)
    if lab:
        return lab["bandwidth_bits_per_second"]
    require(
        run.ledger["num_servers"] == 1 or run.ledger["placement"] == "assumed",
        f"{run.directory} ran on {run.ledger['num_servers']} servers and does not know their links: give"
        " measured_bandwidth=, such as 10gbit.",
    )
    return None  # all ranks on one machine, loopback


def compute_seconds(runs: Sequence[RunRecord], run: RunRecord) -> float:
    """Return the seconds of a step of ranks that run side by side, without data: the median of the slowest one's.

    Ranks that exchange gradients wait for the slowest in every step, which is another one each time.
    """
    for compute in runs:
        _refuse_other_conditions(compute, run)
    slowest = [max(steps) for steps in zip(*map(_steady_steps, runs), strict=False)]  # the shortest run's steps
    require(bool(slowest), f"compute_runs={[str(one.directory) for one in runs]}: one of them recorded no second step.")
    return statistics.median(slowest)


def _steady_steps(run: RunRecord) -> list[float]:
    """Return the seconds of each recorded step but the first, less its wait for data."""
    seconds, waited = (run.series(f"perf/{name}_seconds")[1][1:] for name in ("step", "data_wait"))
    return [step - wait for step, wait in zip(seconds, waited, strict=True)]


def _refuse_other_conditions(compute: RunRecord, run: RunRecord) -> None:
    """Raise `ConfigError` where `compute` computed something else than one rank of `run`."""
    require(
        compute.ledger["world_size"] == 1,
        f"compute_runs: {compute.directory} has {compute.ledger['world_size']} ranks, it must be a run on one rank.",
    )
    for what, here, there in (
        ("model", run.ledger["model"], compute.ledger["model"]),
        ("batch of a rank", run.batch.per_rank, compute.batch.per_rank),
        ("number of micro-batches", run.batch.num_micro_batches, compute.batch.num_micro_batches),
        ("crop", run.setting("data.size"), compute.setting("data.size")),
        ("arithmetic", run.recorded("arithmetic"), compute.recorded("arithmetic")),
    ):
        require(
            here == there, f"compute_runs: the {what} of {compute.directory} is {there}, that of the run is {here}."
        )
