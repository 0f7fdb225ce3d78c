"""What a study may be told: the variants it compares, on which seeds, and how far each is trained."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config.data import DataConfig
from pipeline.config.lab import TrainingsLab
from pipeline.config.training import ClusterConfig
from pipeline.core.typed import PathText, one_of, require
from pipeline.core.units import bits_per_second


@dataclass(frozen=True, kw_only=True)
class PublishedPoint:
    """What a publication says of a variant, on ImageNet; never measured here."""

    source: str
    top1: float | None = None
    """A fraction, as all accuracies."""
    top5: float | None = None
    megabytes: float | None = None
    """Size of the weights in fp32, as printed there, be it in 10^6 or in 2^20 bytes."""

    def __post_init__(self) -> None:
        for key, value in (("top1", self.top1), ("top5", self.top5)):
            require(
                value is None or 0 <= value <= 1,
                f"{key}={value} of {self.source!r} must be a share between 0 and 1, such as 0.575.",
            )


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One of the configurations that a study compares."""

    name: str
    """Name of its row, and of the directory of its runs."""
    overrides: tuple[str, ...] = ()
    """What `train` is told of it: [model=squeezenet1_1,model.metaparameters.sr=0.5]."""
    shows: dict[str, object] = field(default_factory=dict[str, object])
    """Pictures that it is in, each with its label there: {squeeze ratio: 0.5}."""
    published: PublishedPoint | None = None
    """What was published of the same architecture."""


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """How far each run goes: exactly one of the four is set."""

    steps: int | None = None
    """Optimiser steps."""
    epochs: float | None = None
    """Passes over the training split, in whole global batches."""
    gigabytes: float | None = None
    """10^9 bytes that leave all servers together. A run of a few steps finds how many steps that are."""
    seconds: float | None = None
    """Seconds of training steps, on this machine as busy as it is. A run of a few steps finds how many those are."""

    def __post_init__(self) -> None:
        given = {key: value for key, value in vars(self).items() if value is not None}
        for key, value in given.items():
            require(value > 0, f"study.budget.{key}={value} must be positive.")
        require(
            len(given) <= 1,
            f"study.budget has {' and '.join(given)}: keep one, and set the others to null.",
        )

    @property
    def kind(self) -> str:
        """Which of the four is set; empty: none."""
        return next((key for key, value in vars(self).items() if value is not None), "")

    @property
    def is_measured(self) -> bool:
        """Whether a run of a few steps must tell how many it pays for."""
        return self.kind in ("gigabytes", "seconds")

    @property
    def amount(self) -> float:
        """Its value."""
        value = getattr(self, self.kind)
        assert value is not None
        return value


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """What is compared, under which conditions."""

    question: str = ""
    """What the study asks, in a sentence; the head of its report."""
    overrides: tuple[str, ...] = ()
    """What `train` is told in every run, before what a variant says: [recipe.lr=0.1,batch.global_size=64]."""
    variants: tuple[Variant, ...] = ()
    """Given by the file of the study."""
    only: tuple[str, ...] = ()
    """Names of variants: train and report on these alone. Empty: all."""
    part: str | None = None
    """`2/4`: train the second quarter of the variants alone, beside commands with the other quarters, and write no
    report; once all have ended, the command without it does. An array of slurm/study.sh sets it."""
    seeds: tuple[int, ...] = (0,)
    """Every variant is trained once on each."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    targets: tuple[float, ...] = (0.7, 0.75, 0.8, 0.85)
    """Validation accuracies, fractions: gigabytes, minutes and pictures to each are told."""
    bandwidths: tuple[str, ...] = ("10gbit", "1gbit", "100mbit")
    """Links for which the time to each target is forecast."""

    def __post_init__(self) -> None:
        require(bool(self.seeds), "study.seeds=[] leaves nothing to train: give at least one.")
        require(len(set(self.seeds)) == len(self.seeds), f"study.seeds={list(self.seeds)} names a seed twice.")
        require(
            all(0 <= seed < 2**63 for seed in self.seeds),
            f"study.seeds={list(self.seeds)} must be between 0 and 2**63 - 1.",
        )
        for target in self.targets:
            require(0 < target <= 1, f"study.targets: {target} must be a fraction above 0 and up to 1, such as 0.8.")
        for rate in self.bandwidths:
            bits_per_second(rate)
        for name in self.only:
            one_of("study.only", name, tuple(variant.name for variant in self.variants))
        if self.part is not None:
            numbers = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", self.part)
            require(
                numbers is not None and int(numbers[1]) <= int(numbers[2]),
                f"study.part={self.part!r} must be one of the parts 1/N to N/N, such as 2/4.",
            )
            require(
                bool(self.chosen) or not self.variants,
                f"study.part={self.part}: there are fewer variants than parts, and none is left for this one: make"
                " fewer parts (--array of slurm/study.sh).",
            )

    @property
    def chosen(self) -> tuple[Variant, ...]:
        """The variants that are trained and reported on."""
        chosen = tuple(variant for variant in self.variants if not self.only or variant.name in self.only)
        if self.part is None:
            return chosen
        number, num_parts = map(int, self.part.split("/"))
        return chosen[number - 1 :: num_parts]


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Train every variant of a study that is not trained yet, and write one report on all of them.

    A study is a file in conf/study/. Stopped in any way, the same command goes on, and trains nothing twice.
    """

    name: str
    """The study's directory under run_root."""
    run_root: PathText = "runs"
    launcher: str = "auto"
    """`local`: ranks of this machine; `slurm`: each training over the whole allocation, with srun; `auto`: `slurm`
    inside a job of several nodes or tasks."""
    study: StudyPlan
    data: DataConfig
    cluster: ClusterConfig
    lab: TrainingsLab

    def __post_init__(self) -> None:
        one_of("launcher", self.launcher, ("auto", "local", "slurm"))
        require(bool(self.study.variants), "Nothing to study: choose a file of conf/study/ with study=NAME.")
        require(self.data.root is not None, "data.root is not set: add data.root=... to the command.")
        require(
            bool(self.study.budget.kind),
            "Nothing says how far to train: set one of study.budget.steps, .epochs, .gigabytes and .seconds.",
        )

    @property
    def directory(self) -> Path:
        """Directory of the study."""
        return Path(self.run_root) / self.name
