"""Fine-tuning: SqueezeNet v1.0's published weights on 20 kinds of things, beside a training from nothing.

    python -m benchmarks.fine_tuning --folder imagenet-sample --classes wnids.txt --weights squeezenet_v1_0.npz

`--folder` holds a directory per class, `--classes` the 1000 class names in index order. The sample has one picture of
each of 450 classes, so that none of a class could be left out: its classes are put together to 20 kinds (KINDS), a few
classes each, and a third of each kind's pictures is left out, which are of other classes than those trained on. The
authors trained their weights on ImageNet, which has all these classes, and may have seen these pictures.

Three trainings of each seed on two ranks, 100 steps each, with the same pictures: from nothing; from the weights, of
which the last module learns, and a new head ten times as fast; and from the weights with all but the head frozen, whose
ledger owes the head alone. One of the pictures left out is more than a point, so that the mean of the seeds is judged.
"""

import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common

LEAST_POINTS = 40.0
"""By which fine-tuning must be better, percentage points of top-1 on the pictures left out, mean of the seeds."""
NUM_OUTPUTS_OF_BODY = 512
NAME = "fine-tuning"
Ranges = tuple[tuple[int, int], ...]
KINDS: dict[str, Ranges | tuple[int, ...]] = {
    "amphibians": ((25, 32),),
    "boats": (403, 472, 484, 510, 554, 576, 625, 628, 724, 780, 814, 833, 871, 914),
    "buildings": (425, 437, 449, 483, 497, 538, 580, 663, 668, 698, 727, 832),
    "cats": ((281, 293),),
    "clothes": (399, 400, 411, 501, 568, 610, 614, 617, 655, 697, 735, 834, 841, 869, 887),
    "fish": ((0, 6), (389, 397)),
    "food": ((924, 957),),
    "furniture": (423, 431, 453, 495, 516, 520, 526, 532, 559, 564, 765, 831, 857, 894),
    "hounds": ((151, 178),),
    "insects": ((300, 326),),
    "instruments": (401, 402, 420, 432, 486, 513, 541, 546, 558, 566, 577, 579, 594, 642, 683, 776, 875, 881, 889),
    "land birds": ((7, 24), (80, 96)),
    "lizards": ((38, 48),),
    "primates": ((365, 384),),
    "road vehicles": (407, 436, 468, 511, 555, 569, 609, 627, 654, 656, 661, 675, 717, 734, 751, 757, 779, 817, 864),
    "snakes": ((52, 68),),
    "ungulates": ((339, 355),),
    "water birds": ((97, 100), (127, 146)),
    "wolves and foxes": ((269, 280),),
    "working dogs": ((205, 268),),
}  # fmt: skip
OVERRIDES = (
    "model=squeezenet1_0_caffe",
    "cluster=two_ranks",
    "batch.global_size=32",
    "data.augment.scale=[0.5,1.0]",
    "recipe.warmup_steps=10",
    "trainer.validate_every_steps=20",
)
TUNED = (
    "init.head=new",
    "init.freeze=[features.0,features.3,features.4,features.5,features.7,features.8,features.9,features.10]",
    "recipe=adamw",
    "recipe.lr=0.0001",
    "recipe.head_lr_factor=10",
)
"""All but the last module and the head are frozen. Chosen by cross-validation of the training pictures."""
FROZEN = ("init.head=new", "init.freeze=[all_but_head]", "recipe.lr=0.02")


def classes_of(kind: str) -> list[int]:
    """Numbers of the classes that make a kind."""
    found: list[int] = []
    for entry in KINDS[kind]:
        found += range(entry[0], entry[1] + 1) if isinstance(entry, tuple) else [entry]
    return found


def write_kinds(folder: Path, names: Sequence[str], out: Path) -> int:
    """A folder per kind with links to its pictures; returns how many there are."""
    num_pictures = 0
    shutil.rmtree(out, ignore_errors=True)
    for kind in KINDS:
        directory = out / kind
        directory.mkdir(parents=True)
        for number in classes_of(kind):
            for picture in sorted((folder / names[number]).glob("*.JPEG")):
                (directory / picture.name).symlink_to(picture.resolve())
                num_pictures += 1
    return num_pictures


def trained(name: str, root: Path, overrides: Sequence[str], seed: int, steps: int) -> dict[str, Any]:
    """What one training has learnt and sent."""
    keys = [f"name={common.fresh(name)}", f"data.root={root}", *OVERRIDES]
    seconds = common.run("train", *keys, *common.train_overrides(seed, steps, overrides))
    rows = common.read_rows(name)
    ledger = json.loads((common.RUNS / name / "ledger.json").read_text())
    validation = json.loads((common.RUNS / name / "validation.json").read_text())
    found = {
        "top1_on_pictures_left_out": common.last_of(rows, "val/top1"),
        "num_pictures_left_out": validation["num_samples"],
        "train_top1_of_last_step": rows[-1]["train/top1"],
        "steps": len(rows),
        "gradient_bytes_per_step": ledger["gradient_bytes"],
        "residual_bytes_per_rank": ledger["transport"]["residual_bytes_per_rank"],
        "ledger_closed": ledger["closed"],
        "total_gigabytes": common.last_of(rows, "comm/total_gigabytes"),
        "train_seconds": seconds,
    }
    common.show(name, found)
    return found


def main(arguments: Sequence[str]) -> int:
    """Shards, three trainings of each seed, the difference."""
    parser = common.parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="class folders of JPEGs")
    parser.add_argument("--classes", type=Path, required=True, help="1000 class names, one per line, in index order")
    parser.add_argument("--weights", type=Path, required=True, help="v1.0's published weights, as .npz")
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("extra", nargs="*", metavar="key=value", help="further overrides of pipeline.train")
    options = parser.parse_args(arguments)
    common.print_conditions()
    pictures, root = common.SHARDS / f"{NAME}-pictures", common.SHARDS / NAME
    num_pictures = write_kinds(options.folder, options.classes.read_text().split(), pictures)
    common.run("prepare", f"source={pictures}", f"out={root}", "val_fraction=0.33")

    weights = f"init.checkpoint={options.weights}"
    variants = {"from nothing": ("recipe.lr=0.02",), "fine-tuned": (weights, *TUNED), "head alone": (weights, *FROZEN)}
    result = common.Result(
        "fine_tuning",
        {**vars(options), "overrides": [*OVERRIDES], "tuned": [*TUNED], "frozen": [*FROZEN], "kinds": len(KINDS)},
    )
    result.figures["num_pictures"] = num_pictures
    rows = [
        {"seed": seed, "training": title}
        | trained(f"{NAME}-{title.replace(' ', '-')}-{seed}", root, [*own, *options.extra], seed, options.steps)
        for seed in options.seeds
        for title, own in variants.items()
    ]
    top1 = {title: [row["top1_on_pictures_left_out"] for row in rows if row["training"] == title] for title in variants}
    gains = {
        title: [100 * (one - nothing) for one, nothing in zip(top1[title], top1["from nothing"], strict=True)]
        for title in ("fine-tuned", "head alone")
    }
    result.figures |= {"trainings": rows, "points": gains}
    head_bytes = 4 * len(KINDS) * (NUM_OUTPUTS_OF_BODY + 1)
    beyond = [row["gradient_bytes_per_step"] - head_bytes for row in rows if row["training"] == "head alone"]
    residuals = [abs(value) for row in rows for value in row["residual_bytes_per_rank"]]
    result.floors = [
        common.Floor(
            "points of top-1 by which fine-tuning is better, mean of the seeds",
            statistics.mean(gains["fine-tuned"]),
            at_least=LEAST_POINTS,
        ),
        common.Floor(
            "bytes that the ledger of the head alone owes beyond the head's", max(beyond), at_least=0, at_most=0
        ),
        common.Floor("largest residual, bytes", max(residuals), at_most=0),
    ]
    return result.finish(options.results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
