"""`pipeline.train` as a rank of Slurm that writes down what it is fed, and takes PACE_SECONDS longer for each step.

FED_TO/<name of the run>: a directory with a file per rank, as tests/distributed/train_recorded.py makes them.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "distributed"))

from train_recorded import record

from pipeline.cli import run_command
from pipeline.config import TrainConfig
from pipeline.run.preempt import block_early
from pipeline.train import train


def paced(config: TrainConfig) -> int:
    """Record, slow down, train."""
    from pipeline.learner import Learner

    directory = Path(os.environ["FED_TO"]) / config.name
    directory.mkdir(parents=True, exist_ok=True)
    record(directory, int(os.environ["SLURM_PROCID"]), [])
    inner = Learner.training_step

    def training_step(*args: Any) -> Any:
        time.sleep(float(os.environ["PACE_SECONDS"]))
        return inner(*args)

    Learner.training_step = training_step  # type: ignore[method-assign]
    return train(config)


if __name__ == "__main__":
    block_early()
    run_command("train", TrainConfig, paced)
