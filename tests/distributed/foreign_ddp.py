"""A plain DDP program as others write them: it knows nothing of this project. `HOW` says how it ends.

Unused parameters, BatchNorm, accumulation without synchronising, a group of its own; names imported from torch before
anything is made.
"""

import os
import signal
import sys

import torch
from torch import nn
from torch.distributed import all_reduce, destroy_process_group, get_world_size, init_process_group, new_group
from torch.nn.parallel import DistributedDataParallel

HOW = sys.argv[1]
NUM_STEPS = 6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 37, 3), nn.BatchNorm2d(37), nn.ReLU(), nn.Conv2d(37, 301, 3))
        self.classifier = nn.Linear(301, 1001)
        self.unused = nn.Linear(5, 7)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images_BCHW).mean((2, 3)))


def main() -> None:
    init_process_group("gloo")
    ends = new_group([0, get_world_size() - 1])
    ddp = DistributedDataParallel(module=Net(), find_unused_parameters=True)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    for step in range(NUM_STEPS):
        with ddp.no_sync():
            ddp(torch.randn(2, 3, 10, 10)).sum().backward()
        ddp(torch.randn(2, 3, 10, 10)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 4 and HOW == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    if not isinstance(ends, int):  # a member
        all_reduce(torch.ones(3), group=ends)
    if HOW == "destroys":
        destroy_process_group()
    sys.exit(9 if HOW == "exits 9" else 0)


main()
