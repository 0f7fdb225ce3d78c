"""A record of a million steps: how long a resume waits for it, and the report, and how much memory each takes.

    python -m benchmarks.long_record [--steps 1000000]

The record has the metrics of a real row. A resume opens it and cuts it at the step of the last checkpoint, a hundred
steps before its end; the report is written as `pipeline.report` does. Each is a process of its own;
memory is its peak of resident memory above what it held before. The report is one thread's work: the bound is on its
processor time, which other work on the machine does not stretch much.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common

NAME = "long_record"
NUM_LOST_STEPS = 100
MORE_METRICS = [f"comm/bytes_{number}" for number in range(12)]
"""As many as a real row has above what the made one has."""
LONGEST_RESUME_SECONDS, MOST_RESUME_BYTES, LONGEST_REPORT_SECONDS = 2.0, 100_000_000, 15.0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = common.parser(__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000, help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # what the processes are told
    return parser.parse_args(arguments)


def make_run(num_steps: int) -> Path:
    """A run by hand, with so many rows; a validation in every thousandth."""
    from tests.making.runs import handmade_run

    directory = common.RUNS / NAME
    common.fresh(NAME)
    made = handmade_run(num_steps=8, run=NAME)
    row = {**made.rows[-1], **dict.fromkeys(MORE_METRICS, 1234567.125)}
    made.ledger["num_steps"] = num_steps
    made.rows = []
    made.write(directory)
    with (directory / "metrics.jsonl").open("w") as file:
        for step in range(1, num_steps + 1):
            learnt = {"train/loss": 7 * math.exp(-3 * step / num_steps), "comm/total_gigabytes": step * 0.01}
            judged = {"val/loss": 2.0, "val/top1": 0.5} if step % 1000 == 0 else {}
            file.write(json.dumps({**row, "trainer/step": step, **learnt, **judged}) + "\n")
    return directory


def peak_bytes() -> int:
    """Most resident memory of this process since its start."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(what: str, run: Path) -> dict[str, Any]:
    """In a process of its own."""
    from pipeline.reporting.page import write_run_report
    from pipeline.run.record.metrics_log import MetricsLog

    held, began, used = peak_bytes(), time.perf_counter(), time.process_time()
    if what == "resume":
        log = MetricsLog(run / "metrics.jsonl")
        log.truncate_to(log.last_step - NUM_LOST_STEPS)
        log.close()
    else:
        write_run_report(run)
    return {
        "seconds": time.perf_counter() - began,
        "processor_seconds": time.process_time() - used,
        "peak_bytes": peak_bytes() - held,
    }


def main(arguments: Sequence[str]) -> int:
    """Each some times; the largest counts."""
    options = parse(arguments)
    if options.measure:
        print(json.dumps(measure(options.measure[0], Path(options.measure[1]))))
        return 0
    common.print_conditions()
    run = make_run(options.steps)
    result = common.Result(NAME, {"steps": options.steps, "repeats": options.repeats})
    result.figures["record_bytes"] = (run / "metrics.jsonl").stat().st_size
    for what in ("resume", "report"):
        command = [sys.executable, "-m", "benchmarks.long_record", "--measure", what, str(run)]
        found = [
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            for _ in range(options.repeats)
        ]
        result.figures[what] = {key: max(one[key] for one in found) for key in found[0]}
        common.show(what, result.figures[what])
    resume, report = result.figures["resume"], result.figures["report"]
    result.floors = [
        common.Floor("seconds until a resume has its record", resume["seconds"], at_most=LONGEST_RESUME_SECONDS),
        common.Floor("memory a resume takes for it, bytes", resume["peak_bytes"], at_most=MOST_RESUME_BYTES),
        common.Floor("processor seconds of the report", report["processor_seconds"], at_most=LONGEST_REPORT_SECONDS),
    ]
    return result.finish(options.results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
