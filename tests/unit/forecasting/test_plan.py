"""`pipeline.plan` on runs written by hand: its files, its refusals, its sentences."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.comm.all_reduce import Network
from pipeline.comm.forecast import StepForecast
from pipeline.core.errors import ConfigError
from pipeline.core.missing import Missing
from pipeline.core.schemas.forecast import ForecastJson
from pipeline.core.units import bits_per_second
from pipeline.forecasting.document import VALIDATED_ERRORS
from pipeline.forecasting.grid import (
    VALIDATED_BANDWIDTHS,
    VALIDATED_SERVERS,
    Cluster,
    break_even_bandwidth,
    step_on,
)
from pipeline.forecasting.source import Source, read_source
from pipeline.reporting.runs import read_run
from tests.json_shape import mismatches
from tests.making.runs import handmade_run, timed_run

pytestmark = pytest.mark.not_quick


def plan(directory: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.plan", f"run_root={directory}", *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def forecast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two models, on up to 1,024 servers; the directory of its files."""
    root = tmp_path_factory.mktemp("plan")
    timed_run().write(root / "small")
    timed_run("alexnet").write(root / "large")
    done = plan(
        root, f"run={root / 'small'}", f"beside=[{root / 'large'}]", "bandwidth=[1gbit,10gbit]",
        "algorithm=[ring,tree,parameter_server]", "price_per_server_hour=2", "budget=5000",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "extrapolated" in done.stdout
    assert "Soonest within a budget of 5,000" in done.stdout
    return root / "plan"


def test_every_file_is_there(forecast: Path) -> None:
    names = {path.name for path in forecast.iterdir()}
    pictures = {f"forecast-{name}.{kind}" for name in ("scaling", "step", "communication") for kind in ("png", "svg")}
    assert names == {"forecast.json", "forecast.csv", "report.html"} | pictures


def test_the_contract_of_forecast_json(forecast: Path) -> None:
    result = json.loads((forecast / "forecast.json").read_text())
    assert not mismatches(result, ForecastJson)
    assert (result["schema"], result["source_run"]) == (1, "handmade")
    assert len(result["points"]) == 2 * 2 * 3 * 11
    contract = {
        "num_servers", "ranks_per_server", "bandwidth_bits_per_second", "algorithm", "hook",
        "server_egress_bytes_per_step", "step_seconds", "exposed_seconds", "scaling_efficiency",
    }  # fmt: skip
    assert all(contract <= row.keys() for row in result["points"])
    assert result["assumptions"]
    for index, row in enumerate(result["points"]):
        for key, value in row.items():
            assert value is not None or f"points.{index}.{key}" in result["null_reasons"]


def test_bytes_on_two_servers_are_those_of_the_run(forecast: Path) -> None:
    points = json.loads((forecast / "forecast.json").read_text())["points"]
    (point,) = (
        row for row in points
        if (row["model"], row["num_servers"], row["algorithm"], row["bandwidth_bits_per_second"])
        == ("squeezenet1_0", 2, "ring", 1e9)
    )  # fmt: skip
    assert point["server_egress_bytes_per_step"] == 4_993_696 + 2 * 4 * 144 + 8 + 96
    assert point["validated"] is True


def test_the_page_states_assumptions_and_what_was_not_validated(forecast: Path) -> None:
    page = (forecast / "report.html").read_text()
    assert "What it assumes" in page
    assert "never the limit" in page
    assert "extrapolated" in page
    assert page.count("<svg") == 3


def test_the_csv_holds_every_point(forecast: Path) -> None:
    with (forecast / "forecast.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 132


def test_a_global_batch_that_is_kept_shrinks_the_batch_of_a_rank(tmp_path: Path) -> None:
    timed_run().write(tmp_path / "small")
    done = plan(tmp_path, f"run={tmp_path / 'small'}", "servers=[2,3,8]", "global_batch=32")
    assert done.returncode == 0, done.stderr
    points = json.loads((tmp_path / "plan" / "forecast.json").read_text())["points"]
    assert [(row["num_servers"], row["batch_per_rank"], row["global_batch"]) for row in points] == [
        (2, 16, 32), (8, 4, 32)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["servers=[0]"], "at least 1"),
        (["algorithm=[rign]"], "Did you mean 'ring'"),
        (["bandwidth=[fast]"], "not a rate"),
        (["hook=[powersgd]"], "not one of"),
        (["budget=10"], "price_per_server_hour"),
        (["batch_per_rank=4", "global_batch=8"], "not both"),
        (["servers=[3]", "global_batch=32"], "multiple of the ranks"),
        (["measured_bandwidth=1gbit"], "ran in a lab"),
        (["epochs=inf"], "finite"),
    ],
)
def test_impossible_plans_are_refused(tmp_path: Path, overrides: list[str], said: str) -> None:
    timed_run().write(tmp_path / "small")
    done = plan(tmp_path, f"run={tmp_path / 'small'}", *overrides)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "plan").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"buckets": []}, "did not time its buckets"),
        ({"hook": "powersgd"}, "comm.hook=powersgd"),
    ],
)
def test_runs_that_measured_too_little_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    timed_run(**changes).write(tmp_path / "small")
    done = plan(tmp_path, f"run={tmp_path / 'small'}")
    assert done.returncode == 2
    assert said in done.stderr


def test_a_run_of_local_steps_is_refused(tmp_path: Path) -> None:
    run = timed_run()
    run.config["comm"] = {**run.config.get("comm", {}), "period": 4}
    run.write(tmp_path / "small")
    done = plan(tmp_path, f"run={tmp_path / 'small'}")
    assert done.returncode == 2 and "comm.period=4, so that most of its steps exchanged nothing" in done.stderr


def test_a_cluster_whose_links_nobody_knows_is_asked_for(tmp_path: Path) -> None:
    run = timed_run()
    del run.environment["lab"]
    run.write(tmp_path / "small")
    assert "measured_bandwidth" in plan(tmp_path, f"run={tmp_path / 'small'}").stderr
    done = plan(tmp_path, f"run={tmp_path / 'small'}", "measured_bandwidth=1gbit", "servers=[2]")
    assert done.returncode == 0, done.stderr


# --- break-even ---


def source_of(tmp_path: Path, model: str, passes_seconds: float) -> Source:
    run = timed_run(model)
    run.ledger["time"] |= {"forward_seconds": passes_seconds, "step_seconds": {"p50": passes_seconds + 0.3, "p90": 1.0}}
    return read_source(read_run(run.write(tmp_path / model)), None)


def test_a_lighter_model_that_computes_longer_wins_below_some_bandwidth(tmp_path: Path) -> None:
    light, heavy = source_of(tmp_path, "squeezenet1_0", 0.30), source_of(tmp_path, "alexnet", 0.06)
    bandwidth = break_even_bandwidth(light, heavy)
    assert isinstance(bandwidth, float)

    def lead(rate: float) -> float:
        light_step, heavy_step = (
            step_on(source, Cluster(2, 1, Network(rate), "ring", "none", 8, 1)) for source in (light, heavy)
        )
        assert isinstance(light_step, StepForecast)
        assert isinstance(heavy_step, StepForecast)
        return heavy_step.step_seconds - light_step.step_seconds

    assert lead(bandwidth * 0.99) > 0 > lead(bandwidth * 1.01)


def test_a_lighter_model_that_computes_faster_too_has_no_break_even(tmp_path: Path) -> None:
    light, heavy = source_of(tmp_path, "squeezenet1_0", 0.06), source_of(tmp_path, "alexnet", 0.30)
    assert break_even_bandwidth(light, heavy) == Missing("squeezenet1_0 trains faster per picture on every link.")


def alone(directory: Path, seconds: list[float], **changes: Any) -> Path:
    """A run on one rank, a batch of 8, its steps of so many seconds after the first."""
    run = handmade_run("squeezenet1_0", global_batch=8, num_steps=len(seconds) + 1)
    run.ledger |= {"world_size": 1, "num_servers": 1, "server_of_rank": [0]} | changes
    for row, step in zip(run.rows, [9.0, *seconds], strict=True):
        row |= {"perf/step_seconds": step + 0.5, "perf/data_wait_seconds": 0.5}
    return run.write(directory)


def test_ranks_that_share_cores_are_as_slow_as_the_slowest_of_them(tmp_path: Path) -> None:
    run = read_run(timed_run().write(tmp_path / "run"))
    runs = [alone(tmp_path / "a", [0.1, 0.4, 0.2]), alone(tmp_path / "b", [0.3, 0.1, 0.2, 7.0])]
    step = read_source(run, None, [read_run(one) for one in runs]).step
    assert step.compute_seconds == pytest.approx(0.3)  # the median of 0.3, 0.4 and 0.2


def test_computing_of_another_kind_is_refused(tmp_path: Path) -> None:
    run = read_run(timed_run().write(tmp_path / "run"))
    other = read_run(alone(tmp_path / "a", [0.1], global_batch=4))
    with pytest.raises(ConfigError, match=r"the batch of a rank of .* is .*4.*8"):
        read_source(run, None, [other])


# --- what the forecast says of its own error ---


def test_the_error_it_states_is_the_one_that_was_measured() -> None:
    results = Path(__file__).parents[3] / "benchmarks" / "results" / "forecast.json"
    measured = json.loads(results.read_text())
    rates = [bits_per_second(point["bandwidth"]) for point in measured["points"]]
    servers = [point["servers"] for point in measured["points"]]
    assert (min(rates), max(rates)) == VALIDATED_BANDWIDTHS
    assert (min(servers), max(servers)) == VALIDATED_SERVERS
    assert {key: round(error, 3) for key, error in measured["mean_absolute_error"].items()} == VALIDATED_ERRORS
    assert all(point["forecast_bytes"] == point["measured_bytes"] for point in measured["points"])
