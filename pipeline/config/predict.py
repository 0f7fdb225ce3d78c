"""What `predict` may be told."""

from dataclasses import dataclass

from pipeline.config.model import ModelConfig, require_side
from pipeline.core.typed import PathText, one_of, require

FORMATS = ("table", "jsonl", "csv")


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Class names and probabilities of pictures."""

    checkpoint: PathText
    """A run directory (its best checkpoint, else its last), a .ckpt, a torchvision state dict (.pth, .safetensors), or
    the Caffe .npz."""
    source: PathText
    """A picture, a folder with everything below it, a pattern such as 'pictures/*.jpg', or - for paths on stdin, one a
    line."""
    classes: PathText | None = None
    """Names of the outputs where the checkpoint has none: a file with one a line, or `imagenet` for ILSVRC2012's 1000
    in torchvision's order."""
    top: int = 5
    """How many classes to tell of each picture."""
    format: str = "table"
    """On stdout: `table` for people, `jsonl` an object a line, `csv` a line for each class told."""
    size: int | None = None
    """Crop side in pixels; null: as in the training."""
    accelerator: str = "auto"
    """`auto`: a GPU where torch sees one, else the CPU; or `cpu`, `gpu`."""
    model: ModelConfig
    """Without `model=NAME`: what the checkpoint says, its input included. Other weights do not say, and need it."""

    def __post_init__(self) -> None:
        one_of("format", self.format, FORMATS)
        one_of("accelerator", self.accelerator, ("auto", "cpu", "gpu"))
        require(self.top >= 1, f"top={self.top} must be at least 1.")
        if self.size is not None:
            require_side("size", self.size)
