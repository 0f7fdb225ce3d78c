"""One rank that averages weights in plain torch, beside one that averages gradients; no Lightning.

Also the algorithms of local steps written down for one process, which several ranks must equal.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.comm.averaging import Averaging
from pipeline.comm.collectives import CollectiveMeter
from pipeline.comm.ddp import MeteredDDP
from pipeline.comm.rounds import Rounds, plan_rounds
from pipeline.config.comm import CommConfig
from tests.distributed.meter_ranks import run_scenarios

NUM_STEPS = int(sys.argv[2])
LEARNING_RATE = 0.05
OPTIMIZERS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov, decay": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
}


PLAIN = CommConfig(period=4, bucket_megabytes=0.0005)
LAYER = 0.00025  # MiB: a bucket for each layer
METHODS = {
    "outer": CommConfig(period=6, bucket_megabytes=LAYER, outer_lr=0.7, outer_momentum=0.9),
    "fragments": CommConfig(period=6, bucket_megabytes=LAYER, outer_lr=0.7, outer_momentum=0.9, fragments=2, delay=2),
    **{
        f"{codec}, {delay}": CommConfig(
            period=6, bucket_megabytes=LAYER, outer_momentum=0.5, fragments=2, delay=delay, codec=codec
        )
        for codec, delay in (("bf16", 0), ("int8", 1), ("int8", 2), ("int4", 2))
    },
}


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()


def loss_of(model: nn.Module, step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    inputs = torch.randn(5, 6, generator=generator, dtype=next(model.parameters()).dtype)
    return nn.functional.cross_entropy(model(inputs), torch.randint(0, 4, (5,), generator=generator))


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([one.detach().flatten() for one in model.parameters()])


def trained(
    model: nn.Module, *, rank: int, period: int, clip: float = 0.0, comm: CommConfig = PLAIN, **options: Any
) -> torch.Tensor:
    """The weights after NUM_STEPS on the pictures of `rank`, exchanged in rounds of `period`; 0: never."""
    averaging = Averaging(model, comm)
    averaging.begin()
    rounds = rounds_of(period, comm)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, **options)
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        loss_of(model, step, rank).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if period:
            averaging.end_step(rounds, step + 1)
    return flat(model)


def rounds_of(period: int, comm: CommConfig) -> Rounds:
    return plan_rounds(NUM_STEPS, lambda _: period or NUM_STEPS, num_fragments=comm.fragments, delay=comm.delay)


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


def anchored(out: Path) -> dict[str, Any]:
    """An outer step of lr 1 without momentum, from an anchor, is the mean."""
    del out
    rank = dist.get_rank()
    plain = trained(network(), rank=rank, period=4)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    # An outer momentum that is as good as none has an anchor kept.
    averaging = Averaging(model, CommConfig(period=4, bucket_megabytes=0.0005, outer_momentum=1e-300))
    averaging.begin()
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        loss_of(model, step, rank).backward()
        optimizer.step()
        averaging.end_step(rounds_of(4, PLAIN), step + 1)
    return {"has_anchor": bool(averaging.anchor), "apart": distance(flat(model), plain)}


def reference(comm: CommConfig, num_ranks: int) -> list[torch.Tensor]:
    """The weights of all ranks, by the algorithm written down for one process, tensor by tensor of its two layers."""
    models = [network().float() for _ in range(num_ranks)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9) for model in models]
    layers = [[[*model.parameters()][at : at + 2] for model in models] for at in (0, 2)]  # a bucket each
    parts = [[torch.cat([one.detach().flatten() for one in mine]) for mine in layer] for layer in layers]
    anchors = [part[0].clone() for part in parts]
    momenta, errors = [torch.zeros_like(one) for one in anchors], [[torch.zeros_like(one) for one in p] for p in parts]
    gap = comm.period // comm.fragments if comm.period else 0
    queue: list[tuple[int, int, list[torch.Tensor], torch.Tensor]] = []  # arrives after, layer, left with, mean

    def arrive(layer: int, left: list[torch.Tensor], mean: torch.Tensor) -> None:
        change = anchors[layer] - mean if comm.codec == "fp32" else mean
        mean = mean if comm.codec == "fp32" else anchors[layer] - change
        momenta[layer] = comm.outer_momentum * momenta[layer] + change
        moved = mean if comm.outer_lr == 1 else mean + (1 - comm.outer_lr) * change
        moved = moved - (comm.outer_lr * comm.outer_momentum) * momenta[layer]
        anchors[layer] = moved
        for mine, start in zip(layers[layer], left, strict=True):
            now = torch.cat([one.detach().flatten() for one in mine])
            values = moved + (now - start)
            for one, new in zip(mine, values.split([one.numel() for one in mine]), strict=True):
                one.copy_(new.view(one.shape))

    for step in range(1, NUM_STEPS + 1):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            loss_of(model, step - 1, rank).backward()
            optimizer.step()
        is_last = step == NUM_STEPS
        with torch.no_grad():
            for due, layer, left, mean in list(queue):
                if due == step or is_last:
                    arrive(layer, left, mean)
                    queue.pop(0)
            in_last_round = step > (NUM_STEPS - 1) // 6 * 6
            leaving = [0, 1] if is_last else []
            if not in_last_round:
                leaving = [at for at in (0, 1) if comm.fragments == 1 and step % 6 == 0]
                leaving += [step // gap % 2 == 0] if comm.fragments == 2 and step % gap == 0 else []
            for layer in map(int, leaving):
                left = [torch.cat([one.detach().flatten() for one in mine]) for mine in layers[layer]]
                if comm.codec == "fp32":
                    mean = sum(one * (1.0 / num_ranks) for one in left)
                else:
                    mean = coded_mean(comm.codec, [anchors[layer] - one for one in left], errors[layer])
                assert isinstance(mean, torch.Tensor)
                if comm.delay == 0 or is_last:
                    arrive(layer, left, mean)
                else:
                    queue.append((step + comm.delay, layer, left, mean))
    return [flat(model) for model in models]


def rounded(codec: str, values: torch.Tensor) -> torch.Tensor:
    """What arrives of a single block."""
    if codec == "bf16":
        return values.bfloat16().float()
    largest = {"int8": 127, "int4": 7}[codec]
    scale = values.abs().max() / largest
    return (values / scale).round() * scale if scale else values


def coded_mean(codec: str, changes: list[torch.Tensor], errors: list[torch.Tensor]) -> torch.Tensor:
    """Of less than a block of values, so that rank 0 adds all of them up. Errors change in place."""
    owed = [change + error for change, error in zip(changes, errors, strict=True)]
    sent = [rounded(codec, one) for one in owed]
    total = sum(sent[1:], sent[0]) * (1.0 / len(sent))
    for error, one, other in zip(errors, owed, sent, strict=True):
        error.copy_(one - other)
    mean = rounded(codec, total)
    errors[0] += (total - mean) * len(sent)
    return mean


def outer_steps(out: Path) -> dict[str, Any]:
    """Every method and codec on different pictures, against the same in one process."""
    del out
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    found = {}
    for name, comm in METHODS.items():
        assert comm.period is not None
        mine = trained(network().float(), rank=rank, period=comm.period, comm=comm, momentum=0.9)
        expected = reference(comm, num_ranks)[rank]
        found[name] = {"apart": distance(mine, expected), "sum": float(mine.double().sum())}
    return found


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
    Averaging(model, CommConfig(bucket_megabytes=None)).end_step(plan_rounds(1, lambda _: 1), 1)
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
    run_scenarios([rounds_of_one, same_pictures, as_one_process, anchored, outer_steps, layout])
