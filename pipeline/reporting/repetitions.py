"""Runs of one model under the same conditions: their spread, and what may be said of models whose runs overlap."""

from collections.abc import Callable
from itertools import pairwise

from pipeline.core.schemas.comparison import ComparisonJson, SpreadJson
from pipeline.core.units import MISSING, format_accuracy, format_count, format_seconds
from pipeline.reporting.tables import Column, Table, make_table


def spread_text(spread: SpreadJson | None, show: Callable[[float | None], str]) -> str:
    """Return a median with the lowest and the highest value: `182 ms (176 ms to 190 ms)`."""
    if spread is None:
        return MISSING
    return f"{show(spread['median'])} ({show(spread['lowest'])} to {show(spread['highest'])})"


def repetitions_table(comparison: ComparisonJson) -> Table | None:
    """Show each model that has several runs; None where none has."""
    repetitions = comparison.get("repetitions", [])
    columns = (
        Column("label", "model"),
        Column("num_runs", "runs", format_count),
        Column("step_seconds", "step", lambda spread: spread_text(spread, format_seconds), "median, lowest to highest"),
        Column("exposed_seconds", "exposed", lambda spread: spread_text(spread, format_seconds)),
        Column("val_top1", "validation top-1", lambda spread: spread_text(spread, format_accuracy), "the last one's"),
    )
    shown = [column for column in columns if any(row.get(column.key) is not None for row in repetitions)]
    return make_table("Repetitions", shown, repetitions) if repetitions else None


def repetition_sentences(comparison: ComparisonJson) -> list[str]:
    """Return what the runs say of neighbours in step time: a rank only where no run of one is among the other's."""
    timed = [(spread, row["label"]) for row in comparison.get("repetitions", []) if (spread := row["step_seconds"])]
    timed.sort(key=lambda found: found[0]["median"])
    sentences = []
    for (fast, first), (slow, second) in pairwise(timed):
        ranges = f"{first} {spread_text(fast, format_seconds)}, {second} {spread_text(slow, format_seconds)}"
        if fast["highest"] < slow["lowest"]:
            sentences.append(f"Every run of {first} has shorter steps than any of {second}: {ranges}.")
        else:
            sentences.append(f"The step times of {first} and {second} overlap, and neither is the faster: {ranges}.")
    return sentences
