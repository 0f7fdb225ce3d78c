"""Is an epoch still the unbroken one after a kill, on other ranks, with other workers? Ours, and others'.

    make peers
    python -m benchmarks.exactness --peers

First the matrix (exactness_matrix.py): every kill point times every change of ranks and workers, pure and through real
DataLoaders; missed, repeated and out-of-order samples must all be 0. Then the same test over other libraries' own
means (peers/streams.py), ours among them, each killed with SIGKILL and resumed on the same and on other numbers of
ranks. Last, what `data.shuffle_block` costs in mixing and saves in bytes, for a split of ImageNet's size.
"""

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import common, epoch_start

NUM_SAMPLES, NUM_SHARDS = 181, 7  # 13 samples that fill no batch of 24
BLOCKS = (0, 1, 4, 16, 64, 256)
SHUFFLE_BATCH = 256


def timed(measure: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and its seconds."""
    started = time.perf_counter()
    found = measure()
    return found, time.perf_counter() - started


def matrix(loader_rules: Sequence[str]) -> dict[str, Any]:
    """Ours, pure and through loaders."""
    from benchmarks import exactness_matrix as ours
    from pipeline.data.index import ShardIndex

    root = common.SHARDS / f"exactness-{NUM_SAMPLES}"
    epoch_start.make_shards(root, NUM_SAMPLES, NUM_SHARDS)
    index = ShardIndex.open(root, "train")
    rules = [rule for rule in ours.RULES if str(rule) in loader_rules] if loader_rules else ours.LOADER_RULES
    tallies = {
        "pure": timed(lambda: ours.pure(ours.split_of(index))),
        "loaders": timed(lambda: ours.through_loaders(index, rules)),
    }
    rows = {}
    for name, (tally, seconds) in tallies.items():
        rows[name] = {**tally.row(), "seconds": seconds}
        common.show(name, rows[name])
    return {
        "ranks": ours.WORLD_SIZES,
        "workers": ours.WORKERS,
        "global_batch": ours.GLOBAL_BATCH,
        "rules": {"pure": [str(rule) for rule in ours.RULES], "loaders": [str(rule) for rule in rules]},
        **rows,
    }


def shuffle_quality(num_samples: int, num_shards: int) -> list[dict[str, Any]]:
    """A row per block: how well it mixes, and how much of the split must be at hand."""
    import numpy as np

    from benchmarks.mixing import mixing_of
    from pipeline.data.order import epoch_order

    shards = np.arange(num_samples) * num_shards // num_samples
    rows = []
    for block in BLOCKS:
        order = epoch_order(num_samples, seed=0, epoch=0, index_hash="0", block=block, shard_of_sample=shards)
        found = asdict(mixing_of(order, shards, SHUFFLE_BATCH))
        rows.append({"block": block, **found, "share_of_bytes_held": found["shards_held"] / num_shards})
        common.show("shuffle", rows[-1])
    return rows


def main(arguments: Sequence[str]) -> int:
    """The matrix, the peers where asked for, and the shuffle."""
    parser = common.parser(__doc__)
    parser.add_argument(
        "--peers", action="store_true", help="other libraries too, from the environment of `make peers`"
    )
    parser.add_argument("--peers-python", type=Path, default=Path(".venv-peers/bin/python"), help="(%(default)s)")
    parser.add_argument("--rule", action="append", default=[], help="only this rule through the loaders")
    options = parser.parse_args(arguments)
    if options.peers and not options.peers_python.exists():
        parser.error(f"{options.peers_python} is not there: `make peers` makes it.")
    common.print_conditions()
    # Three workers are asked for to see that they change nothing, not to be fast.
    warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
    result = common.Result("exactness", {"samples": NUM_SAMPLES, "shards": NUM_SHARDS})
    found = matrix(options.rule)
    result.figures["matrix"] = found
    result.floors = [
        common.Floor(f"{name}: {figure} in {found[name]['epochs']:,} epochs", found[name][figure], at_most=0)
        for name in ("pure", "loaders")
        for figure in ("missed", "repeated", "out_of_order")
    ]
    result.floors.append(
        common.Floor("most batches in flight when a loader was killed", found["loaders"]["in_flight"], at_least=1)
    )
    if options.peers:
        from benchmarks import exactness_peers

        table = exactness_peers.measure(options.peers_python)
        result.figures["peers"] = table
        result.floors += exactness_peers.floors(table)
    result.figures["shuffle"] = shuffle_quality(epoch_start.NUM_SAMPLES, epoch_start.NUM_SHARDS)
    return result.finish(options.results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
