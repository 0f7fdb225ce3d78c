"""What is settled before the first step: facts that every later part of a training is handed, and nobody changes."""

from dataclasses import dataclass, replace

from pipeline.config.training import TrainConfig
from pipeline.data.index import ShardIndex
from pipeline.run import checkpoint as checkpoints
from pipeline.run.directory import RunDirectory
from pipeline.training.plan import StepPlan
from pipeline.training.resume import at_its_rate, refuse_without_effect
from pipeline.training.world import World


@dataclass(frozen=True)
class Shards:
    """The indexes of both splits; `validation` is None where there is none or none is wanted."""

    training: ShardIndex
    validation: ShardIndex | None
    num_classes: int
    """Outputs of the classifier."""
    why_not_validated: str = ""
    """Where nobody asked for a validation and the split for one is missing: the sentence that says so."""


@dataclass(frozen=True)
class Start:
    """Where this attempt begins: a checkpoint, or nothing yet."""

    step: int = 0
    """Optimiser steps already committed."""
    info: checkpoints.CheckpointInfo | None = None
    content: checkpoints.Content | None = None
    """The checkpoint as saved."""
    changes: tuple[str, ...] = ()
    """What differs from the attempt that saved it, and may."""

    @property
    def section(self) -> checkpoints.SectionJson | None:
        """What we put into the checkpoint beside what Lightning puts there; None without a checkpoint."""
        return None if self.content is None else self.content[checkpoints.SECTION]

    @property
    def num_recorded(self) -> int:
        """Rows of the record that stand. A row whose validation was broken off is written by this attempt."""
        return self.step - (self.section is not None and self.section.get("owed_row") is not None)


@dataclass(frozen=True)
class Setup:
    """One attempt at a run before its first step: what was asked for, who computes it, on what, from where."""

    config: TrainConfig
    world: World
    shards: Shards
    plan: StepPlan
    run: RunDirectory
    start: Start

    def __post_init__(self) -> None:
        if self.start.section is not None:
            object.__setattr__(self, "config", at_its_rate(self.config, self.start.section))

    @property
    def is_finished(self) -> bool:
        """Whether earlier attempts have committed all steps."""
        return self.start.step >= self.plan.num_steps

    @property
    def meant(self) -> TrainConfig:
        """The configuration for the record: as many classes as there are, and the input as data.size makes it."""
        model = replace(self.config.model, num_classes=self.shards.num_classes, input=self.config.input)
        return replace(self.config, model=model)

    def refuse_without_effect(self) -> None:
        """Refuse what the command changes of a finished run.

        Raises:
            ConfigError: something that would have made another run.
        """
        if self.start.section is not None:
            refuse_without_effect(self.config, self.start.section)
