"""From measured runs to `comparison.json`: the rows, their conditions, and the checks a number must pass first."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import nearest, require
from pipeline.errors import ConfigError, ExitCode, LedgerError
from pipeline.files import write_json_atomic, write_text_atomic
from pipeline.models import zoo
from pipeline.report.records import RunRecord, flat

SCHEMA = 1
# Bytes on the wire per byte of gradient, by comm.hook; powersgd's share depends on the shapes of the layers.
_WIRE_SHARE = {"none": 1.0, "fp16": 0.5, "bf16": 0.5}
_POWERSGD_KEYS = ("powersgd_rank", "powersgd_start_step")
_NO_SINGLE_RANK = "No run on a single rank was made under these conditions, against which to measure scaling."


@dataclass(frozen=True)
class Outcome:
    """What became of one model: a run, or the reason why there is none."""

    model: str
    num_parameters: int | None
    parameter_bytes: int | None
    """Bytes of the trainable parameters, from the model itself: what the ledger is checked against."""
    run: RunRecord | None = None
    reason: str = ""
    exit_code: int = ExitCode.DONE
    command: str = ""


def compare_outcomes(outcomes: Sequence[Outcome], baseline: str | None, directory: Path) -> dict[str, Any]:
    """The content of `comparison.json`.

    directory: where it will lie; the runs are named relative to it.

    Raises:
        ConfigError: the baseline is not among the models, or the runs were made under different conditions.
    """
    models = [outcome.model for outcome in outcomes]
    baseline = choose_baseline(baseline, models)
    runs = {outcome.model: outcome.run for outcome in outcomes if outcome.run}
    refuse_to_mix(runs)
    rows = [_row(outcome) for outcome in outcomes]
    base_bytes = next(row["gradient_bytes"] for row in rows if row["model"] == baseline)
    reasons: dict[str, str] = {}
    for index, row in enumerate(rows):
        if row["gradient_bytes"] and base_bytes:
            row["times_baseline"] = row["gradient_bytes"] / base_bytes
        elif not row.get("reason"):
            reasons[f"models.{index}.times_baseline"] = f"The baseline {baseline} was not measured."
    reasons.update(_null_reasons(rows, runs))
    return {
        "schema": SCHEMA,
        "baseline": baseline,
        "conditions": _shared_conditions(outcomes, runs),
        "models": rows,
        "runs": {model: os.path.relpath(run.directory, directory) for model, run in runs.items()},
        "null_reasons": reasons,
    }


def choose_baseline(baseline: str | None, models: Sequence[str]) -> str:
    """The baseline asked for, which must be one of the models; else squeezenet1_0, else the first."""
    if baseline is None:
        return "squeezenet1_0" if "squeezenet1_0" in models else models[0]
    require(
        baseline in models, f"baseline={baseline} is not among the models.{nearest(baseline, models)} Add it to them."
    )
    return baseline


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


def _row(outcome: Outcome) -> dict[str, Any]:
    row: dict[str, Any] = {
        "model": outcome.model,
        "num_parameters": outcome.num_parameters,
        "gradient_bytes": None,
        "server_egress_bytes_per_step": None,
        "times_baseline": None,
        "step_seconds": None,
        "exposed_seconds": None,
        "images_per_second": None,
        "scaling_efficiency": None,
        "published_top1": published_top1(outcome.model),
    }
    if outcome.run is None:
        return {**row, "reason": outcome.reason}
    run, step_seconds = outcome.run, outcome.run.step_seconds
    assert outcome.parameter_bytes is not None
    row["gradient_bytes"] = metered_gradient_bytes(run, outcome.parameter_bytes)
    row["server_egress_bytes_per_step"] = run.egress_bytes_per_step
    row["step_seconds"] = step_seconds
    row["exposed_seconds"] = run.ledger["time"]["exposed_seconds"]
    row["images_per_second"] = run.ledger["global_batch"] / step_seconds if step_seconds else None
    return row


def published_top1(model: str) -> float | None:
    """Fraction of ImageNet's validation pictures; None for variants, of which nothing is published."""
    name, metaparameters = zoo.parse_spec(model)
    accuracy = None if metaparameters else zoo.published_accuracy(name)
    return accuracy.top1 if accuracy else None


def _null_reasons(rows: Sequence[dict[str, Any]], runs: dict[str, RunRecord]) -> dict[str, str]:
    """One sentence for each value of a measured row that is null."""
    reasons = {}
    for index, row in enumerate(rows):
        run = runs.get(row["model"])
        if run is None:
            continue
        told = run.ledger["null_reasons"]
        why = {
            "exposed_seconds": told.get("time.exposed_seconds", "Communication was not timed in this run."),
            "scaling_efficiency": _NO_SINGLE_RANK,
            "published_top1": "Nothing is published for this variant.",
            "server_egress_bytes_per_step": told.get("per_step.server_egress_bytes", "The run's ledger does not tell."),
            "step_seconds": "The run recorded no step time.",
            "images_per_second": "The run recorded no step time.",
        }
        reasons.update({f"models.{index}.{key}": reason for key, reason in why.items() if row[key] is None})
    return reasons


# --- conditions ---


def conditions_of(run: RunRecord) -> dict[str, Any]:
    """What must agree between runs before their numbers may stand in one table."""
    ledger, config = run.ledger, flat(run.config)
    environment = flat(run.environment)
    conditions = {
        "pictures per step": ledger["global_batch"],
        "crop side in pixels": config.get("data.size") or config.get("model.input.size"),
        "classes": config.get("model.num_classes"),
        "ranks": ledger["world_size"],
        "servers": ledger["num_servers"],
        "placement": ledger["placement"],
        "server of rank": ledger["server_of_rank"],
        "link of a server": run.link,
        "segmentation offloads": environment.get("lab.offloads"),
        "backend": ledger["backend"],
        "algorithm": ledger["algorithm"],
        "compression hook": ledger["hook"],
        **({key: config.get(f"comm.{key}") for key in _POWERSGD_KEYS} if ledger["hook"] == "powersgd" else {}),
        "bucket size in MiB": config.get("comm.bucket_megabytes"),
        "arithmetic": environment.get("arithmetic") or config.get("trainer.precision"),
        "largest micro-batch per rank": config.get("batch.max_per_rank"),
        "shards": config.get("data.root"),
    }
    conditions["processor"] = ", ".join(environment.get("devices") or [environment.get("cpu.model") or "unknown"])
    conditions["threads per rank"] = environment.get("num_threads_per_rank")
    conditions["hosts"] = list(dict.fromkeys(environment.get("hosts") or ())) or None
    conditions["torch"] = environment.get("packages.torch")
    return conditions


def refuse_to_mix(runs: dict[str, RunRecord]) -> None:
    """Raise ConfigError naming each condition in which the runs differ."""
    by_model = {model: conditions_of(run) for model, run in runs.items()}
    if not by_model:
        return
    first_model, first = next(iter(by_model.items()))
    for model, conditions in by_model.items():
        for key in first.keys() | conditions.keys():
            here, there = first.get(key), conditions.get(key)
            if here != there:
                raise ConfigError(
                    f"The runs were made under different conditions: {key} is {here} for {first_model} and {there} for"
                    f" {model}. Compare runs that agree, or let `pipeline.compare models=[...]` make them anew."
                )


def _shared_conditions(outcomes: Sequence[Outcome], runs: dict[str, RunRecord]) -> dict[str, Any]:
    run = next(iter(runs.values()), None)
    conditions = {key: value for key, value in conditions_of(run).items() if value is not None} if run else {}
    conditions.pop("server of rank", None)
    if runs:
        steps = sorted({run.ledger["num_steps"] for run in runs.values()})
        conditions["steps per model"] = steps[0] if len(steps) == 1 else steps
    conditions["command"] = next((outcome.command for outcome in outcomes if outcome.command), "")
    return conditions


# --- files ---


def write_files(result: dict[str, Any], directory: Path) -> None:
    """comparison.json, comparison.csv, and the chart as comparison.png and comparison.svg."""
    from pipeline.report import figures
    from pipeline.report.tables import comparison_csv

    directory.mkdir(parents=True, exist_ok=True)
    write_json_atomic(directory / "comparison.json", result)
    write_text_atomic(directory / "comparison.csv", comparison_csv(result))
    measured = [row for row in result["models"] if row["gradient_bytes"]]
    if measured:
        figures.save(figures.model_bytes_figure(measured, result["baseline"]), directory / "comparison")
