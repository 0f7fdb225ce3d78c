"""Exact top-1, top-5 and loss of a checkpoint, a torchvision state dict or the Caffe `.npz`, on any number of ranks.

    python -m pipeline.evaluate name=check data.root=shards/builtin model=squeezenet1_1 checkpoint=runs/first
    python -m pipeline.evaluate name=caffe data.root=shards/imagenet model=squeezenet1_0_caffe checkpoint=weights.npz

Every picture counts once, whatever the number of ranks. Left in `<run_root>/<name>/`: evaluation.json.
"""

import sys

from pipeline.config.evaluate import EvaluateConfig
from pipeline.core.cli import run_command
from pipeline.core.compute import choose_compute


def evaluate(config: EvaluateConfig) -> int:
    """Score the weights; returns the exit code."""
    from pipeline.data.root import check_root
    from pipeline.models import zoo
    from pipeline.run.launch.ranks import find_ranks
    from pipeline.run.launch.supervisor import supervise

    split = config.data.split or config.data.val_split
    ranks = find_ranks(config.cluster.devices)
    if ranks is None or ranks.source == "single":
        zoo.check(config.model.name, config.model.metaparameters)
        check_root(config.data, split)
    if ranks is None:
        command = [sys.executable, "-m", "pipeline.evaluate", *sys.argv[1:]]
        return supervise(command, config.cluster.devices, num_threads=config.cluster.num_threads)

    from pipeline.data.index import open_split
    from pipeline.training import scoring
    from pipeline.training.world import join_group

    compute = choose_compute(accelerator=config.cluster.accelerator, precision=config.precision)
    with join_group(ranks, compute, config.cluster) as world:
        index = world.locally_first(lambda leads: open_split(config.data, split, is_local_leader=leads))
        weights = world.agree(lambda: scoring.load_weights(config, index.num_classes))
        results = scoring.score(config, world, weights, index)
        world.first_decides(lambda: scoring.write(config, weights, results))
        world.say(scoring.sentence(config, weights, results))
    return 0


if __name__ == "__main__":
    run_command("evaluate", EvaluateConfig, evaluate)
