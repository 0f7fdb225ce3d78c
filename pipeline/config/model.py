"""Which network a command builds, and what pictures that network expects."""

import dataclasses
from dataclasses import dataclass, field

from pipeline.config.squeezenet import SqueezeNetConfig
from pipeline.core.typed import one_of, require

MAX_CLASSES = 10_000_000
"""The largest public sets have some 22,000; a classifier of more than this fits nowhere."""
MAX_SIDE = 65_535
"""Pixels: JPEG has no larger pictures."""


def require_side(key: str, pixels: int) -> None:
    """Raise `ConfigError` unless a picture can have sides of so many pixels."""
    require(0 < pixels <= MAX_SIDE, f"{key}={pixels} must be a positive number of pixels, and at most {MAX_SIDE:,}.")


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """What a model expects to see. Mean and std are in the units of 0..255 pixels, in the model's channel order."""

    size: int = 224
    """Side of the square crop, pixels."""
    resize_side: int = 256
    """Evaluation: side to resize to before the centre crop, pixels."""
    resize_mode: str = "short"
    """`short`: the short side becomes resize_side; `warp`: both sides do; `none`: no resize."""
    channel_order: str = "rgb"
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)

    def __post_init__(self) -> None:
        one_of("model.input.resize_mode", self.resize_mode, ("short", "warp", "none"))
        one_of("model.input.channel_order", self.channel_order, ("rgb", "bgr"))
        require_side("model.input.size", self.size)
        require_side("model.input.resize_side", self.resize_side)
        require(
            self.resize_mode == "none" or self.resize_side >= self.size,
            f"model.input.resize_side={self.resize_side} is smaller than the crop {self.size}: raise it to that.",
        )
        require(min(self.std) > 0, f"model.input.std={self.std} must be positive.")

    def resized(self, size: int | None) -> "InputConfig":
        """The same input at another crop side; resize_side keeps its ratio to the crop."""
        if size is None or size == self.size:
            return self
        return dataclasses.replace(self, size=size, resize_side=max(size, round(self.resize_side * size / self.size)))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network: of the registry, timm:NAME, torchvision:NAME, package.module:factory, FILE.py:factory."""

    name: str
    allow_code: bool = False
    """Whether package.module:factory and FILE.py:factory may run: code that is not squeezewire's."""
    num_classes: int | None = None
    """Outputs of the classifier. Null: as many as the shards have classes."""
    metaparameters: dict[str, object] = field(default_factory=dict[str, object], metadata={"keys": SqueezeNetConfig})
    """What makes a variant of the model. SqueezeNet's, with the defaults of squeezenet1_0, are listed here; some of the
    other models take dropout, width_mult, stochastic_depth_prob, zero_init_residual or stem (`torchvision`, `small`);
    those of others, arguments."""
    input: InputConfig = field(default_factory=InputConfig)

    def __post_init__(self) -> None:
        require(
            self.num_classes is None or 2 <= self.num_classes <= MAX_CLASSES,
            f"model.num_classes={self.num_classes} must be at least 2, or null to take it from the shards, and at most"
            f" {MAX_CLASSES:,}.",
        )
