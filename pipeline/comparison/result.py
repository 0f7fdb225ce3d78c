"""From measured runs to `comparison.json` and the files beside it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.comparison import break_even
from pipeline.comparison.conditions import refuse_to_mix, shared_conditions
from pipeline.comparison.rows import Outcome, make_row, null_reasons
from pipeline.core.files import write_json_atomic, write_text_atomic
from pipeline.core.typed import nearest, require

SCHEMA = 1


def compare_outcomes(outcomes: Sequence[Outcome], baseline: str | None, directory: Path) -> dict[str, Any]:
    """The content of `comparison.json`.

    directory: where it will lie; the runs are named relative to it.

    Raises:
        ConfigError: the baseline is not among the models, or the runs were made under different conditions.
    """
    baseline = choose_baseline(baseline, [outcome.model for outcome in outcomes])
    runs = {outcome.name: outcome.run for outcome in outcomes if outcome.run}
    hooks = list(dict.fromkeys(outcome.hook for outcome in outcomes))
    refuse_to_mix(runs, hooks_may_differ=len(hooks) > 1)
    rows = [make_row(outcome) for outcome in outcomes]
    alone = next((outcome.alone for outcome in outcomes if outcome.alone), None)
    conditions = shared_conditions(runs, alone)
    conditions["command"] = next((outcome.command for outcome in outcomes if outcome.command), "")
    base = _base_row(rows, baseline)
    # Both fill their values in.
    compared = _fill_times_baseline(rows, base) | break_even.fill(rows, outcomes, base)
    return {
        "schema": SCHEMA,
        "baseline": baseline,
        "conditions": conditions,
        "models": rows,
        "runs": {label: os.path.relpath(run.directory, directory) for label, run in runs.items()},
        "null_reasons": compared | null_reasons(rows, outcomes),
    }


def choose_baseline(baseline: str | None, models: Sequence[str]) -> str:
    """The baseline asked for, which must be one of the models; else squeezenet1_0, else the first."""
    if baseline is None:
        return "squeezenet1_0" if "squeezenet1_0" in models else models[0]
    require(
        baseline in models, f"baseline={baseline} is not among the models.{nearest(baseline, models)} Add it to them."
    )
    return baseline


def label_of(model: str, hook: str, hooks: Sequence[str]) -> str:
    """`alexnet + bf16` where compressions are compared (`hooks` names them), `alexnet` where none is or it is plain."""
    return f"{model} + {hook}" if hooks and hook != "none" else model


def _base_row(rows: Sequence[dict[str, Any]], baseline: str) -> dict[str, Any]:
    """The baseline's row: without compression, or with the first there is."""
    of_baseline = [row for row in rows if row["model"] == baseline]
    return next((row for row in of_baseline if row["hook"] == "none"), of_baseline[0])


def _fill_times_baseline(rows: Sequence[dict[str, Any]], base: Mapping[str, Any]) -> dict[str, str]:
    """Payload over the baseline's. Returns why one is missing, by its path."""
    reasons = {}
    for index, row in enumerate(rows):
        if row["payload_bytes_per_step"] and base["payload_bytes_per_step"]:
            row["times_baseline"] = row["payload_bytes_per_step"] / base["payload_bytes_per_step"]
        elif not row.get("reason"):
            reasons[f"models.{index}.times_baseline"] = f"The baseline {base['label']} was not measured."
    return reasons


# --- files ---


def write_files(result: Mapping[str, Any], directory: Path) -> None:
    """comparison.json, comparison.csv, and each figure as .png and .svg; of figures not drawn now, none is left."""
    from pipeline.report import comparison_figures, figures
    from pipeline.report.comparison_tables import comparison_csv

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
