"""`pipeline.train` that also writes down what its learner is fed, and that can be killed at a chosen moment.

Takes the overrides of `train`. FED_TO: a directory where every rank appends a line per micro-batch to `rank<r>.jsonl`.
KILL_AT, if set: "rank step micro victim"; that rank, when it is fed that micro-batch of that step (0-based), sends
SIGKILL to the victim: `supervisor`, the process that started the ranks, or `rank`, itself.
SIGNAL_AT, if set: "rank place signal target; ...": that rank sends that signal when it comes to that place. Places:
`start` (joined, before the shards are opened), `step<n>.<micro>` (fed, 0-based), `save<n>` (a save of step n begins),
`validation<n>` (fed its micro-batch n). Targets: `rank`, itself; `supervisor`; `ranks`, all of them;
`everything`, as Slurm does it: each process of the run but the supervisor. A line in `<FED_TO>/fired` for each.
"""

import contextlib
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.cli import run_command
from pipeline.config import TrainConfig
from pipeline.run.launch import supervise
from pipeline.train import train


def record(directory: Path, rank: int, kill_at: list[str]) -> None:
    """Wrap the learner's training step."""
    from pipeline.learner import Batch, Learner

    inner = Learner.training_step
    place = {"step": -1, "micro": -1}

    def training_step(learner: Learner, loaded: Any, batch_idx: int) -> Any:
        if not learner.warming_up:
            step = learner.committed_steps
            place["micro"] = place["micro"] + 1 if place["step"] == step else 0
            place["step"] = step
            batch = Batch.of(loaded)
            pixels = hashlib.sha256(batch.images_BCHW.numpy().tobytes()).hexdigest()
            line = {**place, "ids": batch.sample_ids_B.tolist(), "pixels": pixels, "pid": os.getpid()}
            with (directory / f"rank{rank}.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            if kill_at[:3] == [str(rank), str(step), str(place["micro"])]:
                os.kill(os.getppid() if kill_at[3] == "supervisor" else os.getpid(), signal.SIGKILL)
                time.sleep(60)  # the end comes from the kernel, as soon as the supervisor is gone
        return inner(learner, loaded, batch_idx)

    Learner.training_step = training_step  # type: ignore[method-assign]


def send(number: signal.Signals, target: str) -> None:
    """To processes of this run, which carry FED_TO; dead ones excepted."""
    supervisor = os.getppid()
    if target == "supervisor":
        os.kill(supervisor, number)
        return
    mark = f"FED_TO={os.environ['FED_TO']}".encode()
    for directory in Path("/proc").glob("[0-9]*"):
        pid = int(directory.name)
        with contextlib.suppress(OSError):
            is_rank = f"\nPPid:\t{supervisor}\n" in (directory / "status").read_text()
            if {"rank": pid == os.getpid(), "ranks": is_rank, "everything": pid != supervisor}[target] and (
                mark in (directory / "environ").read_bytes().split(b"\0")
            ):
                os.kill(pid, number)


def signal_at(events: str, directory: Path, rank: int) -> None:
    """Wrap the places that `events` name."""
    from pipeline import training
    from pipeline.learner import Learner
    from pipeline.run.checkpoint import AtomicCheckpointIO

    due: dict[str, list[tuple[signal.Signals, str]]] = {}
    for who, place, name, target in (event.split() for event in filter(None, events.split(";"))):
        if int(who) == rank:
            due.setdefault(place, []).append((signal.Signals[name], target))

    def come_to(place: str) -> None:
        for number, target in due.pop(place, []):
            with (directory / "fired").open("a") as file:
                file.write(f"{time.time()} {place} {number.name} {target}\n")
            send(number, target)

    def wrap(owner: Any, name: str, place_of: Any) -> None:
        inner = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            come_to(place_of(*args))
            return inner(*args, **kwargs)

        setattr(owner, name, wrapped)

    wrap(training, "open_shards", lambda *_: "start")
    wrap(Learner, "training_step", lambda learner, *_: f"step{learner.committed_steps}.{learner._micro}")
    wrap(Learner, "validation_step", lambda _, __, number: f"validation{number}")
    wrap(AtomicCheckpointIO, "save_checkpoint", lambda _, content, *__: f"save{content['squeezewire']['step']}")


def train_recorded(config: TrainConfig) -> int:
    """As `train`, with this file as the program of the ranks."""
    if "RANK" not in os.environ:
        return supervise([sys.executable, *sys.argv], config.cluster.devices, num_threads=config.cluster.num_threads)
    directory, rank = Path(os.environ["FED_TO"]), int(os.environ["RANK"])
    record(directory, rank, os.environ.get("KILL_AT", "").split())
    signal_at(os.environ.get("SIGNAL_AT", ""), directory, rank)
    return train(config)


if __name__ == "__main__":
    run_command("train", TrainConfig, train_recorded)
