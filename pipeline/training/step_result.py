"""What a committed step was."""

from dataclasses import dataclass


@dataclass
class StepResult:
    """What a committed optimiser step was, over all ranks; None: this step is a rank's own, and nothing was exchanged.

    What the steps of a round were, its last one says.
    """

    step: int
    """Steps committed, this one included."""
    lr: float
    loss: float | None = None
    """Mean cross-entropy of the global batch, or of those of the round, label smoothing included."""
    top1: float | None = None
    grad_norm: float | None = None
    """Norm of the reduced gradient before clipping; where weights are averaged, the mean of the ranks' own norms."""
    stop: bool = False
    """Some rank was asked to stop: all ranks know it of the same step."""
    drifted: bool = False
    """The ranks' weights were compared, and are not the same: all ranks know it of the same step."""
    density: float | None = None
    """Share of the weights that is not pruned, of the layers that are; None: the recipe prunes none."""
