"""The published points: what is printed is what the code forecasts, and what the page says of it."""

import json
from pathlib import Path

import pytest

from benchmarks.published_points import POINTS, TAKING_PART, TCP, compared, fit, forecast, held_back

REPOSITORY = Path(__file__).parents[3]
RESULT = json.loads((REPOSITORY / "benchmarks/results/published_points.json").read_text())


def test_the_frozen_constant_gives_the_printed_points() -> None:
    own = [point for point in POINTS if point.kind is TCP]
    fitted = min(own, key=lambda point: held_back(point, TAKING_PART))
    share = fit(fitted, TAKING_PART)
    assert share == pytest.approx(RESULT["constants"][TCP.name]["share_of_line"], rel=1e-6)
    assert forecast(fitted, share).step_seconds == pytest.approx(fitted.step_seconds, rel=1e-6)
    printed = [row for row in RESULT["points"] if row["kind"] == TCP.name]
    for point, row in zip(own, printed, strict=True):
        again = compared(point, share, TAKING_PART, is_fitted=point is fitted)
        assert again == {
            key: pytest.approx(value, abs=1e-6) if isinstance(value, float) else value for key, value in row.items()
        }


def test_one_point_of_each_kind_is_fitted_and_all_others_are_scored() -> None:
    by_kind = {row["kind"]: [] for row in RESULT["points"]}
    for row in RESULT["points"]:
        by_kind[row["kind"]].append(row["fitted"])
    assert all(fitted.count(True) == 1 for fitted in by_kind.values())
    assert RESULT["median_error"]["num_predicted"] == len(POINTS) - len(by_kind) == len(RESULT["points"]) - len(by_kind)


def test_the_page_says_the_errors_that_were_found() -> None:
    page = " ".join((REPOSITORY / "docs/forecasting.md").read_text().split())
    errors = RESULT["median_error"]
    assert f"scaling efficiency is {errors['efficiency'] * 100:.1f} points" in page
    assert f"exposed time **{errors['exposed_time'] * 100:.0f} % (bound 35, missed)**" in page
    apart = [RESULT[f"median_error_of_{unit}"]["exposed_time"] for unit in ("lone_gpus", "servers")]
    assert (
        "{:.0%} where one GPU's speed is known, {:.0%} where it is a server's".format(*apart).replace("%", " %") in page
    )
    assert f"to {len(POINTS)} published points" in page
