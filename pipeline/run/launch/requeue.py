"""Whether a job of Slurm goes back into the queue: where running it again helps, and not for ever.

`requeues.jsonl` in the run's directory remembers, durably, how far the run was each time. A job that comes back without
a newer checkpoint did so in vain; so many times in a row end it, whatever the reason was.
"""

import datetime
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

from pipeline.core.errors import ExitCode
from pipeline.core.files import fsync_directory

# What a shell reports of a program that a signal ended is this and the signal: a rank was killed (out of memory, or by
# a user), or died of a fault of the machine. A rank that fails by itself says why with a code below it.
KILLED = 128
_NOT_BACK = "the job is not put back into the queue."


class RequeueJson(TypedDict):
    """A row of requeues.jsonl."""

    job: str
    exit_code: int
    step: int
    """Of the newest checkpoint."""
    in_vain: int
    """How many times in a row the job has come back without a newer checkpoint."""
    time: str


@dataclass(frozen=True)
class Decision:
    """Whether to requeue a job, and why."""

    requeue: bool
    reason: str
    """One sentence."""


def decide(
    directory: Path, exit_code: int, *, job: str, limit: int, rank_error: int | None = None, num_lost: int = 0
) -> Decision:
    """Decide whether a job is to be put back into the queue; if so, this is recorded first.

    Args:
        directory: Directory of the run; made if there is none yet.
        exit_code: Exit code of the job's ranks.
        job: Slurm's number of the job.
        limit: How many times in a row the job may come back in vain.
        rank_error: Exit code of a rank that ended for a reason of its own, whatever others ended with.
        num_lost: Ranks that ended only because they lost the others.

    Returns:
        The decision with its reason.
    """
    if rank_error is not None:
        return Decision(
            False, f"A rank ended by itself with exit code {rank_error}, which would come again: {_NOT_BACK}"
        )
    is_cut_off = exit_code == ExitCode.INTERNAL and num_lost > 0
    if exit_code != ExitCode.PREEMPTED and exit_code <= KILLED and not is_cut_off:
        return Decision(False, f"Exit code {exit_code} would come again: {_NOT_BACK}")
    step, in_vain = last_step(directory), 0
    previous = _last_record(directory / "requeues.jsonl", job)
    if previous is None:
        in_vain = 1 if step == 0 else 0
    elif previous["step"] == step:
        in_vain = previous["in_vain"] + 1
    if in_vain > limit:
        return Decision(
            False,
            f"Job {job} was put back into the queue {in_vain - 1} times in a row without a new checkpoint (still at"
            f" step {step}): it ends here. Look for the cause above; cluster.max_fruitless_requeues={limit} is the"
            " limit.",
        )
    record: RequeueJson = {
        "job": job,
        "exit_code": exit_code,
        "step": step,
        "in_vain": in_vain,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    try:
        _append(directory / "requeues.jsonl", record)
    except OSError as error:
        return Decision(False, f"{directory} cannot be written ({error.strerror}): the job is not put back.")
    what = f"A rank was killed (exit code {exit_code})"
    if exit_code == ExitCode.PREEMPTED:
        what = "Asked to stop"
    elif is_cut_off:
        what = "The ranks lost one another, and none of them says why (the network?)"
    return Decision(True, f"{what}; the job goes back into the queue and on from step {step}.")


def last_step(directory: Path) -> int:
    """Return the step of the newest checkpoint by name; 0 without one. Its content is verified by the next attempt."""
    steps = (path.stem.removeprefix("step=") for path in (directory / "checkpoints").glob("step=*.ckpt"))
    return max((int(step) for step in steps if step.isdigit()), default=0)


def _last_record(path: Path, job: str) -> RequeueJson | None:
    """Read the newest row of this job; rows of other jobs and lines cut short by a crash are skipped."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("job") == job:
            return cast(RequeueJson, record)
    return None


def _append(path: Path, record: RequeueJson) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_bytes() if path.exists() else b""
    with path.open("ab") as file:
        file.write((b"" if before.endswith(b"\n") or not before else b"\n") + json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    fsync_directory(path.parent)
