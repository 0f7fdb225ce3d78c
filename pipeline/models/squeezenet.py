"""SqueezeNet, as Iandola et al. describe it (arXiv 1602.07360), with its metaparameters left open.

Layers are counted as in the paper: 1 is conv1, 2 to 9 are fire2 to fire9, 10 is conv10. There is no BatchNorm.

Parameter names equal torchvision's (`features.3.squeeze.weight`), so state dicts load strictly in both directions;
with `init="torchvision"` the same torch seed also gives the same initial weights.

Shape suffixes: B pictures, C channels, H height, W width, K classes.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.core.typed import one_of, require

FIRE_LAYERS = range(2, 10)
NUM_DOWNSAMPLABLE_LAYERS = 9


@dataclass(frozen=True)
class Stem:
    """conv1: the only layer that looks at pixels."""

    num_filters: int
    kernel_size: int
    stride: int
    padding: int


STEMS = {
    "v1.0": Stem(num_filters=96, kernel_size=7, stride=2, padding=0),
    "v1.1": Stem(num_filters=64, kernel_size=3, stride=2, padding=0),
    # A 32x32 picture cannot give away half its pixels before anything has looked at them: no stride, and padding so
    # that the poolings halve 32 exactly.
    "small": Stem(num_filters=64, kernel_size=3, stride=1, padding=1),
}
BYPASSES = ("none", "simple", "complex")
INITS = ("torchvision", "caffe")


@dataclass(frozen=True)
class FireWidths:
    """Numbers of filters in one fire module, named as in the paper's Table 1."""

    s1x1: int
    e1x1: int
    e3x3: int

    @property
    def e(self) -> int:
        """Filters of the whole expand layer, which are the module's output channels."""
        return self.e1x1 + self.e3x3


def fire_widths(i: int, *, base_e: int, incr_e: int, freq: int, pct3x3: float, sr: float) -> FireWidths:
    """Widths of the i-th fire module, i = 0 for fire2 (section 5.1 of the paper).

    e_i = base_e + incr_e * floor(i / freq), of which pct3x3 are 3x3 filters; s_i = SR * e_i.
    Fractions of a filter are rounded to the nearest whole one.
    """
    e = base_e + incr_e * (i // freq)
    e3x3 = round(pct3x3 * e)
    return FireWidths(s1x1=round(sr * e), e1x1=e - e3x3, e3x3=e3x3)


class Fire(nn.Module):
    """Squeeze to few channels with 1x1 filters, then expand with 1x1 and 3x3 filters side by side.

    Strategy 1: most filters are 1x1. Strategy 2: the 3x3 filters see only `s1x1` input channels.

    With `bypass="simple"` the input is added to the output where both have the same number of channels; with
    `"complex"` a 1x1 convolution makes the numbers equal where they differ (section 6 of the paper).
    """

    def __init__(self, num_inputs: int, widths: FireWidths, bypass: str = "none") -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(num_inputs, widths.s1x1, kernel_size=1)
        self.squeeze_activation = nn.ReLU(inplace=True)
        self.expand1x1 = nn.Conv2d(widths.s1x1, widths.e1x1, kernel_size=1)
        self.expand1x1_activation = nn.ReLU(inplace=True)
        self.expand3x3 = nn.Conv2d(widths.s1x1, widths.e3x3, kernel_size=3, padding=1)
        self.expand3x3_activation = nn.ReLU(inplace=True)
        self.bypass: nn.Module | None = None
        if bypass != "none" and num_inputs == widths.e:
            self.bypass = nn.Identity()
        elif bypass == "complex":
            self.bypass = nn.Conv2d(num_inputs, widths.e, kernel_size=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, num_inputs, H, W) to (B, e1x1 + e3x3, H, W)."""
        s_BCHW = self.squeeze_activation(self.squeeze(x_BCHW))
        e1x1_BCHW = self.expand1x1_activation(self.expand1x1(s_BCHW))
        e3x3_BCHW = self.expand3x3_activation(self.expand3x3(s_BCHW))
        e_BCHW = torch.cat((e1x1_BCHW, e3x3_BCHW), dim=1)
        return e_BCHW if self.bypass is None else e_BCHW + self.bypass(x_BCHW)


class SqueezeNet(nn.Module):
    """SqueezeNet v1.0 by default; v1.1 is `stem="v1.1", pool_after=(1, 3, 5)`.

    Args:
        num_classes: outputs of conv10.
        base_e: filters in the expand layers of the first fire modules.
        incr_e: filters by which they grow every `freq` modules.
        freq: see `incr_e`.
        pct3x3: share of the expand filters that are 3x3, in (0, 1).
        sr: squeeze ratio, squeeze filters over expand filters, in (0, 1].
        bypass: `none`; `simple`: identity around every fire module that keeps the number of channels (fire3, 5, 7, 9);
            `complex`: besides, a 1x1 convolution around the others (fire2, 4, 6, 8).
        pool_after: layers (1 to 9) after which a 3x3 max-pool of stride 2 halves the picture. Strategy 3: late
            downsampling gives large activation maps. v1.0: (1, 4, 8); v1.1: (1, 3, 5).
        stem: conv1. `v1.0`: 96 filters 7x7/2; `v1.1`: 64 filters 3x3/2; `small`: 64 filters 3x3/1, for 32x32 pictures.
        conv10_pad: zero pixels around conv10's input: 1 in Caffe's v1.0, 0 in v1.1 and in torchvision.
        final_relu: keep the ReLU after conv10. It makes loss = ln(classes) an absorbing state: where every output of
            conv10 is negative, every gradient is exactly 0.
        dropout: share of fire9's outputs that training drops.
        init: `torchvision` (He's uniform, bound sqrt(6 / fan_in)) for inputs of unit variance, `caffe` (bound
            sqrt(3 / fan_in)) for inputs of 0..255 minus a mean. Crossing them stops learning from the start.

    Raises:
        ConfigError: a metaparameter is impossible.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        base_e: int = 128,
        incr_e: int = 128,
        freq: int = 2,
        pct3x3: float = 0.5,
        sr: float = 0.125,
        bypass: str = "none",
        pool_after: Collection[int] = (1, 4, 8),
        stem: str = "v1.0",
        conv10_pad: int = 0,
        final_relu: bool = True,
        dropout: float = 0.5,
        init: str = "torchvision",
    ) -> None:
        _check(num_classes, base_e, incr_e, freq, pct3x3, sr, pool_after, conv10_pad, final_relu, dropout)
        for key, value, allowed in (("bypass", bypass, BYPASSES), ("stem", stem, tuple(STEMS)), ("init", init, INITS)):
            one_of(key, value, allowed)
        super().__init__()

        conv1 = STEMS[stem]
        layers: list[nn.Module] = [
            nn.Conv2d(3, conv1.num_filters, conv1.kernel_size, conv1.stride, conv1.padding),
            nn.ReLU(inplace=True),
        ]
        # Where each layer of the paper lies in `features`: torchvision's numbering counts ReLU and poolings too.
        self._index_of_layer = {1: 0}
        num_channels = conv1.num_filters
        num_identities = 0
        if 1 in pool_after:
            layers.append(_max_pool())
        for layer in FIRE_LAYERS:
            widths = fire_widths(
                layer - FIRE_LAYERS.start, base_e=base_e, incr_e=incr_e, freq=freq, pct3x3=pct3x3, sr=sr
            )
            _check_widths(layer, widths)
            self._index_of_layer[layer] = len(layers)
            layers.append(Fire(num_channels, widths, bypass))
            num_identities += num_channels == widths.e
            num_channels = widths.e
            if layer in pool_after:
                layers.append(_max_pool())
        require(
            bypass != "simple" or num_identities > 0,
            f"bypass='simple' would bypass nothing: with base_e={base_e}, incr_e={incr_e}, freq={freq} no fire module"
            " has as many outputs as inputs. Use bypass='complex', or freq=2 or more.",
        )
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Conv2d(num_channels, num_classes, kernel_size=1, padding=conv10_pad),
            nn.ReLU(inplace=True) if final_relu else nn.Identity(),
            nn.AdaptiveAvgPool2d(1),
        )
        self.num_classes = num_classes
        self.reset_parameters(init)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Normalised pictures (B, 3, H, W) to logits (B, K)."""
        return self.classifier(self.features(images_BCHW)).flatten(1)

    def reset_parameters(self, init: str = "torchvision") -> None:
        """Draw new weights from torch's generator. conv10 is N(0, 0.01) under both schemes, biases are 0."""
        for name, conv in self.named_convolutions():
            if name == "conv10":
                nn.init.normal_(conv.weight, mean=0.0, std=0.01)
            elif init == "caffe":
                bound = math.sqrt(3.0 / conv.weight[0].numel())
                nn.init.uniform_(conv.weight, -bound, bound)
            else:
                nn.init.kaiming_uniform_(conv.weight)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)

    def named_layers(self) -> Iterator[tuple[str, nn.Module]]:
        """The ten layers of the paper's Table 1 that own parameters: conv1, fire2 to fire9, conv10."""
        for layer, index in self._index_of_layer.items():
            yield (f"fire{layer}" if layer in FIRE_LAYERS else "conv1"), self.features[index]
        yield "conv10", self.classifier[1]

    def named_convolutions(self) -> Iterator[tuple[str, nn.Conv2d]]:
        """Every convolution by its Caffe name: conv1, fire2/squeeze1x1, fire2/expand1x1, fire2/expand3x3, ..., conv10.

        The convolution of a complex bypass is called fire2/bypass.
        """
        for name, layer in self.named_layers():
            if isinstance(layer, Fire):
                yield f"{name}/squeeze1x1", layer.squeeze
                yield f"{name}/expand1x1", layer.expand1x1
                yield f"{name}/expand3x3", layer.expand3x3
                if isinstance(layer.bypass, nn.Conv2d):
                    yield f"{name}/bypass", layer.bypass
            else:
                assert isinstance(layer, nn.Conv2d)
                yield name, layer


def _max_pool() -> nn.MaxPool2d:
    """Caffe rounds the output side up, hence `ceil_mode`."""
    return nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)


def _check(
    num_classes: Any,
    base_e: Any,
    incr_e: Any,
    freq: Any,
    pct3x3: Any,
    sr: Any,
    pool_after: Any,
    conv10_pad: Any,
    final_relu: Any,
    dropout: Any,
) -> None:
    """Types and ranges of what may come straight from a command line."""
    for key, value, lowest in (
        ("num_classes", num_classes, 1),
        ("base_e", base_e, 1),
        ("incr_e", incr_e, 0),
        ("freq", freq, 1),
        ("conv10_pad", conv10_pad, 0),
    ):
        require(_is_whole(value) and value >= lowest, f"{key}={value!r} must be a whole number of at least {lowest}.")
    require(_is_number(pct3x3) and 0 < pct3x3 < 1, f"pct3x3={pct3x3!r} must be a share between 0 and 1, such as 0.5.")
    require(_is_number(sr) and 0 < sr <= 1, f"sr={sr!r} must be a ratio in (0, 1], such as 0.125.")
    require(_is_number(dropout) and 0 <= dropout < 1, f"dropout={dropout!r} must be a share in [0, 1), such as 0.5.")
    require(isinstance(final_relu, bool), f"final_relu={final_relu!r} must be true or false.")
    layers = f"pool_after={pool_after!r} must list layers from 1 to {NUM_DOWNSAMPLABLE_LAYERS}, each once: (1, 4, 8)."
    require(isinstance(pool_after, list | tuple | set | frozenset), layers)
    require(all(_is_whole(layer) and 1 <= layer <= NUM_DOWNSAMPLABLE_LAYERS for layer in pool_after), layers)
    require(len(set(pool_after)) == len(pool_after), layers)


def _check_widths(layer: int, widths: FireWidths) -> None:
    for key, num_filters, remedy in (
        ("squeeze1x1", widths.s1x1, "sr"),
        ("expand1x1", widths.e1x1, "base_e or lower pct3x3"),
        ("expand3x3", widths.e3x3, "base_e or pct3x3"),
    ):
        require(num_filters >= 1, f"fire{layer}/{key} would have no filters: raise {remedy}.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
