"""`study.json`: variants of a training on several seeds, what each costs, and what it reaches for that."""

from typing import Literal, NotRequired, TypedDict


class AverageJson(TypedDict):
    """A value over the seeds of a variant."""

    mean: float
    lowest: float
    highest: float


class CurvePointJson(TypedDict):
    """A validation: the mean of all seeds whose ledger closes."""

    step: int
    """Optimiser steps before it."""
    images: int
    """Training pictures before it, repeated ones counted again."""
    gigabytes: float
    """10^9 bytes that have left all servers together, in training steps."""
    seconds: float
    """Seconds of the training steps before it; validations and checkpoints are not in it."""
    top1: float
    """Validation accuracy, a fraction."""


class EnvelopePointJson(TypedDict):
    """A validation that is more accurate than all that cost as much or less."""

    spent: float
    """Gigabytes, seconds or pictures."""
    top1: float
    """Accuracy it has then, a fraction."""
    name: str
    """The variant."""


class ForecastTimeJson(TypedDict):
    """Seconds to a target where every server has another link: a forecast, not a measurement."""

    bandwidth: str
    """Rate of every server's link, as asked for."""
    step_seconds: float | None
    """Seconds of a step."""
    seconds: float | None
    """Seconds to the target; null: it was not reached, or the run cannot be forecast."""


class ReachJson(TypedDict):
    """What a variant spends until a validation is as accurate as a target."""

    target: float
    """Validation accuracy, a fraction."""
    num_reached: int
    """How many of the seeds whose ledger closes get there; the other values are means over these."""
    num_runs: int
    """How many such seeds there are."""
    steps: float | None
    gigabytes: float | None
    seconds: float | None
    images: float | None
    forecasts: list[ForecastTimeJson]
    """The time on other links."""


class StudyRunJson(TypedDict):
    """The run of a variant on one seed. One that failed has a `reason`, and nulls."""

    seed: int
    directory: str
    """Relative to the study's."""
    top1: float | None
    """Accuracy of its last validation, a fraction."""
    gigabytes: float | None
    """10^9 bytes that left all servers together."""
    seconds: float | None
    """Seconds of its training steps."""
    ledger_closed: bool | None
    """Whether what was sent is what the collectives must send, to the byte; null: not measured, or no run."""
    reason: NotRequired[str]
    """Why there is no run. Absent where there is one."""


class PublishedJson(TypedDict):
    """What a publication says of the same architecture, on ImageNet; not measured here."""

    source: str
    top1: float | None
    """A fraction."""
    top5: float | None
    """A fraction."""
    megabytes: float | None
    """Size of the weights in fp32, as printed there, be it in 10^6 or in 2^20 bytes."""


class StudyRowJson(TypedDict):
    """A variant. Values of runs are means over the seeds whose ledger closes, or where none was measured over all of
    them; null where there is none.
    """

    name: str
    model: str
    """Name of the model, with the metaparameters that differ from its own."""
    hook: str
    """Gradient compression (`comm.hook`)."""
    overrides: list[str]
    """What `train` was told of this variant."""
    shows: dict[str, str]
    """Pictures that it is in, with its label there."""
    num_parameters: int
    num_parameters_of_1000_classes: int
    """With ImageNet's classifier, as publications count."""
    gradient_bytes: int
    """Bytes of gradients that the model owes per step, before compression."""
    macs: int
    """Multiply-adds of one picture's forward pass."""
    inference_peak_activation_bytes: int
    """Most bytes of activations alive at once for one picture, in fp32."""
    training_activation_bytes: int
    """Bytes that a rank keeps of its batch for the backward pass, in fp32."""
    global_batch: int
    """Pictures of a step."""
    num_seeds: int
    """Seeds in the mean of `top1`; fewer than `runs` where one failed, or its ledger does not close."""
    num_steps: int | None
    """Optimiser steps of each run."""
    server_egress_bytes_per_step: float | None
    """Bytes that leave the busiest server per step, the mean of all committed ones: predicted of the collectives that
    were issued; a ledger that closes says that so many were sent."""
    server_egress_bytes_per_epoch: float | None
    """The same for the whole global batches of an epoch."""
    step_seconds: float | None
    """Median seconds of a step, data included."""
    exposed_seconds: float | None
    """Seconds of a step in which the rank waits for communication that no computation hides."""
    gigabytes: float | None
    """10^9 bytes that left all servers together in a run."""
    seconds: float | None
    """Seconds of a run's training steps."""
    top1: AverageJson | None
    """Accuracy of the last validation, a fraction."""
    ledger_closed: bool | None
    """Whether every run's ledger closes; false: one does not; null: one was not measured, or there is no run."""
    published: PublishedJson | None
    runs: list[StudyRunJson]
    """One for each seed."""
    curve: list[CurvePointJson]
    """Its validations; empty where no run's ledger closes."""
    reach: list[ReachJson]
    """What it spends to each target."""


class EnvelopeJson(TypedDict):
    """The most accurate variant for each amount spent, of those whose seeds are all there and whose ledgers close."""

    gigabytes: list[EnvelopePointJson]
    seconds: list[EnvelopePointJson]
    images: list[EnvelopePointJson]


class BudgetJson(TypedDict):
    """How far each run was to go."""

    kind: str
    """`steps`, `epochs`, `gigabytes` or `seconds`."""
    amount: float


class StudyJson(TypedDict):
    """`study.json`: what `pipeline.study` trained, a row for each variant."""

    schema: Literal[1]
    """Version of this format."""
    study: str
    """Name of the study."""
    question: str
    """What it asks."""
    command: str
    """Command line that wrote this file."""
    budget: BudgetJson
    seeds: list[int]
    conditions: dict[str, str]
    """What all runs have in common, by its name in words."""
    rows: list[StudyRowJson]
    """In the order of the study's file."""
    envelope: EnvelopeJson
    null_reasons: dict[str, str]
    """Why a value is null, by its dotted path (`rows.0.top1`)."""
