"""A comparison in W&B: one run of its own with the table, the bars and the picture, after comparison.json is written.

Like every mirror it may fail in any way: the comparison's files are complete before it begins.
"""

from pathlib import Path
from typing import Any

from pipeline.config.training import CompareTrackingConfig
from pipeline.core.schemas.comparison import ComparisonJson, ConditionJson
from pipeline.reporting.dashboards import COMPARISON_BARS, COMPARISON_PICTURE, COMPARISON_TABLE
from pipeline.run.record.tracking import mirror_of
from pipeline.run.record.wandb_mirror import table

UNREPORTED = ("command", "hosts", "shards")
"""Conditions that stay in comparison.json: they name paths and machines."""


def mirror_comparison(result: ComparisonJson, name: str, directory: Path, tracking: CompareTrackingConfig) -> None:
    """Log the content of `comparison.json` to the comparison's W&B run, the same one whenever it is repeated.

    Bounded in time; a failure of W&B's is a warning.

    Args:
        result: Content of `comparison.json`.
        name: Name of the comparison.
        directory: Where its files lie.
        tracking: Whether and where W&B mirrors it.
    """
    mirror = mirror_of(
        directory,
        name,
        tracking,
        id_file="comparison_wandb_id",
        group="comparison",
        job_type="compare",
        record="comparison.json",
        config={"baseline": result["baseline"], "conditions": reported_conditions(result)},
        notes=comparison_notes(result),
    )
    if mirror is None:
        return
    mirror.log_media(lambda: _media(result, directory / "comparison.png"))
    mirror.finish()


def reported_conditions(result: ComparisonJson) -> dict[str, ConditionJson]:
    """Return the comparison's conditions without what names paths and machines."""
    return {key: value for key, value in result["conditions"].items() if key not in UNREPORTED}


def comparison_notes(result: ComparisonJson) -> str:
    """Return what was compared under which conditions, in words."""
    models = ", ".join(row["model"] for row in result["models"])
    conditions = "; ".join(f"{key}: {value}" for key, value in reported_conditions(result).items())
    return f"{models} under the same conditions, as multiples of {result['baseline']}. {conditions}."


def _media(result: ComparisonJson, picture: Path) -> dict[str, Any]:
    """Return what W&B shows, by key. Its own classes have no types."""
    import wandb

    rows = result["models"]
    media: dict[str, Any] = {COMPARISON_TABLE: table(rows)}
    for key, (column, title) in COMPARISON_BARS.items():
        measured = [row for row in rows if row.get(column) is not None]
        if measured:
            media[key] = wandb.plot.bar(table(measured, ["model", column]), "model", column, title=title)
    if picture.is_file():
        media[COMPARISON_PICTURE] = wandb.Image(str(picture))
    return media
