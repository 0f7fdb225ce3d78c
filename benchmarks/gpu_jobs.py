"""Measurements one after another in a process of their own: each with a deadline, each written the moment it is known.

A worker says `begin NAME` on its stdout, measures, and writes FOLDER/NAME.json. What passes its deadline, raises, or
takes its process down is written down as failed, and a new worker goes on with the next. What is there already is not
measured again; what failed or was left out in an earlier run is tried again, after all that was never tried.
"""

import argparse
import ctypes
import datetime
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from pipeline.core.files import write_json_atomic

NO_GPU = "there is no GPU here: check the driver (nvidia-smi), or add --dry-run to try everything out on the CPU."
BAD_INPUT_EXIT, CUT_EXIT = 2, 128 + signal.SIGTERM
Content = dict[str, Any]


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the options of every part of the kit."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--out", type=Path, required=True, help="folder of the results, one JSON file each")
    made.add_argument("--dry-run", action="store_true", help="on the CPU, everything small: shows that it runs")
    made.add_argument("--seconds", type=float, default=480.0, help="end by then (%(default)g)")
    made.add_argument("--worker", default="", help=argparse.SUPPRESS)  # the names that this process measures itself
    return made


def has_gpu() -> bool:
    """Whether the driver knows a card; asked at once, without torch."""
    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    except OSError:
        return False
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def conditions(*, dry_run: bool) -> Content:
    """Device, versions and date, for a figure to carry.

    Raises:
        RuntimeError: torch cannot use the GPU, and says why.
    """
    import torch

    return {
        "device": "CPU" if dry_run else torch.cuda.get_device_name(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "num_cores": len(os.sched_getaffinity(0)),
    }


def read(folder: Path, name: str) -> Content | None:
    """A result, if it is there and whole."""
    with suppress(OSError, ValueError):
        return json.loads((folder / f"{name}.json").read_text())
    return None


def write(folder: Path, name: str, content: Content) -> None:
    """A result, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / f"{name}.json", {"schema": 1, "name": name, **content})


def missing(folder: Path, names: Sequence[str]) -> list[str]:
    """What has no result: first what was never tried, then what failed."""
    found = {name: read(folder, name) for name in names}
    failed = [name for name in names if "error" in (found[name] or {})]
    return [name for name in names if found[name] is None] + failed


def measure_each(folder: Path, names: Sequence[str], measure: Callable[[str], Content]) -> None:
    """A worker's life: measure the names in turn.

    What one raises is its result, and the worker's end: after an error on the device, the process may be good for
    nothing.
    """
    for name in names:
        (folder / f"{name}.json").unlink(missing_ok=True)  # of an earlier failure
        print(f"begin {name}", flush=True)
        try:
            content = measure(name)
        except Exception as error:  # whatever a library raises
            write(folder, name, {"error": f"{type(error).__name__}: {error}"[:2000]})
            raise SystemExit(1) from None
        write(folder, name, content)


def run(
    module: str,
    options: argparse.Namespace,
    names: Sequence[str],
    deadline_seconds: Callable[[str], float],
    ends: float,
) -> int:
    """One part of the kit, by workers of itself; returns its exit code: 1 something is missing, 2 bad input."""
    if not options.dry_run and not has_gpu():
        print(f"error: {NO_GPU}", file=sys.stderr)
        return BAD_INPUT_EXIT
    if other := next((name for name in names if _is_of_other_device(read(options.out, name), options.dry_run)), None):
        print(
            f"error: {options.out / other}.json is of {'a GPU' if options.dry_run else 'a dry run'}: results are not"
            " mixed, give another folder.",
            file=sys.stderr,
        )
        return BAD_INPUT_EXIT
    signal.signal(signal.SIGTERM, _end)  # so that a worker never outlives us
    command = [sys.executable, "-m", f"benchmarks.{module}", "--out", str(options.out)]
    if options.dry_run:
        command.append("--dry-run")
    num_missing = supervise(command, names, options.out, deadline_seconds=deadline_seconds, ends=ends)
    print(f"{module}: {len(names) - num_missing} of {len(names)} measured, in {options.out}", flush=True)
    return int(num_missing > 0)


def _is_of_other_device(result: Content | None, dry_run: bool) -> bool:
    return result is not None and "device" in result and (result["device"] == "CPU") != dry_run


def supervise(
    command: Sequence[str], names: Sequence[str], folder: Path, *, deadline_seconds: Callable[[str], float], ends: float
) -> int:
    """Have workers measure what is missing until `ends` (time.monotonic); returns how many names stay missing.

    Args:
        command: of a worker; `--worker NAME,NAME` is added.
        names: in the order of what they tell.
        folder: of the results.
        deadline_seconds: of a name, its worker's start not included.
        ends: a measurement under way then is cut, and stays missing.
    """
    left = missing(folder, names)
    left += [name for name in names if name not in left and "left_out" in (read(folder, name) or {})]
    while left and time.monotonic() < ends:
        worker = _Worker([*command, "--worker", ",".join(left)])
        try:
            begun, why = worker.follow(deadline_seconds, ends)
        finally:
            worker.end()
        if begun is None:
            if why is not None:
                print(f"error: a worker {why} before it measured anything.", file=sys.stderr, flush=True)
            break
        if why is not None and read(folder, begun) is None:
            write(folder, begun, {"error": f"it {why}"})
            print(f"  {begun}: it {why}", flush=True)
        left = left[left.index(begun) + 1 :]
    return len(missing(folder, names))


def _end(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    sys.exit(CUT_EXIT)


class _Worker:
    """A process that measures, and what it says."""

    def __init__(self, command: Sequence[str]) -> None:
        bound = partial(die_with, os.getpid())
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=bound)
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)

    def follow(self, deadline_seconds: Callable[[str], float], ends: float) -> tuple[str | None, str | None]:
        """(the name begun last, what became of the worker there; None: it measured all, or the time was over).

        The name is None too where nothing was begun, or where the time was over amid a measurement.
        """
        begun, until = None, ends
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, min(until, ends) - time.monotonic()))
            except queue.Empty:
                if until >= ends or begun is None:
                    return None, None
                return begun, f"passed its deadline of {deadline_seconds(begun):g} s"
            if line is None:
                code = self._process.wait()
                return begun, None if code == 0 else f"took its process down (exit code {code})"
            if line.startswith("begin "):
                begun = line.split()[1]
                until = time.monotonic() + deadline_seconds(begun)
            else:
                print(line, end="", flush=True)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join(1.0)  # a compiler that the worker started may hold the pipe a little longer


def die_with(parent_pid: int) -> None:
    """Linux: this process is killed with its parent, however that one ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent_pid:
        os._exit(1)
