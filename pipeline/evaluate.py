"""Exact top-1, top-5 and loss of a checkpoint, a torchvision state dict or the Caffe `.npz`, on any number of ranks.

    python -m pipeline.evaluate name=check data.root=shards/builtin model=squeezenet1_1 checkpoint=runs/first
    python -m pipeline.evaluate name=caffe data.root=shards/imagenet model=squeezenet1_0_caffe checkpoint=weights.npz

Every picture counts once, whatever the number of ranks. Left in `<run_root>/<name>/`: evaluation.json.
"""

import sys
from dataclasses import dataclass

from pipeline.config.training import ClusterConfig, DataConfig, InputConfig, ModelConfig, TrainerConfig, one_of, require
from pipeline.core.cli import run_command


@dataclass(frozen=True, kw_only=True)
class EvaluateDataConfig(DataConfig):
    """Where the shards are, and which of their splits is scored."""

    split: str | None = None
    """Which split to score; null: val_split."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Exact top-1, top-5 and loss of one set of weights on one split."""

    name: str = "evaluation"
    """The directory of evaluation.json under run_root."""
    run_root: str = "runs"
    checkpoint: str
    """A run directory (its best checkpoint, else its last), a .ckpt, a torchvision state dict, or the Caffe .npz."""
    precision: str = "fp32"
    """`fp32`, `bf16`, or `auto` as in training."""
    batch_per_rank: int = 64
    data: EvaluateDataConfig
    model: ModelConfig
    cluster: ClusterConfig

    def __post_init__(self) -> None:
        one_of("precision", self.precision, ("auto", "fp32", "bf16"))
        require(self.batch_per_rank > 0, f"batch_per_rank={self.batch_per_rank} must be positive.")
        require(self.data.root is not None, "data.root is not set: give the directory that holds the shards.")

    @property
    def input(self) -> InputConfig:
        """The model's input at the crop side used here."""
        return self.model.input.resized(self.data.size)

    @property
    def trainer(self) -> TrainerConfig:
        """What decides precision and layout."""
        return TrainerConfig(max_steps=1, precision=self.precision)


def evaluate(config: EvaluateConfig) -> int:
    """Score the weights; returns the exit code."""
    from pipeline.models import zoo
    from pipeline.run.launch.supervisor import find_ranks, supervise
    from pipeline.training.preflight import check_root

    split = config.data.split or config.data.val_split
    ranks = find_ranks(config.cluster.devices)
    if ranks is None or ranks.source == "single":
        zoo.check(config.model.name, config.model.metaparameters)
        check_root(config.data, split)
    if ranks is None:
        command = [sys.executable, "-m", "pipeline.evaluate", *sys.argv[1:]]
        return supervise(command, config.cluster.devices, num_threads=config.cluster.num_threads)

    from pipeline.data.index import open_split
    from pipeline.training import plan as startup
    from pipeline.training import scoring
    from pipeline.training.world import join_group

    compute = startup.choose_compute(config.trainer, config.cluster)
    with join_group(ranks, compute, config.cluster) as world:
        index = world.locally_first(lambda is_first: open_split(config.data, split, is_first=is_first))
        weights = world.agree(lambda: scoring.load_weights(config, index.num_classes))
        results = scoring.score(config, world, weights, index)
        world.first_decides(lambda: scoring.write(config, weights, results))
        world.say(scoring.sentence(config, weights, results))
    return 0


if __name__ == "__main__":
    run_command("evaluate", EvaluateConfig, evaluate)
