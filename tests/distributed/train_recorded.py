"""`pipeline.train` that also writes down what its learner is fed, and that can be killed at a chosen moment.

Takes the overrides of `train`. FED_TO: a directory where every rank appends a line per micro-batch to `rank<r>.jsonl`.
KILL_AT, if set: "rank step micro victim"; that rank, when it is fed that micro-batch of that step (0-based), sends
SIGKILL to the victim: `supervisor`, the process that started the ranks, or `rank`, itself.
"""

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


def train_recorded(config: TrainConfig) -> int:
    """As `train`, with this file as the program of the ranks."""
    if "RANK" not in os.environ:
        return supervise([sys.executable, *sys.argv], config.cluster.devices, num_threads=config.cluster.num_threads)
    record(Path(os.environ["FED_TO"]), int(os.environ["RANK"]), os.environ.get("KILL_AT", "").split())
    return train(config)


if __name__ == "__main__":
    run_command("train", TrainConfig, train_recorded)
