"""What it costs that all ranks are one run: the comparison at the start, and the checksum of the weights in a step.

    python -m benchmarks.rank_checks [--ranks 2] [--models squeezenet1_1 alexnet]

Each rank lists what it is (configuration, code, packages, arithmetic) and compares it with the others through their
store, as at the start of a training, with nothing remembered from the time before: wall time of rank 0, in which it
waits for the others, and its processor time. Then the checksum of a model's weights is timed beside a step of that
model (forward, backward, optimiser); what a step pays for it is its time over the interval.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import common

NAME = "rank_checks"
LONGEST_START_SECONDS, LARGEST_SHARE = 0.05, 0.001


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = common.parser(__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=["squeezenet1_1", "alexnet"])
    parser.add_argument("--batch", type=int, default=32, help="pictures per rank (%(default)s)")
    parser.add_argument("--size", type=int, default=224, help="crop side in pixels (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args(arguments)


def seconds_of(work: Callable[[], Any], repeats: int) -> float:
    """The median."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def of_start(rank: int, num_ranks: int, repeats: int) -> dict[str, float]:
    """Seconds of the comparison, the ranks beginning together: the least, the median, and the processor's."""
    import torch.distributed as dist

    from pipeline.comm.ledger.exchange import StoreExchange
    from pipeline.config.training import TrainConfig
    from pipeline.core.cli import compose
    from pipeline.core.compute import choose_compute
    from pipeline.run.provenance import versions
    from pipeline.training.same_run import compare, facts_of

    config = compose("train", TrainConfig, ["name=a", "data.root=shards", "trainer.max_steps=1"])
    compute = choose_compute(accelerator="cpu", precision="auto")
    exchange = StoreExchange(rank, num_ranks, name="benchmark")
    wall, processor = [], []
    for _ in range(repeats):
        versions.cache_clear()
        dist.barrier()
        began, used = time.perf_counter(), time.process_time()
        assert compare(exchange, facts_of("train", config, compute, num_ranks)) == []
        wall.append(time.perf_counter() - began)
        processor.append(time.process_time() - used)
    return {
        "least_seconds": min(wall),
        "median_seconds": statistics.median(wall),
        "processor_seconds": statistics.median(processor),
    }


def of_model(model_name: str, batch: int, size: int, repeats: int) -> dict[str, Any]:
    """Seconds of a step on this rank alone and of the checksum; what the checksum adds to a step."""
    import torch
    from torch.nn import functional as F

    from pipeline.config.training import TrainerConfig
    from pipeline.models import zoo
    from pipeline.training import drift

    model = zoo.build(model_name, 1000).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    images, labels = torch.randn(batch, 3, size, size), torch.zeros(batch, dtype=torch.int64)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    def check() -> None:
        drift.to_sums(drift.checksum(model.parameters())).tolist()

    step()
    check()
    step_seconds, check_seconds = seconds_of(step, repeats), seconds_of(check, 4 * repeats)
    every = TrainerConfig(max_steps=1).compare_weights_every_steps
    return {
        "model": model_name,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "step_seconds": step_seconds,
        "checksum_seconds": check_seconds,
        "every_steps": every,
        "share_of_a_step": check_seconds / every / step_seconds,
    }


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    options = parse(arguments)
    if "RANK" not in os.environ:
        from pipeline.run.launch.supervisor import supervise

        return supervise([sys.executable, "-m", "benchmarks.rank_checks", *arguments], options.ranks)
    import torch.distributed as dist

    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    start = of_start(rank, num_ranks, 10 * options.repeats)
    dist.barrier()
    if rank != 0:
        dist.barrier()
        return 0
    common.print_conditions()
    models = [of_model(name, options.batch, options.size, options.repeats) for name in options.models]
    dist.barrier()
    common.show("start", start)
    for row in models:
        common.show(row["model"], row)
    settings = {"ranks": num_ranks, "batch": options.batch, "size": options.size, "repeats": options.repeats}
    figures = {"start": start, "models": models}
    floors = [common.Floor("start.least_seconds", start["least_seconds"], at_most=LONGEST_START_SECONDS)]
    floors += [
        common.Floor(f"{row['model']}.share_of_a_step", row["share_of_a_step"], at_most=LARGEST_SHARE) for row in models
    ]
    return common.Result(NAME, settings, figures, floors).finish(options.results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
