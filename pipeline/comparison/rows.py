"""A row of `comparison.json`: from what became of one model to its values, each null with its reason."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.comparison.conditions import footing_difference
from pipeline.config.models import IMAGENET_TRAINING_PICTURES
from pipeline.core.errors import ExitCode, LedgerError
from pipeline.models import zoo
from pipeline.models.facts import ModelFacts
from pipeline.report.runs import RunRecord

# Bytes on the wire per byte of gradient, by comm.hook; powersgd's share depends on the shapes of the layers.
_WIRE_SHARE = {"none": 1.0, "fp16": 0.5, "bf16": 0.5}
KEYS = (
    "model",
    "hook",
    "label",
    "num_parameters",
    "gradient_bytes",
    "payload_bytes_per_step",
    "server_egress_bytes_per_step",
    "server_egress_bytes_per_image",
    "server_egress_bytes_per_epoch",
    "server_egress_bytes_per_training",
    "times_baseline",
    "step_seconds",
    "communication_seconds",
    "exposed_seconds",
    "images_per_second",
    "scaling_efficiency",
    "break_even_bandwidth_bits_per_second",
    "export_bytes",
    "inference_memory_bytes",
    "training_memory_bytes",
    "published_top1",
    "published_top1_source",
    "published_epochs",
    "published_epochs_source",
    "ledger_closed",
    "layers",
)


@dataclass(frozen=True)
class Outcome:
    """What became of one model with one compression: a run, or the reason why there is none."""

    model: str
    facts: ModelFacts
    hook: str = "none"
    label: str = ""
    """Names the row. Empty: the model."""
    run: RunRecord | None = None
    reason: str = ""
    exit_code: int = ExitCode.DONE
    command: str = ""
    alone: RunRecord | None = None
    """The same model on one rank."""
    why_not_alone: str = "No run on a single rank was made under these conditions, against which to measure scaling."

    @property
    def name(self) -> str:
        """Of the row."""
        return self.label or self.model


def metered_gradient_bytes(run: RunRecord, parameter_bytes: int) -> int:
    """Gradient bytes of a step as the run's collectives carried them, compression undone.

    Where the compression has no fixed share, what DDP handed over in each step, which must be no less than was carried.

    Raises:
        LedgerError: nothing was carried, or not what the model's parameters owe.
    """
    wire_bytes = run.wire_gradient_bytes
    share = _WIRE_SHARE.get(run.ledger["hook"])
    if wire_bytes is None:
        raise LedgerError(
            f"{run.directory} recorded no gradient collective: a comparison needs at least 2 ranks and comm.meter=true."
        )
    handed_over = {wire_bytes / share} if share else set(run.series("comm/gradient_bytes")[1])
    is_closed = handed_over == {parameter_bytes} and run.ledger["gradient_bytes"] == parameter_bytes
    if not is_closed or wire_bytes > parameter_bytes:
        carried = " and ".join(f"{num_bytes:,.10g}" for num_bytes in sorted(handed_over)) or "an unknown number of"
        raise LedgerError(
            f"{run.directory} carried {carried} bytes of gradients per step and its ledger owes "
            f"{run.ledger['gradient_bytes']:,}, but the parameters of {run.ledger['model']} are {parameter_bytes:,}"
            " bytes; the run was made by another version of the model or its ledger was changed: repeat it."
        )
    return parameter_bytes


def make_row(outcome: Outcome) -> dict[str, Any]:
    """Every key but `times_baseline` and the break-even bandwidth, which are matters of all rows."""
    row = dict.fromkeys(KEYS) | _known_beforehand(outcome)
    if outcome.run is None:
        # Exit code 6 is the run's own verdict on its ledger.
        return {
            **row,
            "ledger_closed": False if outcome.exit_code == ExitCode.LEDGER else None,
            "reason": outcome.reason,
        }
    run, facts = outcome.run, outcome.facts
    step_seconds, time = run.step_seconds, run.ledger["time"]
    row |= {
        "gradient_bytes": metered_gradient_bytes(run, facts.parameter_bytes),
        "payload_bytes_per_step": run.carried_bytes_per_step,
        **egress(run.egress_bytes_per_step, run.ledger["global_batch"], row["published_epochs"]),
        "step_seconds": step_seconds,
        "communication_seconds": time["communication_seconds"],
        "exposed_seconds": time["exposed_seconds"],
        "images_per_second": run.images_per_second,
        "scaling_efficiency": scaling_efficiency(run, outcome.alone),
        "ledger_closed": run.ledger["closed"],
        "layers": [
            {"name": layer["name"], "kind": facts.kinds.get(layer["name"], "other"), "bytes": layer["bytes"]}
            for layer in run.ledger["layers"]
        ],
    }
    return row


def _known_beforehand(outcome: Outcome) -> dict[str, Any]:
    """What needs no run."""
    taken, top1 = outcome.facts.footprint, published(outcome.model, zoo.published_accuracy)
    recipe = published(outcome.model, zoo.published_recipe)
    return {
        "model": outcome.model,
        "hook": outcome.hook,
        "label": outcome.name,
        "num_parameters": outcome.facts.num_parameters,
        "export_bytes": taken and taken.export_bytes,
        "inference_memory_bytes": taken and taken.inference_memory_bytes,
        "training_memory_bytes": taken and taken.training_memory_bytes,
        "published_top1": top1 and top1.top1,
        "published_top1_source": top1 and top1.source,
        "published_epochs": recipe and recipe.epochs,
        "published_epochs_source": recipe and recipe.source,
    }


def published(model: str, look_up: Any) -> Any:
    """What the registry has of a model; None for variants, of which nothing is published."""
    name, metaparameters = zoo.parse_spec(model)
    return None if metaparameters else look_up(name)


def egress(per_step: int | None, global_batch: int, epochs: float | None) -> dict[str, float | int | None]:
    """What the busiest server sends per step, picture, epoch of ImageNet, and training of so many epochs, bytes.

    Steps are counted as the training counts them: whole global batches of an epoch, whole steps in all.
    """
    image = epoch = training = None
    if per_step is not None:
        image = per_step / global_batch
        if steps_per_epoch := IMAGENET_TRAINING_PICTURES // global_batch:
            epoch = steps_per_epoch * per_step
            training = None if epochs is None else math.floor(epochs * steps_per_epoch) * per_step
    return {
        "server_egress_bytes_per_step": per_step,
        "server_egress_bytes_per_image": image,
        "server_egress_bytes_per_epoch": epoch,
        "server_egress_bytes_per_training": training,
    }


def scaling_efficiency(run: RunRecord, alone: RunRecord | None) -> float | None:
    """Pictures per second and rank, as a fraction of what one rank alone does; None where they cannot be compared."""
    if alone is None or footing_difference(run, alone):
        return None
    together, single = run.images_per_second, alone.images_per_second
    return together / run.ledger["world_size"] / single if together and single else None


def null_reasons(rows: Sequence[Mapping[str, Any]], outcomes: Sequence[Outcome]) -> dict[str, str]:
    """One sentence for each value of a measured row that is null, by its path, but for what compares rows."""
    reasons = {}
    for index, (row, outcome) in enumerate(zip(rows, outcomes, strict=True)):
        if outcome.run is None:
            continue
        why = _why_null(outcome, outcome.run)
        reasons.update({f"models.{index}.{key}": reason for key, reason in why.items() if row[key] is None})
    return reasons


def _why_null(outcome: Outcome, run: RunRecord) -> dict[str, str]:
    told = run.ledger["null_reasons"]
    untimed = "Communication was not timed in this run."
    no_egress = told.get("per_step.server_egress_bytes", "The run's ledger does not tell.")
    no_picture = "The global batch is larger than ImageNet." if run.egress_bytes_per_step is not None else no_egress
    no_epochs = f"No source says for how many epochs {outcome.model} was trained to its published accuracy."
    no_accuracy = f"No accuracy of {outcome.model} is published."
    no_step = "The run recorded no step time."
    return {
        "payload_bytes_per_step": "The run recorded no gradient collective.",
        "server_egress_bytes_per_step": no_egress,
        "server_egress_bytes_per_image": no_egress,
        "server_egress_bytes_per_epoch": no_picture,
        "server_egress_bytes_per_training": no_epochs if run.egress_bytes_per_step is not None else no_egress,
        "step_seconds": no_step,
        "communication_seconds": told.get("time.communication_seconds", untimed),
        "exposed_seconds": told.get("time.exposed_seconds", untimed),
        "images_per_second": no_step,
        "scaling_efficiency": _why_no_scaling(run, outcome),
        **dict.fromkeys(
            ("export_bytes", "inference_memory_bytes", "training_memory_bytes"), outcome.facts.why_no_footprint
        ),
        **dict.fromkeys(("published_top1", "published_top1_source"), no_accuracy),
        **dict.fromkeys(("published_epochs", "published_epochs_source"), no_epochs),
        "ledger_closed": told.get("closed", "The run's ledger does not tell."),
    }


def _why_no_scaling(run: RunRecord, outcome: Outcome) -> str:
    if outcome.alone is None:
        return outcome.why_not_alone
    return footing_difference(run, outcome.alone) or "One of the runs recorded no step time."
