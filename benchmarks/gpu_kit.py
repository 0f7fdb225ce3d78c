"""All that is to be measured on a machine with one GPU, the most telling first, within a budget of seconds.

    bash benchmarks/gpu_kit.sh FOLDER                  NCCL's bytes, the training step, decoding
    bash benchmarks/gpu_kit.sh FOLDER --dry-run        all of it small, on the CPU over gloo
    bash benchmarks/gpu_kit.sh FOLDER --resume FILE    what FILE, an earlier summary.json, lacks

FOLDER/nccl, FOLDER/step and FOLDER/decode get a JSON file the moment a result is known; FOLDER/summary.json, kept up to
date meanwhile, holds them all, and so is the one file to bring home. Where $OUT is set, a copy of it is kept there; the
folder is runs/gpu_kit unless given. A second run takes up what is missing. GPU_KIT_SECONDS (450) bounds the whole.
Exit codes: 0 all is measured; 1 something is missing or failed; 2 bad input, such as no GPU; 143 ended by SIGTERM, with
its summary.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

from benchmarks import gpu_jobs, gpu_kit_summary
from pipeline.core.files import write_json_atomic

DEFAULT_SECONDS, LEAST_SECONDS = 450.0, 8.0
GRACE_SECONDS = 8.0  # for a part to write what it has, once it is asked to end
REFRESH_SECONDS = 5.0
NOTHING_MISSING = "all was measured"


@dataclass(frozen=True)
class Part:
    """One command of the kit."""

    name: str
    module: str
    share: float
    """Of the seconds left that it may take in its first turn."""
    told_seconds: bool = True
    """Whether it is told when to end."""
    trial: tuple[str, ...] = ()
    """Further options of a dry run."""


PARTS = (
    Part("nccl", "nccl_probe", 0.45, told_seconds=False, trial=("--ranks", "2", "--sizes", "4,33332", "--steps", "2")),
    Part("step", "gpu_step", 0.75),
    Part("decode", "gpu_decode", 1.0),
)


class Kit:
    """The parts in turn; its summary is right at any moment."""

    def __init__(self, folder: Path, *, dry_run: bool, seconds: float, copy: Path | None) -> None:
        self.folder, self.dry_run, self.copy = folder, dry_run, copy
        self.ends = time.monotonic() + seconds
        self.missing = {part.name: "was not begun" for part in PARTS}

    def run(self) -> None:
        """Every part within its share, then within what is left those that something is missing of."""
        for part in PARTS:
            self._turn(part, part.share)
        for part in PARTS:
            if self.missing[part.name] != NOTHING_MISSING:
                self._turn(part, 1.0)

    def summarize(self, ended: str | None = None) -> None:
        """Write the summary, and its copy; `ended`: what ended the kit before its time."""
        summary = gpu_kit_summary.summarize(self.folder, missing=self.missing, ended=ended)
        for folder in filter(None, (self.folder, self.copy)):
            folder.mkdir(parents=True, exist_ok=True)
            write_json_atomic(folder / gpu_kit_summary.FILE, summary)

    def _turn(self, part: Part, share: float) -> None:
        seconds = share * (self.ends - time.monotonic())
        if seconds < LEAST_SECONDS:
            return
        command = [sys.executable, "-m", f"benchmarks.{part.module}", "--out", str(self.folder / part.name)]
        command += ["--seconds", f"{seconds - 2:.0f}"] if part.told_seconds else []
        command += ["--dry-run", *part.trial] if self.dry_run else []
        print(f"{part.name}: at most {seconds:.0f} s", flush=True)
        self.missing[part.name] = "was cut"
        code = self._run(command, time.monotonic() + seconds)
        self.missing[part.name] = NOTHING_MISSING if code == 0 else f"ended with exit code {code}"
        self.summarize()

    def _run(self, command: Sequence[str], until: float) -> int:
        process = subprocess.Popen(command, process_group=0, preexec_fn=partial(gpu_jobs.die_with, os.getpid()))
        try:
            while time.monotonic() < until:
                with suppress(subprocess.TimeoutExpired):
                    return process.wait(min(REFRESH_SECONDS, max(0.0, until - time.monotonic())))
                self.summarize()
            print(f"  its time is over: {' '.join(command[1:3])}", flush=True)
        finally:
            _end_group(process)
        return process.returncode


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """Ask a part to end, then end it and all that it started."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _cut(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    signal.signal(number, signal.SIG_IGN)  # once is enough: what follows is writing down
    raise KeyboardInterrupt


def _options(arguments: Iterable[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_kit.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/gpu_kit"), help="of the results")
    parser.add_argument("--dry-run", action="store_true", help="small, on the CPU over gloo: shows that it runs")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="summary.json of an earlier run, to go on from")
    options = parser.parse_args(list(arguments))
    try:
        options.seconds = float(os.environ.get("GPU_KIT_SECONDS") or DEFAULT_SECONDS)
    except ValueError:
        parser.error(f"GPU_KIT_SECONDS={os.environ['GPU_KIT_SECONDS']} is not a number of seconds, such as 450")
    return options


def main(arguments: Sequence[str]) -> int:
    """Measure what is missing, and say what came out."""
    options = _options(arguments)
    if not options.dry_run and not gpu_jobs.has_gpu():
        print(f"error: {gpu_jobs.NO_GPU}", file=sys.stderr)
        return gpu_jobs.BAD_INPUT_EXIT
    if options.resume is not None:
        try:
            gpu_kit_summary.unpack(options.resume, options.folder)
        except (OSError, ValueError) as error:
            print(f"error: --resume takes the summary.json of an earlier run: {error}", file=sys.stderr)
            return gpu_jobs.BAD_INPUT_EXIT
    copy = os.environ.get("OUT")
    kit = Kit(options.folder, dry_run=options.dry_run, seconds=options.seconds, copy=Path(copy) if copy else None)
    ended = None
    signal.signal(signal.SIGTERM, _cut)
    try:
        kit.run()
    except KeyboardInterrupt:
        ended = "It was asked to end before its time; the same command goes on."
    kit.summarize(ended)
    print("\n".join(gpu_kit_summary.table(gpu_jobs.read(kit.folder, "summary") or {})), flush=True)
    if ended:
        print(f"error: {ended}", file=sys.stderr)
        return gpu_jobs.CUT_EXIT
    return int(any(word != NOTHING_MISSING for word in kit.missing.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
