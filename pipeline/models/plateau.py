"""SqueezeNet is known to stick at loss = ln(classes). This notices, and says what to do."""

import math
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


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

    def update(self, step: int, mean_loss: float, live_share: float | None = None) -> str | None:
        """Return the advice, or None while there is nothing to say.

        Args:
            step: optimiser steps done so far, this one included.
            mean_loss: training loss of this step, in nats, averaged over all ranks.
            live_share: what `live_conv10_share` says of this step's logits, if somebody looked.
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
        return self._advice(step, mean, live_share)

    def _advice(self, step: int, mean: float, live_share: float | None) -> str:
        found = (
            f"Stuck at step {step}: the mean loss of the last {len(self._losses)} steps is {mean:.4f}, and"
            f" ln({self._num_classes}) = {self.uninformed_loss:.4f} is what a network gets that tells no class from"
            " another."
        )
        if live_share == 0.0:
            return (
                f"{found} Every output of conv10 is negative, so its ReLU makes every gradient exactly 0 and this run"
                " cannot recover: start again with model.metaparameters.final_relu=false, or with a lower recipe.lr and"
                " a longer recipe.warmup_steps."
            )
        return (
            f"{found} Try, in this order: a lower recipe.lr, a longer recipe.warmup_steps,"
            " model.metaparameters.final_relu=false, another seed; and check that initialisation and input belong"
            " together (init=torchvision with normalised pictures, init=caffe with 0..255 minus the mean)."
        )


def live_conv10_share(logits_BK: "Tensor") -> float:
    """Return the share of the K classes whose logit is above 0 for at least one of the B pictures.

    Behind conv10's ReLU a logit of 0 means that the whole map of that class is negative and passes no gradient. 0.0: no
    class does, the state that training cannot leave.
    """
    return (logits_BK > 0).any(dim=0).float().mean().item()
