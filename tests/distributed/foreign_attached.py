"""A program that meters parts of itself: group, DDP and optimiser are made before the first block, in the second."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import destroy_process_group, init_process_group, new_group

from pipeline import meter

ROOT = sys.argv[1]


def make(store: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = f"file://{ROOT}/{store}"  # torchrun's store is good for one group
    init_process_group("gloo", init_method=place, rank=rank, world_size=num_ranks)
    ddp = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(100, 300), nn.ReLU(), nn.Linear(300, 10)))
    return ddp, torch.optim.SGD(ddp.parameters(), lr=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, ledger: meter.Metered) -> None:
    for _ in range(3):
        model(torch.randn(2, 100)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    both = new_group([0, 1])
    assert not isinstance(both, int)  # no member
    with ledger.phase("validation"):
        dist.all_reduce(torch.ones(100), group=both)


early = make("first")
with meter.attach("before", run_root=ROOT, placement="rank") as accounts:
    train(*early, accounts)
destroy_process_group()  # torch is as it was
with meter.attach("inside", run_root=ROOT, placement="rank") as accounts:
    train(*make("second"), accounts)
    destroy_process_group()
