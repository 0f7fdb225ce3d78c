"""How long a preemption takes: from the signal to a durable checkpoint, to the exit, and from a start to the next step.

    python -m benchmarks.preemption [--rounds 5] [key=value ...]

A training on two ranks is told to stop by SIGTERM in the middle of a step, and started again; so for some rounds. The
checkpoint counts as durable when it has its final name, which comes after fsync. The exit is that of the command, when
all ranks are gone.
"""

import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import common

CEILING_SECONDS = 25.0  # Slurm kills 30 s after SIGTERM
STEPS_BEFORE = 3
LONGEST_WAIT_SECONDS = 300.0
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


def attempt(name: str, run: Path, overrides: Sequence[str]) -> dict[str, float]:
    """One start, some steps, one signal."""
    record = run / "metrics.jsonl"
    before = num_rows(record)
    command = [sys.executable, "-m", "pipeline.train", f"name={name}", *overrides]
    started = time.time()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        first = wait_for(lambda: num_rows(record) > before)
        wait_for(lambda: num_rows(record) >= before + STEPS_BEFORE)
        told = time.time()
        process.send_signal(signal.SIGTERM)
        code = process.wait(LONGEST_WAIT_SECONDS)
        ended = time.time()
    if code != 75:
        sys.exit(f"pipeline.train ended with {code}, not 75.")
    newest = max((run / "checkpoints").glob("step=*.ckpt"))
    return {
        # The row of a step is written with the next: one step later than it was made.
        "start_to_first_step_seconds": first - started,
        "signal_to_checkpoint_seconds": newest.stat().st_ctime - told,
        "signal_to_exit_seconds": ended - told,
    }


def main(arguments: Sequence[str]) -> int:
    """All rounds; the slowest exit must keep its bound."""
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("extra", nargs="*", metavar="key=value", help="further overrides of pipeline.train")
    options = parser.parse_args(arguments)
    common.prepare_for_timing("preemption", 400)
    name, run = common.fresh("preemption"), common.RUNS / "preemption"
    overrides = [f"data.root={common.SHARDS / 'preemption'}", *OVERRIDES, *options.extra]
    rounds = [attempt(name, run, overrides) for _ in range(options.rounds)]
    for number, row in enumerate(rounds, 1):
        common.show(f"round {number}", row)
    result = common.Result("preemption", vars(options), {"rounds": rounds})
    result.figures["step_seconds"] = common.median_of(common.read_rows("preemption"), "perf/step_seconds")
    result.figures |= {f"median_{key}": statistics.median(row[key] for row in rounds) for key in rounds[0]}
    slowest = max(row["signal_to_exit_seconds"] for row in rounds)
    result.floors = [common.Floor("slowest exit after SIGTERM, seconds", slowest, at_most=CEILING_SECONDS)]
    return result.finish(options.results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
