"""What `evaluate` may be told."""

from dataclasses import dataclass

from pipeline.config.data import DataConfig
from pipeline.config.model import ModelConfig
from pipeline.config.training import ClusterConfig, TrainerConfig
from pipeline.core.typed import PathText, one_of, require


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
    run_root: PathText = "runs"
    checkpoint: PathText
    """A run directory (its best checkpoint, else its last), a .ckpt, a torchvision state dict (.pth, .safetensors), or
    the Caffe .npz."""
    precision: str = "fp32"
    """`fp32`, `bf16`, or `auto` as in training."""
    batch_per_rank: int = 64
    data: EvaluateDataConfig
    model: ModelConfig
    """Without `model=NAME`: what the checkpoint says, its input included. Other weights do not say, and need it."""
    cluster: ClusterConfig

    def __post_init__(self) -> None:
        one_of("precision", self.precision, ("auto", "fp32", "bf16"))
        require(self.batch_per_rank > 0, f"batch_per_rank={self.batch_per_rank} must be positive.")
        require(self.data.root is not None, "data.root is not set: give the directory that holds the shards.")

    @property
    def trainer(self) -> TrainerConfig:
        """What decides precision and layout."""
        return TrainerConfig(max_steps=1, precision=self.precision)
