"""Decoding pictures: torchvision's nvJPEG on the GPU beside our loader's decoder on 1 to 16 cores.

    python -m benchmarks.gpu_decode --out FOLDER              what FOLDER lacks
    python -m benchmarks.gpu_decode --out FOLDER --dry-run    few pictures, on the CPU alone

Pictures are the built-in set's, of ImageNet's sizes and weight, in memory. Ours is `pipeline.data.pixels.train_view`:
header, decode, random crop, resize to 224, mirror, by processes of one thread each. nvJPEG decodes batches of whole
pictures; once more with crop, resize and mirror of each picture on the GPU.
"""

import functools
import importlib.util
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Barrier
from typing import Any

from benchmarks import gpu_jobs
from benchmarks.gpu_jobs import Content

WORKERS = (1, 2, 4, 8, 16)
NVJPEG, NVJPEG_VIEWS = "decode-nvjpeg", "decode-nvjpeg_views"
SIZE = 224
START_SECONDS, DEADLINE_SECONDS = 20.0, 40.0


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    num_pictures: int
    seconds: float
    """Of each measurement, after a warm-up."""
    batch: int
    """Pictures that nvJPEG gets at once."""
    workers: tuple[int, ...]

    @classmethod
    def of(cls, *, dry_run: bool) -> "Effort":
        """A figure, or a trial."""
        return cls(8, 0.3, 4, (1, 2)) if dry_run else cls(256, 3.0, 64, WORKERS)


def crossing_point(ours: Mapping[int, float], nvjpeg: float) -> int | None:
    """Fewest of our measured numbers of processes that are at least as fast as nvJPEG; None: none is.

    Args:
        ours: pictures per second by number of processes.
        nvjpeg: pictures per second.
    """
    return min((workers for workers, rate in ours.items() if rate >= nvjpeg), default=None)


@functools.cache
def make_pictures(num_pictures: int) -> tuple[bytes, ...]:
    """JPEG files, made once."""
    from pipeline.data.prepare.builtin import CLASSES, BuiltinPictures

    made = BuiltinPictures(seed=0, num_classes=len(CLASSES))
    return tuple(made.jpeg("train", index) for index in range(num_pictures))


def views_per_second(num_workers: int, pictures: Sequence[bytes], seconds: float) -> float:
    """Of so many processes, that all view the same pictures, each from another one on."""
    context = multiprocessing.get_context("fork")
    barrier, total = context.Barrier(num_workers), context.Value("q", 0)
    processes = [
        context.Process(target=_view, args=(pictures, worker, seconds, barrier, total, os.getpid()), daemon=True)
        for worker in range(num_workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"of {num_workers} processes some failed; their own words are above")
    return total.value / seconds


def _view(
    pictures: Sequence[bytes],
    worker: int,
    seconds: float,
    barrier: Barrier,
    total: "Synchronized[int]",
    parent_pid: int,
) -> None:
    """A process's share: views for `seconds`, from when all are warm."""
    import torch

    from pipeline.config.data import AugmentConfig
    from pipeline.config.model import InputConfig
    from pipeline.data.pixels import train_draws, train_view

    gpu_jobs.die_with(parent_pid)
    torch.set_num_threads(1)
    config, augment, seen = InputConfig(size=SIZE), AugmentConfig(), 0
    draws = train_draws(0, [(worker, index) for index in range(len(pictures))])

    def view(index: int) -> None:
        place = (worker * 17 + index) % len(pictures)
        train_view(pictures[place], config, augment, draws[place], is_checked=True)

    view(0)
    barrier.wait(START_SECONDS)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        view(seen)
        seen += 1
    with total.get_lock():
        total.value += seen


def measure_ours(num_workers: int, effort: Effort) -> Content:
    """Our decoder on so many processes."""
    rate = views_per_second(num_workers, make_pictures(effort.num_pictures), effort.seconds)
    return {"num_workers": num_workers, "pictures_per_second": rate, "size": SIZE}


def measure_nvjpeg(effort: Effort, *, views: bool) -> Content:
    """torchvision's decoder on the GPU, one process; `views`: with crop, resize and mirror."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    pictures = [torch.frombuffer(bytearray(each), dtype=torch.uint8) for each in make_pictures(effort.num_pictures)]
    batches = [pictures[start : start + effort.batch] for start in range(0, len(pictures), effort.batch)]
    finish: Callable[[list[Any]], Any] = _gpu_views if views else lambda decoded: decoded
    rates, ends = [], 0.0
    while len(rates) < 2 or time.perf_counter() < ends:  # the first pass over the pictures warms up
        started = time.perf_counter()
        for batch in batches:
            finish(decode_jpeg(batch, mode=ImageReadMode.RGB, device="cuda"))  # type: ignore[arg-type]
        torch.cuda.synchronize()
        rates.append(len(pictures) / (time.perf_counter() - started))
        ends = ends or time.perf_counter() + effort.seconds
    return {
        "pictures_per_second": statistics.median(rates[1:]),
        "least": min(rates[1:]),
        "most": max(rates[1:]),
        "batch": effort.batch,
        "views": views,
    }


def _gpu_views(decoded: "list[Any]") -> Any:
    """A square of each picture, on the GPU."""
    import torch
    from torchvision.transforms import v2

    view = v2.Compose([v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()])
    return torch.stack([view(picture) for picture in decoded])


def measure(name: str, *, dry_run: bool) -> Content:
    """One way of decoding, or the sentence that says what it lacks."""
    if importlib.util.find_spec("simplejpeg") is None:
        return {"left_out": "simplejpeg, which decodes and makes the pictures, is not installed: bring its wheel."}
    effort = Effort.of(dry_run=dry_run)
    if name not in (NVJPEG, NVJPEG_VIEWS):
        return measure_ours(int(name.rpartition("-w")[2]), effort)
    if dry_run:
        return {"left_out": "nvJPEG needs a GPU."}
    if importlib.util.find_spec("torchvision") is None:
        return {"left_out": "torchvision, whose nvJPEG this measures, is not installed: bring its wheel."}
    return measure_nvjpeg(effort, views=name == NVJPEG_VIEWS)


def main(arguments: Sequence[str]) -> int:
    """Measure what the folder lacks; returns 1 where something stays missing, 2 without a GPU."""
    options = gpu_jobs.parser(__doc__).parse_args(arguments)
    ends = time.monotonic() + options.seconds
    workers = Effort.of(dry_run=options.dry_run).workers
    names = [NVJPEG, NVJPEG_VIEWS, *(f"decode-ours-w{number}" for number in reversed(workers))]
    if options.worker:
        conditions = gpu_jobs.conditions(dry_run=options.dry_run)
        gpu_jobs.measure_each(
            options.out, options.worker.split(","), lambda name: conditions | measure(name, dry_run=options.dry_run)
        )
        return 0
    return gpu_jobs.run("gpu_decode", options, names, lambda _: DEADLINE_SECONDS, ends)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
