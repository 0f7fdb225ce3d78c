"""One rank of DDP under the timeline, where something is made slow on purpose: a rank, or a large tensor."""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.comm.collectives import CollectiveMeter
from pipeline.comm.ddp import MeteredDDP, gradient_bytes_by_parameter, rebuild_buckets
from pipeline.comm.ledger.document import Conditions
from pipeline.comm.powersgd import PowerSGD
from pipeline.comm.timeline import Timeline
from tests.distributed.meter_ranks import leave, unreconciled

NUM_STEPS = 3
DELAY_SECONDS = 0.4
SMALL, LARGE = 300, 4_000_000  # elements; the smaller exceeds the bucket size too


class Delay(torch.autograd.Function):
    """The identity, whose backward pass takes a while."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        time.sleep(ctx.seconds)
        return gradients[0], None


class Net(nn.Module):
    """A bucket per parameter: the gradient of `last` is ready first, then comes the delay, then those of the others."""

    def __init__(self, first: int, last: int, buffer: bool, middle: bool) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.ones(first))
        self.last = nn.Parameter(torch.ones(last))
        self.middle = nn.Parameter(torch.ones(SMALL)) if middle else torch.ones(1)
        self.delay = 0.0
        if buffer:
            self.register_buffer("running", torch.zeros(3))

    def forward(self, scale: torch.Tensor) -> torch.Tensor:
        middle = (self.middle * (self.first * scale).sum()).sum()
        return (self.last * Delay.apply(middle, self.delay)).sum()


def measure(
    *,
    first: int = SMALL,
    last: int = SMALL,
    delay: float = 0.0,
    buffer: bool = False,
    compressed: bool = False,
    before_forward: Callable[[], None] = lambda: None,
    before_metrics: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train; returns what ledger.json would say, and the times of the last step."""
    timeline = Timeline(dist.get_world_size())
    meter = CollectiveMeter(observers=[timeline])
    meter.attach()
    net = Net(first, last, buffer, middle=compressed)
    hook = PowerSGD(rank=1, start_step=2, step=2, waiting=timeline.waiting) if compressed else "none"
    ddp = MeteredDDP(net, meter=meter, timeline=timeline, hook=hook, bucket_cap_mb=0.001, gradient_as_bucket_view=True)
    rebuild_buckets(ddp, lambda: ddp(torch.ones(())), meter)
    net.delay = delay
    ledger = unreconciled(meter, gradient_bytes_by_parameter(net))
    dist.barrier()
    times = None
    with meter.phase("train"):
        for _ in range(NUM_STEPS):
            before_forward()
            with timeline.forward():
                loss = ddp(torch.ones(()))
            with timeline.backward():
                loss.backward()
            before_metrics()
            with meter.origin("metrics"), timeline.waiting():
                dist.all_reduce(torch.ones(3))
            ledger.commit_step()
            times = timeline.take_step()
    assert times is not None
    conditions = Conditions(
        run="test", model="net", hook="none", global_batch=1, communication=timeline.medians(), why_untimed="Never."
    )
    return {"json": ledger.to_json(conditions), "last": asdict(times)}


def sleep_on(rank: int) -> Callable[[], None]:
    """What delays one rank only."""
    return lambda: time.sleep(DELAY_SECONDS if dist.get_rank() == rank else 0)


def late_backward(last_rank: int) -> dict[str, Any]:
    """The last rank computes longer before its last gradient is ready."""
    return measure(delay=DELAY_SECONDS if dist.get_rank() == last_rank else 0.0)


def late_metrics(last_rank: int) -> dict[str, Any]:
    """The last rank comes late to the exchange of metrics."""
    return measure(before_metrics=sleep_on(last_rank))


def late_buffers(last_rank: int) -> dict[str, Any]:
    """Rank 0, whose buffers the others need for their forward pass, comes late to it."""
    return measure(buffer=True, before_forward=sleep_on(0))


def late_for_compression(last_rank: int) -> dict[str, Any]:
    """The hook of the second of three buckets waits for the first, for which the last rank comes late."""
    return measure(compressed=True, before_forward=sleep_on(last_rank))


def hidden(last_rank: int) -> dict[str, Any]:
    """A large tensor travels while everybody still computes."""
    return measure(last=LARGE, delay=2 * DELAY_SECONDS)


def bare(last_rank: int) -> dict[str, Any]:
    """The same tensor is the last to be ready."""
    return measure(first=LARGE)


SCENARIOS = (late_backward, late_metrics, late_buffers, late_for_compression, hidden, bare)


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    results = {scenario.__name__: scenario(dist.get_world_size() - 1) for scenario in SCENARIOS}
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps({"delay": DELAY_SECONDS, **results}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(Path(sys.argv[1]))
