"""Forecast against measurement: from one run per model at one bandwidth on two servers, step times elsewhere.

    python -m benchmarks.forecast              half an hour
    python -m benchmarks.forecast --reuse      forecast anew what was measured before

Every run is a training in the lab (`pipeline.lab`): network namespaces with shaped links, one rank with one thread on
each; packets are cut into frames after they leave a server (`offloads=true`), as network cards do it. Fitted is one run
per model, two servers at 1 Gbit/s. Forecast by `pipeline.plan` and then measured are other bandwidths on two servers,
and three and four servers at 1 Gbit/s. Where there are more ranks than cores, ranks compute more slowly for a reason
that no network has; there the forecast takes the time to compute, and nothing else, from as many ranks side by side
that exchange nothing (`compute_runs=`). No measured point enters a forecast.

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
from typing import Any

from benchmarks import common
from pipeline.reporting.runs import is_run

MODELS = {"squeezenet1_0": 40, "resnet18": 30, "alexnet": 8}  # steps of a run
FITTED_BANDWIDTH = "1gbit"
BANDWIDTHS = ("100mbit", "300mbit", "2gbit")
SERVERS = (3, 4)
FLOOR, GOAL = 0.10, 0.05


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
    if not (options.reuse and is_run(common.RUNS / case.name)):
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


def measure_compute(options: argparse.Namespace, model: str, ranks: int) -> list[str]:
    """As many ranks side by side as `ranks`, each a training of its own that exchanges nothing; their directories."""
    name = f"forecast-{model}-apart-{ranks}"
    directories = [common.RUNS / name / str(rank) for rank in range(ranks)]
    if options.reuse and all(map(is_run, directories)):
        return list(map(str, directories))
    shutil.rmtree(common.RUNS / name, ignore_errors=True)
    steps = options.steps or max(12, MODELS[model])
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


def forecast(model: str, servers: int, bandwidth: str, compute_runs: Sequence[str]) -> dict[str, Any]:
    """The one point that `pipeline.plan` makes from the model's fitted run."""
    name = f"forecast-{model}-plan"
    common.run(
        "plan", f"name={name}", f"run_root={common.RUNS}",
        f"run={common.RUNS / Case(model, 2, FITTED_BANDWIDTH).name}", f"servers=[{servers}]",
        f"bandwidth=[{bandwidth}]", f"compute_runs=[{','.join(compute_runs)}]",
    )  # fmt: skip
    (point,) = common.read_json(common.RUNS / name / "forecast.json")["points"]
    return point


def compared(options: argparse.Namespace, model: str) -> list[dict[str, Any]]:
    """Every test point of a model, its forecast beside what was measured."""
    measure(options, Case(model, 2, FITTED_BANDWIDTH))
    apart = {ranks: measure_compute(options, model, ranks) for ranks in SERVERS if ranks > (os.cpu_count() or 1)}
    points = [(2, bandwidth) for bandwidth in BANDWIDTHS] + [(servers, FITTED_BANDWIDTH) for servers in SERVERS]
    rows = []
    for servers, bandwidth in points:
        told = forecast(model, servers, bandwidth, apart.get(servers, []))
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
    options = parser.parse_args(arguments)
    common.print_conditions()
    common.run("prepare", "source=builtin", f"out={common.SHARDS / 'links'}", "num_images=1200", "short_side=256")
    rounds = {servers: idle_round(servers) for servers in (2, *SERVERS)}
    common.show("seconds of a round between idle servers", {str(key): value for key, value in rounds.items()})
    rows = [row for model in MODELS for row in compared(options, model)]
    errors = {
        "bandwidth": statistics.fmean(abs(row["error"]) for row in rows if row["servers"] == 2),
        "servers": statistics.fmean(abs(row["error"]) for row in rows if row["servers"] != 2),
    }
    result = common.Result(
        "forecast",
        vars(options),
        {"points": rows, "mean_absolute_error": errors, "goal": GOAL, "round_seconds": rounds},
    )
    result.floors = [
        common.Floor(f"mean absolute error over other {what}", error, at_most=FLOOR)
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
