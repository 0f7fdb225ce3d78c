"""Our training step beside plain PyTorch loops: same model, same pictures, same threads, one run.

    python -m benchmarks.train_step               one rank, all cores
    python -m benchmarks.train_step --ranks 2     two ranks; the plain loops run beside each other and exchange nothing

A round is some steps of each plain loop, then as many of ours; rounds alternate, so that a change in the machine's
speed meets all alike. Ours is `training.steps.fit` as the `train` command calls it: Lightning, DDP with the meter,
the finite guard, gradient clipping, the ledger, metrics.jsonl and W&B's offline mirror. Only its loader is replaced, by
one that hands out pictures decoded before; its time is what metrics.jsonl says, `perf/step_seconds` less
`perf/data_wait_seconds`. A plain loop is `plain_loop.py`, what one writes by hand, in a process of its own.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from unittest import mock

from benchmarks import common
from benchmarks.plain_loop import Peer, Settings, started

if TYPE_CHECKING:
    from pipeline.config.training import TrainConfig
    from pipeline.data.batches import LoadedBatch
    from pipeline.training.world import World

NUM_CLASSES = 1000
NUM_BATCHES = 4  # distinct ones, reused in turn
FLOOR_FP32_WITH_AMX, FLOOR_BF16 = 2.5, 0.95
RUN = "train-step"
FP32, BF16 = "plain fp32 NCHW", "plain bf16 channels_last"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="squeezenet1_1")
    parser.add_argument("--size", type=int, default=224, help="crop side in pixels (%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="pictures per rank (%(default)s)")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--threads", type=int, help="per rank; default: the cores over the ranks")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=6, help="of each loop in a round, the first not counted")
    parser.add_argument("--tracking", default="offline", choices=("offline", "disabled"))
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.steps < 2:
        parser.error("a round has at least 2 steps, of which the first is not counted, and there is at least 1 round")
    return options


@dataclass
class Timings:
    """Seconds of every counted step, by round."""

    rounds: list[list[float]]

    @property
    def medians(self) -> list[float]:
        """One per round."""
        return [statistics.median(seconds) for seconds in self.rounds]

    def as_json(self, batch: int) -> dict[str, float]:
        """Of the medians of the rounds: their median, least and most; and the rate that the median gives."""
        medians = self.medians
        middle = statistics.median(medians)
        return {
            "step_seconds": middle,
            "step_seconds_least": min(medians),
            "step_seconds_most": max(medians),
            "images_per_second": batch / middle,
        }


class Interleaved:
    """A training loader that hands out decoded batches, and lets the plain loops do theirs between our rounds.

    What it does between two batches is waiting for data to whoever times our step.
    """

    def __init__(
        self,
        batches: "list[LoadedBatch]",
        peers: dict[str, Peer],
        *,
        num_rounds: int,
        num_steps: int,
        barrier: Callable[[], object],
    ) -> None:
        self.batches, self.peers = batches, peers
        self.num_rounds, self.num_steps = num_rounds, num_steps
        self.barrier = barrier
        self.timings = {name: Timings([]) for name in peers}

    def __len__(self) -> int:
        return self.num_rounds * self.num_steps

    def __iter__(self) -> "Iterator[LoadedBatch]":
        stream = itertools.cycle(self.batches)
        for _ in range(self.num_rounds):
            for name, peer in self.peers.items():
                self.barrier()
                self.timings[name].rounds.append(peer.round()[1:])
            self.barrier()
            yield from itertools.islice(stream, self.num_steps)


def our_timings(num_steps: int) -> Timings:
    """Our steps as metrics.jsonl has them, the first of each round left out."""
    seconds = [row["perf/step_seconds"] - row["perf/data_wait_seconds"] for row in common.read_rows(RUN)]
    return Timings([seconds[start + 1 : start + num_steps] for start in range(0, len(seconds), num_steps)])


def compose_run(options: argparse.Namespace) -> "TrainConfig":
    """The run, as the train command would have it."""
    from pipeline.config.training import TrainConfig
    from pipeline.core.cli import compose

    threads = "null" if options.threads is None else options.threads
    overrides = [
        f"name=benchmarks/{RUN}",
        f"data.root={common.SHARDS / RUN}",
        f"data.size={options.size}",
        "data.num_workers=0",
        f"model={options.model}",
        f"model.num_classes={NUM_CLASSES}",
        f"batch.global_size={options.batch * options.ranks}",
        f"batch.max_per_rank={options.batch}",
        f"cluster.devices={options.ranks}",
        f"cluster.num_threads={threads}",
        "cluster.accelerator=cpu",
        f"trainer.max_steps={options.rounds * options.steps}",
        "trainer.validate_every_steps=0",
        "trainer.checkpoint_every_steps=0",
        f"tracking={options.tracking}",
    ]
    return compose("train", TrainConfig, overrides)


def peer_settings(config: "TrainConfig", world: "World", batches: "list[LoadedBatch]", num_steps: int) -> Settings:
    """Of this rank's fp32 loop; the pictures go to it through a file."""
    import numpy as np

    pictures = common.RUNS / RUN / f"pictures-{world.rank}.npz"
    images_NBHWC = np.stack([batch.images_BCHW.permute(0, 2, 3, 1).numpy() for batch in batches])
    np.savez(pictures, images_NBHWC=images_NBHWC, labels_NB=np.stack([batch.labels_B.numpy() for batch in batches]))
    recipe = config.recipe
    return Settings(
        pictures=str(pictures),
        bf16=False,
        model=config.model.name,
        metaparameters=config.model.metaparameters,
        num_classes=NUM_CLASSES,
        mean=config.input.mean,
        std=config.input.std,
        lr=recipe.peak_lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        seed=config.seed,
        num_threads=world.num_threads,
        num_steps=num_steps,
    )


def measure(options: argparse.Namespace, world: "World", config: "TrainConfig") -> int:
    """Train, with the plain loops in between; rank 0 writes the result, and its exit code says what became of it."""
    import torch.distributed as dist

    from pipeline.training import steps

    run = steps.open_run(config, world)
    shards = steps.open_shards(config, world)
    plan = steps.plan_steps(config, world, shards)
    setup = steps.Setup(config, world, shards, plan, run, steps.Start())
    batches = list(itertools.islice(steps.make_training_loader(setup), NUM_BATCHES))
    settings = peer_settings(config, world, batches, options.steps)
    with started(settings) as fp32, started(replace(settings, bf16=True)) as bf16:
        loader = Interleaved(
            batches, {FP32: fp32, BF16: bf16}, num_rounds=options.rounds, num_steps=options.steps, barrier=dist.barrier
        )
        with mock.patch.object(steps, "make_training_loader", lambda _: loader):
            steps.fit(setup)
    if not world.is_rank_zero:
        return 0
    return report(options, world, {"ours": our_timings(options.steps), **loader.timings})


def report(options: argparse.Namespace, world: "World", timings: dict[str, Timings]) -> int:
    """Print, and write the result; returns the exit code."""
    result = common.Result(
        "train_step",
        {
            **vars(options),
            "threads": world.num_threads,
            "num_classes": NUM_CLASSES,
            "arithmetic": world.compute.sentence,
        },
    )
    result.figures["loops"] = {name: timing.as_json(options.batch) for name, timing in timings.items()}
    for name, timing in timings.items():
        told = timing.as_json(options.batch)
        print(
            f"  {name:26s} {1e3 * told['step_seconds']:8.1f} ms a step ({1e3 * told['step_seconds_least']:.1f} to"
            f" {1e3 * told['step_seconds_most']:.1f} over rounds), {told['images_per_second']:.1f} pictures/s a rank"
        )
    result.figures["ratios"] = {}
    for name in list(timings)[1:]:
        ratios = [theirs / ours for theirs, ours in zip(timings[name].medians, timings["ours"].medians, strict=True)]
        low, middle, high = _quartiles(ratios)
        result.figures["ratios"][name] = {"median": middle, "quartile_low": low, "quartile_high": high}
        print(f"  against {name:26s} {middle:.3f} times as fast (half of the rounds: {low:.3f} to {high:.3f})")
    ratio = result.figures["ratios"]
    if world.compute.accelerator == "cpu" and "amx_bf16" in common.conditions()["cpu"]["flags"]:
        value = ratio[FP32]["median"]
        result.floors.append(common.Floor("times as fast as plain fp32 NCHW", value, at_least=FLOOR_FP32_WITH_AMX))
    else:
        print(f"  no floor against fp32 NCHW: it is {FLOOR_FP32_WITH_AMX} on CPUs with AMX, which this one lacks")
    value = ratio[BF16]["median"]
    result.floors.append(common.Floor("times as fast as plain bf16 channels_last", value, at_least=FLOOR_BF16))
    return result.finish(options.results)


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def main(arguments: Sequence[str]) -> int:
    """One rank is this process; several are started as the train command starts them."""
    from pipeline.run.launch.ranks import find_ranks
    from pipeline.run.launch.supervisor import supervise

    options = parse(arguments)
    ranks = find_ranks(options.ranks)
    if ranks is None or ranks.world_size == 1:
        common.prepare_for_timing(RUN, NUM_BATCHES * options.batch * options.ranks)
    if ranks is None:
        command = [sys.executable, "-m", "benchmarks.train_step", *arguments]
        return supervise(command, options.ranks, num_threads=options.threads)

    from pipeline.training import steps

    config = compose_run(options)
    with steps.join(config, ranks) as world:
        return measure(options, world, config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
