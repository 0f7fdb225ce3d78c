"""What `export` may be told."""

from dataclasses import dataclass, field

from pipeline.config.evaluate import EvaluateDataConfig
from pipeline.config.model import ModelConfig
from pipeline.config.training import TrackingConfig
from pipeline.core.typed import PathText, one_of, require

FORMATS = ("safetensors", "safetensors_fp16", "onnx", "onnx_int8", "package")


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """Pictures by which weights and ranges are rounded. Their labels are not looked at."""

    num_images: int = 256
    """Of the split, drawn at random. The others judge; where none are left, so do these, and it is said."""
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.num_images >= 1, f"calibration.num_images={self.num_images} must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class LatencyConfig:
    """How long ONNX files are run for their latency, on one thread."""

    num_windows: int = 5
    """The median of the windows is told. 0: latency is not measured."""
    window_seconds: float = 10.0

    def __post_init__(self) -> None:
        require(self.num_windows >= 0, f"latency.num_windows={self.num_windows} must be 0 or more.")
        require(self.window_seconds > 0, f"latency.window_seconds={self.window_seconds} must be positive.")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Files to ship one set of weights as, with what each costs in accuracy."""

    name: str = "export"
    """The directory of the files and of artefacts.json under run_root."""
    run_root: PathText = "runs"
    checkpoint: PathText
    """A run directory (its best checkpoint, else its last), a .ckpt, a torchvision state dict, or the Caffe .npz."""
    formats: tuple[str, ...] = FORMATS
    """`safetensors`, `safetensors_fp16`, `onnx`, `onnx_int8`: weights stored as int8; `package`: .sqz, the smallest, to
    send over the air."""
    max_bytes: int | None = None
    """The package's most bytes: the best quality that fits is sought."""
    max_loss: float | None = None
    """How much the package may raise the mean cross-entropy, in nats: the smallest that keeps to it is sought. Neither:
    0.01 where there are pictures to judge by."""
    base: PathText | None = None
    """An older .sqz on whose grid the package is made, and against which a delta is written."""
    data: EvaluateDataConfig
    """Shards of pictures to calibrate on and to judge by. Without data.root the package needs max_bytes, and nothing is
    judged."""
    calibration: CalibrationConfig
    latency: LatencyConfig
    model: ModelConfig
    """Without `model=NAME`: what the checkpoint says, its input included. Other weights do not say, and need it."""
    tracking: TrackingConfig = field(default_factory=lambda: TrackingConfig(mode="disabled"))
    """Weights & Biases gets the table of the files, and the files as artefacts."""

    def __post_init__(self) -> None:
        require(bool(self.formats), f"formats=[] must name at least one of {', '.join(FORMATS)}.")
        for number, kind in enumerate(self.formats):
            one_of(f"formats[{number}]", kind, FORMATS)
        for key in ("artifacts", "loggers"):
            require(
                not getattr(self.tracking, key),
                f"tracking.{key} is for a training: with tracking=offline or online W&B keeps every file of an export.",
            )
        require(self.max_bytes is None or self.max_bytes > 0, f"max_bytes={self.max_bytes} must be positive.")
        require(self.max_loss is None or self.max_loss > 0, f"max_loss={self.max_loss} must be positive.")
        given = [key for key in ("max_bytes", "max_loss", "base") if getattr(self, key) is not None]
        require(
            len(given) < 2,
            f"{' and '.join(given)} were given, and each alone decides the package: keep one of them.",
        )
        if self.data.root is None:
            require(
                "onnx_int8" not in self.formats, "formats=[onnx_int8] needs pictures for its ranges: set data.root."
            )
            require(
                "package" not in self.formats or self.max_loss is None,
                "max_loss needs pictures to judge by: set data.root.",
            )
            require(
                "package" not in self.formats or bool(self.max_bytes or self.base),
                "Without data.root nothing says how good the package must be: set data.root, or max_bytes.",
            )
