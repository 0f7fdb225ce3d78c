"""`prepare` against `tar` on the same pictures: images per second and core, peak memory, and what ImageNet would take.

    python -m benchmarks.prepare --folder imagenet-sample

`--folder` holds a directory per class; its pictures are copied into a small and a large source. Everything runs on
both, and rates are of the images that the large one has more, so that starting up does not count. `tar` packs the
folder as it is, and its archive is synced to the disk, as `prepare` does with shards. Each is one process on one core;
rounds take turns, with the files in the page cache and, where it may be emptied (root), without: ImageNet fits no
cache, so the floor is of that. `prepare` runs twice: as it is, decoding every picture to its end, and with check=ends,
which reads and writes as tar does.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.loader import middle

NUM_TRAIN, NUM_VAL = 1_281_167, 50_000
FLOOR, MEMORY_CEILING = 0.7, 1.05
SHORT_SIDE = 256
NOT_CACHED = "not cached"
TAR, ENDS, PIXELS = "tar", "prepare check=ends", "prepare"
CACHES = Path("/proc/sys/vm/drop_caches")
POLL_SECONDS = 0.02
SHARD_BYTES = 8 * 1024**2
"""Of the runs on all cores: small enough that every core has shards to write with the small source too."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = common.parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="class folders of JPEGs")
    parser.add_argument(
        "--copies", type=int, default=10, help="times the pictures are in the large source (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="(%(default)s)")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="(%(default)s)")
    return parser.parse_args(arguments)


def copy_pictures(folder: Path, out: Path, copies: int) -> int:
    """`out/<class>/` with so many copies of each picture, files of their own. Returns how many there are."""
    pictures = sorted(folder.glob("*/*"))
    for path in pictures:
        (out / path.parent.name).mkdir(parents=True, exist_ok=True)
        for copy in range(copies):
            target = out / path.parent.name / f"{copy}_{path.name}"
            if not target.exists():
                shutil.copyfile(path, target)
    return copies * len(pictures)


def command_of(contender: str, source: Path, out: Path) -> list[str]:
    """Of its process; `out` is new."""
    if contender == TAR:
        script = 'mkdir "$2" && tar --create --file "$2/all.tar" --directory "$1" . && sync "$2/all.tar"'
        return ["sh", "-c", script, "sh", str(source), str(out)]
    check = "ends" if contender == ENDS else "pixels"
    return prepare(source, out, "num_workers=1", f"check={check}")


def prepare(source: Path, out: Path, *overrides: str) -> list[str]:
    """The command."""
    return [sys.executable, "-m", "pipeline.prepare", f"source={source}", f"out={out}", *overrides]


def seconds_of(contender: str, source: Path, out: Path, *, core: int, is_cold: bool) -> float:
    """One run on one core."""
    start_afresh(source, out, is_cold=is_cold)
    started = time.monotonic()
    command = ["taskset", "--cpu-list", str(core), *command_of(contender, source, out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def start_afresh(source: Path, out: Path, *, is_cold: bool) -> None:
    """No output, nothing waiting to be written and, if cold, no picture in the page cache; but the program itself."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    if is_cold:
        CACHES.write_text("3")
        subprocess.run(prepare(source, out, "--help"), check=True, stdout=subprocess.DEVNULL)


def may_empty_caches() -> bool:
    """Whether the page cache is ours to empty."""
    return os.access(CACHES, os.W_OK)


def measure_rates(options: argparse.Namespace, sizes: dict[Path, int], out: Path) -> dict[str, dict[str, list[float]]]:
    """Images per second by state of the cache and contender, round by round."""
    states = {"cached": False, **({NOT_CACHED: True} if may_empty_caches() else {})}
    small, large = sizes
    rates: dict[str, dict[str, list[float]]] = {state: {TAR: [], ENDS: [], PIXELS: []} for state in states}
    for number in range(options.rounds):
        for state, is_cold in states.items():
            for contender in (TAR, ENDS, PIXELS):
                few, many = (
                    seconds_of(contender, source, out, core=options.core, is_cold=is_cold) for source in (small, large)
                )
                rates[state][contender].append((sizes[large] - sizes[small]) / (many - few))
            told = ", ".join(f"{name} {found[-1]:.0f}" for name, found in rates[state].items())
            print(f"  round {number + 1}, {state}: {told} images/s on one core", flush=True)
    return rates


def run_watched(command: Sequence[str]) -> tuple[float, int]:
    """(seconds, bytes): how long it took, and the sum of the peaks of resident memory of all its processes."""
    import psutil

    started, peaks = time.monotonic(), dict[int, int]()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                for one in (watched, *watched.children(recursive=True)):
                    peaks[one.pid] = max(peaks.get(one.pid, 0), peak_of(one.pid))
            except (psutil.Error, OSError):
                pass  # it has ended meanwhile
            time.sleep(POLL_SECONDS)
        if process.returncode:
            sys.exit(f"{command} ended with {process.returncode}.")
    return time.monotonic() - started, sum(peaks.values())


def peak_of(pid: int) -> int:
    """VmHWM in bytes; 0 of a process that is ending."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def measure_whole(sizes: dict[Path, int], out: Path, *overrides: str) -> dict[str, Any]:
    """On all cores, from the disk where that can be had: rate, memory of both sizes, bytes of the shards."""
    small, large = sizes
    seconds, memory = {}, {}
    for source in sizes:
        start_afresh(source, out, is_cold=may_empty_caches())
        command = prepare(source, out, f"shard_bytes={SHARD_BYTES}", *overrides)
        seconds[source], memory[source] = run_watched(command)
    split = common.read_json(out / "manifest.json")["splits"]["train"]
    num_bytes = sum(shard["bytes"] for shard in split["shards"])
    return {
        "images_per_second": (sizes[large] - sizes[small]) / (seconds[large] - seconds[small]),
        "bytes_per_image": num_bytes / sizes[large],
        "peak_bytes_small": memory[small],
        "peak_bytes_large": memory[large],
        # What is known of each picture (name, place, size) is held in one process until the last is written.
        "peak_bytes_per_image_more": (memory[large] - memory[small]) / (sizes[large] - sizes[small]),
    }


def extrapolated(whole: dict[str, Any], num_large: int) -> dict[str, float]:
    """All of ILSVRC2012, at the measured rate and size. `num_large`: images of the large source.

    Memory grows with the images, little beside what the processes take anyway with thousands of them, and much with a
    million: each image more takes what it took here, which is a small difference of large numbers.
    """
    num_images = NUM_TRAIN + NUM_VAL
    more_bytes = (num_images - num_large) * whole["peak_bytes_per_image_more"]
    return {
        "images": num_images,
        "hours": num_images / whole["images_per_second"] / 3600,
        "gigabytes": num_images * whole["bytes_per_image"] / 1e9,
        "peak_memory_gigabytes": (whole["peak_bytes_large"] + more_bytes) / 1e9,
    }


def main(arguments: Sequence[str]) -> int:
    """Rates against tar, then everything on all cores."""
    options = parse(arguments)
    common.print_conditions()
    root = common.SHARDS / "prepare"
    sources = (root / "small", 1), (root / "large", options.copies)
    sizes = {source: copy_pictures(options.folder, source, copies) for source, copies in sources}
    rates = measure_rates(options, sizes, root / "out")
    result = common.Result("prepare", {**vars(options), "images": list(sizes.values())})
    for state, found in rates.items():
        figures: dict[str, Any] = {name: middle(values) for name, values in found.items()}
        for name in (ENDS, PIXELS):
            ratios = [mine / theirs for mine, theirs in zip(found[name], found[TAR], strict=True)]
            figures[f"{name} over tar"] = middle(ratios)
            print(f"  {name} over tar, {state}: {figures[f'{name} over tar']['median']:.3f} times as fast")
        result.figures[state] = figures
        if state == NOT_CACHED:
            ratio = figures[f"{ENDS} over tar"]["median"]
            result.floors.append(common.Floor(f"{ENDS} over tar, {state}", ratio, at_least=FLOOR))
    if NOT_CACHED not in rates:
        print(f"  no floor: {CACHES} is not ours to write to, and files in the page cache say nothing about ImageNet")
    for name, overrides in {"original": (), f"short_side_{SHORT_SIDE}": (f"short_side={SHORT_SIDE}",)}.items():
        whole = measure_whole(sizes, root / "out", *overrides)
        told = extrapolated(whole, max(sizes.values()))
        result.figures[name] = {"cores": len(os.sched_getaffinity(0)), **whole, "imagenet": told}
        common.show(f"{name}, all cores", {**whole, **told})
        growth = whole["peak_bytes_large"] / whole["peak_bytes_small"]
        figure = f"peak memory for {options.copies} times the images, {name}"
        result.floors.append(common.Floor(figure, growth, at_most=MEMORY_CEILING))
    shutil.rmtree(root / "out", ignore_errors=True)
    return result.finish(options.results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
