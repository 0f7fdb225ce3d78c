"""Step time and exposed communication at several sizes of DDP's gradient buckets, for a small model and a large one.

    python -m benchmarks.buckets                                   two ranks on this machine, all its cores
    python -m benchmarks.buckets --megabytes null 1 25 -- comm.hook=fp16

A round is one short training for every model and size, in an order that rotates; rounds follow one another in the same
processes, so that a change in the machine's speed meets all alike. A training is `training.steps.fit` as the `train`
command calls it, but for its loader, which hands out pictures decoded before. The times are those of its metrics.jsonl:
`perf/step_seconds` less `perf/data_wait_seconds`, `comm/seconds`, `comm/exposed_seconds`, on rank 0; a training's first
step is left out. Printed are medians over the rounds of the median of a round.
"""

import argparse
import contextlib
import io
import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from benchmarks import common

if TYPE_CHECKING:
    from pipeline.config.training import TrainConfig
    from pipeline.data.batches import LoadedBatch
    from pipeline.training.world import World

NAME = "buckets"
NUM_CLASSES = 1000
NUM_BATCHES = 4  # distinct ones, reused in turn


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = common.parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["squeezenet1_1", "alexnet"])
    parser.add_argument(
        "--megabytes",
        nargs="+",
        default=["null", "0.5", "1", "2", "5", "25"],
        help="values of comm.bucket_megabytes (%(default)s)",
    )
    parser.add_argument("--size", type=int, default=224, help="crop side in pixels (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="pictures per rank (%(default)s)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, help="per rank; default: the cores over the ranks")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=6, help="of a training, the first not counted (%(default)s)")
    parser.add_argument("extra", nargs="*", metavar="key=value", help="further overrides of pipeline.train")
    options = parser.parse_args(arguments)
    if options.ranks < 2 or options.rounds < 1 or options.steps < 2:
        parser.error("there are at least 2 ranks, 1 round, and 2 steps, of which the first is not counted")
    return options


@dataclass(frozen=True)
class Case:
    """A model and a bucket size, and what was found: medians of each round."""

    model: str
    megabytes: str
    buckets: list[int] = field(default_factory=list)
    """Bytes of the gradient buckets, in the order in which they are sent."""
    found: dict[str, list[float]] = field(default_factory=dict)
    """By figure, one value per round."""

    def add(self, rows: list[dict[str, Any]], buckets: list[int]) -> None:
        """A round's training: its metrics.jsonl."""
        self.buckets[:] = buckets
        steps = [
            {
                "step_seconds": row["perf/step_seconds"] - row["perf/data_wait_seconds"],
                "communication_seconds": row["comm/seconds"],
                "exposed_seconds": row["comm/exposed_seconds"],
                "bus_bandwidth_bytes_per_second": row["comm/bus_bandwidth"],
            }
            for row in rows
        ]
        for key in steps[0]:
            self.found.setdefault(key, []).append(common.median_of(steps, key))

    def as_json(self) -> dict[str, Any]:
        """Medians over the rounds, and for the step the least and the most of them."""
        medians = {key: statistics.median(values) for key, values in self.found.items()}
        return {
            "model": self.model,
            "bucket_megabytes": None if self.megabytes == "null" else float(self.megabytes),
            "bucket_bytes": self.buckets,
            **medians,
            "step_seconds_least": min(self.found["step_seconds"]),
            "step_seconds_most": max(self.found["step_seconds"]),
            "exposed_share": medians["exposed_seconds"] / medians["step_seconds"],
        }


class Decoded:
    """A training loader that hands out the same decoded batches again and again."""

    def __init__(self, batches: "list[LoadedBatch]", num_steps: int) -> None:
        self.batches, self.num_steps = batches, num_steps

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> "Iterator[LoadedBatch]":
        return itertools.islice(itertools.cycle(self.batches), self.num_steps)

    def train_dataloader(self) -> "Decoded":
        """As a data module."""
        return self

    def val_dataloader(self) -> list[Any]:
        """There is none."""
        return []


def compose_run(options: argparse.Namespace, case: Case, round_number: int) -> "TrainConfig":
    """The training, as the train command would have it."""
    from pipeline.config.training import TrainConfig
    from pipeline.core.cli import compose

    overrides = [
        f"name=benchmarks/{NAME}/{case.model}-{case.megabytes}-{round_number}",
        f"data.root={common.SHARDS / NAME}",
        f"data.size={options.size}",
        "data.num_workers=0",
        f"model={case.model}",
        f"model.num_classes={NUM_CLASSES}",
        f"batch.global_size={options.batch * options.ranks}",
        f"batch.max_per_rank={options.batch}",
        f"cluster.devices={options.ranks}",
        f"cluster.num_threads={'null' if options.threads is None else options.threads}",
        "cluster.accelerator=cpu",
        f"comm.bucket_megabytes={case.megabytes}",
        f"trainer.max_steps={options.steps}",
        "trainer.validate_every_steps=0",
        "trainer.checkpoint_every_steps=0",
        "tracking=disabled",
        *options.extra,
    ]
    return compose("train", TrainConfig, overrides)


class Rounds:
    """All trainings, in the processes of the ranks."""

    def __init__(self, options: argparse.Namespace, world: "World") -> None:
        self.options, self.world = options, world
        self.cases = [Case(model, size) for model in options.models for size in options.megabytes]
        self._batches: list[LoadedBatch] = []

    def run(self) -> list[Case]:
        """Every case in every round, beginning with another one each time."""
        for number in range(self.options.rounds):
            first = number * len(self.cases) // self.options.rounds
            for case in self.cases[first:] + self.cases[:first]:
                self._train(case, number)
            self.world.say(f"  round {number + 1} of {self.options.rounds} done")
        return self.cases

    def _train(self, case: Case, number: int) -> None:
        from pipeline.training import steps

        config, world = compose_run(self.options, case, number), self.world
        # Rank 0 tells its user what each training is: here there are many, and the table tells.
        with contextlib.redirect_stdout(io.StringIO()):
            run = steps.open_run(config, world)
            shards = steps.open_shards(config, world)
            plan = steps.plan_steps(config, world, shards)
            start = steps.Start()
            if not self._batches:
                real = steps.make_data(config, world, shards, plan, start)
                self._batches = list(itertools.islice(real.train_dataloader(), NUM_BATCHES))
            learner = steps.make_learner(config, world, shards, plan, start)
            decoded = Decoded(self._batches, self.options.steps)
            with mock.patch.object(steps, "make_data", lambda *_: decoded):
                steps.fit(config, world, run, shards, plan, start, learner)
        if world.is_first:
            buckets = [bucket.num_bytes for _, bucket in sorted(world.meter.buckets.items())]
            case.add(common.read_rows(str(Path(config.name).relative_to("benchmarks"))), buckets)


def report(options: argparse.Namespace, world: "World", cases: list[Case]) -> int:
    """Print the table, and write the result; returns the exit code."""
    told = {"threads": world.num_threads, "num_classes": NUM_CLASSES, "arithmetic": world.compute.sentence}
    result = common.Result(NAME, {**vars(options), **told})
    result.figures["cases"] = [case.as_json() for case in cases]
    columns = "{:15s} {:>6s} {:>8s} {:>10s} {:>18s} {:>14s} {:>11s} {:>8s}"
    print(columns.format("model", "MiB", "buckets", "step ms", "least to most", "communication", "exposed ms", "share"))
    for row, case in zip(result.figures["cases"], cases, strict=True):
        least, most = 1e3 * row["step_seconds_least"], 1e3 * row["step_seconds_most"]
        print(
            columns.format(
                case.model,
                case.megabytes,
                str(len(case.buckets)),
                f"{1e3 * row['step_seconds']:.1f}",
                f"{least:.1f} to {most:.1f}",
                f"{1e3 * row['communication_seconds']:.1f}",
                f"{1e3 * row['exposed_seconds']:.1f}",
                f"{row['exposed_share']:.1%}",
            )
        )
    return result.finish(options.results)


def main(arguments: Sequence[str]) -> int:
    """The ranks are started as the train command starts them."""
    from pipeline.run.launch.ranks import find_ranks
    from pipeline.run.launch.supervisor import supervise

    options = parse(arguments)
    ranks = find_ranks(options.ranks)
    if ranks is None:
        common.prepare_for_timing(NAME, NUM_BATCHES * options.batch * options.ranks)
        command = [sys.executable, "-m", "benchmarks.buckets", *arguments]
        return supervise(command, options.ranks, num_threads=options.threads)

    from pipeline.training import steps

    with steps.join(compose_run(options, Case(options.models[0], options.megabytes[0]), 0), ranks) as world:
        cases = Rounds(options, world).run()
        return report(options, world, cases) if world.is_first else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
