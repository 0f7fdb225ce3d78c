"""Gradual magnitude pruning (Zhu and Gupta, arXiv 1710.01878): the smallest weights become 0 step by step, and stay 0.

What is pruned follows from the weights alone, which are the same on every rank, so that no rank has to tell another: a
rank that pruned other weights would have other weights, which is what the drift's checksum looks at. Gradients are
reduced whole, as without pruning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.config.pruning import LAYER, PruneConfig
from pipeline.core.errors import ConfigError
from pipeline.models.coded_layers import coded_layers
from pipeline.run.checkpoint_checks import unusable


@dataclass(frozen=True)
class Schedule:
    """When weights are pruned, and how many are left. Steps are optimiser steps that were committed."""

    density: float
    """Share of the weights that is left at the end."""
    begin_step: int
    end_step: int
    every_steps: int

    def density_after(self, step: int) -> float:
        """Return the share of the weights that is left after `step` steps: from 1, along a cubic curve."""
        if step < self.begin_step:
            return 1.0
        if step >= self.end_step:
            return self.density
        progress = (step - self.begin_step) / (self.end_step - self.begin_step)
        return self.density + (1 - self.density) * (1 - progress) ** 3

    def is_due(self, step: int) -> bool:
        """Return whether weights are pruned after `step` steps."""
        is_within = self.begin_step <= step <= self.end_step
        return is_within and ((step - self.begin_step) % self.every_steps == 0 or step == self.end_step)


def make_schedule(config: PruneConfig, num_steps: int) -> Schedule | None:
    """Return when a run of `num_steps` optimiser steps prunes; None: it does not.

    Raises:
        ConfigError: It would end before it begins, or the run would before the density is reached.
    """
    if not config.prunes:
        return None
    begin = num_steps // 4 if config.begin_step is None else config.begin_step
    end = num_steps * 3 // 4 if config.end_step is None else config.end_step
    schedule = Schedule(config.density, begin, end, config.every_steps)
    if begin >= num_steps:
        raise ConfigError(
            f"recipe.prune.begin_step={begin}, but the run has {num_steps} steps, so that nothing would be pruned:"
            " lower it, or set recipe.prune.density=1."
        )
    if end < begin:
        told = "three quarters of the run" if config.end_step is None else "given"
        raise ConfigError(
            f"recipe.prune.end_step={end} ({told}) is before recipe.prune.begin_step={begin}: set recipe.prune.end_step"
            f" to {begin} or more, at most {num_steps}."
        )
    if end > num_steps:
        raise ConfigError(
            f"recipe.prune.end_step={end}, but the run has {num_steps} steps, and would end at a density of"
            f" {schedule.density_after(num_steps):.3g} instead of {config.density}: set recipe.prune.end_step to at"
            f" most {num_steps}, or train for longer."
        )
    return schedule


class Pruner:
    """Keeps the pruned weights of a model at exactly 0.

    Args:
        model: Whose plain convolutions and linear layers are pruned, but those that are not trained; never a bias.
        schedule: When, and how many are left.
        scope: recipe.prune.scope: whether the smallest weights are sought in each layer or in all together.
        step: Optimiser steps that were committed. A run that begins may prune the weights that it begins with.

    Raises:
        ConfigError: The model has no such layer.
    """

    def __init__(self, model: nn.Module, schedule: Schedule, scope: str, *, step: int = 0) -> None:
        coded = {id(layer.weight) for _, layer in coded_layers(model)}
        self.weights = {name: one for name, one in model.named_parameters() if id(one) in coded and one.requires_grad}
        if not self.weights:
            raise ConfigError(
                f"recipe.prune.density={schedule.density}: the model has no convolution (without groups) or linear"
                " layer that is trained: set recipe.prune.density=1."
            )
        self.schedule = schedule
        self.masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self.weights.items()}
        """False where a weight is pruned, in the shape of the weights, by the parameter's name."""
        self._groups = [[name] for name in self.weights] if scope == LAYER else [list(self.weights)]
        self._count()
        if step == 0:
            self.step_done(0)

    def to(self, device: torch.device) -> None:
        """Follow the weights to their device."""
        self.masks = {name: mask.to(device) for name, mask in self.masks.items()}

    @torch.no_grad()
    def clear_gradients(self) -> None:
        """Set the reduced gradient of what is pruned to 0, so that it counts for no norm; NaN and infinity stay NaN."""
        for name, weight in self.weights.items():
            if weight.grad is not None:
                weight.grad.mul_(self.masks[name])

    def step_done(self, step: int) -> None:
        """After the optimiser's step number `step`, from 1: prune if that is due, and set to 0 what is pruned."""
        is_late = step > self.schedule.end_step and not self.is_done  # the run was made shorter
        if self.schedule.is_due(step) or is_late:
            self._prune(self.schedule.density_after(step))
        self.clear(self.weights)

    @torch.no_grad()
    def clear(self, weights: Mapping[str, Tensor]) -> None:
        """Set what is pruned to 0 in these weights, which may be an average of the model's."""
        for name, mask in self.masks.items():
            weights[name].masked_fill_(mask.logical_not(), 0.0)

    @torch.no_grad()
    def _prune(self, density: float) -> None:
        """Keep the largest weights. What is pruned stays so; of two that are alike the first in order is kept."""
        for names in self._groups:
            masks = [self.masks[name] for name in names]
            sizes = [self.weights[name].abs().masked_fill(self.masks[name].logical_not(), -1) for name in names]
            sizes_N = torch.cat([size.flatten() for size in sizes])
            num_kept = min(self._num_kept(names), _goal(len(sizes_N), density))
            kept_N = torch.zeros_like(sizes_N, dtype=torch.bool)
            kept_N[torch.sort(sizes_N, descending=True, stable=True).indices[:num_kept]] = True
            for mask, kept in zip(masks, kept_N.split([mask.numel() for mask in masks]), strict=True):
                mask.copy_(kept.view(mask.shape))
        self._count()

    def _num_kept(self, names: Sequence[str]) -> int:
        return sum(int(self.masks[name].sum()) for name in names)

    def _count(self) -> None:
        """Waits for the device, and so is done where masks have changed alone."""
        kept = [self._num_kept(names) for names in self._groups]
        sizes = [sum(self.masks[name].numel() for name in names) for names in self._groups]
        self.density = sum(kept) / sum(sizes)
        """Share of the weights that is not pruned."""
        self.is_done = all(count <= _goal(size, self.schedule.density) for count, size in zip(kept, sizes, strict=True))
        """Whether no more than the last density is left. Until then the weights are not what the run is for."""

    def load_masks(self, masks: object) -> None:
        """Take over the masks of a checkpoint, whose weights the model has already.

        Raises:
            ValueError: They are missing, are not of these weights, or a weight that is pruned is not 0.
        """
        if not isinstance(masks, Mapping) or masks.keys() != self.masks.keys():
            raise ValueError("the masks of what is pruned are missing, or of other layers")
        for name, mask in self.masks.items():
            found = masks[name]
            if wrong := unusable(f"the mask of {name}", found, mask):
                raise ValueError(wrong)
            if (found.shape, found.dtype) != (mask.shape, mask.dtype):
                raise ValueError(f"the mask of {name} is {tuple(found.shape)} of {found.dtype}")
            mask.copy_(found)
            if self.weights[name].masked_fill(mask, 0.0).count_nonzero():
                raise ValueError(f"{name} has weights that are pruned and not 0")
        self._count()


def _goal(num_weights: int, density: float) -> int:
    """How many of so many weights are left at a density; a layer is never without any."""
    return max(1, round(density * num_weights))
