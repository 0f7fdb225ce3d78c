"""SqueezeNet is known to stick at loss = ln(classes), and to die there. This notices, and says what to do."""

import math
from collections import deque

NUM_DEAD_STEPS = 40
LEARNT_BY_HEART = 1e-3
"""Nats. Below this loss a gradient may round to 0."""


class PlateauDetector:
    """Watches the training loss for the value of a network that tells no class from another.

    Equal logits give a cross entropy of exactly ln(num_classes), with label smoothing too. Every network starts near
    it, so the detector waits `after_steps` steps, and then compares the mean over the last `window` losses. It speaks
    once per plateau: again only after the loss has left and come back.

    Args:
        num_classes: outputs of the classifier, at least 2.
        window: losses averaged, at least 1.
        after_steps: optimiser steps before which nothing is said; at least the warm-up.
        tolerance: largest distance from ln(num_classes), in nats.
    """

    def __init__(self, num_classes: int, window: int = 50, after_steps: int = 500, tolerance: float = 0.01) -> None:
        assert num_classes >= 2 and window >= 1 and after_steps >= 0 and tolerance > 0
        self.uninformed_loss = math.log(num_classes)
        self._num_classes = num_classes
        self._after_steps = after_steps
        self._tolerance = tolerance
        self._losses: deque[float] = deque(maxlen=window)
        self._has_spoken = False

    def update(self, step: int, mean_loss: float) -> str | None:
        """Return the advice, or None while there is nothing to say.

        Args:
            step: optimiser steps done so far, this one included.
            mean_loss: training loss of this step, in nats, averaged over all ranks.
        """
        self._losses.append(mean_loss)
        window = self._losses.maxlen
        assert window is not None
        if len(self._losses) < window or step < self._after_steps:
            return None
        mean = sum(self._losses) / window
        if not abs(mean - self.uninformed_loss) <= self._tolerance:
            self._has_spoken = False
            return None
        if self._has_spoken:
            return None
        self._has_spoken = True
        return self._advice(step, mean)

    def _advice(self, step: int, mean: float) -> str:
        found = (
            f"Stuck at step {step}: the mean loss of the last {len(self._losses)} steps is {mean:.4f}, and"
            f" ln({self._num_classes}) = {self.uninformed_loss:.4f} is what a network gets that tells no class from"
            " another."
        )
        return (
            f"{found} Try, in this order: model.metaparameters.init=standardized (SqueezeNet, where it is another), a"
            " lower recipe.lr, a longer recipe.warmup_steps, model.metaparameters.final_relu=false, another seed; and"
            " check that initialisation and input belong"
            " together (init=caffe with 0..255 minus the mean, any other with normalised pictures)."
        )


class DeadNetworkDetector:
    """Watches for a gradient of exactly 0 at a loss that is not: a state that training cannot leave.

    SqueezeNet gets there when every output of conv10 is negative, so that its ReLU passes no gradient. A network that
    has learnt its pictures by heart has no gradient either, and no loss.
    """

    def __init__(self) -> None:
        self._num_steps = 0

    def update(self, step: int, mean_loss: float, grad_norm: float) -> str | None:
        """Return the verdict, after NUM_DEAD_STEPS such steps in a row, or None.

        Args:
            step: Optimiser steps done so far, this one included.
            mean_loss: Training loss of this step in nats, averaged over all ranks.
            grad_norm: Norm of its reduced gradient.
        """
        self._num_steps = self._num_steps + 1 if grad_norm == 0 and mean_loss > LEARNT_BY_HEART else 0
        if self._num_steps < NUM_DEAD_STEPS:
            return None
        return (
            f"Step {step}: the gradient has been exactly 0 for {NUM_DEAD_STEPS} steps at a loss of {mean_loss:.4f}, so"
            " that this network cannot learn any more: every ReLU before the classes is off. Start again under another"
            " name= with model.metaparameters.final_relu=false (SqueezeNet), a lower recipe.lr, or a longer"
            " recipe.warmup_steps."
        )
