"""Exact top-1, top-5 and loss of a checkpoint, a torchvision state dict or the Caffe `.npz`, on any number of ranks.

    python -m pipeline.evaluate name=check data.root=shards/builtin checkpoint=runs/first
    python -m pipeline.evaluate name=caffe data.root=shards/imagenet model=squeezenet1_0_caffe checkpoint=weights.npz

A checkpoint of ours says which model it is and how its pictures are cut; what the command says otherwise is said too.
Every picture counts once, whatever the number of ranks. Left in `<run_root>/<name>/`: evaluation.json.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.evaluate import EvaluateConfig
from pipeline.core.cli import run_command
from pipeline.core.compute import choose_compute

if TYPE_CHECKING:
    from pipeline.run.launch.ranks import RankInfo


def evaluate(config: EvaluateConfig) -> int:
    """Score the weights; returns the exit code."""
    from pipeline.run.launch.supervisor import as_ranks

    split = config.data.split or config.data.val_split

    def check() -> None:
        from pipeline.training.preflight import check_evaluation

        check_evaluation(config, split)

    def work(ranks: "RankInfo") -> int:
        return evaluate_as(ranks, config, split)

    return as_ranks("evaluate", config.cluster, work, num_workers=config.data.num_workers, check=check)


def evaluate_as(ranks: "RankInfo", config: EvaluateConfig, split: str) -> int:
    """Score the weights as one of the ranks."""
    from pipeline.data.index import open_split
    from pipeline.training import scoring
    from pipeline.training.same_run import facts_of
    from pipeline.training.trained import load_trained
    from pipeline.training.world import join_group

    choose = functools.partial(choose_compute, accelerator=config.cluster.accelerator, precision=config.precision)
    facts = functools.partial(facts_of, "evaluate", config, world_size=ranks.world_size)
    with join_group(ranks, choose, config.cluster, facts=facts, run_root=config.run_root) as world:
        index = world.locally_first(lambda leads: open_split(config.data, split, is_local_leader=leads))
        trained = world.agree(lambda: load_trained(Path(config.checkpoint), config.model, size=config.data.size))
        world.agree(lambda: scoring.check_batch(config, trained, ranks.local_world_size))
        label_of_class = world.agree(lambda: scoring.match_outputs(trained, index))
        world.require_same_run(scoring.facts_of_content(trained, index, label_of_class))
        for difference in trained.differences:
            world.say(f"not as trained: {difference}.")
        if label_of_class is not None:
            world.say("labels are matched to outputs by class name: the shards have fewer, or in another order.")
        results = scoring.score(config, world, trained, index, label_of_class)
        world.first_decides(lambda: scoring.write(config, trained, results))
        world.say(scoring.sentence(trained, results))
    return 0


if __name__ == "__main__":
    run_command("evaluate", EvaluateConfig, evaluate)
