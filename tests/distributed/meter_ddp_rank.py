"""One rank of plain PyTorch DDP under the meter, through several scenarios; no Lightning."""

import hashlib
import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from torch import nn

from pipeline.comm.collectives import Call, CollectiveMeter
from pipeline.comm.ddp import MeteredDDP, gradient_bytes_by_parameter, rebuild_buckets
from pipeline.comm.ledger.document import Conditions
from pipeline.comm.timeline import Timeline
from pipeline.core.errors import LedgerError
from pipeline.core.schemas.ledger import LedgerJson
from tests.distributed.meter_ranks import run_scenarios, unreconciled

CONDITIONS = Conditions(run="test", model="small", hook="none", global_batch=6)


class SmallNet(nn.Module):
    """Uneven layers, dropout, optionally BatchNorm and a branch that is not used."""

    def __init__(self, batch_norm: bool = False, unused: bool = False) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 37, 3), nn.BatchNorm2d(37) if batch_norm else nn.Identity(), nn.ReLU(), nn.Conv2d(37, 301, 3)
        )
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(301, 1001)
        if unused:
            self.unused = nn.Linear(5, 7)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.dropout(self.features(images_BCHW).mean((2, 3))))


def make_batch(step: int, size: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """A pure function of step and rank, as in the product."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    return torch.randn(2, 3, size, size, generator=generator), torch.randint(0, 1000, (2,), generator=generator)


class Training:
    """SGD with momentum on a metered DDP model, step by step, resumable."""

    def __init__(
        self,
        model: nn.Module,
        *,
        metered: bool = True,
        timed: bool = False,
        warm_up: bool = True,
        size: int = 10,
        **ddp: Any,
    ) -> None:
        self.timeline = Timeline(dist.get_world_size(), metered=metered, enabled=timed)
        self.meter = CollectiveMeter(enabled=metered, observers=[self.timeline])
        self.meter.attach()
        self.ddp = MeteredDDP(model, meter=self.meter, timeline=self.timeline, **ddp)
        self.ledger = unreconciled(self.meter, gradient_bytes_by_parameter(model))
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        self.size = size
        if warm_up:
            rebuild_buckets(self.ddp, lambda: self.loss(0), self.meter)

    def loss(self, step: int) -> torch.Tensor:
        images_BCHW, labels_B = make_batch(step, self.size)
        return nn.functional.cross_entropy(self.ddp(images_BCHW), labels_B)

    def step(self, step: int, num_micro_batches: int = 1) -> dict[str, float]:
        torch.manual_seed(step)
        with self.meter.phase("train"):
            for micro in range(num_micro_batches):
                with self.ddp.no_sync() if micro + 1 < num_micro_batches else nullcontext():
                    with self.timeline.forward():
                        loss = self.loss(step)
                    with self.timeline.backward():
                        loss.backward()
            self.times = self.timeline.take_step()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.ledger.commit_step().metrics()

    def state(self) -> dict[str, Any]:
        return {
            "model": self.ddp.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ledger": self.ledger.state_dict(),
        }

    def load(self, state: dict[str, Any], previous: LedgerJson | None = None) -> None:
        self.ddp.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ledger.load_state_dict(state["ledger"], previous)

    def digest(self) -> str:
        whole = hashlib.sha256()
        for tensor in self.ddp.module.state_dict().values():
            whole.update(tensor.numpy().tobytes())
        return whole.hexdigest()

    def to_json(self, ended: bool = False) -> LedgerJson:
        return self.ledger.to_json(CONDITIONS, ended)


def seeded(**kwargs: Any) -> SmallNet:
    torch.manual_seed(7)
    return SmallNet(**kwargs)


def squeezenet(out: Path) -> dict[str, Any]:
    """The published example: torchvision's SqueezeNet 1.1 at DDP's default buckets."""
    torch.manual_seed(7)
    training = Training(torchvision.models.squeezenet1_1(), size=32)
    steps = [training.step(step) for step in range(2)]
    return {"steps": steps, "json": training.to_json(ended=True)}


def batch_norm_with_unused(out: Path) -> dict[str, Any]:
    """Buffers and the bitmap of used parameters travel too; under accumulation gradients travel once."""
    training = Training(seeded(batch_norm=True, unused=True), find_unused_parameters=True)
    before = {name: buffer.clone() for name, buffer in training.ddp.module.named_buffers()}
    rebuild_buckets(training.ddp, lambda: training.loss(3), training.meter)
    restored = all(torch.equal(before[name], buffer) for name, buffer in training.ddp.module.named_buffers())
    steps = [training.step(0), training.step(1, num_micro_batches=3)]
    return {"steps": steps, "json": training.to_json(), "restored": restored}


def hooks(out: Path) -> dict[str, Any]:
    """Compression shows in what is issued, not in what the model owes."""
    return {hook: Training(seeded(), hook=hook).step(0) for hook in ("none", "fp16", "bf16")}


def neutral(out: Path) -> dict[str, str]:
    """Weights after three steps: with and without meter and timeline, with and without gradients as views of buckets.

    The smallest buckets, so that there are several.
    """
    digests = {}
    for name, kwargs in {
        "metered": {},
        "plain": {"metered": False},
        "views": {"gradient_as_bucket_view": True},
        "plain views": {"metered": False, "gradient_as_bucket_view": True},
        "timed": {"timed": True},
        "timed views": {"timed": True, "gradient_as_bucket_view": True},
    }.items():
        training = Training(seeded(batch_norm=True), bucket_cap_mb=0.1, **kwargs)
        for step in range(3):
            training.step(step)
        digests[name] = training.digest()
    return digests


def resume(out: Path) -> dict[str, Any]:
    """Six steps at once, against three, a checkpoint, one step that is lost, and three more after it."""
    whole = Training(seeded(batch_norm=True), bucket_cap_mb=1, gradient_as_bucket_view=True)
    steps = [whole.step(step) for step in range(6)]
    first = Training(seeded(batch_norm=True), bucket_cap_mb=1, gradient_as_bucket_view=True)
    for step in range(3):
        first.step(step)
    checkpoint = out / f"resume{dist.get_rank()}.pt"
    torch.save(first.state(), checkpoint)
    first.step(3)
    previous = json.loads(json.dumps(first.to_json()))
    second = Training(seeded(batch_norm=True), bucket_cap_mb=1, gradient_as_bucket_view=True)
    second.load(torch.load(checkpoint, weights_only=True), previous)
    resumed_steps = [second.step(step) for step in range(3, 6)]
    return {
        "whole": {"digest": whole.digest(), "steps": steps, "json": whole.to_json(ended=True)},
        "resumed": {"digest": second.digest(), "steps": resumed_steps, "json": second.to_json(ended=True)},
    }


def silent_hook(out: Path) -> str:
    """Gradients that travel past the communication hook are an error, not a zero."""
    meter, model = CollectiveMeter(), seeded()
    meter.attach()
    ddp = nn.parallel.DistributedDataParallel(model)
    ledger = unreconciled(meter, gradient_bytes_by_parameter(model))
    with meter.phase("train"):
        ddp(make_batch(0)[0]).sum().backward()
    try:
        ledger.commit_step()
    except LedgerError as error:
        return str(error)
    return "nothing was raised"


def flight_recorder(out: Path) -> dict[str, Any]:
    """What torch's own recorder saw over the same step, as [operation, elements] with counts."""
    training = Training(seeded(batch_norm=True))
    training.meter.take()
    last = max(entry["record_id"] for entry in recorded())
    with training.meter.phase("train"):
        training.loss(0).backward()
        dist.barrier()
        dist.broadcast(torch.ones(11), 1)
    seen = Counter(
        (entry["profiling_name"], sum(map(product, entry["input_sizes"])))
        for entry in recorded()
        if entry["record_id"] > last
    )
    calls: Counter[Call] = training.meter.take().calls
    metered: Counter[tuple[str, int]] = Counter()
    for call, count in calls.items():
        metered[f"gloo:{call.op}", call.payload_bytes // call.itemsize] += count
    return {
        "recorder": sorted([*key, count] for key, count in seen.items()),
        "meter": sorted([*key, count] for key, count in metered.items()),
    }


def recorded() -> list[dict[str, Any]]:
    c10d: Any = torch._C
    return json.loads(c10d._distributed_c10d._dump_fr_trace_json())["entries"]


def product(sizes: list[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


SCENARIOS = (squeezenet, batch_norm_with_unused, hooks, neutral, resume, silent_hook, flight_recorder)


if __name__ == "__main__":
    run_scenarios(SCENARIOS)
