"""`evaluation.json`: how well weights of any origin classify a split, every picture counted once."""

from typing import Literal, TypedDict


class EvaluationJson(TypedDict):
    """`evaluation.json`: exact sums over all ranks."""

    schema: Literal[1]
    """Version of this format."""
    checkpoint: str
    """Where the weights come from: the file, and its step if it is one of our checkpoints."""
    num_samples: int
    """Number of pictures scored."""
    num_correct_top1: int
    """Number of pictures whose class has the largest output."""
    num_correct_top5: int
    """Number of pictures whose class is among the five largest outputs (among all, if there are fewer)."""
    top1: float
    """Fraction of pictures whose class has the largest output."""
    top5: float
    """Fraction of pictures whose class is among the five largest outputs."""
    loss: float
    """Mean cross-entropy in nats."""
    model: str
    """Name of the model."""
