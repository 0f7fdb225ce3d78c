"""What a comparison may be told."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.config.comm import CommConfig
from pipeline.config.data import DataConfig
from pipeline.config.hooks import HOOKS
from pipeline.config.lab import TrainingsLab
from pipeline.config.training import BatchConfig, ClusterConfig, CompareTrackingConfig
from pipeline.core.typed import PathText, one_of, require


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Train several models for a few steps each, under the same conditions, and compare what they send."""

    name: str = "comparison"
    """The comparison's directory under run_root."""
    run_root: PathText = "runs"
    models: tuple[str, ...]
    """Names of the registry, with metaparameters if you like: [squeezenet1_0,squeezenet1_0:sr=0.5,alexnet]. Those of
    others too: [timm:resnet10t,torchvision:regnet_y_400mf,nets.py:tiny:width=8]."""
    allow_code: bool = False
    """As model.allow_code: whether models that are factories of yours may run."""
    hooks: tuple[str, ...] = ()
    """Compressions to run each model with, a row for each: [none,bf16,powersgd]. Empty: comm.hook alone."""
    runs: tuple[PathText, ...] = ()
    """Run directories already made: report on these and run nothing. Their conditions must agree; the compression may
    differ if `hooks` names it."""
    alone: bool = True
    """Run each model on one rank too, with the same batch per rank, to see how well it scales."""
    alone_runs: tuple[PathText, ...] = ()
    """With `runs`: run directories of single ranks, to see how well those scale."""
    training_run: PathText | None = None
    """A training run whose curves the report shows too. Null: the run in the comparison's own directory, if any."""
    baseline: str | None = None
    """The model the others are multiples of. Null: squeezenet1_0 if it is among the models, else the first."""
    steps: int = 10
    """Optimiser steps per model."""
    num_classes: int = 1000
    """Outputs of every classifier, whatever the shards hold: 1000 compares the models as published."""
    precision: str = "auto"
    """As trainer.precision: `auto`, `fp32`, `bf16`."""
    seed: int = 0
    launcher: str = "auto"
    """`local`: ranks of this machine; `slurm`: each training over the whole allocation, with srun; `auto`: `slurm`
    inside a job of several nodes or tasks."""
    data: DataConfig
    batch: BatchConfig
    cluster: ClusterConfig
    comm: CommConfig
    tracking: CompareTrackingConfig
    lab: TrainingsLab

    def __post_init__(self) -> None:
        one_of("precision", self.precision, ("auto", "fp32", "bf16"))
        one_of("launcher", self.launcher, ("auto", "local", "slurm"))
        for hook in self.hooks:
            one_of("hooks", hook, HOOKS)
        require(len(set(self.hooks)) == len(self.hooks), f"hooks={list(self.hooks)} names a hook twice.")
        require(bool(self.models or self.runs), "Nothing to compare: give models=[...] or runs=[...].")
        require(len(set(self.models)) == len(self.models), f"models={list(self.models)} names a model twice.")
        require(
            bool(self.runs) or not self.alone_runs,
            "alone_runs=[...] belongs to runs=[...]: without them `alone=true` makes the single-rank runs.",
        )
        require(
            self.comm.period is None,
            f"comm.period={self.comm.period}: a comparison is of what each step exchanges, and ranks that train by"
            " themselves exchange nothing in most: set comm.period=null, and train with it to see what a run sends.",
        )
        require(self.steps >= 1, f"steps={self.steps} must be at least 1.")
        require(self.num_classes >= 2, f"num_classes={self.num_classes} must be at least 2.")
        require(self.comm.meter or bool(self.runs), "comm.meter=false leaves nothing to compare: set it to true.")

    @property
    def all_hooks(self) -> tuple[str, ...]:
        """Compressions that every model is run with."""
        return self.hooks or (self.comm.hook,)

    @property
    def directory(self) -> Path:
        """Directory of the comparison."""
        return Path(self.run_root) / self.name
