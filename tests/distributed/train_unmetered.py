"""`pipeline.train` with a fault planted. FAULT: `group`, `collective`, `formula` or `none`.

group: in step 3 every rank reduces a tensor over a group of its own, which the meter does not see.
collective: the same over the group of all ranks, which the meter sees.
formula: the price of an all-reduce is 48 bytes too high for rank 0.
"""

import os
import sys
from typing import Any

from pipeline.config.training import TrainConfig
from pipeline.core.cli import run_command
from pipeline.run.launch.supervisor import supervise
from pipeline.train import train


def plant_reduction(*, has_own_group: bool) -> None:
    import torch
    import torch.distributed as dist

    from pipeline.training.learner import Learner

    inner, kept = Learner.training_step, []

    def training_step(learner: Learner, loaded: Any, batch_idx: int) -> Any:
        if learner.committed_steps == 3 and not learner.warming_up:
            group = dist.new_group(list(range(dist.get_world_size()))) if has_own_group else dist.group.WORLD
            assert isinstance(group, dist.ProcessGroup)
            dist.all_reduce(torch.ones(1000), group=group)
            print("the fault fired", flush=True)
            kept.append(group)  # a closed connection can no longer be counted
        return inner(learner, loaded, batch_idx)

    Learner.training_step = training_step  # type: ignore[method-assign]


def plant_formula() -> None:
    from pipeline.comm.wire import gloo

    inner = gloo.sent_bytes_per_rank

    def sent_bytes_per_rank(links: Any, num_ranks: int) -> list[int]:
        sent = inner(links, num_ranks)
        if sum(link.data_bytes for link in links.values()) > 1_000_000:
            sent[0] += 48
            print("the fault fired", flush=True)
        return sent

    gloo.sent_bytes_per_rank = sent_bytes_per_rank


def train_with_a_fault(config: TrainConfig) -> int:
    """As `train`, with this file as the program of the ranks."""
    if "RANK" not in os.environ:
        return supervise([sys.executable, *sys.argv], config.cluster.devices, num_threads=config.cluster.num_threads)
    plants = {
        "group": lambda: plant_reduction(has_own_group=True),
        "collective": lambda: plant_reduction(has_own_group=False),
        "formula": plant_formula,
        "none": lambda: None,
    }
    plants[os.environ["FAULT"]]()
    return train(config)


if __name__ == "__main__":
    run_command("train", TrainConfig, train_with_a_fault)
