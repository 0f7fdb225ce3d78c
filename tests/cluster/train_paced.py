"""`pipeline.train` as a rank of Slurm that writes down what it is fed, and can be held in the middle of a run.

FED_TO/<name of the run>: a directory with a file per rank, as tests/distributed/train_recorded.py makes them.
FED_TO/<name of the run>.hold: the step (0-based) at which the ranks wait for as long as the file says so.
PACE_SECONDS: how much longer each step takes.
"""

import os
import time
from pathlib import Path
from typing import Any

from pipeline.config.training import TrainConfig
from pipeline.core.cli import run_command
from pipeline.run.launch.preempt import block_early
from pipeline.train import train
from tests.distributed.train_recorded import record


def paced(config: TrainConfig) -> int:
    """Record, hold, slow down, train."""
    from pipeline.training.learner import Learner

    directory = Path(os.environ["FED_TO"]) / config.name
    directory.mkdir(parents=True, exist_ok=True)
    record(directory, int(os.environ["SLURM_PROCID"]), [])
    inner = Learner.training_step
    hold = directory.with_name(f"{directory.name}.hold")

    def training_step(learner: Learner, *args: Any) -> Any:
        while hold.exists() and learner.committed_steps >= int(hold.read_text() or 0):
            time.sleep(0.02)
        time.sleep(float(os.environ["PACE_SECONDS"]))
        return inner(learner, *args)

    Learner.training_step = training_step  # type: ignore[method-assign]
    return train(config)


if __name__ == "__main__":
    block_early()
    run_command("train", TrainConfig, paced)
