"""The typed configuration. OmegaConf ends here: past this module there are only frozen dataclasses.

A field's name is its YAML key. `core.typed.build` makes them from plain containers and refuses unknown keys and wrong
types; every impossible combination raises `ConfigError` in `__post_init__` with the remedy.
"""

import itertools
import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

from pipeline.config.comm import CommConfig
from pipeline.config.data import DataConfig
from pipeline.config.model import InputConfig, ModelConfig
from pipeline.config.pruning import PruneConfig
from pipeline.core.errors import ConfigError
from pipeline.core.typed import PathText, one_of, require

ARTIFACTS = ("ledger", "config", "report", "best")
LOGGERS = ("csv", "tensorboard")
OPTIMIZERS = ("sgd", "adamw")
AUTHORS_LR, AUTHORS_BATCH, AUTHORS_LARGEST_LR = 0.04, 512, 0.08
"""Of the solvers that SqueezeNet's authors published, the later one and the largest (for 1024)."""
MOST_CRUMBS = 4
"""A rank's share is not taken in more micro-batches than so many times those that would hold it."""


@dataclass(frozen=True)
class BatchSplit:
    """The pictures of one optimiser step, shared out: global_size = ranks x num_micro_batches x per_rank."""

    global_size: int
    per_rank: int
    """Pictures of one micro-batch on one rank."""
    num_micro_batches: int
    """Micro-batches per optimiser step, over which each rank accumulates its gradients."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The batch people think and tune in; per-rank batch and accumulation follow from it."""

    global_size: int = 256
    """Pictures per optimiser step over all ranks."""
    max_per_rank: int = 256
    """Most pictures one rank holds at once; more than that is accumulated over micro-batches."""

    def __post_init__(self) -> None:
        require(self.global_size > 0, f"batch.global_size={self.global_size} must be positive.")
        require(self.max_per_rank > 0, f"batch.max_per_rank={self.max_per_rank} must be positive.")

    def split(self, world_size: int) -> BatchSplit:
        """Share the batch out: the fewest micro-batches of equal size of which none exceeds `max_per_rank`.

        Raises:
            ConfigError: `global_size` is not divisible by the ranks, or a rank's share has no divisor near
                `max_per_rank`, so that it would be taken in crumbs: a prime share one picture at a time.
        """
        if self.global_size % world_size:
            below = self.global_size // world_size * world_size
            near = [str(size) for size in (below, below + world_size) if size > 0]
            raise ConfigError(
                f"batch.global_size={self.global_size} is not divisible by {world_size} ranks:"
                f" set it to {' or '.join(near)}, or change the number of ranks."
            )
        of_rank = self.global_size // world_size
        per_rank = self._per_rank(of_rank)
        num_micro_batches = of_rank // per_rank
        if num_micro_batches <= MOST_CRUMBS * -(-of_rank // self.max_per_rank):
            return BatchSplit(self.global_size, per_rank, num_micro_batches)
        below = next(filter(self._is_even, range(of_rank, 0, -1)))
        above = next(filter(self._is_even, itertools.count(of_rank)))
        raise ConfigError(
            f"batch.global_size={self.global_size} gives each of {world_size} ranks {of_rank} pictures, which"
            f" batch.max_per_rank={self.max_per_rank} divides into {num_micro_batches} micro-batches of {per_rank}:"
            f" set batch.global_size to {below * world_size} or {above * world_size},"
            f" or batch.max_per_rank to {of_rank}."
        )

    def _per_rank(self, of_rank: int) -> int:
        """Return the largest micro-batch that divides a rank's share."""
        sizes = range(min(self.max_per_rank, of_rank), 0, -1)
        return next(size for size in sizes if of_rank % size == 0)

    def _is_even(self, of_rank: int) -> bool:
        """Return whether a rank's share needs no more micro-batches than any share of about its size."""
        return of_rank // self._per_rank(of_rank) == -(-of_rank // self.max_per_rank)


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """The optimiser, with a linear warm-up and a decay to zero, both per step."""

    optimizer: str = "sgd"
    """`sgd` with momentum, or `adamw`. A run that resumes keeps its own."""
    lr: float | None = None
    """Highest learning rate. Null, of SGD: 0.04 for a batch.global_size of 512, as the authors of SqueezeNet trained,
    and in proportion for any other (Goyal et al., arXiv 1706.02677), at most 0.08; the same for every model. A run
    that resumes keeps the rate that it began with unless another one is given."""
    head_lr_factor: float = 1.0
    """Learning rate of the layer that gives the classes, over that of everything else."""
    momentum: float = 0.9
    """Of SGD; of AdamW its first beta."""
    beta2: float = 0.999
    """Of AdamW."""
    weight_decay: float = 0.0002
    """Of SGD added to the gradient, of AdamW taken off the weights, times the learning rate both."""
    nesterov: bool = False
    warmup_steps: int = 0
    """Steps of linear warm-up from lr / warmup_steps to lr."""
    decay: str = "linear"
    """After the warm-up: `linear` to 0, `cosine` to 0, or `none`."""
    label_smoothing: float = 0.0
    grad_clip_norm: float = 0.0
    """Largest norm of the whole gradient; 0: no clipping."""
    ema_decay: float = 0.0
    """Exponential moving average of the weights, which validation and best checkpoints then use; 0: off."""
    prune: PruneConfig = field(default_factory=PruneConfig)

    def __post_init__(self) -> None:
        one_of("recipe.decay", self.decay, ("linear", "cosine", "none"))
        one_of("recipe.optimizer", self.optimizer, OPTIMIZERS)
        require(self.lr is None or self.lr > 0, f"recipe.lr={self.lr} must be positive.")
        require(
            self.lr is not None or self.optimizer == "sgd",
            f"recipe.lr is null, and only SGD has a rate of its own here: give recipe.lr with {self.optimizer}, 0.001"
            " or below, or set recipe.optimizer=sgd.",
        )
        require(self.head_lr_factor >= 0, f"recipe.head_lr_factor={self.head_lr_factor} must not be negative.")
        require(0 <= self.beta2 < 1, f"recipe.beta2={self.beta2} must be in [0, 1).")
        require(
            not (self.nesterov and self.optimizer == "adamw"),
            "recipe.nesterov=true is of SGD: set recipe.nesterov=false, or recipe.optimizer=sgd.",
        )
        require(0 <= self.momentum < 1, f"recipe.momentum={self.momentum} must be in [0, 1).")
        require(self.weight_decay >= 0, f"recipe.weight_decay={self.weight_decay} must not be negative.")
        require(
            not self.nesterov or self.momentum > 0, "recipe.nesterov=true needs momentum: set recipe.momentum above 0."
        )
        require(self.warmup_steps >= 0, f"recipe.warmup_steps={self.warmup_steps} must not be negative.")
        require(0 <= self.label_smoothing < 1, f"recipe.label_smoothing={self.label_smoothing} must be in [0, 1).")
        require(self.grad_clip_norm >= 0, f"recipe.grad_clip_norm={self.grad_clip_norm} must not be negative.")
        require(0 <= self.ema_decay < 1, f"recipe.ema_decay={self.ema_decay} must be in [0, 1).")

    @property
    def peak_lr(self) -> float:
        """`lr`, which in a `TrainConfig` is always known."""
        assert self.lr is not None, "derived from the batch, which is not known here"
        return self.lr

    def learning_rate(self, step: int, num_steps: int) -> float:
        """Learning rate of optimiser step `step` (0-based) of `num_steps`: linear warm-up, then decay towards 0.

        linear: Caffe's `poly` policy of power 1 over the steps after the warm-up; cosine: half a cosine period.
        """
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        if self.decay == "none":
            return self.peak_lr
        progress = (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps)
        if self.decay == "linear":
            return self.peak_lr * max(0.0, 1 - progress)
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """The weights that a run begins with. A run that resumes goes on from its own."""

    checkpoint: PathText | None = None
    """A run, a checkpoint, a torchvision state dict (.pth or .safetensors) or the Caffe .npz to begin from; null: drawn
    as the model says."""
    head: str | None = None
    """The layer that gives the classes: `keep` it, or draw a `new` one. Null: kept if it is of the same classes, as far
    as names and numbers tell; else asked for."""
    freeze: tuple[str, ...] = ()
    """Modules that stay as they are, by name ([features], [features.3]), or [all_but_head]. Their gradients are neither
    computed nor sent, and they compute as in evaluation."""

    def __post_init__(self) -> None:
        if self.head is not None:
            one_of("init.head", self.head, ("new", "keep"))
        require(
            self.checkpoint is not None or self.head is None,
            f"init.head={self.head} is about weights to begin from: give init.checkpoint= too.",
        )


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long, how often, in which precision."""

    max_steps: int | None = None
    """Optimiser steps in all. Exactly one of max_steps and max_epochs is set; the smaller wins if both are."""
    max_epochs: float | None = None
    """Passes over the training split; whole global batches only."""
    validate_every_steps: int | None = None
    """Null: once per epoch and at the end. 0: never."""
    checkpoint_every_steps: int | None = None
    """Null: once per epoch. 0: never, not even at the end."""
    keep_checkpoints: int = 2
    precision: str = "auto"
    """`auto`: bf16 autocast where the hardware gains from it, else fp32; or `fp32`, `bf16`."""
    memory_format: str = "auto"
    """`auto`: channels_last wherever precision is bf16 or the device a GPU; or `channels_last`, `contiguous`."""
    deterministic: bool = False
    """Ask torch for deterministic kernels only."""
    compare_weights_every_steps: int = 100
    """Ranks compare a checksum of their weights after so many steps, before each checkpoint and at the end; where they
    differ, the run ends with exit code 7. 0: never."""
    evaluation_batch_per_rank: int = 64
    report_every_seconds: float | None = 60.0
    """After a checkpoint, report.html is made anew where the last one was begun so long ago, by a process of its own
    at the lowest priority; and once more where a signal stops the training. Null: at the end alone."""

    def __post_init__(self) -> None:
        one_of("trainer.precision", self.precision, ("auto", "fp32", "bf16"))
        one_of("trainer.memory_format", self.memory_format, ("auto", "channels_last", "contiguous"))
        require(
            self.max_steps is not None or self.max_epochs is not None,
            "Nothing says how long to train: set trainer.max_steps or trainer.max_epochs.",
        )
        for key in ("max_steps", "max_epochs"):
            value = getattr(self, key)
            require(value is None or value > 0, f"trainer.{key}={value} must be positive.")
        for key in ("validate_every_steps", "checkpoint_every_steps"):
            value = getattr(self, key)
            require(value is None or value >= 0, f"trainer.{key}={value} must be >= 0 (0: never) or null.")
        require(
            self.keep_checkpoints >= 2,
            f"trainer.keep_checkpoints={self.keep_checkpoints} must be at least 2: the newest may turn out damaged.",
        )
        every = self.compare_weights_every_steps
        require(every >= 0, f"trainer.compare_weights_every_steps={every} must be >= 0 (0: never).")
        require(self.evaluation_batch_per_rank > 0, "trainer.evaluation_batch_per_rank must be positive.")
        require(
            self.report_every_seconds is None or self.report_every_seconds >= 0,
            f"trainer.report_every_seconds={self.report_every_seconds} must be >= 0 (0: after every checkpoint) or"
            " null.",
        )


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Ranks and devices. Under Slurm or torchrun the ranks are given and `devices` is not used."""

    devices: int = 1
    """Ranks to start on this machine."""
    accelerator: str = "auto"
    """`auto`: a GPU where torch sees one, else the CPU; or `cpu`, `gpu`."""
    num_threads: int | None = None
    """Compute threads per rank on the CPU; null: the cores divided by the ranks of this machine."""
    timeout_seconds: float = 600.0
    """How long a collective may wait for the other ranks: until the first step, in validation and checkpoints."""
    step_timeout_seconds: float | None = None
    """The same between steps, where a rank that is late hangs. Null: data.fetch_timeout_seconds, which a rank may wait
    for its shards, and a minute more, or with comm.period timeout_seconds; at most timeout_seconds."""
    preempt_grace_seconds: float = 120.0
    """After a signal that asks to stop: how long the end of the step, a save and W&B may take before the rank leaves
    as it is. Keep it below what `--signal` in slurm/train.sh allows."""
    max_fruitless_requeues: int = 3
    """slurm/train.sh puts a job back into the queue at most so often in a row without a new checkpoint."""

    def __post_init__(self) -> None:
        one_of("cluster.accelerator", self.accelerator, ("auto", "cpu", "gpu"))
        require(self.devices >= 1, f"cluster.devices={self.devices} must be at least 1.")
        require(self.num_threads is None or self.num_threads >= 1, "cluster.num_threads must be at least 1.")
        require(self.timeout_seconds > 0, "cluster.timeout_seconds must be positive.")
        require(
            self.step_timeout_seconds is None or 0 < self.step_timeout_seconds <= self.timeout_seconds,
            f"cluster.step_timeout_seconds={self.step_timeout_seconds} must be positive and at most"
            f" cluster.timeout_seconds={self.timeout_seconds}, or null.",
        )
        require(self.preempt_grace_seconds > 0, "cluster.preempt_grace_seconds must be positive.")
        require(self.max_fruitless_requeues >= 0, "cluster.max_fruitless_requeues must not be negative.")


OPEN, STRICT = "open", "strict"
FORBIDDEN_IN_PROJECT = "/\\#?%:"  # by W&B
LONGEST_PROJECT, LONGEST_TAG = 128, 64  # characters W&B takes


def check_project(key: str, project: str) -> None:
    """Raise `ConfigError` for a name that W&B refuses for a project."""
    require(
        0 < len(project) <= LONGEST_PROJECT and not set(project) & set(FORBIDDEN_IN_PROJECT),
        f"{key}={project!r} must have 1 to {LONGEST_PROJECT} characters and none of {FORBIDDEN_IN_PROJECT}",
    )


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Weights & Biases mirrors metrics.jsonl."""

    mode: str = "offline"
    """`offline` (upload later with `wandb sync`), `online`, `disabled`."""
    project: str = "squeezewire"
    entity: str | None = None
    tags: tuple[str, ...] = ()
    artifacts: tuple[str, ...] = ()
    """Files that W&B keeps of a finished training: any of `ledger`, `config`, `report` and `best`, the checkpoint."""
    loggers: tuple[str, ...] = ()
    """Lightning's loggers that mirror the record too: `csv`, `tensorboard`, each into a directory of its name."""

    def __post_init__(self) -> None:
        for name in self.artifacts:
            one_of("tracking.artifacts", name, ARTIFACTS)
        for name in self.loggers:
            one_of("tracking.loggers", name, LOGGERS)
        one_of("tracking.mode", self.mode, ("offline", "online", "disabled"))
        check_project("tracking.project", self.project)
        for tag in self.tags:
            require(
                0 < len(tag) <= LONGEST_TAG,
                f"tracking.tags: {tag!r} has {len(tag)} characters, and W&B takes tags of 1 to {LONGEST_TAG}.",
            )


@dataclass(frozen=True, kw_only=True)
class CompareTrackingConfig(TrackingConfig):
    """Weights & Biases for a comparison, which is one W&B run with its table and charts."""

    trainings: bool = False
    """Mirror each model's training too, as a W&B run of its own."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    name: str
    """The run's directory under run_root. The same name resumes it."""
    run_root: PathText = "runs"
    seed: int = 0
    privacy: str = OPEN
    """`open`, or `strict`: report, W&B and checkpoints name no host and no folder above that of the shards, and the
    command stands there without them. SECURITY.md lists what they say otherwise."""
    data: DataConfig
    model: ModelConfig
    init: InitConfig = field(default_factory=InitConfig)
    recipe: RecipeConfig
    batch: BatchConfig
    trainer: TrainerConfig
    cluster: ClusterConfig
    comm: CommConfig
    tracking: TrackingConfig
    has_given_lr: ClassVar[bool] = True
    """Of an instance: whether recipe.lr was given, not derived from the batch."""

    def __post_init__(self) -> None:
        one_of("privacy", self.privacy, (OPEN, STRICT))
        require(
            not (self.is_private and "tensorboard" in self.tracking.loggers),
            "privacy=strict does not go with tracking.loggers=[tensorboard], whose file names hold the host: use csv.",
        )
        require(0 <= self.seed < 2**63, f"seed={self.seed} must be between 0 and 2**63 - 1.")
        if self.recipe.lr is None:
            lr = min(AUTHORS_LR * self.batch.global_size / AUTHORS_BATCH, AUTHORS_LARGEST_LR)
            object.__setattr__(self, "recipe", replace(self.recipe, lr=lr))
            object.__setattr__(self, "has_given_lr", False)
        require(
            self.data.root is not None,
            "data.root is not set: give the directory that `python -m pipeline.prepare` made"
            " (`python -m pipeline.prepare source=builtin out=shards/builtin` makes one from nothing).",
        )
        require(
            self.batch.global_size % self.data.shuffle_groups == 0,
            f"data.shuffle_groups={self.data.shuffle_groups} must divide batch.global_size={self.batch.global_size}.",
        )
        period = self.comm.period
        require(
            period is None or not self.recipe.ema_decay,
            f"recipe.ema_decay={self.recipe.ema_decay} averages over weights that differ from rank to rank between"
            f" synchronisations (comm.period={period}): set recipe.ema_decay=0, or comm.period=null.",
        )
        require(
            period is None or not self.recipe.prune.prunes,
            f"recipe.prune.density={self.recipe.prune.density} would prune other weights on each rank between"
            f" synchronisations (comm.period={period}): set prune=dense, or comm.period=null.",
        )

    @property
    def is_private(self) -> bool:
        """Whether what is handed on names no places."""
        return self.privacy == STRICT

    @property
    def step_timeout_seconds(self) -> float:
        """How long a collective may wait between steps. Ranks that meet once in a round may be a round apart."""
        cluster = self.cluster
        longest_fetch = self.data.fetch_timeout_seconds + 60.0
        longest = longest_fetch if self.comm.period is None else cluster.timeout_seconds
        return min(cluster.timeout_seconds, cluster.step_timeout_seconds or longest)

    @property
    def input(self) -> InputConfig:
        """The model's input at the crop side this run uses."""
        return self.model.input.resized(self.data.size)
