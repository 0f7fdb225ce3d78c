"""A measured run read back for a forecast: what a rank computes and sends, and what its link and hosts add to that."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.comm import forecast as pure
from pipeline.config.training import BatchConfig
from pipeline.core.typed import require
from pipeline.core.units import bits_per_second
from pipeline.report.runs import RunRecord, flat

ITEMSIZES = {"none": 4, "fp16": 2, "bf16": 2}
"""Bytes of a gradient's element on the wire, by comm.hook."""


@dataclass(frozen=True)
class Source:
    """A measured run, ready to be asked about other clusters."""

    name: str
    model: str
    step: pure.Step
    host: pure.Host
    calls: tuple[dict[str, Any], ...]
    """`per_step.calls` of its ledger."""
    hook: str
    batch_per_rank: int
    """Of one micro-batch."""
    num_ranks: int
    ranks_per_server: int
    network: pure.Network


def read_source(
    run: RunRecord,
    measured_bandwidth: str | None,
    compute: Sequence[RunRecord] = (),
    round_seconds: float = pure.ROUND_SECONDS,
) -> Source:
    """The measured step of `run`.

    measured_bandwidth: of its link, if the run itself does not tell (a lab's does). compute: runs on one rank each,
    made side by side, whose time to compute replaces that of `run`. round_seconds: of a message between two idle hosts.

    Raises:
        ConfigError: the run did not measure what a forecast needs, or `compute` computed something else.
    """
    ledger, time = run.ledger, run.ledger["time"]
    name = str(run.directory)
    require(
        ledger["world_size"] >= 2 and time.get("forward_seconds") is not None and bool(ledger.get("buckets")),
        f"{name} did not time its buckets ({ledger['null_reasons'].get('time.forward_seconds', 'one rank alone')}): a"
        " forecast needs a run of at least 2 ranks with comm.meter and comm.timeline on.",
    )
    require(
        ledger["hook"] in ITEMSIZES,
        f"{name} was made with comm.hook={ledger['hook']}: a forecast needs a run with none, fp16 or bf16.",
    )
    require(
        ledger["per_step"].get("calls") is not None,
        f"{name} does not list the collectives of a step: repeat it with this version of the program.",
    )
    network = pure.Network(_link_of(run, measured_bandwidth))
    share, itemsize = ITEMSIZES[ledger["hook"]] / 4, ITEMSIZES[ledger["hook"]]
    buckets = [bucket for bucket in ledger["buckets"] if bucket["ready_seconds"] is not None]
    micro_batch, num_micro_batches = _micro_batch(run)
    step_seconds = run.step_seconds
    require(step_seconds is not None, f"{name} recorded no step time: a forecast needs at least 2 steps.")
    assert step_seconds is not None
    passes = time["forward_seconds"] + time["backward_seconds"] + time["exposed_seconds"]
    step = pure.Step(
        forward_seconds=time["forward_seconds"],
        backward_seconds=time["backward_seconds"],
        other_seconds=max(0.0, step_seconds - (time["data_wait_seconds"] or 0.0) - passes),
        buckets=tuple(
            pure.Bucket(round(bucket["bytes"] * share), itemsize, bucket["ready_seconds"]) for bucket in buckets
        ),
        num_micro_batches=num_micro_batches,
        blocking_all_reduces=_num_blocking(ledger, "all_reduce"),
        blocking_broadcasts=_num_blocking(ledger, "broadcast"),
    )  # fmt: skip
    placement = ledger["server_of_rank"]
    measured = [
        pure.MeasuredBucket(
            round(bucket["bytes"] * share), itemsize, bucket["ready_seconds"], bucket["sent_seconds"],
            bucket["done_seconds"],
        )
        for bucket in buckets
    ]  # fmt: skip
    host = pure.fit_host(measured, "ring", placement, network, round_seconds)
    step, host = pure.calibrated(step, host, placement, network, time["exposed_seconds"])
    if compute:
        step = step.scaled(_compute_seconds(compute, run) / step.compute_seconds)
    return Source(
        name=ledger["run"],
        model=ledger["model"],
        step=step,
        host=host,
        calls=tuple(ledger["per_step"]["calls"]),
        hook=ledger["hook"],
        batch_per_rank=micro_batch,
        num_ranks=ledger["world_size"],
        ranks_per_server=ledger["world_size"] // ledger["num_servers"] or 1,
        network=network,
    )


def _num_blocking(ledger: dict[str, Any], op: str) -> int:
    """Small exchanges of a step that it waits for."""
    calls = ledger["per_step"]["calls"]
    return sum(call["num_calls"] for call in calls if call["op"] == op and call["origin"] != "gradients")


def _link_of(run: RunRecord, measured_bandwidth: str | None) -> float | None:
    """Bandwidth of a server's link in the measured run, None where nothing limited it."""
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


def _micro_batch(run: RunRecord) -> tuple[int, int]:
    """(pictures of a micro-batch on a rank, micro-batches of a step)."""
    largest = flat(run.config).get("batch.max_per_rank") or run.ledger["global_batch"]
    batch = BatchConfig(global_size=run.ledger["global_batch"], max_per_rank=largest).split(run.ledger["world_size"])
    return batch.per_rank, batch.num_micro_batches


def _compute_seconds(runs: Sequence[RunRecord], run: RunRecord) -> float:
    """Of a step of ranks that run side by side, the wait for data left out: the median of the slowest one's.

    Ranks that exchange gradients wait for the slowest in every step, which is another one each time.
    """
    for compute in runs:
        _refuse_other_conditions(compute, run)
    slowest = [max(steps) for steps in zip(*map(_steady_steps, runs), strict=False)]  # the shortest run's steps
    require(bool(slowest), f"compute_runs={[str(one.directory) for one in runs]}: one of them recorded no second step.")
    return statistics.median(slowest)


def _steady_steps(run: RunRecord) -> list[float]:
    """Seconds of each recorded step but the first, less its wait for data."""
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
        ("batch of a rank", _micro_batch(run), _micro_batch(compute)),
        ("crop", flat(run.config).get("data.size"), flat(compute.config).get("data.size")),
        ("arithmetic", run.environment.get("arithmetic"), compute.environment.get("arithmetic")),
    ):
        require(
            here == there, f"compute_runs: the {what} of {compute.directory} is {there}, that of the run is {here}."
        )
