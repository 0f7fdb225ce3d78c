"""CIFAR-10 from JPEGs on two ranks: accuracy on all test pictures, time, gigabytes moved, on three seeds.

    python -m benchmarks.cifar10 --tar cifar10.tar

The tar holds `train/<class>/*` and `test/<class>/*`. Of each seed: `pipeline.train experiment=cifar10`, then
`pipeline.evaluate` of the weights after the last step (not of the best on the way, which would be chosen by the test
pictures). A seed that never leaves loss = ln 10 has top-1 0.10.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from benchmarks import common

FLOOR, GOAL = 0.70, 0.82


def evaluate_last(name: str) -> dict[str, float]:
    """Exact results of the newest checkpoint of the run, by the evaluate command, under the run's own input."""
    from pipeline.run.checkpoint import find_latest

    directory = common.RUNS / name
    info = find_latest(directory / "checkpoints")
    assert info is not None, "the training ended without a checkpoint"
    config = yaml.safe_load((directory / "config.yaml").read_text())
    model, data = config["model"], config["data"]
    overrides = [
        f"name={common.fresh(f'{name}-evaluation')}",
        f"checkpoint={info.path}",
        f"data.root={data['root']}",
        f"data.size={'null' if data['size'] is None else data['size']}",
        f"model={model['name']}",
        *(f"model.input.{key}={value}" for key, value in model["input"].items()),
        f"cluster.devices={config['cluster']['devices']}",
    ]
    common.run("evaluate", *overrides)
    return common.read_json(common.RUNS / f"{name}-evaluation" / "evaluation.json")


def measure(seed: int, root: Path, steps: int | None, extra: Sequence[str]) -> dict[str, float | int | bool]:
    """One seed."""
    name = f"cifar10-seed{seed}"
    run_name = common.fresh(name)
    overrides = ["experiment=cifar10", f"name={run_name}", f"data.root={root}"]
    seconds = common.run("train", *overrides, *common.train_overrides(seed, steps, extra))
    rows = common.read_rows(name)
    tested = evaluate_last(name)
    final_loss = sum(row["train/loss"] for row in rows[-10:]) / len(rows[-10:])
    row = {
        "seed": seed,
        "test_top1": tested["top1"],
        "test_top5": tested["top5"],
        "test_loss": tested["loss"],
        "num_samples": tested["num_samples"],
        "train_loss_last_10": final_loss,
        "stuck": final_loss > math.log(10) - 0.05,
        "steps": len(rows),
        "train_seconds": seconds,
        "images_per_second": common.median_of(rows, "perf/images_per_second"),
        "total_gigabytes": common.last_of(rows, "comm/total_gigabytes"),
    }
    common.show(name, row)
    return row


def main(arguments: Sequence[str]) -> int:
    """All seeds; the worst must keep the floor."""
    parser = common.parser(__doc__)
    parser.add_argument("--tar", type=Path, required=True, help="the pictures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="fewer steps than the experiment's, to try the benchmark itself")
    parser.add_argument("extra", nargs="*", metavar="key=value", help="further overrides of pipeline.train")
    options = parser.parse_args(arguments)
    common.print_conditions()
    root = common.SHARDS / "cifar10"
    prepare_seconds = common.run("prepare", f"source={options.tar}", f"out={root}")
    result = common.Result("cifar10", vars(options))
    rows = [measure(seed, root, options.steps, options.extra) for seed in options.seeds]
    result.figures |= {"prepare_seconds": prepare_seconds, "goal_test_top1": GOAL, "seeds": rows}
    result.floors = [common.Floor("lowest test top-1", min(row["test_top1"] for row in rows), at_least=FLOOR)]
    return result.finish(options.results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
