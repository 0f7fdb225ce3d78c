"""The keys of `recipe.prune`."""

from dataclasses import dataclass

from pipeline.core.typed import one_of, require

LAYER, GLOBAL = "layer", "global"


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """Gradual magnitude pruning: the smallest weights of convolutions and linear layers become 0, and stay 0."""

    density: float = 1.0
    """Share of these weights that is left at the end of the pruning; 1: none is pruned. A run that resumes keeps all
    keys of recipe.prune."""
    begin_step: int | None = None
    """Optimiser steps before the pruning begins. Null: a quarter of the run."""
    end_step: int | None = None
    """Optimiser steps after which the density is reached; from then on no weight is pruned any more. The same as
    begin_step: all at once. Null: three quarters of the run."""
    every_steps: int = 100
    """From begin_step to end_step, weights are pruned after so many steps, and at the end."""
    scope: str = LAYER
    """Whose smallest weights: those of each `layer`, which all end at the same density, or `global`."""

    def __post_init__(self) -> None:
        one_of("recipe.prune.scope", self.scope, (LAYER, GLOBAL))
        require(
            0 < self.density <= 1,
            f"recipe.prune.density={self.density} must be above 0 and at most 1 (1: nothing is pruned).",
        )
        for key in ("begin_step", "end_step"):
            value = getattr(self, key)
            require(value is None or value >= 0, f"recipe.prune.{key}={value} must not be negative.")
        require(self.every_steps >= 1, f"recipe.prune.every_steps={self.every_steps} must be at least 1.")

    @property
    def prunes(self) -> bool:
        """Whether any weight is pruned."""
        return self.density < 1
