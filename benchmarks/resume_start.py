"""How long a resumed run waits for its first batch: at 90 % of an epoch against its beginning, at ImageNet's size.

    python -m benchmarks.resume_start

The set is `epoch_start`'s: 1,281,167 samples in 1,282 shards. Each figure is of a process of its own, which has
imported what a rank imports; its clock runs from opening the cached index until the DataLoader hands out the first
batch, through worker processes that start meanwhile. Nothing is replayed to get to 90 %, so it should take no longer.
The two places take turns, and a ratio is that of neighbours.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.epoch_start import GLOBAL_BATCH, NUM_SAMPLES, NUM_SHARDS, SEED, WORLD_SIZE, make_shards

LATE, CEILING = 0.9, 1.1
WORKERS = (2, 0)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = common.parser(__doc__)
    parser.add_argument("--samples", type=int, default=NUM_SAMPLES, help="(%(default)s)")
    parser.add_argument("--shards", type=int, default=NUM_SHARDS, help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of processes (%(default)s)")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # what the processes are told
    return parser.parse_args(arguments)


def measure(root: Path, place: float, num_workers: int) -> dict[str, Any]:
    """In a process of its own: open, and get the first batch of a run resumed at that share of the first epoch."""
    from benchmarks.synthetic import first_rank
    from pipeline.data.index import ShardIndex
    from pipeline.training import steps  # noqa: F401  # all that a rank has imported by then

    started = time.perf_counter()
    index = ShardIndex.open(root, "train")
    start_step = int(place * (index.num_samples // GLOBAL_BATCH))
    loader = first_rank(
        index,
        seed=SEED,
        global_batch=GLOBAL_BATCH,
        world_size=WORLD_SIZE,
        num_workers=num_workers,
        start_step=start_step,
    )
    batches = iter(loader)
    first = next(batches)
    seconds = time.perf_counter() - started
    assert len(first.labels_B) == GLOBAL_BATCH // WORLD_SIZE
    return {"start_step": start_step, "seconds": seconds, "first_sample": int(first.sample_ids_B[0])}


def measured(root: Path, place: float, num_workers: int) -> dict[str, Any]:
    """`measure`, there."""
    command = [sys.executable, "-m", "benchmarks.resume_start", "--measure", str(root), str(place), str(num_workers)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(arguments: Sequence[str]) -> int:
    """Pairs of processes, the first pair not counted."""
    options = parse(arguments)
    if options.measure:
        root, place, num_workers = options.measure
        print(json.dumps(measure(Path(root), float(place), int(num_workers))))
        return 0
    common.print_conditions()
    root = common.SHARDS / f"epoch-start-{options.samples}-{options.shards}"
    make_shards(root, options.samples, options.shards)
    result = common.Result("resume_start", {"samples": options.samples, "shards": options.shards, "late": LATE})
    for num_workers in WORKERS:
        rows = []
        for number in range(options.repeats + 1):
            # In turn first, so that neither always follows the other.
            places = (0.0, LATE) if number % 2 else (LATE, 0.0)
            found = {place: measured(root, place, num_workers) for place in places}
            if number:  # the first pair caches the index and the files
                rows.append({"begin_seconds": found[0.0]["seconds"], "late_seconds": found[LATE]["seconds"]})
                common.show(f"{num_workers} workers", rows[-1])
            assert found[0.0]["first_sample"] != found[LATE]["first_sample"]
        ratio = statistics.median(row["late_seconds"] / row["begin_seconds"] for row in rows)
        result.figures[f"workers_{num_workers}"] = {
            "begin_seconds": statistics.median(row["begin_seconds"] for row in rows),
            "late_seconds": statistics.median(row["late_seconds"] for row in rows),
            "ratio": ratio,
            "pairs": rows,
        }
        figure = f"first batch at {LATE:.0%} of an epoch over that at its beginning, {num_workers} workers"
        result.floors.append(common.Floor(figure, ratio, at_most=CEILING))
    return result.finish(options.results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
