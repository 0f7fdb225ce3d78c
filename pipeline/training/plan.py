"""What is decided once, before the first step: how a step is shared out, and how many steps mean what."""

import math
from dataclasses import dataclass

from pipeline.comm.rounds import Rounds, plan_rounds, quadratic_steps
from pipeline.config.comm import CommConfig
from pipeline.config.training import BatchConfig, BatchSplit, RecipeConfig, TrainerConfig
from pipeline.core.compute import Compute
from pipeline.core.errors import ConfigError, DataError
from pipeline.data.order import steps_per_epoch


@dataclass(frozen=True)
class StepPlan:
    """Steps of a run. Steps count optimiser steps; an epoch is a number of whole global batches."""

    num_samples: int
    """Pictures of the training split."""
    batch: BatchSplit
    """What one step takes, and how the ranks share it."""
    num_steps: int
    """Steps of the whole run, earlier attempts included."""
    steps_per_epoch: int
    validate_every_steps: int
    """0: never."""
    checkpoint_every_steps: int
    """0: never."""
    rounds: Rounds | None = None
    """When the ranks average their weights; None: they exchange gradients in every step."""

    @property
    def dropped_per_epoch(self) -> int:
        """Samples left out of each epoch because they do not fill a global batch (others each time)."""
        return max(0, self.num_samples - self.steps_per_epoch * self.batch.global_size)

    @property
    def repeated_per_epoch(self) -> int:
        """Samples shown a second time in each epoch to fill its last global batch (others each time)."""
        return max(0, self.steps_per_epoch * self.batch.global_size - self.num_samples)

    @property
    def epoch_sentence(self) -> str:
        """What an epoch is and what becomes of its tail."""
        if self.repeated_per_epoch:
            tail = f"{self.repeated_per_epoch} of them shown twice in each epoch (data.tail=pad)"
        else:
            tail = f"{self.dropped_per_epoch} left out of each epoch" + (
                " (data.tail=drop)" if self.dropped_per_epoch else ""
            )
        return f"{self.steps_per_epoch} an epoch of {self.num_samples:,} pictures, {tail}"

    def validation_due(self, committed_steps: int) -> bool:
        """Whether the weights after `committed_steps` steps are validated: at the interval and at the end.

        Where each rank has its own weights at the interval: when a round ends next.
        """
        every, rounds = self.validate_every_steps, self.rounds
        if rounds is None or every == 0 or committed_steps == 0:
            return self._due(committed_steps, every)
        since = rounds.last_met(committed_steps - 1)
        is_due = committed_steps // every > since // every or committed_steps == self.num_steps
        return is_due and rounds.meets(committed_steps)

    def checkpoint_due(self, committed_steps: int) -> bool:
        """Whether the state after `committed_steps` steps is saved: at the interval and at the end."""
        return self._due(committed_steps, self.checkpoint_every_steps)

    def _due(self, committed_steps: int, every: int) -> bool:
        return every > 0 and (committed_steps % every == 0 or committed_steps == self.num_steps)


def make_plan(
    trainer: TrainerConfig,
    batch: BatchConfig,
    num_samples: int,
    world_size: int,
    *,
    validate: bool,
    tail: str = "drop",
) -> StepPlan:
    """Share the batch out, turn epochs into steps and fill the intervals left null.

    Args:
        trainer: how long and how often.
        batch: what one step takes.
        num_samples: pictures of the training split.
        world_size: number of ranks.
        validate: whether there is a split to validate on.
        tail: data.tail.

    Raises:
        ConfigError: the ranks cannot share the batch.
        DataError: fewer samples than one global batch. Padded, it would show a picture twice, the same pixels both
            times.
    """
    split = batch.split(world_size)
    if num_samples < batch.global_size:
        largest = num_samples // world_size * world_size
        remedy = f"lower batch.global_size to at most {largest}" if largest else f"{world_size} ranks are too many"
        raise DataError(
            f"The training split has {num_samples} samples, fewer than one global batch of {batch.global_size}:"
            f" {remedy}."
        )
    epoch = steps_per_epoch(num_samples, batch.global_size, tail)
    limits = []
    if trainer.max_steps is not None:
        limits.append(trainer.max_steps)
    if trainer.max_epochs is not None:
        limits.append(max(1, math.floor(trainer.max_epochs * epoch)))
    validate_every = epoch if trainer.validate_every_steps is None else trainer.validate_every_steps
    checkpoint_every = epoch if trainer.checkpoint_every_steps is None else trainer.checkpoint_every_steps
    return StepPlan(
        num_samples=num_samples,
        batch=split,
        num_steps=min(limits),
        steps_per_epoch=epoch,
        validate_every_steps=validate_every if validate else 0,
        checkpoint_every_steps=checkpoint_every,
    )


def make_rounds(comm: CommConfig, recipe: RecipeConfig, num_steps: int) -> Rounds | None:
    """Say when the ranks of a run average their weights; None where they exchange gradients in every step.

    Raises:
        ConfigError: no round would fit into the run.
    """
    period, start = comm.period, comm.local_start_step
    if period is None:
        return None
    if start + period > num_steps:
        after = f" after comm.local_start_step={start}" if start else ""
        raise ConfigError(
            f"comm.period={period}{after} is longer than the run of {num_steps} steps: lower comm.period, or set it to"
            " null to exchange gradients."
        )

    def round_steps(step: int) -> int:
        if comm.rule != "qsr" or comm.qsr_alpha is None:
            return period
        # In the warm-up the learning rate is low for another reason: its peak counts, as the rule's authors advise.
        lr = recipe.learning_rate(max(step, recipe.warmup_steps), num_steps)
        return quadratic_steps(period, comm.qsr_alpha, lr)

    return plan_rounds(num_steps, round_steps, start, num_fragments=comm.fragments, delay=comm.delay)


def require_compression(comm: CommConfig, plan: StepPlan, compute: Compute) -> None:
    """Refuse a compression that would never begin, or that torch's hook cannot do here.

    Raises:
        ConfigError: as said.
    """
    import torch

    if comm.hook != "powersgd":
        return
    if comm.powersgd_start_step >= plan.num_steps:
        raise ConfigError(
            f"comm.powersgd_start_step={comm.powersgd_start_step}, but the run has {plan.num_steps} steps, so that none"
            f" would be compressed: lower it, or set comm.hook=none."
        )
    if compute.accelerator == "cpu" and torch.cuda.is_available():
        raise ConfigError(
            "comm.hook=powersgd on the CPU of a machine with a GPU: torch's hook would synchronise the GPU and fail."
            " Hide it (CUDA_VISIBLE_DEVICES=), or choose another hook."
        )
