"""From the runs of a study to `study.json`: a row for each variant, each missing value with its reason."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.comparison.conditions import conditions_of, require_same_shards
from pipeline.core.errors import ConfigError
from pipeline.core.missing import Missing, known, to_json
from pipeline.core.schemas.study import StudyJson
from pipeline.core.units import MISSING, bits_per_second
from pipeline.forecasting.grid import step_with_links
from pipeline.forecasting.source import Source, read_source
from pipeline.models import zoo
from pipeline.reporting.runs import RunRecord
from pipeline.reporting.sections import plain
from pipeline.reporting.study_rows import is_complete
from pipeline.studying.curves import AXES, average, curve_of, envelope, mean_curve, reach
from pipeline.studying.plan import Plan, Planned
from pipeline.studying.runs import Made

Draft = dict[str, Any]
"""A part of the file, with each `Missing` still in its place."""
_MAY_DIFFER = ("pictures per step", "crop side in pixels", "compression hook", "bucket size in MiB", "arithmetic")
"""Conditions that a variant may be about, by the start of their names."""
NO_STEP = "The run recorded no step."
NO_CLOSED = "No run's ledger closes."


def study_result(plan: Plan, made: Mapping[str, Sequence[Made]]) -> StudyJson:
    """Return the content of study.json.

    Args:
        plan: Of the study.
        made: By variant, what became of each seed.

    Raises:
        ConfigError: The shards were exchanged between two of the runs.
    """
    study = plan.config.study
    require_same_shards(
        {one.place: one.run for runs in made.values() for one in runs if one.run is not None},
        "Choose another name=, put them back, or remove the runs that were made on the others.",
    )
    rows = [_row(plan, planned, made[planned.variant.name]) for planned in plan.variants]
    curves = {row["name"]: row["curve"] for row in rows if is_complete(row)}
    content, reasons = to_json(
        {
            "schema": 1,
            "study": plan.config.name,
            "question": study.question,
            "command": shlex.join(["python", "-m", "pipeline.study", *sys.argv[1:]]),
            "budget": {"kind": study.budget.kind, "amount": study.budget.amount},
            "seeds": study.seeds,
            "conditions": _conditions([one.run for runs in made.values() for one in runs if one.run is not None]),
            "rows": rows,
            "envelope": {axis: envelope(curves, axis) for axis in AXES},
        }
    )
    return StudyJson(**content, null_reasons=reasons)


def _conditions(runs: Sequence[RunRecord]) -> dict[str, str]:
    """Return what all runs have in common, and the names of what they should and do not."""
    of_runs = [conditions_of(run) for run in runs]
    keys = list(dict.fromkeys(key for conditions in of_runs for key in conditions))
    values = {key: [conditions.get(key) for conditions in of_runs] for key in keys}
    shared = {key: plain(found[0]) for key, found in values.items() if all(value == found[0] for value in found)}
    differing = [key for key in keys if key not in shared and not key.startswith((*_MAY_DIFFER, "powersgd"))]
    if differing:
        shared["not the same in all runs"] = ", ".join(differing)
    return {key: text for key, text in shared.items() if text != MISSING and key != "server of rank"}


# --- a row ---


def _row(plan: Plan, planned: Planned, made: Sequence[Made]) -> Draft:
    facts, variant = planned.facts, planned.variant
    told = facts.config.model
    runs = [one.run for one in made if one.run is not None]
    closed = [run for run in runs if run.ledger["closed"] is True]
    curves = [curve for run in closed if (curve := curve_of(run))]
    return {
        "name": variant.name,
        "model": zoo.format_spec(told.name, told.metaparameters),
        "hook": facts.config.comm.hook,
        "overrides": variant.overrides,
        "shows": {picture: str(label) for picture, label in variant.shows.items()},
        "num_parameters": facts.of_one.num_parameters,
        "num_parameters_of_1000_classes": facts.num_parameters_of_1000_classes,
        "gradient_bytes": facts.of_one.gradient_bytes,
        "macs": facts.of_one.macs,
        "inference_peak_activation_bytes": facts.of_one.inference_peak_activation_bytes,
        "training_activation_bytes": facts.of_batch.training_activation_bytes,
        "global_batch": facts.config.batch.global_size,
        **_measured(plan, planned, made),
        "published": _published(planned),
        "runs": [_run(one) for one in made],
        "curve": mean_curve(curves),
        "reach": _reach(plan, closed),
    }


def _measured(plan: Plan, planned: Planned, made: Sequence[Made]) -> Draft:
    """Return what runs tell, as means over those that count."""
    ended = [one.run for one in made if one.run is not None]
    runs = _counted(ended)
    why = "; ".join(dict.fromkeys(one.reason for one in made if one.reason)) or NO_STEP
    why = NO_CLOSED if ended else why

    def mean(values: Sequence[float | None], reason: str) -> float | Missing:
        found = [value for value in values if value is not None]
        return sum(found) / len(found) if found else Missing(reason if runs else why)

    top1 = [value for run in runs if (value := run.last("val/top1")) is not None]
    per_step = mean([_egress_per_step(run) for run in runs], "The bytes sent are not known.")
    closed = [run.ledger["closed"] for run in ended]
    return {
        "num_seeds": len(top1),
        "num_steps": known(next((run.ledger["num_steps"] for run in ended), None), why),
        "server_egress_bytes_per_step": per_step,
        "server_egress_bytes_per_epoch": per_step
        if isinstance(per_step, Missing)
        else per_step * plan.steps_per_epoch(planned),
        "step_seconds": mean([run.step_seconds for run in runs], NO_STEP),
        "exposed_seconds": mean(
            [run.ledger["time"]["exposed_seconds"] for run in runs], "Communication was not timed in these runs."
        ),
        "gigabytes": mean([run.last("comm/total_gigabytes") for run in runs], "The bytes sent are not known."),
        "seconds": mean([_seconds(run) for run in runs], NO_STEP),
        "top1": average(top1) if top1 else Missing("Nothing was validated." if runs else why),
        "ledger_closed": known(
            False if False in closed else True if closed and None not in closed else None,
            "The bytes of a run were not measured." if ended else why,
        ),
    }


def _counted(ended: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the runs that means are of: those whose ledger closes; without any, those that were not measured."""
    closed = [run for run in ended if run.ledger["closed"] is True]
    return closed or [run for run in ended if run.ledger["closed"] is None]


def _egress_per_step(run: RunRecord) -> float | None:
    """Return what the busiest server sent per committed step: with local steps or PowerSGD these differ."""
    egress, num_steps = run.ledger["servers"]["predicted_egress_bytes"], run.ledger["num_steps"]
    return max(egress) / num_steps if egress and num_steps else None


def _seconds(run: RunRecord) -> float | None:
    return sum(run.series("perf/step_seconds")[1]) or None


def _run(made: Made) -> Draft:
    run = made.run
    if run is None:
        nothing = dict.fromkeys(("top1", "gigabytes", "seconds", "ledger_closed"))
        return {"seed": made.seed, "directory": made.place, **nothing, "reason": made.reason}
    reasons = run.ledger["null_reasons"]
    return {
        "seed": made.seed,
        "directory": made.place,
        "top1": known(run.last("val/top1"), "Nothing was validated."),
        "gigabytes": known(run.last("comm/total_gigabytes"), "The bytes sent are not known."),
        "seconds": known(_seconds(run), NO_STEP),
        "ledger_closed": known(run.ledger["closed"], reasons.get("closed", "The run's ledger does not tell.")),
    }


def _published(planned: Planned) -> Draft | Missing:
    point = planned.variant.published
    if point is None:
        return Missing("The study's file gives nothing published of it.")
    return {key: known(value, f"{point.source} does not say.") for key, value in asdict(point).items()}


# --- what a target costs ---


def _reach(plan: Plan, closed: Sequence[RunRecord]) -> list[Draft]:
    """Return what the runs whose ledger closes spend to each target."""
    source = _source(closed)
    curves = [curve_of(run) for run in closed]
    made: list[Draft] = []
    for target in plan.config.study.targets:
        found = reach(curves, target)
        never = Missing(f"No validation reached {target:.0%}." if closed else NO_CLOSED)
        made.append(
            {
                "target": target,
                "num_reached": found.num_reached,
                "num_runs": found.num_runs,
                **{
                    ("steps" if key == "step" else key): known(found.spent.get(key), never.reason)
                    for key in ("step", *AXES)
                },
                "forecasts": [
                    _forecast(source, rate, found.spent.get("step"), never) for rate in plan.config.study.bandwidths
                ],
            }
        )
    return made


def _source(closed: Sequence[RunRecord]) -> Source | Missing:
    if not closed:
        return Missing(NO_CLOSED)
    try:
        return read_source(closed[0], None)
    except ConfigError as error:
        return Missing(str(error))


def _forecast(source: Source | Missing, rate: str, steps: float | None, never: Missing) -> Draft:
    """Return the time to a target on a link.

    Args:
        source: A run to forecast from, or why there is none.
        rate: Of every server's link.
        steps: To the target; None: it was not reached.
        never: Why it was not.
    """
    if isinstance(source, Missing):
        return {"bandwidth": rate, "step_seconds": source, "seconds": source}
    seconds = step_with_links(source, bits_per_second(rate)).step_seconds
    return {"bandwidth": rate, "step_seconds": seconds, "seconds": never if steps is None else steps * seconds}
