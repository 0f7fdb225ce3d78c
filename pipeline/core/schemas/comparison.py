"""`comparison.json`: several models under the same conditions, and what each costs on the wire."""

from typing import Literal, NotRequired, TypedDict

ConditionJson = str | int | float | bool | list[str] | list[int]
"""A condition that the compared runs share, or each of its values in order."""


class ModelLayerJson(TypedDict):
    """A layer of a compared model."""

    name: str
    """Dotted name of the module."""
    kind: str
    """`convolution`, `fully connected` or `other`."""
    bytes: int
    """Bytes of its gradients in one step, before compression."""


class ModelRowJson(TypedDict):
    """A model with one compression. A model whose run failed has a `reason`, and nulls for what its run would tell."""

    model: str
    """Name of the model, with the metaparameters that differ from its own: `squeezenet1_0:sr=0.5`."""
    hook: str
    """Gradient compression (`comm.hook`)."""
    label: str
    """Name of the row, which no other row has: the model, and its compression where compressions are compared."""
    num_parameters: int
    """Number of parameters."""
    gradient_bytes: int | None
    """Bytes of gradients that the model owes per step, before compression, as the collectives carried them."""
    payload_bytes_per_step: float | None
    """Bytes of gradients per step as carried, compressed; under PowerSGD, of the compressed steps."""
    server_egress_bytes_per_step: int | None
    """Bytes that leave the busiest server per step: gradients, buffers, metrics and message headers."""
    server_egress_bytes_per_image: float | None
    """The same bytes per picture of the global batch."""
    server_egress_bytes_per_epoch: int | None
    """The same bytes for the whole global batches of ImageNet's 1,281,167 training pictures."""
    server_egress_bytes_per_training: int | None
    """The same bytes for `published_epochs` epochs at this global batch."""
    times_baseline: float | None
    """Payload per step over that of the baseline's row."""
    step_seconds: float | None
    """Median seconds of a step, data included."""
    communication_seconds: float | None
    """Seconds of a step in which something is being exchanged, overlapping exchanges counted once."""
    exposed_seconds: float | None
    """Seconds of a step in which the rank waits for communication that no computation hides."""
    images_per_second: float | None
    """Pictures per second over all ranks, at the median step."""
    scaling_efficiency: float | None
    """Pictures per second and rank, as a fraction of what one rank alone does with the same batch."""
    break_even_bandwidth_bits_per_second: float | None
    """Bandwidth in bits per second of every server's link below which whichever of this row and the baseline's carries
    less trains faster per picture, and above which the other does; forecast from both runs."""
    export_bytes: int | None
    """Bytes of the state dict's tensors."""
    inference_memory_bytes: int | None
    """Bytes of weights, buffers and the most activations alive, for one picture."""
    training_memory_bytes: int | None
    """Bytes of weights, gradients, momentum and kept activations of a rank in fp32."""
    published_top1: float | None
    """Top-1 on ImageNet as published, a fraction; not measured here."""
    published_top1_source: str | None
    """Who published that accuracy."""
    measured_top1: float | None
    """Top-1 of the run's last validation, on its own pictures, a fraction."""
    published_epochs: float | None
    """Epochs of ImageNet that led, or are said to have led, to that accuracy."""
    published_epochs_source: str | None
    """Who published that number of epochs."""
    ledger_closed: bool | None
    """Whether the run's ledger closes: what was sent is what the collectives must send, to the byte."""
    layers: list[ModelLayerJson] | None
    """Gradient bytes by layer, in the model's order."""
    reason: NotRequired[str]
    """Why there is no run. Absent where there is one."""


class SpreadJson(TypedDict):
    """A figure over several runs."""

    lowest: float
    median: float
    highest: float


class RepetitionJson(TypedDict):
    """Runs of one model and compression under the same conditions; null: not every one of them tells."""

    label: str
    """The model, with its compression where those are compared."""
    num_runs: int
    step_seconds: SpreadJson | None
    """Of the runs' median steps."""
    exposed_seconds: SpreadJson | None
    val_top1: SpreadJson | None
    """Of their last validations, fractions of one."""


class ComparisonJson(TypedDict):
    """`comparison.json`: what `pipeline.compare` measured or read, a row for each model and compression."""

    schema: Literal[1]
    """Version of this format."""
    baseline: str
    """Name of the model that the others are multiples of."""
    conditions: dict[str, ConditionJson]
    """What the runs have in common, by its name in words; a condition that no run recorded is left out."""
    models: list[ModelRowJson]
    """The rows, in the order asked for."""
    runs: dict[str, str]
    """Directory of each row's run, relative to the comparison's own, by the row's label; failed rows have none."""
    null_reasons: dict[str, str]
    """Why a value of a measured row is null, by its dotted path (`models.0.scaling_efficiency`)."""
    repetitions: NotRequired[list[RepetitionJson]]
    """Models with several runs; not there where none has."""
