"""Train SqueezeNet with DDP and account for every byte: the commands on top, the rooms below.

>>> from pipeline import load_model
>>> trained = load_model("runs/first")
>>> trained.predict("cat.jpg", top=1)
[[Prediction(label=3, name='cat', probability=0.93)]]
"""

import os
import sys

# `python -m pipeline.train` looks first in the current folder, where a `random.py` or `queue.py` would stand in for the
# standard library's. While Python looks for the command, its argument is still `-m`.
if sys.argv[:1] == ["-m"] and sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(__file__)):  # noqa: PTH109, PTH120
    del sys.path[0]

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.training.trained import Trained

__all__ = ["load_model"]


def load_model(
    checkpoint: str | Path, model: str = "", *, num_classes: int | None = None, allow_code: bool = False
) -> "Trained":
    """Return the network of a checkpoint with its classes and preprocessing, for one's own script.

    Args:
        checkpoint: A run directory (its best checkpoint, else its last), a checkpoint, a torchvision state dict or the
            Caffe `.npz`.
        model: Name of the model where the file does not say it, such as `squeezenet1_1`.
        num_classes: Number of outputs where the file does not say it; None: as many as its classifier has.
        allow_code: Whether the factory that the model comes from may run, where it is neither ours nor a library's.

    Raises:
        CheckpointError: No such file, damaged, or of another model.
        ConfigError: It does not say which model it is, and neither does `model`.
    """
    from pipeline.config.model import ModelConfig
    from pipeline.config.registry import preset_input
    from pipeline.training.trained import load_trained

    asked = ModelConfig(name=model, num_classes=num_classes, input=preset_input(model), allow_code=allow_code)
    return load_trained(Path(checkpoint), asked)
