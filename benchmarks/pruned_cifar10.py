"""CIFAR-10 pruned to a third and packed: what is lost on all test pictures beside a dense twin, on three seeds.

    python -m benchmarks.pruned_cifar10 --tar cifar10.tar

The tar holds `train/<class>/*` and `test/<class>/*`. Of each seed two trainings of `experiment=cifar10`, alike but for
`prune=third`; then `pipeline.export` of the last weights, calibrated on training pictures, and `pipeline.evaluate` of
weights and packages on the 10,000 test pictures, which nothing was trained, calibrated or chosen by. What is finished
below `runs/benchmarks/pruned-cifar10` is kept: the same command goes on where it was broken off.
"""

import itertools
import statistics
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from pipeline.run.checkpoint import find_latest

NAME = "pruned-cifar10"
EPOCHS = 9
TWINS = {"dense": (), "third": ("prune=third",)}
PACKAGES = (("dense", 3.0), ("third", 3.0), ("third", 2.0))
"""Which of the twins is packed, and into how many bits per weight: those of the whole file."""
CALIBRATION_PICTURES_PER_CLASS, NUM_CALIBRATION = 60, 512
MOST_BITS, MOST_POINTS = 3.0, 0.5


def write_calibration(tar: Path) -> Path:
    """Shards of a few training pictures of each class, which calibrate without their labels."""
    root, folder = common.SHARDS / f"{NAME}-calibration", common.SHARDS / f"{NAME}-pictures"
    with tarfile.open(tar) as archive:
        members = sorted(
            (member for member in archive if member.isfile() and "train/" in member.name), key=lambda one: one.name
        )
        for _, group in itertools.groupby(members, lambda member: Path(member.name).parent):
            archive.extractall(folder, list(group)[:CALIBRATION_PICTURES_PER_CLASS], filter="data")
    (train,) = folder.rglob("train")
    common.run("prepare", f"source={train}", f"out={root}", "split=val")
    return root


def trained(twin: str, seed: int, root: Path, epochs: int, extra: Sequence[str]) -> Path:
    """The last checkpoint of one training, which is taken up if it was broken off, and kept if it is done."""
    name = f"{NAME}/{twin}-seed{seed}-epochs{epochs}"
    common.run(
        "train", "experiment=cifar10", f"name=benchmarks/{name}", f"data.root={root}",
        f"trainer.max_epochs={epochs}", "trainer.validate_every_steps=0", *TWINS[twin],
        *common.train_overrides(seed, None, extra),
    )  # fmt: skip
    info = find_latest(common.RUNS / name / "checkpoints")
    assert info is not None, "the training ended without a checkpoint"
    return info.path


def fp32_bytes(checkpoint: Path) -> int:
    """Of all its weights: what the run's gradients owe in a step."""
    return common.read_json(checkpoint.parents[1] / "ledger.json")["gradient_bytes"]


def tested(checkpoint: Path, name: str, root: Path) -> dict[str, float]:
    """Top-1 and loss of weights or a package on the test pictures."""
    path = common.RUNS / NAME / name / "evaluation.json"
    if not path.exists() or path.stat().st_mtime < checkpoint.stat().st_mtime:
        run = f"name={common.fresh(f'{NAME}/{name}')}"
        common.run("evaluate", run, f"checkpoint={checkpoint}", f"data.root={root}", "cluster=two_ranks")
    found = common.read_json(path)
    return {key: found[key] for key in ("num_samples", "top1", "loss")}


def packed(checkpoint: Path, name: str, bits: float, calibration: Path) -> dict[str, Any]:
    """Bytes, bits per weight and density of a package of at most so many bits per weight, the whole file counted."""
    table = common.RUNS / NAME / name / "artefacts.json"
    if not table.exists() or table.stat().st_mtime < checkpoint.stat().st_mtime:
        common.run(
            "export", f"name={common.fresh(f'{NAME}/{name}')}", f"checkpoint={checkpoint}", "formats=[package]",
            f"max_bytes={int(fp32_bytes(checkpoint) * bits / 32)}", f"data.root={calibration}",
            f"calibration.num_images={NUM_CALIBRATION}",
        )  # fmt: skip
    content = common.read_json(table)
    (row,) = content["artefacts"]
    return {
        "num_bytes": row["num_bytes"],
        "bits_per_weight": content["bits_per_weight"],
        "density": 1 - content["num_zeros"] / content["num_parameters"],
    }


def measure(seed: int, root: Path, calibration: Path, epochs: int, extra: Sequence[str]) -> list[dict[str, Any]]:
    """Both twins of one seed, as trained and as packages; points are counted from the dense twin as trained."""
    checkpoints = {twin: trained(twin, seed, root, epochs, extra) for twin in TWINS}
    rows: list[dict[str, Any]] = []
    for twin, checkpoint in checkpoints.items():
        row = {"seed": seed, "weights": twin, "file": "fp32", "num_bytes": fp32_bytes(checkpoint)}
        row |= {"bits_per_weight": 32.0}
        rows.append(row | tested(checkpoint, f"{twin}-seed{seed}-epochs{epochs}-tested", root))
    for twin, bits in PACKAGES:
        name = f"{twin}-seed{seed}-epochs{epochs}-bits{bits:g}"
        row = {"seed": seed, "weights": twin, "file": f"package, {bits:g} bits"}
        row |= packed(checkpoints[twin], name, bits, calibration)
        rows.append(row | tested(common.RUNS / NAME / name / "model.sqz", f"{name}-tested", root))
    for row in rows:
        row["points_lost"] = 100 * (rows[0]["top1"] - row["top1"])
        common.show(f"seed {seed}", row)
    return rows


def main(arguments: Sequence[str]) -> int:
    """All seeds; the mean must keep the bar."""
    parser = common.parser(__doc__)
    parser.add_argument("--tar", type=Path, required=True, help="the pictures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of each training (%(default)s)")
    parser.add_argument("extra", nargs="*", metavar="key=value", help="further overrides of pipeline.train")
    options = parser.parse_args(arguments)
    common.print_conditions()
    root = common.SHARDS / "cifar10"
    common.run("prepare", f"source={options.tar}", f"out={root}")
    calibration = write_calibration(options.tar)
    rows = [row for seed in options.seeds for row in measure(seed, root, calibration, options.epochs, options.extra)]
    result = common.Result("pruned_cifar10", {**vars(options), "calibration_pictures": NUM_CALIBRATION})
    result.figures["rows"] = rows
    kinds = list(dict.fromkeys((row["weights"], row["file"]) for row in rows))
    result.figures["means"] = means = {}
    for weights, file in kinds:
        own = [row for row in rows if (row["weights"], row["file"]) == (weights, file)]
        means[f"{weights}, {file}"] = {
            key: statistics.mean(row[key] for row in own) for key in ("top1", "points_lost", "bits_per_weight")
        }
    wanted = means[f"third, package, {MOST_BITS:g} bits"]
    result.floors = [
        common.Floor("bits per weight, the whole file", wanted["bits_per_weight"], at_most=MOST_BITS),
        common.Floor("points of top-1 lost, mean over the seeds", wanted["points_lost"], at_most=MOST_POINTS),
        common.Floor("test pictures", min(row["num_samples"] for row in rows), at_least=10_000),
    ]
    return result.finish(options.results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
