"""Which validation is the best: that of the highest top-1, and of equal ones that of the lowest loss."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Validated(NamedTuple):
    """What a validation found."""

    top1: float
    loss: float
    """Mean cross-entropy. Minus infinity: not known, so that one of equal top-1 is no better."""
    step: int | None = None
    """Optimiser steps after which it took place; None: not known."""

    @classmethod
    def of_results(cls, results: Mapping[str, Any], step: int) -> "Validated":
        """Take them from a validation's results, of the weights after so many steps."""
        return cls(float(results["top1"]), float(results["loss"]), step)

    @classmethod
    def of_section(cls, section: Mapping[str, Any] | None) -> "Validated | None":
        """Return the best of the attempts before, as their checkpoint says; None: there was none."""
        if section is None or section.get("best_score") is None:
            return None
        loss = section.get("best_loss")
        return cls(float(section["best_score"]), -math.inf if loss is None else float(loss), section.get("best_step"))

    @property
    def in_words(self) -> str:
        """Top-1, and of which step."""
        return f"{self.top1:.1%}" + ("" if self.step is None else f" at step {self.step:,}")

    @property
    def known_loss(self) -> float | None:
        """The loss, for a checkpoint; None: not known."""
        return self.loss if math.isfinite(self.loss) else None

    def beats(self, other: "Validated | None") -> bool:
        """Return whether it is better. With few pictures top-1 is often the same, and the loss still falls."""
        return other is None or (self.top1, -self.loss) > (other.top1, -other.loss)
