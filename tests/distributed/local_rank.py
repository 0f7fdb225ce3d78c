"""One rank that averages weights in plain torch, beside one that averages gradients; no Lightning."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.comm.averaging import Averaging
from pipeline.comm.collectives import CollectiveMeter
from pipeline.comm.ddp import MeteredDDP
from tests.distributed.meter_ranks import run_scenarios

NUM_STEPS = int(sys.argv[2])
LEARNING_RATE = 0.05
OPTIMIZERS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov, decay": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
}


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()


def loss_of(model: nn.Module, step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    inputs = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    return nn.functional.cross_entropy(model(inputs), torch.randint(0, 4, (5,), generator=generator))


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([one.detach().flatten() for one in model.parameters()])


def trained(model: nn.Module, *, rank: int, period: int, clip: float = 0.0, **options: Any) -> torch.Tensor:
    """The weights after NUM_STEPS on the pictures of `rank`, averaged after every `period`; 0: never."""
    averaging = Averaging(model, 0.0005)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, **options)
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        loss_of(model, step, rank).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if period and (step + 1) % period == 0:
            averaging.average()
    return flat(model)


def ddp(**options: Any) -> nn.Module:
    return MeteredDDP(network(), meter=CollectiveMeter(enabled=False), **options)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference, relative to the largest weight."""
    return float((one - other).abs().max() / other.abs().max())


def rounds_of_one(out: Path) -> dict[str, float]:
    """Weights averaged in every step, against gradients averaged in every step."""
    del out
    rank = dist.get_rank()
    apart = {
        name: distance(
            trained(network(), rank=rank, period=1, **options), trained(ddp(), rank=rank, period=0, **options)
        )
        for name, options in OPTIMIZERS.items()
    }
    clipped = [trained(network(), rank=rank, period=1, clip=0.1), trained(ddp(), rank=rank, period=0, clip=0.1)]
    return {**apart, "clipped": distance(clipped[0], clipped[1])}


def same_pictures(out: Path) -> dict[str, float]:
    """All ranks see what rank 0 sees, in rounds of 4: as one rank alone."""
    del out
    options = OPTIMIZERS["nesterov, decay"]
    alone = trained(network(), rank=0, period=0, **options)
    return {"apart": distance(trained(network(), rank=0, period=4, **options), alone)}


def as_one_process(out: Path) -> dict[str, float]:
    """Rounds of 4 on different pictures, against the algorithm written down for one process."""
    del out
    options, num_ranks = OPTIMIZERS["momentum"], dist.get_world_size()
    models = [network() for _ in range(num_ranks)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, **options) for model in models]
    for step in range(NUM_STEPS):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            loss_of(model, step, rank).backward()
            optimizer.step()
        if (step + 1) % 4 == 0:
            with torch.no_grad():
                for ours in zip(*(model.parameters() for model in models), strict=True):
                    mean = sum(one * (1.0 / num_ranks) for one in ours)
                    for one in ours:
                        one.copy_(mean)
    mine = trained(network(), rank=dist.get_rank(), period=4, **options)
    return {"apart": distance(mine, flat(models[0])), "sum": float(mine.sum())}


def layout(out: Path) -> dict[str, Any]:
    """Buffers are averaged, counts are not, nothing moves in memory, and what is frozen stays."""
    del out
    rank = dist.get_rank()
    torch.manual_seed(5 + rank)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    model[2].requires_grad_(False)
    for _ in range(rank + 1):
        model(torch.randn(2, 3, 6, 6))
    tensors = [*model.parameters(), *model.buffers()]
    before = [one.detach().clone() for one in tensors]
    places = [(one.data_ptr(), one.stride()) for one in tensors]
    Averaging(model, None).average()
    frozen = {id(one) for one in model[2].parameters()}
    return {
        "stays": places == [(one.data_ptr(), one.stride()) for one in tensors],
        "kept": all(torch.equal(*pair) for pair in zip(tensors, before, strict=True) if _is_kept(pair[0], frozen)),
        "before": [float(old.sum()) for one, old in zip(tensors, before, strict=True) if not _is_kept(one, frozen)],
        "after": [float(one.sum()) for one in tensors if not _is_kept(one, frozen)],
    }


def _is_kept(tensor: torch.Tensor, frozen: set[int]) -> bool:
    return id(tensor) in frozen or not tensor.is_floating_point()


if __name__ == "__main__":
    run_scenarios([rounds_of_one, same_pictures, as_one_process, layout])
