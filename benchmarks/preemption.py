"""How long an end takes: from a signal to a durable checkpoint and the exit, from a rank's death to that of all.

    python -m benchmarks.preemption [--rounds 5] [key=value ...]

A training on two ranks is told to stop by SIGTERM in the middle of a step, and started again; so for some rounds. The
checkpoint counts as durable when it has its final name, which comes after fsync. The exit is that of the command, when
all ranks are gone. Then, for as many rounds, SIGKILL takes one of its ranks, until nothing of the command is left.
"""

import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks import common

CEILING_SECONDS = 25.0  # Slurm kills 30 s after SIGTERM
STEPS_BEFORE = 3
LONGEST_WAIT_SECONDS = 300.0
RUN = common.RUNS / "preemption"
OVERRIDES = (
    "model=squeezenet1_1",
    "batch.global_size=64",
    "cluster.devices=2",
    "trainer.max_steps=100000",
    "trainer.checkpoint_every_steps=100000",
    "trainer.validate_every_steps=0",
)


def wait_for(condition: Callable[[], bool]) -> float:
    """When it holds, by the clock of the files' dates."""
    deadline = time.monotonic() + LONGEST_WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            sys.exit("Nothing happened for too long.")
        time.sleep(0.002)
    return time.time()


def num_rows(record: Path) -> int:
    """Steps recorded."""
    return record.read_bytes().count(b"\n") if record.exists() else 0


@contextmanager
def under_way(overrides: Sequence[str]) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    """A start of the training that has done some steps; the process, and the seconds until its first row."""
    record = RUN / "metrics.jsonl"
    before = num_rows(record)
    started = time.time()
    with subprocess.Popen([sys.executable, "-m", "pipeline.train", *overrides], stdout=subprocess.DEVNULL) as process:
        # The row of a step is written with the next: one step later than it was made.
        first = wait_for(lambda: num_rows(record) > before)
        wait_for(lambda: num_rows(record) >= before + STEPS_BEFORE)
        yield process, first - started


def ended(process: subprocess.Popen[bytes], expected_code: int) -> float:
    """When the command has."""
    code = process.wait(LONGEST_WAIT_SECONDS)
    now = time.time()
    if code != expected_code:
        sys.exit(f"pipeline.train ended with {code}, not {expected_code}.")
    return now


def preempted(overrides: Sequence[str]) -> dict[str, float]:
    """One start, some steps, one signal."""
    with under_way(overrides) as (process, until_first_row):
        told = time.time()
        process.send_signal(signal.SIGTERM)
        gone = ended(process, 75)
    newest = max((RUN / "checkpoints").glob("step=*.ckpt"))
    return {
        "start_to_first_step_seconds": until_first_row,
        "signal_to_checkpoint_seconds": newest.stat().st_ctime - told,
        "signal_to_exit_seconds": gone - told,
    }


def bereaved(overrides: Sequence[str]) -> dict[str, float]:
    """One start, some steps, one dead rank."""
    with under_way(overrides) as (process, _):
        family = psutil.Process(process.pid).children(recursive=True)
        victim = next(child for child in family if child.environ().get("RANK") == "1")
        victim.kill()
        killed = time.time()
        ended(process, 1)
        gone = wait_for(lambda: not any(child.is_running() for child in family))
    return {"death_to_all_gone_seconds": gone - killed}


def main(arguments: Sequence[str]) -> int:
    """All rounds; the slowest exit must keep its bound."""
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("extra", nargs="*", metavar="key=value", help="further overrides of pipeline.train")
    options = parser.parse_args(arguments)
    common.prepare_for_timing("preemption", 400)
    name = common.fresh("preemption")
    overrides = [f"name={name}", f"data.root={common.SHARDS / 'preemption'}", *OVERRIDES, *options.extra]
    rounds = [preempted(overrides) for _ in range(options.rounds)]
    rounds = [{**row, **bereaved(overrides)} for row in rounds]
    for number, row in enumerate(rounds, 1):
        common.show(f"round {number}", row)
    result = common.Result("preemption", vars(options), {"rounds": rounds})
    result.figures["step_seconds"] = common.median_of(common.read_rows("preemption"), "perf/step_seconds")
    result.figures |= {f"median_{key}": statistics.median(row[key] for row in rounds) for key in rounds[0]}
    slowest = max(row["signal_to_exit_seconds"] for row in rounds)
    last = max(row["death_to_all_gone_seconds"] for row in rounds)
    result.floors = [
        common.Floor("slowest exit after SIGTERM, seconds", slowest, at_most=CEILING_SECONDS),
        common.Floor("slowest end of all after a rank's death, seconds", last, at_most=CEILING_SECONDS),
    ]
    return result.finish(options.results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
