"""Local SGD: after which steps the ranks meet. Pure: a function of the configuration, the same on every rank.

A run is some steps that exchange gradients, as DDP does, and then rounds: steps in which each rank trains by itself, at
the end of which the ranks average their weights. The last round ends with the run, however long it is.

Steps count from 1 here: step s is the one that makes s steps committed.
"""

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass

LARGEST_ROOT = 1e9
"""Its square is more steps than any run has, and can still be computed."""


@dataclass(frozen=True)
class Rounds:
    """The rounds of a run."""

    num_synchronous: int
    """Steps before the first round."""
    ends: tuple[int, ...]
    """The last step of each round, in order; that of the last round is the run's."""

    def exchanges_gradients(self, step: int) -> bool:
        """Whether the step comes before the first round."""
        return step <= self.num_synchronous

    def averages(self, step: int) -> bool:
        """Whether the ranks average their weights at the end of the step."""
        at = bisect.bisect_left(self.ends, step)
        return at < len(self.ends) and self.ends[at] == step

    def is_synchronised(self, step: int) -> bool:
        """Whether the ranks have the same weights after so many steps."""
        return self.exchanges_gradients(step) or self.averages(step)

    def last_synchronised(self, step: int) -> int:
        """Return the latest of the first `step` steps after which the ranks had the same weights."""
        at = bisect.bisect_right(self.ends, step)
        return self.ends[at - 1] if at else min(step, self.num_synchronous)


def plan_rounds(num_steps: int, round_steps: Callable[[int], int], num_synchronous: int = 0) -> Rounds:
    """Cut a run into rounds.

    Args:
        num_steps: Of the run.
        round_steps: Returns the number of steps of a round that begins after so many steps.
        num_synchronous: Steps before the first round.
    """
    ends, step = [], num_synchronous
    while step < num_steps:
        step = min(num_steps, step + round_steps(step))
        ends.append(step)
    return Rounds(num_synchronous, tuple(ends))


def quadratic_steps(period: int, alpha: float, lr: float) -> int:
    """Return the steps of a round by the quadratic synchronisation rule (Gu et al. 2024, arXiv 2310.14423).

    Args:
        period: The fewest steps of a round.
        alpha: The rule's constant, in units of the learning rate.
        lr: Learning rate of the round's first step.
    """
    return max(period, math.floor(min(alpha / lr, LARGEST_ROOT) ** 2))
