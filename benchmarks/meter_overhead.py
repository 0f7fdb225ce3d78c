"""What the meter costs: pairs of steps with and without it, in one run.

    python -m benchmarks.meter_overhead [--batch 32] [--model squeezenet1_1]

On each rank two copies of the model train side by side on the same pictures, one through metered DDP (gradient hook,
record of every collective, timeline, ledger with the kernel's counts, as the train command does it), one through plain
DDP on a process group of its own. A pair is one step of each, in changing order, each begun together by all ranks.
Pairs are added until the half-width of the 95 % interval of the mean overhead is at most `--half-width`. The two copies
must end with the same weights, bit for bit.
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks import common
from benchmarks.synthetic import make_training, whole_group

if TYPE_CHECKING:
    import torch

CEILING, GOAL = 0.01, 0.003
FEWEST_PAIRS = 200
BLOCK = 50  # pairs between two looks at the interval


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="squeezenet1_1")
    parser.add_argument("--size", type=int, default=224, help="crop side in pixels (%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="pictures per rank (%(default)s)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--half-width", type=float, default=0.003, help="of the interval, to stop at (%(default)s)")
    parser.add_argument("--most-pairs", type=int, default=3000)
    return parser.parse_args(arguments)


@dataclass
class Copy:
    """One of the two trainings: `step()` is one optimiser step."""

    model: "torch.nn.Module"
    step: Callable[[], None]


def interval(overheads: Sequence[float]) -> tuple[float, float]:
    """(mean, half-width of its 95 % interval), the normal approximation."""
    return statistics.fmean(overheads), 1.96 * statistics.stdev(overheads) / math.sqrt(len(overheads))


def trimmed(pairs: Sequence[tuple[float, float]]) -> list[float]:
    """(with - without) / without of each pair, the 5 % at either end left out: another process was at work then."""
    overheads = sorted(with_meter / without - 1 for with_meter, without in pairs)
    cut = len(overheads) // 20
    return overheads[cut : len(overheads) - cut]


def make_copies(options: argparse.Namespace) -> tuple[Copy, Copy]:
    """(metered, plain), with the same weights and pictures."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from pipeline.comm.collectives import CollectiveMeter
    from pipeline.comm.ddp import MeteredDDP, gradient_bytes_by_parameter, rebuild_buckets
    from pipeline.comm.kernel.counter import SocketCounter
    from pipeline.comm.ledger.ledger import Ledger
    from pipeline.comm.ledger.reconcile import Reconciler
    from pipeline.comm.ledger.traffic import Placement

    world_size, rank = dist.get_world_size(), dist.get_rank()
    plain_group = whole_group()
    counter = SocketCounter(int(os.environ["MASTER_PORT"]))
    meter = CollectiveMeter(observers=[counter])
    meter.attach()

    def copy(wrap: Callable[[Any], Any]) -> tuple[Any, Any, Callable[[], Any]]:
        training = make_training(options.model, options.batch, options.size, wrap)
        return training.ddp, torch.optim.SGD(training.ddp.parameters(), lr=0.001, momentum=0.9), training.loss

    def one_step(optimizer: Any, loss: Callable[[], Any]) -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    metered, optimizer, loss = copy(lambda model: MeteredDDP(model, meter=meter, gradient_as_bucket_view=True))
    placement = Placement.assumed(world_size)
    ledger = Ledger(
        meter,
        gradient_bytes_by_parameter(metered.module),
        placement=placement,
        attempt=1,
        rank=rank,
        reconciler=Reconciler(counter, rank, placement, strict=False),
    )
    rebuild_buckets(metered, loss, meter)
    plain, plain_optimizer, plain_loss = copy(
        lambda model: DistributedDataParallel(model, process_group=plain_group, gradient_as_bucket_view=True)
    )
    for _ in range(2):  # as rebuild_buckets does
        plain_loss().backward()
        plain_optimizer.zero_grad()
    meter.set_phase("train")

    def metered_step() -> None:
        one_step(optimizer, loss)
        ledger.commit_step().metrics()

    return Copy(metered, metered_step), Copy(plain, lambda: one_step(plain_optimizer, plain_loss))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """On every rank alike; what rank 0 returns counts."""
    import torch
    import torch.distributed as dist

    copies = make_copies(options)
    aside = whole_group()
    for _ in range(3):
        for copy in copies:
            copy.step()
    pairs: list[tuple[float, float]] = []
    while True:
        for _ in range(BLOCK):
            seconds = [0.0, 0.0]
            for which in (0, 1) if len(pairs) % 2 else (1, 0):
                dist.barrier(group=aside)
                started = time.perf_counter()
                copies[which].step()
                seconds[which] = time.perf_counter() - started
            pairs.append((seconds[0], seconds[1]))
        mean, half_width = interval(trimmed(pairs))
        enough = len(pairs) >= FEWEST_PAIRS and half_width <= options.half_width
        verdict = torch.tensor([float(enough or len(pairs) >= options.most_pairs)])
        dist.broadcast(verdict, 0, group=aside)
        if verdict.item():
            break
    states = [copy.model.state_dict() for copy in copies]
    same = all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    return {
        "pairs": len(pairs),
        "overhead_fraction": mean,
        "interval_half_width": half_width,
        "upper_end": mean + half_width,
        "step_seconds_with": statistics.median(pair[0] for pair in pairs),
        "step_seconds_without": statistics.median(pair[1] for pair in pairs),
        "weights_identical": same,
    }


def main(arguments: Sequence[str]) -> int:
    """Start the ranks, or be one."""
    options = parse(arguments)
    if "RANK" not in os.environ:
        from pipeline.run.launch.supervisor import supervise

        common.print_conditions()
        return supervise([sys.executable, "-m", "benchmarks.meter_overhead", *arguments], options.ranks)
    import torch.distributed as dist

    from pipeline.core.compute import keep_freed_memory, set_threads

    keep_freed_memory()
    set_threads(None, options.ranks)
    dist.init_process_group("gloo")
    figures = measure(options)
    code = 0
    if dist.get_rank() == 0:
        common.show(f"{options.model}, {options.batch} pictures per rank", figures)
        result = common.Result("meter_overhead", vars(options), {**figures, "goal": GOAL})
        result.floors = [
            common.Floor("upper end of the overhead's interval", figures["upper_end"], at_most=CEILING),
            common.Floor("weights identical with and without", float(figures["weights_identical"]), at_least=1),
        ]
        code = result.finish(options.results)
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
