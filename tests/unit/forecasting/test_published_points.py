"""The published points: what is printed is what the code forecasts, and what the page says of it."""

import json
from pathlib import Path

import pytest

from benchmarks.published_points import POINTS, TCP, compared, fit, forecast, held_back

REPOSITORY = Path(__file__).parents[3]
RESULT = json.loads((REPOSITORY / "benchmarks/results/published_points.json").read_text())


def test_the_frozen_constant_gives_the_printed_points() -> None:
    own = [point for point in POINTS if point.kind is TCP]
    fitted = min(own, key=held_back)
    share = fit(fitted)
    assert share == pytest.approx(RESULT["constants"][TCP.name]["share_of_line"], rel=1e-6)
    assert forecast(fitted, share).step_seconds == pytest.approx(fitted.step_seconds, rel=1e-6)
    printed = [row for row in RESULT["points"] if row["kind"] == TCP.name]
    for point, row in zip(own, printed, strict=True):
        again = compared(point, share, is_fitted=point is fitted)
        assert again == {
            key: pytest.approx(value, abs=1e-6) if isinstance(value, float) else value for key, value in row.items()
        }


def test_one_point_of_each_kind_is_fitted_and_all_others_are_scored() -> None:
    by_kind = {row["kind"]: [] for row in RESULT["points"]}
    for row in RESULT["points"]:
        by_kind[row["kind"]].append(row["fitted"])
    assert all(fitted.count(True) == 1 for fitted in by_kind.values())
    assert RESULT["num_predicted"] == len(POINTS) - len(by_kind) == len(RESULT["points"]) - len(by_kind)


def test_the_page_says_the_errors_that_were_found() -> None:
    page = " ".join((REPOSITORY / "docs/forecasting.md").read_text().split())
    errors = RESULT["median_error"]
    assert f"scaling efficiency is {errors['efficiency'] * 100:.1f} points" in page
    assert f"exposed time {errors['exposed_time'] * 100:.0f} %" in page
    assert f"to {len(POINTS)} published points" in page
