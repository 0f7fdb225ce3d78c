"""The demo's accuracy on five seeds, and what a linear classifier makes of the same pictures.

    python -m benchmarks.builtin_seeds

A seed changes the pictures, their order and the initial weights. Of each: `pipeline.prepare source=builtin`, then
`pipeline.train experiment=demo`; the accuracy is that of the last step on all validation pictures, not the best on the
way. The linear classifier sees the same pictures scaled to 32x32 pixels; of several penalties the one that does best on
the validation pictures counts, which flatters it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import common

if TYPE_CHECKING:
    import torch

FLOOR, LINEAR_CEILING = 0.90, 0.5
SIDE = 32  # pixels
PENALTIES = (1e-4, 1e-2, 1.0)


def small_pictures(root: Path, split: str) -> "tuple[torch.Tensor, torch.Tensor]":
    """All pictures of a split as pixels (N, 3 * SIDE * SIDE) in 0..255, and their labels (N,)."""
    import io

    import numpy as np
    import torch
    from PIL import Image

    from pipeline.data.index import ShardIndex

    index = ShardIndex.open(root, split)
    rows = []
    for sample_id in range(index.num_samples):
        picture = Image.open(io.BytesIO(index.read(sample_id))).convert("RGB")
        rows.append(np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32).ravel())
    return torch.from_numpy(np.stack(rows)), torch.from_numpy(np.array(index.table.label, dtype=np.int64))


def linear_top1(root: Path) -> float:
    """Validation top-1 of multinomial logistic regression on standardised pixels, the best over PENALTIES.

    Minimises mean cross-entropy + penalty * sum of squared weights by L-BFGS.
    """
    import torch
    from torch.nn import functional as F

    train_ND, train_labels_N = small_pictures(root, "train")
    val_ND, val_labels_N = small_pictures(root, "val")
    mean_D, std_D = train_ND.mean(0), train_ND.std(0)
    train_ND, val_ND = (train_ND - mean_D) / std_D, (val_ND - mean_D) / std_D
    num_classes = int(train_labels_N.max()) + 1

    def fit(penalty: float) -> float:
        weight_DK = torch.zeros(train_ND.shape[1], num_classes, requires_grad=True)
        bias_K = torch.zeros(num_classes, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight_DK, bias_K], max_iter=60, line_search_fn="strong_wolfe")

        def closure() -> float:
            optimizer.zero_grad()
            loss = F.cross_entropy(train_ND @ weight_DK + bias_K, train_labels_N) + penalty * weight_DK.square().sum()
            loss.backward()
            return loss.item()

        optimizer.step(closure)
        with torch.no_grad():
            return ((val_ND @ weight_DK + bias_K).argmax(1) == val_labels_N).float().mean().item()

    return max(fit(penalty) for penalty in PENALTIES)


def measure(seed: int, num_images: int, steps: int | None, extra: Sequence[str]) -> dict[str, float | int]:
    """One seed."""
    name = f"builtin-seed{seed}" + (f"-{num_images}" if num_images != 2000 else "")
    root = common.SHARDS / name
    common.run("prepare", "source=builtin", f"out={root}", f"seed={seed}", f"num_images={num_images}")
    run_name = common.fresh(name)
    overrides = ["experiment=demo", f"name={run_name}", f"data.root={root}"]
    seconds = common.run("train", *overrides, *common.train_overrides(seed, steps, extra))
    rows = common.read_rows(name)
    row = {
        "seed": seed,
        "val_top1": common.last_of(rows, "val/top1"),
        "linear_top1": linear_top1(root),
        "steps": len(rows),
        "train_seconds": seconds,
        "total_gigabytes": common.last_of(rows, "comm/total_gigabytes"),
    }
    common.show(name, row)
    return row


def main(arguments: Sequence[str]) -> int:
    """All seeds; the worst of each figure must keep its bound."""
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--num-images", type=int, default=2000, help="training pictures (%(default)s)")
    parser.add_argument("--steps", type=int, help="fewer steps than the experiment's, to try the benchmark itself")
    parser.add_argument("extra", nargs="*", metavar="key=value", help="further overrides of pipeline.train")
    options = parser.parse_args(arguments)
    common.print_conditions()
    result = common.Result("builtin_seeds", vars(options))
    rows = [measure(seed, options.num_images, options.steps, options.extra) for seed in options.seeds]
    result.figures["seeds"] = rows
    result.floors = [
        common.Floor("lowest val top-1", min(row["val_top1"] for row in rows), at_least=FLOOR),
        common.Floor("highest linear top-1", max(row["linear_top1"] for row in rows), at_most=LINEAR_CEILING),
    ]
    return result.finish(options.results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
