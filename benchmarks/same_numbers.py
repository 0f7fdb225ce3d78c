"""Proof of value: two states of the code, the same seed, the same numbers.

    python -m benchmarks.same_numbers --before COMMIT_OR_CHECKOUT [--after CHECKOUT]

Small trainings on 1, 2 and 3 ranks, plain and with PowerSGD, are run from both checkouts: once left alone, and once
resumed in mid-epoch, where both continue a copy of the run directory that the checkout *before* left when it was told
to stop or was killed. One case averages weights, another accumulates. Compared without tolerance are metrics.jsonl,
ledger.json and everything in the checkpoints, tensors bit for bit; left out is only what chance decides: times,
bandwidths, shares of times, and bytes that the kernel sent again or the ranks' meeting point polled for. Every
difference is printed with file, row and key, and makes the exit code 1.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import common
from pipeline.run.provenance import CODE_ROOT, describe_git

ROOT = common.RUNS / "same-numbers"
NUM_IMAGES = 100
NUM_STEPS = 11
STEPS_PER_EPOCH = 8
LONGEST_WAIT_SECONDS = 300.0
ATTEMPTS_AT_A_STOP = 3
SMALL = (
    "model=squeezenet1_1",
    "data.size=32",
    "data.num_workers=0",
    "cluster.num_threads=1",
    "batch.global_size=12",
    f"trainer.max_steps={NUM_STEPS}",
    "trainer.validate_every_steps=4",
    "trainer.checkpoint_every_steps=3",
    "recipe.warmup_steps=2",
    "tracking=disabled",
)
POWERSGD = ("comm.hook=powersgd", "comm.powersgd_start_step=2")
# Paths of what chance decides: times, and bytes that the kernel sent again or that a rank polled for.
METRIC_TIMES = re.compile(r"^perf/|^comm/(seconds|exposed_seconds|exposed_share|bus_bandwidth)$")
LEDGER_TIMES = re.compile(
    r"seconds\b|_per_second$|^time\b|^meter_overhead_fraction$|\b(retransmitted|store)_bytes_per_rank\b"
)
# Paths in a checkpoint and its sidecar that follow from installed versions, not from the training, and the same bytes.
CHECKPOINT_CHANCE = re.compile(
    r"^pytorch-lightning_version$|\bversions\b|^(replaces\.)?(sha256|num_bytes)$"
    r"|\b(retransmitted|store)_bytes_per_rank\b"
)


@dataclass(frozen=True)
class Case:
    """A training that both checkouts run."""

    name: str
    num_ranks: int
    overrides: tuple[str, ...] = ()
    stop: signal.Signals = signal.SIGTERM
    """How the run that is resumed was ended."""


CASES = (
    Case("1-plain-accumulating", 1, ("batch.max_per_rank=4",)),
    Case("2-plain-averaged", 2, ("recipe.ema_decay=0.9",), signal.SIGKILL),
    Case("3-plain", 3),
    Case("1-powersgd", 1, POWERSGD, signal.SIGKILL),
    Case("2-powersgd", 2, POWERSGD),
    Case("3-powersgd-accumulating", 3, (*POWERSGD, "batch.max_per_rank=2"), signal.SIGKILL),
)


@dataclass(frozen=True)
class Difference:
    """One value that is not the same on both sides."""

    file: str
    path: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.file}: {self.path}: {self.before} before, {self.after} after"


class Comparer:
    """Compares what two runs left.

    What was compared is counted too, so that an empty comparison is not taken for a proof.
    """

    def __init__(self) -> None:
        self.differences: list[Difference] = []
        self.num_values = 0
        self.num_tensors = 0

    def compare_runs(self, before: Path, after: Path) -> None:
        """Compare metrics.jsonl, ledger.json and all checkpoints of two run directories."""
        rows = [_rows(run / "metrics.jsonl") for run in (before, after)]
        self.compare("metrics.jsonl", *rows, ignored=METRIC_TIMES)
        ledgers = [common.read_json(run / "ledger.json") for run in (before, after)]
        self.compare("ledger.json", *ledgers, ignored=LEDGER_TIMES)
        names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (before, after)]
        self.compare("checkpoints/", *names)
        for name in sorted(set(names[0]) & set(names[1])):
            paths = [run / "checkpoints" / name for run in (before, after)]
            if name.endswith(".ckpt"):
                contents = [torch.load(path, weights_only=True) for path in paths]
            else:
                contents = [common.read_json(path) for path in paths]
            self.compare(f"checkpoints/{name}", *contents, ignored=CHECKPOINT_CHANCE)

    def compare(self, file: str, before: Any, after: Any, *, ignored: re.Pattern[str] | None = None) -> None:
        """Compare two trees of containers, tensors and plain values exactly.

        Args:
            file: name for what is found.
            before: the one tree.
            after: the other.
            ignored: leaves are left out whose path (or whose key, in a row) it finds; never a reason for a null.
        """
        self._walk(file, before, after, "", ignored)

    def _walk(self, file: str, before: Any, after: Any, path: str, ignored: re.Pattern[str] | None) -> None:
        # A reason names in its key the value that is null, and is not a time itself.
        key = path.partition("].")[2] if path.startswith("[") else path
        if ignored is not None and ignored.search(key) and not key.startswith("null_reasons."):
            return
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            for name in {**before, **after}:
                inner = f"{path}.{name}" if path else str(name)
                self._walk(file, before.get(name, _ABSENT), after.get(name, _ABSENT), inner, ignored)
        elif isinstance(before, list | tuple) and isinstance(after, list | tuple):
            self._walk(file, len(before), len(after), f"{path}[length]", None)
            for position, (one, other) in enumerate(zip(before, after, strict=False)):
                self._walk(file, one, other, f"{path}[{position}]", ignored)
        elif isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
            self.num_tensors += 1
            if not _same_bits(before, after):
                self.differences.append(Difference(file, path, _told(before), _told(after)))
        else:
            self.num_values += 1
            # repr tells apart what == does not, 0.0 from -0.0 and 1 from True, and takes NaN for equal to itself.
            if type(before) is not type(after) or repr(before) != repr(after):
                self.differences.append(Difference(file, path, _told(before), _told(after)))


class _Absent:
    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def _told(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} of sum {value.double().sum().item()!r}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _rows(path: Path) -> dict[str, dict[str, Any]]:
    """metrics.jsonl by step, as `[step 3].train/loss`; a step that stands twice is a difference of its own."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [row["trainer/step"] for row in lines]
    return {
        f"[step {step}{' again' * steps[:position].count(step)}]": row
        for position, (step, row) in enumerate(zip(steps, lines, strict=True))
    }


@dataclass(frozen=True)
class Checkout:
    """A state of the code that can train."""

    side: str
    """`before` or `after`."""
    root: Path

    @property
    def runs(self) -> Path:
        """Directory of its runs. Ranks exchange this path, so both sides' are equally long."""
        return (ROOT / {"before": "runs-0", "after": "runs-1"}[self.side]).resolve()

    def start(self, command: str, *overrides: str) -> "subprocess.Popen[str]":
        """Start `python -m pipeline.<command>` of this checkout, with its own code first on the path."""
        return subprocess.Popen(
            [sys.executable, "-m", f"pipeline.{command}", *overrides],
            cwd=self.root,
            env={**os.environ, "PYTHONPATH": str(self.root)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, command: str, *overrides: str) -> None:
        """Run it to its end; ends the benchmark where it fails."""
        process = self.start(command, *overrides)
        output, _ = process.communicate()
        if process.returncode:
            sys.exit(f"pipeline.{command} of {self.root} ended with {process.returncode}:\n{output}")

    def train(self, case: Case, run_root: Path) -> Path:
        """Start or continue the run of this case below `run_root`, to its end. Returns its directory."""
        self.run("train", *overrides_of(case, run_root))
        return run_root / case.name

    def stop_early(self, case: Case, run_root: Path) -> int:
        """Begin the run, and end it in mid-epoch. Returns the step of the checkpoint it leaves."""
        for _ in range(ATTEMPTS_AT_A_STOP):
            shutil.rmtree(run_root / case.name, ignore_errors=True)
            process = self.start("train", *overrides_of(case, run_root))
            output = _stop_after_rows(process, run_root / case.name / "metrics.jsonl", case.stop)
            pointer = run_root / case.name / "checkpoints" / "last.json"
            step = common.read_json(pointer)["step"] if pointer.exists() else 0
            if process.returncode in (75, -case.stop) and 0 < step < NUM_STEPS and step % STEPS_PER_EPOCH:
                return step
            if process.returncode not in (0, 75, -case.stop):
                sys.exit(f"pipeline.train of {self.root} ended with {process.returncode}:\n{output}")
        sys.exit(f"{case.name}: the run never stopped in mid-epoch; the machine may be too busy.")


def overrides_of(case: Case, run_root: Path) -> list[str]:
    """Everything the command is told; the same for both checkouts but for the place."""
    where = [f"name={case.name}", f"run_root={run_root}", f"data.root={(ROOT / 'shards').resolve()}"]
    return [*where, f"cluster.devices={case.num_ranks}", *SMALL, *case.overrides]


def _stop_after_rows(process: "subprocess.Popen[str]", record: Path, number: signal.Signals) -> str:
    """Send the signal once four steps are recorded, past the first checkpoint, and wait until no process is left."""
    deadline = time.monotonic() + LONGEST_WAIT_SECONDS
    while process.poll() is None and (not record.exists() or record.read_bytes().count(b"\n") < 4):
        if time.monotonic() > deadline:
            process.kill()
        time.sleep(0.002)
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    output, _ = process.communicate()
    psutil.wait_procs(family, timeout=LONGEST_WAIT_SECONDS)
    return output


@contextlib.contextmanager
def checkout_of(side: str, place: str) -> Iterator[Checkout]:
    """The checkout at a path, or of a commit of this repository in a temporary worktree."""
    path = Path(place)
    if path.is_dir():
        yield Checkout(side, path.resolve())
        return
    with tempfile.TemporaryDirectory(prefix="same-numbers-") as temporary:
        worktree = Path(temporary) / side
        git = ["git", "-C", str(CODE_ROOT), "worktree"]
        added = subprocess.run([*git, "add", "--detach", worktree, place], capture_output=True, text=True, check=False)
        if added.returncode:
            sys.exit(f"--{side} {place} is neither a directory nor a commit that git knows: {added.stderr.strip()}")
        try:
            yield Checkout(side, worktree)
        finally:
            subprocess.run([*git, "remove", "--force", worktree], check=False)


def both(before: Checkout, after: Checkout, case: Case, what: str) -> dict[str, Any]:
    """Train the case from both checkouts at once and compare. Returns the row."""
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda one: one.train(case, one.runs / what), (before, after)))
    comparer = Comparer()
    comparer.compare_runs(*runs)
    for difference in comparer.differences[:20]:
        print(f"  DIFFERS {case.name}, {what}: {difference}", flush=True)
    return {
        "case": case.name,
        "run": what,
        "num_values": comparer.num_values,
        "num_tensors": comparer.num_tensors,
        "num_differences": len(comparer.differences),
        "differences": [str(difference) for difference in comparer.differences[:20]],
    }


def compare_case(before: Checkout, after: Checkout, case: Case) -> list[dict[str, Any]]:
    """Both rows of a case: left alone, and resumed from what the checkout before left."""
    alone = both(before, after, case, "alone")
    stopped = (ROOT / "stopped").resolve()
    step = before.stop_early(case, stopped)
    for one in (before, after):
        shutil.copytree(stopped / case.name, one.runs / "resumed" / case.name)
    resumed = {**both(before, after, case, "resumed"), "stopped_by": case.stop.name, "resumed_from_step": step}
    return [alone, resumed]


def show(row: Mapping[str, Any]) -> None:
    """One line of the table."""
    how = f"{row['run']} from step {row['resumed_from_step']}" if "resumed_from_step" in row else row["run"]
    counts = f"{row['num_values']:7,} values {row['num_tensors']:6,} tensors {row['num_differences']:6,} differences"
    print(f"  {row['case']:24} {how:24} {counts}", flush=True)


def main(arguments: Sequence[str]) -> int:
    """All cases; no difference may be left."""
    parser = common.parser(__doc__)
    parser.add_argument("--before", required=True, help="a checkout, or a commit of this repository")
    parser.add_argument("--after", default=str(CODE_ROOT), help="the same (default: this checkout)")
    parser.add_argument("--only", default="", metavar="WORD", help="cases whose name contains it")
    options = parser.parse_args(arguments)
    common.print_conditions()
    shutil.rmtree(ROOT, ignore_errors=True)
    with checkout_of("before", options.before) as before, checkout_of("after", options.after) as after:
        before.run("prepare", "source=builtin", f"out={(ROOT / 'shards').resolve()}", f"num_images={NUM_IMAGES}")
        rows = []
        for case in CASES:
            if options.only in case.name:
                for row in compare_case(before, after, case):
                    show(row)
                    rows.append(row)
        commits = {one.side: describe_git(one.root)["commit"] for one in (before, after)}
    result = common.Result("same_numbers", vars(options), {"commits": commits, "cases": rows})
    total = sum(row["num_differences"] for row in rows)
    result.floors = [common.Floor("values and tensors that differ", total, at_most=0)]
    return result.finish(options.results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
