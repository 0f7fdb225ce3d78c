"""The jobs that `peers/streams.py` runs for each library, and what their epochs lack."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import common, epoch_start
from pipeline.run.provenance import CODE_ROOT

NUM_SAMPLES, NUM_SHARDS, GLOBAL_BATCH, NUM_WORKERS = 1003, 26, 24, 2  # 19 samples that fill no batch
RANKS, KILL_AFTER, KILL_AGAIN_AFTER = 4, 17, 12  # steps
DEADLINE_SECONDS = 120.0
STREAMS = Path(__file__).parent / "peers" / "streams.py"


@dataclass(frozen=True)
class Subject:
    """A library with its settings."""

    library: str
    note: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.library} ({self.note})"


SUBJECTS = (
    Subject("webdataset", "by node and worker"),
    Subject("mosaicml-streaming", "defaults"),
    Subject("litdata", "defaults"),
    Subject("litdata", "drop_last=False", {"drop_last": False}),
    Subject("squeezewire", "data.tail=drop", {"tail": "drop"}),
    Subject("squeezewire", "data.tail=pad", {"tail": "pad"}),
)


@dataclass(frozen=True)
class Job:
    """Ranks, when they are killed, and the job that they go on with."""

    name: str
    ranks: int
    kill_after: int | None = None
    """Steps of this job."""
    goes_on_with: str | None = None


FIRST, SECOND, KILLED, KILLED_AGAIN = f"{RANKS} ranks", "3 ranks", "killed", "killed again"
JOBS = (
    Job(FIRST, RANKS),
    Job(SECOND, 3),
    Job(KILLED, RANKS, kill_after=KILL_AFTER),
    *(Job(f"{RANKS} killed, {ranks} go on", ranks, goes_on_with=KILLED) for ranks in (RANKS, 3, 2, 6)),
    Job(KILLED_AGAIN, 3, kill_after=KILL_AGAIN_AFTER, goes_on_with=KILLED),
    Job(f"{RANKS} killed, 3 killed, 6 go on", 6, goes_on_with=KILLED_AGAIN),
)


def measure(peers_python: Path) -> dict[str, Any]:
    """Every job of every subject."""
    data, scratch = (root.resolve() / "exactness-peers" for root in (common.SHARDS, common.RUNS))
    epoch_start.make_shards(data, NUM_SAMPLES, NUM_SHARDS)
    shutil.rmtree(scratch, ignore_errors=True)
    rows: list[dict[str, Any]] = []
    versions = {}
    for number, subject in enumerate(SUBJECTS):
        python = Path(sys.executable) if subject.library == "squeezewire" else peers_python
        versions[subject.library], ended = _run(python, subject, data, scratch / str(number))
        rows += rows_of(subject, ended)
    shutil.rmtree(scratch, ignore_errors=True)
    print(markdown(rows), flush=True)
    settings = {"samples": NUM_SAMPLES, "shards": NUM_SHARDS, "global_batch": GLOBAL_BATCH, "workers": NUM_WORKERS}
    return {"settings": {**settings, "killed_after_steps": KILL_AFTER}, "versions": versions, "rows": rows}


def _run(python: Path, subject: Subject, data: Path, scratch: Path) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """The versions, and by the name of each job how it ended."""
    lines = [
        json.dumps(
            {
                "data": str(data),
                "scratch": str(scratch / job.name),
                "num_samples": NUM_SAMPLES,
                "global_batch": GLOBAL_BATCH,
                "world_size": job.ranks,
                "num_workers": NUM_WORKERS,
                "kill_after": job.kill_after,
                "state": str(scratch / job.goes_on_with) if job.goes_on_with else None,
                "deadline_seconds": DEADLINE_SECONDS,
                "options": subject.options,
            }
        )
        for job in JOBS
    ]
    environment = {**os.environ, "PYTHONPATH": str(CODE_ROOT)}
    done = subprocess.run(
        [str(python.absolute()), str(STREAMS), subject.library],
        input="\n".join(lines),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        timeout=(len(JOBS) + 1) * (DEADLINE_SECONDS + 30),
        check=True,
    )
    versions, *ended = map(json.loads, done.stdout.splitlines())
    return versions, {job.name: one for job, one in zip(JOBS, ended, strict=True)}


def rows_of(subject: Subject, ended: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each job but those killed, which are part of those that go on."""
    steps_of = defaultdict(set)
    for step, ids in enumerate(_global_batches(ended[FIRST]["steps_of_rank"])):
        for one in ids:
            steps_of[one].add(step)
    rows = []
    for job in JOBS:
        if job.kill_after:
            continue
        parts = _parts(job, ended)
        before = [batch for part in parts[:-1] for batch in _global_batches(part["steps_of_rank"])]
        last = parts[-1]["steps_of_rank"]
        shown = [*before, *_global_batches(last)]
        counts = Counter(one for batch in shown for one in batch)
        row = {
            "job": job.name,
            "status": next((part["status"] for part in parts if part["status"] != "ended"), "ended"),
            "missed": NUM_SAMPLES - len(counts),
            "repeated": sum(counts.values()) - len(counts),
            "in_another_step": sum(step not in steps_of[one] for step, batch in enumerate(shown) for one in batch),
            "steps_of_ranks": [len(before) + len(steps) for steps in last],
        }
        common.show(subject.name, row)
        rows.append({"library": subject.name, **row})
    return rows


def _parts(job: Job, ended: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """How the jobs ended that make up one epoch, in order."""
    earlier = next((one for one in JOBS if one.name == job.goes_on_with), None)
    return [*(_parts(earlier, ended) if earlier else []), ended[job.name]]


def _global_batches(steps_of_rank: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
    """What all ranks show in each step; those that have no more show nothing."""
    num_steps = max(map(len, steps_of_rank), default=0)
    return [
        [one for steps in steps_of_rank for one in (steps[step] if step < len(steps) else ())]
        for step in range(num_steps)
    ]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table as the README has it: a row for the jobs of a library that went on after one kill."""
    once = [job.name for job in JOBS if job.goes_on_with == KILLED and not job.kill_after]
    lines = ["| library | job | missed | repeated | in another step | steps of a rank |", "|---|---|---|---|---|---|"]
    for library in dict.fromkeys(row["library"] for row in rows):
        of_library = {row["job"]: row for row in rows if row["library"] == library}
        for jobs in ([FIRST], [SECOND], once, [JOBS[-1].name]):
            found = [of_library[name] for name in jobs if name in of_library]
            if not found:
                continue
            name = f"{RANKS} killed; 4 / 3 / 2 / 6 go on" if len(found) > 1 else found[0]["job"]
            cells = [_joined([row[key] for row in found]) for key in ("missed", "repeated", "in_another_step")]
            lines.append(f"| {library} | {name} | {' | '.join(cells)} | {_joined([_steps(row) for row in found])} |")
    return "\n".join(lines)


def _steps(row: dict[str, Any]) -> str:
    low, high = min(row["steps_of_ranks"]), max(row["steps_of_ranks"])
    steps = str(low) if low == high else f"**{low} to {high}**"
    return steps if row["status"] == "ended" else row["status"].splitlines()[0][:80]


def _joined(values: Sequence[Any]) -> str:
    """One word for what is the same everywhere."""
    return str(values[0]) if len(set(values)) == 1 else " / ".join(map(str, values))


def floors(table: dict[str, Any]) -> list[common.Floor]:
    """Ours: what the tail rule says and nothing else, in equal steps."""
    found = []
    tail = NUM_SAMPLES % GLOBAL_BATCH
    expected = {"data.tail=drop": (tail, 0), "data.tail=pad": (0, GLOBAL_BATCH - tail)}
    for note, (missed, repeated) in expected.items():
        rows = [row for row in table["rows"] if row["library"] == f"squeezewire ({note})"]
        wrong = sum(
            (row["status"], row["missed"], row["repeated"], row["in_another_step"]) != ("ended", missed, repeated, 0)
            or len(set(row["steps_of_ranks"])) != 1
            for row in rows
        )
        found.append(
            common.Floor(f"squeezewire, {note}: jobs of {len(rows)} that differ from the rule", wrong, at_most=0)
        )
    return found
