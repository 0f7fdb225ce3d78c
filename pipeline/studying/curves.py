"""What accuracy costs, from validations alone: means over seeds, the best variant for a budget, the price of a target.

Pure: from numbers to numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.core.schemas.study import AverageJson, CurvePointJson, EnvelopePointJson
from pipeline.reporting.runs import RunRecord

Curve = Sequence[CurvePointJson]
AXES = ("gigabytes", "seconds", "images")


def average(values: Sequence[float]) -> AverageJson:
    """Return mean and extremes of at least one value."""
    return {"mean": sum(values) / len(values), "lowest": min(values), "highest": max(values)}


def curve_of(run: RunRecord) -> list[CurvePointJson]:
    """Return a run's validations with what was spent before each; empty where it did not count what it sent."""
    totals = dict(zip(*run.series("comm/total_gigabytes"), strict=True))
    spent, seconds = dict[int, float](), 0.0
    for step, took in zip(*run.series("perf/step_seconds"), strict=True):
        seconds += took
        spent[step] = seconds
    return [
        {
            "step": step,
            "images": step * run.global_batch,
            "gigabytes": totals[step],
            "seconds": spent[step],
            "top1": top1,
        }
        for step, top1 in zip(*run.series("val/top1"), strict=True)
        if step in totals and step in spent
    ]


def mean_curve(curves: Sequence[Curve]) -> list[CurvePointJson]:
    """Return the mean of several seeds at the steps after which all of them were validated."""
    by_step = [{point["step"]: point for point in curve} for curve in curves]
    shared = [step for step in by_step[0] if all(step in points for points in by_step)] if by_step else []

    def mean(step: int, key: str) -> float:
        return sum(points[step][key] for points in by_step) / len(by_step)

    return [
        {
            "step": step,
            "images": by_step[0][step]["images"],
            "gigabytes": mean(step, "gigabytes"),
            "seconds": mean(step, "seconds"),
            "top1": mean(step, "top1"),
        }
        for step in shared
    ]


def envelope(curves: Mapping[str, Curve], axis: str) -> list[EnvelopePointJson]:
    """Return the points from which on a variant is more accurate than all were for less or as much.

    Args:
        curves: Validations by variant.
        axis: What is spent: `gigabytes`, `seconds` or `images`.
    """
    points = [(point[axis], -point["top1"], name) for name, curve in curves.items() for point in curve]
    best, made = -1.0, list[EnvelopePointJson]()
    for spent, negated, name in sorted(points):
        if -negated > best:
            best = -negated
            made.append({"spent": spent, "top1": best, "name": name})
    return made


@dataclass(frozen=True)
class Reach:
    """What seeds spend until they are as accurate as a target."""

    num_reached: int
    num_runs: int
    spent: Mapping[str, float]
    """Means over those that get there, by the keys of a validation; empty: none does."""


def reach(curves: Sequence[Curve], target: float) -> Reach:
    """Return what the seeds of a variant spend up to their first validation of at least `target`."""
    found = [first for curve in curves if (first := next((point for point in curve if point["top1"] >= target), None))]
    if not found:
        return Reach(0, len(curves), {})
    means = {key: sum(point[key] for point in found) / len(found) for key in ("step", *AXES)}
    return Reach(len(found), len(curves), means)
