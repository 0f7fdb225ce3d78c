"""Local SGD and DiLoCo: when ranks exchange weights. Pure: a function of the configuration, the same on every rank.

A run is some steps that exchange gradients, as DDP does, and then rounds: steps in which each rank trains by itself. In
a round each fragment of the weights is exchanged once: it leaves at the end of a step, and arrives `delay` steps later.
Fragments leave evenly spread over the round, the last one at its end; where there is one, that is local SGD. In the
last round all leave at the end of the run and arrive at once, so that a run ends with the same weights on every rank.

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
    num_fragments: int = 1
    delay: int = 0
    """Steps between a fragment's departure and its arrival, so few that one has arrived before the next one leaves."""
    nothing_before: int = 0
    """What would have left up to this step has not, or has arrived: an attempt began here, with another plan."""

    def exchanges_gradients(self, step: int) -> bool:
        """Whether the step comes before the first round."""
        return step <= self.num_synchronous

    def ends_round(self, step: int) -> bool:
        """Whether the step is the last one of a round: statistics are averaged, and sums added up."""
        at = bisect.bisect_left(self.ends, step)
        return at < len(self.ends) and self.ends[at] == step

    def meets(self, step: int) -> bool:
        """Whether the ranks agree at the end of the step on what they have in common."""
        return self.exchanges_gradients(step) or self.ends_round(step)

    def last_met(self, step: int) -> int:
        """Return the latest of the first `step` steps at whose end the ranks met; 0: none."""
        at = bisect.bisect_right(self.ends, step)
        return self.ends[at - 1] if at else min(step, self.num_synchronous)

    def is_synchronised(self, step: int) -> bool:
        """Whether the ranks have the same weights after so many steps."""
        if self.num_fragments == 1 and self.delay == 0:
            return self.meets(step)
        return self.exchanges_gradients(step) or step == self.ends[-1]

    def leaving(self, step: int) -> tuple[int, ...]:
        """Return the fragments that leave at the end of the step."""
        at = bisect.bisect_left(self.ends, step)
        if step <= max(self.num_synchronous, self.nothing_before) or at == len(self.ends):
            return ()
        everything = range(self.num_fragments)
        if at == len(self.ends) - 1:
            return tuple(everything) if step == self.ends[at] else ()
        begin = self.ends[at - 1] if at else self.num_synchronous
        length = self.ends[at] - begin
        return tuple(one for one in everything if begin + (one + 1) * length // self.num_fragments == step)

    def turning(self, step: int) -> tuple[int, ...]:
        """Return the fragments that have been reduced and are sent back, where that is a second exchange: half way."""
        return self._left_before(step, self._turns_after)

    def has_turned(self, left: int, step: int) -> bool:
        """Whether what left at the end of step `left` has been sent back by the end of `step`."""
        return step >= left + self._turns_after

    @property
    def _turns_after(self) -> int:
        return (self.delay + 1) // 2

    def arriving(self, step: int) -> tuple[int, ...]:
        """Return the fragments that arrive at the end of the step, the longest under way first."""
        return self._left_before(step, self.delay)

    def _left_before(self, step: int, num_steps: int) -> tuple[int, ...]:
        """Fragments that left so many steps before; by the end of the run, whatever left until then."""
        first = step - num_steps
        last = first if step < self.ends[-1] else step
        return tuple(one for at in range(first, last + 1) for one in self.leaving(at))

    def under_way(self, step: int) -> int | None:
        """Return the step at whose end the fragment left that is under way after `step`; None where none is."""
        if step >= self.ends[-1]:
            return None
        return next((at for at in range(step, step - self.delay, -1) if self.leaving(at)), None)


def plan_rounds(
    num_steps: int,
    round_steps: Callable[[int], int],
    num_synchronous: int = 0,
    *,
    num_fragments: int = 1,
    delay: int = 0,
) -> Rounds:
    """Cut a run into rounds.

    Args:
        num_steps: Of the run.
        round_steps: Returns the number of steps of a round that begins after so many steps.
        num_synchronous: Steps before the first round.
        num_fragments: At most the steps of a round.
        delay: Less than the steps of a round, shared out to the fragments.
    """
    ends, step = [], num_synchronous
    while step < num_steps:
        step = min(num_steps, step + round_steps(step))
        ends.append(step)
    return Rounds(num_synchronous, tuple(ends), num_fragments, delay)


def quadratic_steps(period: int, alpha: float, lr: float) -> int:
    """Return the steps of a round by the quadratic synchronisation rule (Gu et al. 2024, arXiv 2310.14423).

    Args:
        period: The fewest steps of a round.
        alpha: The rule's constant, in units of the learning rate.
        lr: Learning rate of the round's first step.
    """
    return max(period, math.floor(min(alpha / lr, LARGEST_ROOT) ** 2))
