"""One rank of DDP with PowerSGD: what travels, what it must not change, what survives a restart."""

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.comm.ddp import rebuild_buckets
from pipeline.comm.powersgd import PowerSGD
from pipeline.core.errors import CheckpointError
from tests.distributed.meter_ddp_rank import SmallNet, Training
from tests.distributed.meter_ranks import run_scenarios

START_STEP, NUM_STEPS, SAVE_AFTER = 2, 6, 4
BUCKET_MEGABYTES = 0.1
LATE_SECONDS = 0.02
DEAD_STEPS, LIVE_STEPS = 2, 3


def compressed(
    step: int = 0,
    saved: dict[str, Any] | None = None,
    *,
    rank: int = 2,
    model: SmallNet | None = None,
    **options: Any,
) -> Training:
    """Several buckets of uneven layers, some of them too small to be compressed."""
    powersgd = PowerSGD(rank=rank, start_step=START_STEP, step=step)
    if saved is not None:
        powersgd.load_state_dict(saved, dist.get_rank(), dist.get_world_size())
    torch.manual_seed(7)
    options = {"bucket_cap_mb": BUCKET_MEGABYTES, "gradient_as_bucket_view": True, **options}
    training = Training(model or SmallNet(), hook=powersgd, **options)
    training.powersgd = powersgd  # type: ignore[attr-defined]
    return training


def state_of(training: Training) -> dict[str, Any]:
    return training.powersgd.state_dict()  # type: ignore[attr-defined]


def traffic(out: Path) -> dict[str, Any]:
    """Ranks that are not in step: the one that is ahead must not issue in another order."""
    training = compressed()
    steps = []
    for step in range(NUM_STEPS):
        time.sleep(LATE_SECONDS * ((step + dist.get_rank()) % 2))
        steps.append(training.step(step))
    return {"steps": steps, "json": training.to_json(), "digest": training.digest()}


def before_compression(out: Path) -> dict[str, str]:
    """Weights after the steps that reduce plainly, beside those of a run that never compresses."""
    torch.manual_seed(7)
    plain = Training(SmallNet(), bucket_cap_mb=BUCKET_MEGABYTES, gradient_as_bucket_view=True)
    powersgd = compressed()
    digests = {}
    for step in range(START_STEP + 1):
        for training in (plain, powersgd):
            training.step(step)
        digests[f"plain {step}"], digests[f"powersgd {step}"] = plain.digest(), powersgd.digest()
    return digests


def untouched_by_warm_up(out: Path) -> dict[str, Any]:
    """More throw-away passes, also after the first compressed step, change nothing."""
    training, twice = compressed(), compressed()
    for step in range(NUM_STEPS):
        rebuild_buckets(twice.ddp, lambda: twice.loss(90), twice.meter)
        twice.step(step)
        training.step(step)
    return {"once": training.digest(), "again": twice.digest()}


def resume(out: Path) -> dict[str, Any]:
    """Rank 0 saves the state of all; each rank finds its own again."""
    whole = compressed()
    for step in range(SAVE_AFTER):
        whole.step(step)
    path = out / "saved.pt"
    state = {**whole.state(), "powersgd": state_of(whole)}
    if dist.get_rank() == 0:
        torch.save(state, path)
    dist.barrier()
    # Loaded anew for each: an optimiser keeps the tensors it is given.
    loaded, again = (torch.load(path, weights_only=True) for _ in range(2))
    resumed = compressed(SAVE_AFTER, loaded["powersgd"])
    resumed.load(loaded)
    forgetful = compressed(SAVE_AFTER)
    forgetful.load(again)
    for step in range(SAVE_AFTER, NUM_STEPS):
        for training in (whole, resumed, forgetful):
            training.step(step)
    one, other = state_of(whole), state_of(resumed)
    errors = loaded["powersgd"]["errors"]
    return {
        "whole": whole.digest(),
        "resumed": resumed.digest(),
        "forgetful": forgetful.digest(),
        "same_state": {name: same(one[name], other[name]) for name in one},
        "errors_differ": all(not torch.equal(memory[0], memory[-1]) for memory in errors.values()),
        "num_buckets": len(errors),
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


def other_buckets(out: Path) -> str:
    """A state of other buckets is refused, by every rank."""
    training = compressed()
    for step in range(SAVE_AFTER):
        training.step(step)
    path = out / "other.pt"
    state = state_of(training)
    if dist.get_rank() == 0:
        torch.save(state, path)
    dist.barrier()
    try:
        compressed(SAVE_AFTER, torch.load(path, weights_only=True), bucket_cap_mb=25)
    except CheckpointError as error:
        return str(error)
    return "nothing was raised"


class Gated(SmallNet):
    """Its layers get no gradient at all, except biases, while `gate` is 0."""

    gate = 1.0

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.gate * self.features(images_BCHW).mean((2, 3)))


def vanished(out: Path) -> dict[str, Any]:
    """What is applied of a gradient that was zero when compression began and comes back; for each rank of P and Q."""
    return {str(rank): lengths_of_gradients(rank) for rank in (1, 2, 3)}


def lengths_of_gradients(rank: int) -> dict[str, list[float]]:
    training = compressed(rank=rank, model=Gated())
    model = training.ddp.module
    assert isinstance(model, Gated)
    lengths: dict[str, list[float]] = {name: [] for name, weight in model.named_parameters() if weight.dim() > 1}
    for step in range(START_STEP + DEAD_STEPS + LIVE_STEPS):
        model.gate = float(step >= START_STEP + DEAD_STEPS)
        with training.meter.phase("train"):
            training.loss(step).backward()
        for name, found in lengths.items():
            gradient = model.get_parameter(name).grad
            assert gradient is not None
            found.append(float(gradient.norm()))
        training.optimizer.zero_grad()
        training.ledger.commit_step()
    return lengths


SCENARIOS = (traffic, before_compression, untouched_by_warm_up, resume, other_buckets, vanished)


if __name__ == "__main__":
    run_scenarios(SCENARIOS)
