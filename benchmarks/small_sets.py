"""Whether SqueezeNet's presets learn on small sets with the default recipe: 20 seeds on each of four.

    python -m benchmarks.small_sets --tar cifar10.tar --folder imagenet-sample --classes wnids.txt

The sets: 2,000 built-in pictures of 10 classes, 200 pictures of each class of CIFAR-10, 500 of each of its frogs and
ships, and an ImageNet sample of one picture per class, put together to 20 kinds (benchmarks.fine_tuning). A training of
240 steps of 32 pictures at 64 pixels has no key of its own but those sizes. It has left ln(classes) when the mean loss
of its last 20 steps is at most LARGEST_SHARE of that; the accuracy on pictures left out stands beside it.

(Cats and dogs, CIFAR-10's hardest pair, take more steps.)

Trainings run beside one another, one on each core. Keys of `pipeline.train` are told to each of them:
`... --classes wnids.txt model.metaparameters.init=torchvision recipe.lr=0.04` are the defaults of version 0.2.
"""

import itertools
import math
import os
import statistics
import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import common, fine_tuning

LARGEST_SHARE = 0.95
NUM_LAST_STEPS = 20
MODELS = ("squeezenet1_1", "squeezenet1_0")
OVERRIDES = (
    "data.size=64",
    "batch.global_size=32",
    "trainer.validate_every_steps=240",
    "cluster.num_threads=1",
    "tracking=disabled",
)
STEPS = 240


def write_part(tar: Path, out: Path, classes: Sequence[str] | None, num_per_class: int) -> Path:
    """Write the first pictures of each class of the tar's training split; returns the folder of class folders."""
    if out.exists():
        return out
    taken: Counter[str] = Counter()
    with tarfile.open(tar) as archive:
        for member in archive:
            split, _, rest = member.name.removeprefix("./").partition("/")
            name, _, file = rest.partition("/")
            wanted = member.isfile() and split == "train" and (classes is None or name in classes)
            if not wanted or taken[name] == num_per_class:
                continue
            taken[name] += 1
            (out / name).mkdir(parents=True, exist_ok=True)
            stream = archive.extractfile(member)
            assert stream is not None
            (out / name / file).write_bytes(stream.read())
    return out


def prepared(options: Any) -> dict[str, Path]:
    """Shards of the four sets."""
    folders = {
        "CIFAR-10": write_part(options.tar, common.SHARDS / "small-cifar10-pictures", None, 200),
        "frogs and ships": write_part(options.tar, common.SHARDS / "small-two-pictures", ("frog", "ship"), 500),
        "ImageNet kinds": common.SHARDS / "small-kinds-pictures",
    }
    fine_tuning.write_kinds(options.folder, options.classes.read_text().split(), folders["ImageNet kinds"])
    roots = {title: common.SHARDS / f"small-{title.lower().replace(' ', '-')}" for title in ("built-in", *folders)}
    common.run("prepare", "source=builtin", f"out={roots['built-in']}")
    for title, folder in folders.items():
        common.run("prepare", f"source={folder}", f"out={roots[title]}", "val_fraction=0.2")
    return roots


def measure(title: str, root: Path, model: str, seed: int, extra: Sequence[str]) -> dict[str, Any]:
    """Train one seed on one set."""
    name = f"small-{model}-{title.lower().replace(' ', '-')}-{seed}"
    common.run(
        "train", f"name={common.fresh(name)}", f"data.root={root}", f"model={model}", *OVERRIDES,
        *common.train_overrides(seed, STEPS, extra),
    )  # fmt: skip
    rows = common.read_rows(name)
    num_classes = len(common.read_json(root / "manifest.json")["classes"])
    last_loss = statistics.fmean(row["train/loss"] for row in rows[-NUM_LAST_STEPS:])
    row = {
        "set": title,
        "model": model,
        "seed": seed,
        "num_classes": num_classes,
        "last_train_loss": last_loss,
        "share_of_uninformed_loss": last_loss / math.log(num_classes),
        "val_top1": common.last_of(rows, "val/top1"),
    }
    common.show(f"{model}, {title}, seed {seed}", row)
    return row


def main(arguments: Sequence[str]) -> int:
    """All sets, models and seeds; each training must have left ln(classes)."""
    parser = common.parser(__doc__)
    parser.add_argument("--tar", type=Path, required=True, help="CIFAR-10 as JPEGs in train/<class>/")
    parser.add_argument("--folder", type=Path, required=True, help="class folders of an ImageNet sample")
    parser.add_argument("--classes", type=Path, required=True, help="1000 class names, one per line, in index order")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(20)))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("extra", nargs="*", metavar="key=value", help="further overrides of pipeline.train")
    options = parser.parse_args(arguments)
    common.print_conditions()
    roots = prepared(options)

    def train(one: tuple[str, str, int]) -> dict[str, Any]:
        model, title, seed = one
        return measure(title, roots[title], model, seed, options.extra)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        rows = list(pool.map(train, itertools.product(options.models, roots, options.seeds)))
    summary = []
    for model in options.models:
        for title in roots:
            own = [row for row in rows if (row["model"], row["set"]) == (model, title)]
            learnt = sum(row["share_of_uninformed_loss"] <= LARGEST_SHARE for row in own)
            mean = statistics.fmean(row["val_top1"] for row in own)
            summary.append({"model": model, "set": title, "seeds": len(own), "learnt": learnt, "mean_val_top1": mean})
    result = common.Result("small_sets", {**vars(options), "overrides": [*OVERRIDES], "steps": STEPS})
    result.figures |= {"summary": summary, "trainings": rows}
    not_learnt = sum(row["seeds"] - row["learnt"] for row in summary)
    result.floors = [common.Floor("trainings still at ln(classes)", not_learnt, at_most=0)]
    return result.finish(options.results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
