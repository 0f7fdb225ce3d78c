"""Real ImageNet JPEGs: SqueezeNet v1.0 with 1000 classes, at 224 pixels, from random weights, on two ranks.

    python -m benchmarks.imagenet_sample --folder imagenet-sample --classes wnids.txt

`--folder` holds a directory per class, `--classes` the 1000 class names in index order. A few hundred pictures teach
nobody ImageNet; what is shown is that training starts and goes somewhere: a loss of ln 1000 = 6.91 at the start is
knowing nothing, ln of the number of classes that occur is knowing which do, and only less than that is looking at the
pictures. Beside the JSON lie the curve's values and its picture.
"""

import csv
import io
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common

CEILING = 5.8
NUM_LAST = 10  # steps whose losses are averaged
NAME = "imagenet-sample"
# Few pictures, seen often: a mild crop, a batch that is small against the set, a warm-up of a few passes.
OVERRIDES = (
    "model=squeezenet1_0",
    "model.metaparameters.init=torchvision",
    "model.num_classes=1000",
    "cluster=two_ranks",
    "batch.global_size=30",
    "data.augment.scale=[0.5,1.0]",
    "recipe.lr=0.02",
    "recipe.warmup_steps=100",
    "trainer.validate_every_steps=0",
)


def write_curve(rows: Sequence[Mapping[str, Any]], num_classes: int, directory: Path) -> None:
    """`imagenet_sample.csv` and `.png`: loss by step, and the two losses that take no looking."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from pipeline.core.files import write_bytes_atomic, write_text_atomic

    steps, losses = [row["trainer/step"] for row in rows], [row["train/loss"] for row in rows]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", "train/loss", "train/top1", "lr"])
    writer.writerows(
        [row["trainer/step"], *(f"{row[key]:.6g}" for key in ("train/loss", "train/top1", "lr"))] for row in rows
    )
    directory.mkdir(parents=True, exist_ok=True)
    write_text_atomic(directory / "imagenet_sample.csv", text.getvalue())

    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(steps, losses, color="#9aa3ad", linewidth=0.7, label="each step")
    window = [statistics.fmean(losses[max(0, end - NUM_LAST) : end]) for end in range(1, len(losses) + 1)]
    axes.plot(steps, window, color="#0072b2", linewidth=1.6, label=f"mean of {NUM_LAST} steps")
    # The curve falls from the upper left to the lower right; words stand above it, at the right.
    for level, words, above in (
        (math.log(1000), "knowing nothing: ln 1000", 3),
        (math.log(num_classes), f"knowing which {num_classes} classes occur", 3),
        (CEILING, "bound", -9),
    ):
        axes.axhline(level, color="#d55e00", linewidth=0.8, linestyle="--")
        text_of_line = f"{words} ({level:.2f})"
        axes.annotate(
            text_of_line, (steps[-1], level), (0, above), textcoords="offset points", fontsize=7.5, ha="right"
        )
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    write_bytes_atomic(directory / "imagenet_sample.png", drawn.getvalue())


def main(arguments: Sequence[str]) -> int:
    """Shards, training, figure."""
    parser = common.parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="class folders of JPEGs")
    parser.add_argument("--classes", type=Path, required=True, help="1000 class names, one per line, in index order")
    parser.add_argument("--steps", type=int, default=1000, help="optimiser steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("extra", nargs="*", metavar="key=value", help="further overrides of pipeline.train")
    options = parser.parse_args(arguments)
    common.print_conditions()
    root = common.SHARDS / NAME
    common.run("prepare", f"source={options.folder}", f"out={root}", f"classes={options.classes}")
    overrides = [f"name={common.fresh(NAME)}", f"data.root={root}", *OVERRIDES]
    seconds = common.run("train", *overrides, *common.train_overrides(options.seed, options.steps, options.extra))

    rows = common.read_rows(NAME)
    num_present = sum(1 for folder in options.folder.iterdir() if folder.is_dir())
    write_curve(rows, num_present, options.results)
    last = statistics.fmean(row["train/loss"] for row in rows[-NUM_LAST:])
    result = common.Result("imagenet_sample", {**vars(options), "overrides": list(OVERRIDES)})
    result.figures |= {
        "num_classes_present": num_present,
        "first_loss": rows[0]["train/loss"],
        "mean_loss_of_last_10_steps": last,
        "steps": len(rows),
        "samples": rows[-1]["samples"],
        "train_seconds": seconds,
        "images_per_second": common.median_of(rows, "perf/images_per_second"),
        "total_gigabytes": common.last_of(rows, "comm/total_gigabytes"),
    }
    common.show(NAME, result.figures)
    result.floors = [common.Floor("mean loss of the last 10 steps", last, at_most=CEILING)]
    return result.finish(options.results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
