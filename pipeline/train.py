"""Train one model over WebDataset shards on any number of ranks, and account for every byte its gradients cost.

    python -m pipeline.train name=first data.root=shards/builtin cluster.devices=2 trainer.max_epochs=2

The same command again resumes the run; once it is finished, it exits 0 at once.
"""

import contextlib
from typing import TYPE_CHECKING

from pipeline.config.training import TrainConfig
from pipeline.core.cli import run_command

if TYPE_CHECKING:
    from pipeline.run.launch.preempt import StopRequest
    from pipeline.run.launch.ranks import RankInfo


def train(config: TrainConfig) -> int:
    """One run, or one further attempt at it. Returns the exit code."""
    from pipeline.run.launch.preempt import StopRequest
    from pipeline.run.launch.supervisor import as_ranks

    def check() -> None:
        from pipeline.training.preflight import check_before_ranks

        check_before_ranks(config)

    def train_as_rank(ranks: "RankInfo") -> int:
        return train_as(ranks, config, stop)

    stop = StopRequest(config.cluster.preempt_grace_seconds)
    return as_ranks(
        "train",
        config.cluster,
        train_as_rank,
        num_workers=config.data.num_workers,
        check=check,
        listening=stop.listening(),
    )


def train_as(ranks: "RankInfo", config: TrainConfig, stop: "StopRequest") -> int:
    """Train as one of the ranks."""
    from pipeline.training import steps

    with steps.join(config, ranks, stop) as world:
        shards = steps.open_shards(config, world)
        plan = steps.plan_steps(config, world, shards)
        with contextlib.closing(steps.open_run(config, world)) as run:
            start = steps.find_start(config, world, run, shards.training.index_hash, shards.training.classes)
            setup = steps.Setup(config, world, shards, plan, run, start)
            if setup.is_finished:
                setup.refuse_without_effect()
                world.say(f"{config.name} is finished: {start.step} of {plan.num_steps} steps are done. Nothing to do.")
            else:
                steps.fit(setup)
    return 0


if __name__ == "__main__":
    from pipeline.run.launch.preempt import block_early

    block_early()
    run_command("train", TrainConfig, train)
