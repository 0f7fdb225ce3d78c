"""The learning rate as a function of the step, so that nothing of it needs saving."""

import math

from pipeline.config.training import RecipeConfig


def learning_rate(recipe: RecipeConfig, step: int, num_steps: int) -> float:
    """Learning rate of optimiser step `step` (0-based) of `num_steps`: linear warm-up, then decay towards 0.

    linear: Caffe's `poly` policy of power 1 over the steps after the warm-up; cosine: half a cosine period.
    """
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    if recipe.decay == "none":
        return recipe.lr
    progress = (step - recipe.warmup_steps) / max(1, num_steps - recipe.warmup_steps)
    if recipe.decay == "linear":
        return recipe.lr * max(0.0, 1 - progress)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
