"""How long ImageNet's size takes to start, and how much memory: from opening the index to the first batch's names.

    python -m benchmarks.epoch_start
    python -m benchmarks.epoch_start --large

1,281,167 samples in 1,282 shards with a manifest, as many as ILSVRC2012's training set has. The shards are real tars of
real pictures, of 8 x 8 pixels each, so that the set takes 2.6 GB; what is measured depends on the number of samples and
the length of their keys, which are as long as `prepare` makes them. Each figure is of a process of its own, which has
imported what a rank imports before its clock starts and its memory is looked at.

`--large`: 14,000,000 samples in 14,000 shards with the index that `prepare` leaves beside them; as that is all that is
read, the shards are holes of their size.
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
LARGE_SAMPLES, LARGE_SHARDS = 14_000_000, 14_000
FLOOR_SECONDS, FLOOR_BYTES = 2.0, 200e6
LARGE_SECONDS, LARGE_RANK_BYTES, LARGE_WORKER_BYTES = 5.0, 150e6, 20e6
BLOCK = 512
KEY = "000000000-n00000000_0000000"  # of a sample that `prepare` took from n00000000_0000000.JPEG


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = common.parser(__doc__)
    parser.add_argument("--samples", type=int, help=f"({NUM_SAMPLES:,}; with --large {LARGE_SAMPLES:,})")
    parser.add_argument("--shards", type=int, help=f"({NUM_SHARDS:,}; with --large {LARGE_SHARDS:,})")
    parser.add_argument("--large", action="store_true", help="an index beside shards that are holes")
    parser.add_argument(
        "--repeats", type=int, default=5, help="processes that start from the cached index (%(default)s)"
    )
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # what the processes are told
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.samples = options.samples or (LARGE_SAMPLES if options.large else NUM_SAMPLES)
    options.shards = options.shards or (LARGE_SHARDS if options.large else NUM_SHARDS)
    return options


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


def make_indexed(root: Path, num_samples: int, num_shards: int) -> None:
    """A set of which nothing can be read but manifest and index, unless it is there."""
    import numpy as np

    from pipeline.core.files import sha256_of_file, write_atomic
    from pipeline.data.shards.manifest import MANIFEST_NAME, Manifest, Shard, Split
    from pipeline.data.shards.table import INDEX_KEY, SampleTable, index_name

    if (root / MANIFEST_NAME).exists():
        return
    root.mkdir(parents=True, exist_ok=True)
    ids = np.arange(num_samples)
    shard = ids * num_shards // num_samples
    firsts = np.searchsorted(shard, np.arange(num_shards + 1))
    sample_bytes = len(template())
    keys = (f"{number:09d}-n{number % NUM_CLASSES:08d}_{number:07d}".encode() for number in range(num_samples))
    table = SampleTable(
        shard.astype(np.int32),
        (ids - firsts[shard]) * sample_bytes + BLOCK,
        np.full(num_samples, BLOCK, np.int32),
        (ids % NUM_CLASSES).astype(np.int32),
        np.fromiter(keys, f"S{len(KEY)}", num_samples),
    )
    shards = []
    for number, count in enumerate(np.diff(firsts).tolist()):
        name, size = f"train-{number:06d}.tar", count * sample_bytes + 2 * BLOCK
        with (root / name).open("wb") as file:
            file.truncate(size)
        shards.append(Shard(name, size, hashlib.sha256(name.encode()).hexdigest(), count))
    write_atomic(root / index_name("train"), table.save)
    path = root / index_name("train")
    described = {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
    split = Split(tuple(shards), extra={INDEX_KEY: described})
    Manifest(tuple(f"n{label:08d}" for label in range(NUM_CLASSES)), {"train": split}).save(root)


def own_bytes() -> int:
    """Memory that this process shares with no other, and no file backs: `Anonymous` of proc(5)."""
    (line,) = (one for one in Path("/proc/self/smaps_rollup").read_text().splitlines() if one.startswith("Anonymous:"))
    return 1024 * int(line.split()[1])


def worker_bytes(path: Path) -> int:
    """In a process of its own, as a DataLoader's worker: what the index takes there."""
    import pickle

    from pipeline.data import workers  # noqa: F401  # all that a worker has imported by then

    before = own_bytes()
    with path.open("rb") as file:
        index = pickle.load(file)  # noqa: S301  # written a moment ago
    assert sum(index.label(sample_id) for sample_id in range(0, index.num_samples, 1000)) >= 0
    return own_bytes() - before


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
    before, before_own, started = memory("VmRSS"), own_bytes(), time.perf_counter()
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
    sent = root / "sent-to-a-worker"
    sent.write_bytes(pickle.dumps(index))
    worker = [sys.executable, "-m", "benchmarks.epoch_start", "--worker", str(sent)]
    return {
        "num_samples": index.num_samples,
        "open_seconds": opened - started,
        "start_seconds": begun - started,
        "next_epoch_seconds": next_epoch - begun,
        "resident_bytes": memory("VmRSS") - before,
        "peak_bytes": memory("VmHWM") - before,
        "own_bytes": own_bytes() - before_own,
        "bytes_sent_to_a_worker": sent.stat().st_size,
        "own_bytes_of_a_worker": int(subprocess.run(worker, check=True, capture_output=True, text=True).stdout),
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
    if options.worker:
        print(worker_bytes(options.worker))
        return 0
    common.print_conditions()
    from pipeline.data.local import CACHE_DIRECTORY

    name = "epoch_start_large" if options.large else "epoch_start"
    root = common.SHARDS / f"{name}-{options.samples}-{options.shards}"
    (make_indexed if options.large else make_shards)(root, options.samples, options.shards)
    shutil.rmtree(root / CACHE_DIRECTORY, ignore_errors=True)
    first = measured(root)
    common.show("first opening, index made", first)
    rows = [measured(root) for _ in range(options.repeats)]
    for row in rows:
        common.show("index cached", row)
    result = common.Result(name, {"samples": options.samples, "shards": options.shards})
    result.figures |= {"first": first, "cached": rows}
    seconds = statistics.median(row["start_seconds"] for row in rows)
    most = {key: max(row[key] for row in rows) for key in ("peak_bytes", "own_bytes", "own_bytes_of_a_worker")}
    if options.large:
        result.floors = [
            common.Floor("seconds to start an epoch (median)", seconds, at_most=LARGE_SECONDS),
            common.Floor("bytes of a rank's own (most)", most["own_bytes"], at_most=LARGE_RANK_BYTES),
            common.Floor("bytes of a worker's own (most)", most["own_bytes_of_a_worker"], at_most=LARGE_WORKER_BYTES),
        ]
    else:
        result.floors = [
            common.Floor("seconds to start an epoch (median)", seconds, at_most=FLOOR_SECONDS),
            common.Floor("bytes of a rank for it (most)", most["peak_bytes"], at_most=FLOOR_BYTES),
        ]
    return result.finish(options.results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
