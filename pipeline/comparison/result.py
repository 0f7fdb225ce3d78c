"""From measured runs to `comparison.json` and the files beside it."""

import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.comparison.break_even import Baseline
from pipeline.comparison.conditions import refuse_to_mix, shared_conditions
from pipeline.comparison.outcome import Outcome
from pipeline.comparison.rows import make_row
from pipeline.core.files import write_json_atomic, write_text_atomic
from pipeline.core.missing import to_json
from pipeline.core.schemas.comparison import ComparisonJson, RepetitionJson, SpreadJson
from pipeline.core.typed import nearest, require
from pipeline.core.units import median
from pipeline.reporting.runs import RunRecord

SCHEMA = 1


def compare_outcomes(outcomes: Sequence[Outcome], baseline: str | None, directory: Path) -> ComparisonJson:
    """Return the content of `comparison.json`.

    Args:
        outcomes: A row's each, in order.
        baseline: Model that the others are multiples of; None: see `choose_baseline`.
        directory: Where the file will lie; the runs are named relative to it.

    Raises:
        ConfigError: the baseline is not among the models, or the runs were made under different conditions.
    """
    model = choose_baseline(baseline, [outcome.model for outcome in outcomes])
    runs = {outcome.name: outcome.run for outcome in outcomes if outcome.run}
    refuse_to_mix(runs, hooks_may_differ=len({outcome.hook for outcome in outcomes}) > 1)
    base = Baseline(_base(outcomes, model))
    content, reasons = to_json(
        {
            "schema": SCHEMA,
            "baseline": model,
            "conditions": {
                **shared_conditions(runs, next((outcome.alone for outcome in outcomes if outcome.alone), None)),
                "command": next((outcome.command for outcome in outcomes if outcome.command), ""),
            },
            "models": [make_row(outcome, base) for outcome in outcomes],
            "runs": {label: os.path.relpath(run.directory, directory) for label, run in runs.items()},
        }
    )
    made = ComparisonJson(**content, null_reasons=reasons)
    if repeated := _repetitions(outcomes):
        made["repetitions"] = repeated
    return made


def _repetitions(outcomes: Sequence[Outcome]) -> list[RepetitionJson]:
    """Return the spread of each model and compression that has several runs."""
    by_model: dict[tuple[str, str], list[RunRecord]] = {}
    for outcome in outcomes:
        if outcome.run is not None:
            by_model.setdefault((outcome.model, outcome.hook), []).append(outcome.run)
    hooks = {hook for _, hook in by_model}
    return [
        {
            "label": label_with_hook(model, hook, [*hooks] if len(hooks) > 1 else []),
            "num_runs": len(runs),
            "step_seconds": _spread([run.step_seconds for run in runs]),
            "exposed_seconds": _spread([run.ledger["time"]["exposed_seconds"] for run in runs]),
            "val_top1": _spread([run.last("val/top1") for run in runs]),
        }
        for (model, hook), runs in by_model.items()
        if len(runs) > 1
    ]


def _spread(values: Sequence[float | None]) -> SpreadJson | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    middle = median(known)
    return None if middle is None else {"lowest": min(known), "median": middle, "highest": max(known)}


def choose_baseline(baseline: str | None, models: Sequence[str]) -> str:
    """Return the baseline asked for, which must be one of the models; else squeezenet1_0, else the first.

    Raises:
        ConfigError: the baseline asked for is not among the models.
    """
    if baseline is None:
        return "squeezenet1_0" if "squeezenet1_0" in models else models[0]
    require(
        baseline in models, f"baseline={baseline} is not among the models.{nearest(baseline, models)} Add it to them."
    )
    return baseline


def label_with_hook(model: str, hook: str, hooks: Sequence[str]) -> str:
    """Name a row: `alexnet + bf16` where compressions are compared, `alexnet` where none is or it is plain.

    Args:
        model: Name of the model.
        hook: Its compression.
        hooks: Compressions that are compared; empty: none is.
    """
    return f"{model} + {hook}" if hooks and hook != "none" else model


def _base(outcomes: Sequence[Outcome], model: str) -> Outcome:
    """Return the baseline's outcome: without compression, or with the first there is."""
    of_baseline = [outcome for outcome in outcomes if outcome.model == model]
    return next((outcome for outcome in of_baseline if outcome.hook == "none"), of_baseline[0])


# --- files ---


def write_files(result: ComparisonJson, directory: Path) -> None:
    """Write comparison.json and .csv, and each figure as .png and .svg; of figures not drawn now, none is left."""
    from pipeline.reporting import comparison_figures, figures
    from pipeline.reporting.comparison_tables import comparison_csv

    directory.mkdir(parents=True, exist_ok=True)
    write_json_atomic(directory / "comparison.json", result)
    write_text_atomic(directory / "comparison.csv", comparison_csv(result))
    for name, drawing in comparison_figures.draw_all(result).items():
        path = directory / name
        if drawing is None:
            for suffix in (".png", ".svg"):
                path.with_suffix(suffix).unlink(missing_ok=True)
        else:
            figures.save(drawing.figure, path)
