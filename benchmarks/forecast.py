"""Forecast against measurement: from one run per model at one bandwidth on two servers, step times elsewhere.

    python -m benchmarks.forecast              half an hour
    python -m benchmarks.forecast --reuse      forecast anew what was measured before, measure what is missing
    python -m benchmarks.forecast --from-one-rank --reuse    from one rank alone: an hour and a half

Every run is a training in the lab (`pipeline.lab`): network namespaces with shaped links, one rank with one thread on
each; packets are cut into frames after they leave a server (`offloads=true`), as network cards do it. Fitted is one run
per model, two servers at 1 Gbit/s. Forecast by `pipeline.plan` and then measured are other bandwidths on two servers,
and three and four servers at 1 Gbit/s. Where there are more ranks than cores, ranks compute more slowly for a reason
that no network has; there the forecast takes the time to compute, and nothing else, from as many ranks side by side
that exchange nothing (`compute_runs=`). No measured point enters a forecast.

`--from-one-rank` starts from a run on one rank that has seen no network, and holds the forecast to 2, 3 and 4 servers
on four links each. All servers of the lab are one machine, whose caches and cores they share; so the time to compute is
always that of as many ranks side by side.

Step times are medians of the step less its wait for data. Bytes out of a server must agree exactly.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import common
from pipeline.reporting.runs import is_run

MODELS = {"squeezenet1_0": 40, "resnet18": 30, "alexnet": 8}  # steps of a run
FITTED_BANDWIDTH = "1gbit"
BANDWIDTHS = ("100mbit", "300mbit", "2gbit")
SERVERS = (3, 4)
FLOOR, GOAL = 0.10, 0.05
FLOOR_FROM_ONE_RANK = 0.06


@dataclass(frozen=True)
class Case:
    """One training in the lab."""

    model: str
    servers: int
    bandwidth: str

    @property
    def name(self) -> str:
        """Of its run."""
        return f"forecast-{self.model}-{self.servers}-{self.bandwidth}"


def overrides(options: argparse.Namespace, model: str, steps: int, ranks: int) -> list[str]:
    """Of `pipeline.train`, but the name."""
    return [
        f"run_root={common.RUNS}", f"data.root={common.SHARDS / 'links'}", f"data.size={options.size}",
        "data.num_workers=0", "data.augment.crop=center", f"model={model}", "model.num_classes=1000",
        "recipe.lr=0.0001", "tracking=disabled", f"batch.global_size={options.batch * ranks}",
        f"trainer.max_steps={steps}", "trainer.validate_every_steps=0", "trainer.checkpoint_every_steps=0",
        "cluster.num_threads=1",
    ]  # fmt: skip


def measure(options: argparse.Namespace, case: Case) -> dict[str, Any]:
    """Train in the lab; the step's time and bytes."""
    steps = options.steps or MODELS[case.model]
    lab = [
        f"name={case.name}", f"run_root={common.RUNS}", f"servers={case.servers}", f"bandwidth={case.bandwidth}",
        "offloads=true", "num_threads=1",
    ]  # fmt: skip
    train = [f"name={case.name}", *overrides(options, case.model, steps, case.servers)]
    if not (options.reuse and is_finished(common.RUNS / case.name, steps)):
        shutil.rmtree(common.RUNS / case.name, ignore_errors=True)
        common.run("lab", *lab, "--", "python", "-m", "pipeline.train", *train)
    ledger = common.read_json(common.RUNS / case.name / "ledger.json")
    rows = common.read_rows(case.name)[1:]
    seconds = [row["perf/step_seconds"] - row["perf/data_wait_seconds"] for row in rows]
    return {
        "step_seconds": statistics.median(seconds),
        "egress_bytes": max(ledger["per_step"]["server_egress_bytes"]),
        "exposed_seconds": ledger["time"]["exposed_seconds"],
        "closed": ledger["closed"],
    }


def is_finished(directory: Path, steps: int) -> bool:
    """Whether a run of so many steps lies there, whole."""
    return is_run(directory) and common.read_json(directory / "ledger.json")["num_steps"] == steps


def measure_compute(options: argparse.Namespace, model: str, ranks: int) -> list[str]:
    """As many ranks side by side as `ranks`, each a training of its own that exchanges nothing; their directories."""
    name = f"forecast-{model}-apart-{ranks}"
    directories = [common.RUNS / name / str(rank) for rank in range(ranks)]
    steps = options.steps or max(12, MODELS[model])
    if options.reuse and all(is_finished(directory, steps) for directory in directories):
        return list(map(str, directories))
    shutil.rmtree(common.RUNS / name, ignore_errors=True)
    train = [sys.executable, "-m", "pipeline.train", *overrides(options, model, steps, 1)]
    running = [subprocess.Popen([*train, f"name={name}/{rank}"], stdout=subprocess.DEVNULL) for rank in range(ranks)]
    print(f"$ {ranks} x python -m pipeline.train {model}, apart", flush=True)
    codes = [process.wait() for process in running]
    if any(codes):
        sys.exit(f"A training apart ended with {codes}.")
    return list(map(str, directories))


def idle_round(servers: int) -> float:
    """Seconds of a round of a four-byte all-reduce between so many idle servers: plan's round_seconds."""
    lab = [
        f"name=forecast-round-{servers}", f"run_root={common.RUNS}", f"servers={servers}",
        f"bandwidth={FITTED_BANDWIDTH}", "offloads=true", "num_threads=1",
    ]  # fmt: skip
    command = [sys.executable, "-m", "pipeline.lab", *lab, "--", "python", "-m", "benchmarks.idle_round"]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (line,) = (line for line in told.splitlines() if line.startswith("round_seconds"))
    return float(line.split()[1])


def forecast(run: str, servers: int, bandwidth: str, compute_runs: Sequence[str]) -> dict[str, Any]:
    """The one point that `pipeline.plan` makes from a run."""
    name = "forecast-plan"
    common.run(
        "plan", f"name={name}", f"run_root={common.RUNS}", f"run={run}", f"servers=[{servers}]",
        f"bandwidth=[{bandwidth}]", f"compute_runs=[{','.join(compute_runs)}]",
    )  # fmt: skip
    (point,) = common.read_json(common.RUNS / name / "forecast.json")["points"]
    return point


@dataclass(frozen=True)
class Origin:
    """What a model's forecasts start from, and where they go."""

    run: str
    """Directory of the run."""
    apart: dict[int, list[str]]
    """By number of servers, runs of as many ranks side by side, whose time to compute is taken."""
    points: list[tuple[int, str]]
    """(servers, bandwidth) of each."""


def from_two_ranks(options: argparse.Namespace, model: str) -> Origin:
    """Two servers at one bandwidth; computing apart where there are more ranks than cores."""
    fitted = Case(model, 2, FITTED_BANDWIDTH)
    measure(options, fitted)
    apart = {ranks: measure_compute(options, model, ranks) for ranks in SERVERS if ranks > (os.cpu_count() or 1)}
    points = [(2, bandwidth) for bandwidth in BANDWIDTHS] + [(servers, FITTED_BANDWIDTH) for servers in SERVERS]
    return Origin(str(common.RUNS / fitted.name), apart, points)


def from_one_rank(options: argparse.Namespace, model: str) -> Origin:
    """One rank alone, outside of the lab."""
    points = [
        (servers, bandwidth)
        for servers in (2, *SERVERS)
        for bandwidth in (*BANDWIDTHS, FITTED_BANDWIDTH)
        if f"{model}-{servers}-{bandwidth}".startswith(options.only)
    ]
    (alone,) = measure_compute(options, model, 1)
    return Origin(alone, {ranks: measure_compute(options, model, ranks) for ranks in {at for at, _ in points}}, points)


def compared(options: argparse.Namespace, model: str) -> list[dict[str, Any]]:
    """Every test point of a model, its forecast beside what was measured."""
    origin = from_one_rank(options, model) if options.from_one_rank else from_two_ranks(options, model)
    rows = []
    for servers, bandwidth in origin.points:
        told = forecast(origin.run, servers, bandwidth, origin.apart.get(servers, []))
        seen = measure(options, Case(model, servers, bandwidth))
        rows.append(
            {
                "model": model,
                "servers": servers,
                "bandwidth": bandwidth,
                "forecast_seconds": told["step_seconds"],
                "measured_seconds": seen["step_seconds"],
                "error": told["step_seconds"] / seen["step_seconds"] - 1,
                "forecast_exposed_seconds": told["exposed_seconds"],
                "measured_exposed_seconds": seen["exposed_seconds"],
                "forecast_bytes": told["server_egress_bytes_per_step"],
                "measured_bytes": seen["egress_bytes"],
                "closed": seen["closed"],
            }
        )
        common.show(f"{model}, {servers} servers, {bandwidth}", rows[-1])
    return rows


def main(arguments: Sequence[str]) -> int:
    """All models; the mean absolute errors."""
    parser = common.parser(__doc__)
    parser.add_argument("--batch", type=int, default=16, help="pictures per rank (%(default)s)")
    parser.add_argument("--size", type=int, default=224, help="crop side in pixels (%(default)s)")
    parser.add_argument("--steps", type=int, help="of every run (default: 40, 30 and 8 by model)")
    parser.add_argument("--reuse", action="store_true", help="keep the runs of an earlier time, forecast them anew")
    parser.add_argument("--from-one-rank", action="store_true", help="forecast from one rank that has seen no network")
    parser.add_argument(
        "--only", default="", help="with it, points of this name: squeezenet1_0-2-1gbit, or its beginning"
    )
    options = parser.parse_args(arguments)
    common.print_conditions()
    common.run("prepare", "source=builtin", f"out={common.SHARDS / 'links'}", "num_images=1200", "short_side=256")
    rounds = {servers: idle_round(servers) for servers in (2, *SERVERS)}
    common.show("seconds of a round between idle servers", {str(key): value for key, value in rounds.items()})
    chosen = [model for model in MODELS if model.startswith(options.only) or options.only.startswith(model)]
    rows = [row for model in chosen for row in compared(options, model)]
    groups = {
        "bandwidth": [row for row in rows if row["servers"] == 2],
        "servers": [row for row in rows if row["servers"] != 2],
    }
    if options.from_one_rank:
        groups = {"links and numbers of servers": rows}
    errors = {name: statistics.fmean(abs(row["error"]) for row in group) for name, group in groups.items()}
    floor = FLOOR_FROM_ONE_RANK if options.from_one_rank else FLOOR
    result = common.Result(
        "forecast_one_rank" if options.from_one_rank else "forecast",
        vars(options),
        {"points": rows, "mean_absolute_error": errors, "goal": GOAL, "round_seconds": rounds},
    )
    result.floors = [
        common.Floor(f"mean absolute error over other {what}", error, at_most=floor)
        for what, error in errors.items()
    ]  # fmt: skip
    wrong = sum(row["forecast_bytes"] != row["measured_bytes"] for row in rows)
    result.floors.append(common.Floor("points whose bytes differ", wrong, at_most=0))
    result.floors.append(
        common.Floor("runs whose ledger closed", sum(row["closed"] is True for row in rows), at_least=len(rows))
    )
    return result.finish(options.results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
