"""A row of `comparison.json`: from what became of one model to its values, each missing one with its reason."""

import math
from collections.abc import Callable
from typing import TypeVar

from pipeline.comparison.break_even import Baseline, break_even
from pipeline.comparison.conditions import footing_difference
from pipeline.comparison.outcome import Outcome, metered_gradient_bytes
from pipeline.config.registry import IMAGENET_TRAINING_PICTURES
from pipeline.core.errors import ExitCode
from pipeline.core.missing import Missing, known, to_json
from pipeline.core.schemas.comparison import ModelRowJson
from pipeline.models import zoo
from pipeline.models.facts import ModelFacts
from pipeline.reporting.runs import RunRecord

T = TypeVar("T")
Draft = dict[str, object]
"""A row, or a part of one, with each `Missing` still in its place."""

KEYS = tuple(key for key in ModelRowJson.__annotations__ if key in ModelRowJson.__required_keys__)
"""What every row has, in the file's order."""


def make_row(outcome: Outcome, baseline: Baseline) -> Draft:
    """Return the row of `outcome`, which is to become a `ModelRowJson`.

    A model without a run has nulls for what only a run tells, and one reason for all of them.

    Raises:
        LedgerError: the run did not carry the gradients its model owes.
    """
    row: Draft = {**dict.fromkeys(KEYS), **_known_beforehand(outcome)}
    if outcome.run is not None:
        return {**row, **_measured(outcome, outcome.run, baseline)}
    without, _ = to_json(row)
    # Exit code 6 is the run's own verdict on its ledger.
    is_closed = False if outcome.exit_code == ExitCode.LEDGER else None
    return {**without, "ledger_closed": is_closed, "reason": outcome.reason}


def _known_beforehand(outcome: Outcome) -> Draft:
    """Return what needs no run."""
    model, facts, taken = outcome.model, outcome.facts, outcome.facts.footprint
    accuracy, recipe = published(model, zoo.published_accuracy), published(model, zoo.published_recipe)
    no_footprint, no_accuracy = Missing(facts.why_no_footprint), Missing(f"No accuracy of {model} is published.")
    return {
        "model": model,
        "hook": outcome.hook,
        "label": outcome.name,
        "num_parameters": facts.num_parameters,
        "export_bytes": taken.export_bytes if taken else no_footprint,
        "inference_memory_bytes": taken.inference_memory_bytes if taken else no_footprint,
        "training_memory_bytes": taken.training_memory_bytes if taken else no_footprint,
        "published_top1": accuracy.top1 if accuracy else no_accuracy,
        "published_top1_source": accuracy.source if accuracy else no_accuracy,
        "published_epochs": recipe.epochs if recipe else _no_recipe(model),
        "published_epochs_source": recipe.source if recipe else _no_recipe(model),
    }


def _no_recipe(model: str) -> Missing:
    return Missing(f"No source says for how many epochs {model} was trained to its published accuracy.")


def published(model: str, look_up: Callable[[str], T | None]) -> T | None:
    """Return what the registry has of a model; None for variants, of which nothing is published."""
    name, metaparameters = zoo.parse_spec(model)
    return None if metaparameters else look_up(name)


def _measured(outcome: Outcome, run: RunRecord, baseline: Baseline) -> Draft:
    """Return what the run tells, alone and beside the baseline's."""
    time, reasons = run.ledger["time"], run.ledger["null_reasons"]
    untimed, no_step = "Communication was not timed in this run.", "The run recorded no step time."
    no_reason = "The run's ledger does not tell."
    recipe = published(outcome.model, zoo.published_recipe)
    per_step = known(run.egress_bytes_per_step, reasons.get("per_step.server_egress_bytes", no_reason))
    return {
        "gradient_bytes": metered_gradient_bytes(run, outcome.facts.parameter_bytes),
        "payload_bytes_per_step": known(run.carried_bytes_per_step, "The run recorded no gradient collective."),
        **egress(per_step, run.global_batch, recipe.epochs if recipe else _no_recipe(outcome.model)),
        "times_baseline": _times_baseline(run, baseline.outcome),
        "step_seconds": known(run.step_seconds, no_step),
        "communication_seconds": known(
            time["communication_seconds"], reasons.get("time.communication_seconds", untimed)
        ),
        "exposed_seconds": known(time["exposed_seconds"], reasons.get("time.exposed_seconds", untimed)),
        "images_per_second": known(run.images_per_second, no_step),
        "scaling_efficiency": scaling_efficiency(run, outcome),
        "break_even_bandwidth_bits_per_second": break_even(outcome, baseline),
        "measured_top1": known(run.last("val/top1"), "Nothing was validated in this run."),
        "ledger_closed": known(run.ledger["closed"], reasons.get("closed", no_reason)),
        "layers": _layers(run, outcome.facts),
    }


def egress(per_step: int | Missing, global_batch: int, epochs: float | Missing) -> Draft:
    """Return what the busiest server sends per step, picture, epoch of ImageNet, and training, in bytes.

    Steps are counted as the training counts them: whole global batches of an epoch, whole steps in all.

    Args:
        per_step: Bytes that leave the busiest server in a step.
        global_batch: Pictures of a step.
        epochs: Epochs of the training.
    """
    image: float | Missing
    epoch: int | Missing
    training: int | Missing
    if isinstance(per_step, Missing):
        image = epoch = training = per_step
    else:
        image = per_step / global_batch
        steps_per_epoch = IMAGENET_TRAINING_PICTURES // global_batch
        if not steps_per_epoch:
            epoch = training = Missing("The global batch is larger than ImageNet.")
        else:
            epoch = steps_per_epoch * per_step
            training = epochs if isinstance(epochs, Missing) else math.floor(epochs * steps_per_epoch) * per_step
    return {
        "server_egress_bytes_per_step": per_step,
        "server_egress_bytes_per_image": image,
        "server_egress_bytes_per_epoch": epoch,
        "server_egress_bytes_per_training": training,
    }


def _times_baseline(run: RunRecord, base: Outcome) -> float | Missing:
    """Return the payload of a step over the baseline's."""
    carried, of_base = run.carried_bytes_per_step, base.run and base.run.carried_bytes_per_step
    if not carried or not of_base:
        return Missing(f"The baseline {base.name} was not measured.")
    return carried / of_base


def scaling_efficiency(run: RunRecord, outcome: Outcome) -> float | Missing:
    """Return pictures per second and rank, as a fraction of what one rank alone does, or why they are not compared."""
    if outcome.alone is None:
        return Missing(outcome.why_not_alone)
    if difference := footing_difference(run, outcome.alone):
        return Missing(difference)
    together, single = run.images_per_second, outcome.alone.images_per_second
    if not together or not single:
        return Missing("One of the runs recorded no step time.")
    return together / run.ledger["world_size"] / single


def _layers(run: RunRecord, facts: ModelFacts) -> list[Draft]:
    return [
        {"name": layer["name"], "kind": facts.kinds.get(layer["name"], "other"), "bytes": layer["bytes"]}
        for layer in run.ledger["layers"]
    ]
