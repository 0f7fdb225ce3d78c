"""How long ImageNet's size takes to start, and how much memory: from opening the index to the first batch's names.

    python -m benchmarks.epoch_start

1,281,167 samples in 1,282 shards with a manifest, as many as ILSVRC2012's training set has. The shards are real tars of
real pictures, of 8 x 8 pixels each, so that the set takes 2.6 GB; what is measured depends on the number of samples and
the length of their keys, which are as long as `prepare` makes them. Each figure is of a process of its own, which has
imported what a rank imports before its clock starts and its memory is looked at.
"""

import argparse
import hashlib
import io
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common

NUM_SAMPLES, NUM_SHARDS, NUM_CLASSES = 1_281_167, 1_282, 1000
GLOBAL_BATCH, WORLD_SIZE, SEED = 1024, 8, 0
FLOOR_SECONDS, FLOOR_BYTES = 2.0, 200e6
BLOCK = 512
KEY = "000000000-n00000000_0000000"  # of a sample that `prepare` took from n00000000_0000000.JPEG


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = common.parser(__doc__)
    parser.add_argument("--samples", type=int, default=NUM_SAMPLES, help="(%(default)s)")
    parser.add_argument("--shards", type=int, default=NUM_SHARDS, help="(%(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="processes that start from the cached index (%(default)s)"
    )
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # what the processes are told
    return parser.parse_args(arguments)


def template() -> Any:
    """The blocks of one sample as uint8: two headers, a picture, a label."""
    import numpy as np
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("L", (8, 8), 128).save(buffer, "JPEG")
    content = b""
    for extension, member in (("jpg", buffer.getvalue()), ("cls", b"000")):
        info = tarfile.TarInfo(f"{KEY}.{extension}")
        info.size = len(member)
        content += info.tobuf(tarfile.USTAR_FORMAT) + member + bytes(-len(member) % BLOCK)
    return np.frombuffer(content, np.uint8)


def shard_content(first: int, count: int) -> bytes:
    """A tar of samples `first` .. `first + count - 1`: the template with other numbers, and checksums to match."""
    import numpy as np

    def digits(values: Any, width: int) -> Any:
        return 48 + values[:, None] // 10 ** np.arange(width - 1, -1, -1) % 10

    samples = np.tile(template(), (count, 1))
    numbers = np.arange(first, first + count)
    label_at = samples.shape[1] - 2 * BLOCK
    for header in (0, label_at):
        name = samples[:, header : header + len(KEY)]
        name[:, :9], name[:, 11:19], name[:, 20:] = (
            digits(numbers, 9),
            digits(numbers % NUM_CLASSES, 8),
            digits(numbers, 7),
        )
        block = samples[:, header : header + BLOCK]
        block[:, 148:156] = ord(" ")
        sums = block.sum(axis=1, dtype=np.int64)
        block[:, 148:154] = 48 + sums[:, None] // 8 ** np.arange(5, -1, -1) % 8
        block[:, 154] = 0
    samples[:, label_at + BLOCK : label_at + BLOCK + 3] = digits(numbers % NUM_CLASSES, 3)
    return samples.tobytes() + bytes(2 * BLOCK)


def make_shards(root: Path, num_samples: int, num_shards: int) -> None:
    """The set, unless it is there."""
    from pipeline.data.shards.manifest import MANIFEST_NAME, Manifest, Shard, Split

    if (root / MANIFEST_NAME).exists():
        return
    root.mkdir(parents=True, exist_ok=True)
    borders = [num_samples * number // num_shards for number in range(num_shards + 1)]
    shards = []
    for number, (first, end) in enumerate(itertools.pairwise(borders)):
        content, name = shard_content(first, end - first), f"train-{number:06d}.tar"
        (root / name).write_bytes(content)
        shards.append(Shard(name, len(content), hashlib.sha256(content).hexdigest(), end - first))
    Manifest(tuple(f"n{label:08d}" for label in range(NUM_CLASSES)), {"train": Split(tuple(shards))}).save(root)


def memory(field: str) -> int:
    """Bytes, from /proc/self/status: VmRSS now, VmHWM at most."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def measure(root: Path) -> dict[str, float]:
    """In a process of its own: open, order an epoch, name the first batch; then the next epoch's."""
    import pickle

    from benchmarks.synthetic import first_rank
    from pipeline.data.batches import TrainBatches
    from pipeline.data.index import ShardIndex
    from pipeline.training import steps  # noqa: F401  # all that a rank has imported by then

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on (proc(5))
    before, started = memory("VmRSS"), time.perf_counter()
    index = ShardIndex.open(root, "train")
    opened = time.perf_counter()
    loader = first_rank(index, seed=SEED, global_batch=GLOBAL_BATCH, world_size=WORLD_SIZE)
    batches = loader.batch_sampler
    assert isinstance(batches, TrainBatches)
    first = next(iter(batches))
    begun = time.perf_counter()
    assert len(first) == GLOBAL_BATCH // WORLD_SIZE
    batches.order.batch_samples(batches.order.steps_per_epoch)
    next_epoch = time.perf_counter()
    return {
        "num_samples": index.num_samples,
        "open_seconds": opened - started,
        "start_seconds": begun - started,
        "next_epoch_seconds": next_epoch - begun,
        "resident_bytes": memory("VmRSS") - before,
        "peak_bytes": memory("VmHWM") - before,
        "bytes_sent_to_a_worker": len(pickle.dumps(index)),
    }


def measured(root: Path) -> dict[str, float]:
    """`measure`, there."""
    command = [sys.executable, "-m", "benchmarks.epoch_start", "--measure", str(root)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(arguments: Sequence[str]) -> int:
    """Once without the cached index, then several times with it; the floors are of the latter."""
    options = parse(arguments)
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return 0
    common.print_conditions()
    from pipeline.data.local import CACHE_DIRECTORY

    root = common.SHARDS / f"epoch-start-{options.samples}-{options.shards}"
    make_shards(root, options.samples, options.shards)
    shutil.rmtree(root / CACHE_DIRECTORY, ignore_errors=True)
    first = measured(root)
    common.show("first opening, index made", first)
    rows = [measured(root) for _ in range(options.repeats)]
    for row in rows:
        common.show("index cached", row)
    result = common.Result("epoch_start", {"samples": options.samples, "shards": options.shards})
    result.figures |= {"first": first, "cached": rows}
    result.floors = [
        common.Floor(
            "seconds to start an epoch (median)",
            statistics.median(r["start_seconds"] for r in rows),
            at_most=FLOOR_SECONDS,
        ),
        common.Floor("bytes of a rank for it (most)", max(row["peak_bytes"] for row in rows), at_most=FLOOR_BYTES),
    ]
    return result.finish(options.results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
