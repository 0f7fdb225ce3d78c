"""SqueezeNet's metaparameters (arXiv 1602.07360, sections 3 and 5), and the widths of its layers that follow from them.

Layers are counted as in the paper: 1 is conv1, 2 to 9 are fire2 to fire9, 10 is conv10.
"""

from collections.abc import Collection
from dataclasses import dataclass

from pipeline.core.typed import is_number, is_whole, one_of, require

FIRE_LAYERS = range(2, 10)
NUM_DOWNSAMPLABLE_LAYERS = 9
MOST_FILTERS = 1_000_000
"""A layer of more fits into no memory; beyond it torch's own arithmetic overflows."""


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


@dataclass(frozen=True, kw_only=True)
class SqueezeNetConfig:
    """One network of the family: v1.0 by default; v1.1 is `stem="v1.1", pool_after=(1, 3, 5)`.

    Raises:
        ConfigError: a metaparameter is impossible.
    """

    base_e: int = 128
    """Filters in the expand layers of the first fire modules."""
    incr_e: int = 128
    """Filters by which the expand layers grow every `freq` fire modules."""
    freq: int = 2
    """Fire modules after which the expand layers grow by `incr_e`."""
    pct3x3: float = 0.5
    """Share of the expand filters that are 3x3, in (0, 1)."""
    sr: float = 0.125
    """Squeeze ratio: squeeze filters over expand filters, in (0, 1]."""
    bypass: str = "none"
    """`none`; `simple`: identity around every fire module that keeps the number of channels (fire3, 5, 7, 9);
    `complex`: besides, a 1x1 convolution around the others (fire2, 4, 6, 8)."""
    pool_after: Collection[int] = (1, 4, 8)
    """Layers (1 to 9) after which a 3x3 max-pool of stride 2 halves the picture. Late downsampling gives large
    activation maps. v1.0: [1,4,8]; v1.1: [1,3,5]."""
    stem: str = "v1.0"
    """conv1. `v1.0`: 96 filters 7x7/2; `v1.1`: 64 filters 3x3/2; `small`: 64 filters 3x3/1, for 32x32 pictures."""
    conv10_pad: int = 0
    """Zero pixels around conv10's input: 1 in Caffe's v1.0, 0 in v1.1 and in torchvision."""
    final_relu: bool = True
    """Keep the ReLU after conv10. It makes loss = ln(classes) an absorbing state: where every output of conv10 is
    negative, every gradient is exactly 0."""
    norm: str = "none"
    """`none`, as in the paper; `batch`: conv1 and the convolutions of fire modules have a BatchNorm in the place of a
    bias. Export folds it into the convolutions, so that what is shipped is a network without."""
    dropout: float = 0.5
    """Share of fire9's outputs that training drops, in [0, 1)."""
    init: str = "standardized"
    """`torchvision` (He's uniform, bound sqrt(6 / fan_in)) for inputs of unit variance; `standardized`: besides, each
    filter is scaled and shifted until its outputs on noise have mean 0 and variance 1, and conv10 begins above its
    ReLU's zero, without which v1.0 and v1.1 learn nothing on many small sets; `caffe` (bound sqrt(3 / fan_in)) for
    inputs of 0..255 minus a mean. Crossing it with the others stops learning from the start."""

    def __post_init__(self) -> None:
        # Values may come straight from a command line, so that types are checked too.
        for key, lowest in (("base_e", 1), ("incr_e", 0), ("freq", 1), ("conv10_pad", 0)):
            value = getattr(self, key)
            require(
                is_whole(value) and lowest <= value <= MOST_FILTERS,
                f"{key}={value!r} must be a whole number of at least {lowest}, and at most {MOST_FILTERS:,}.",
            )
        within = is_number(self.pct3x3) and 0 < self.pct3x3 < 1
        require(within, f"pct3x3={self.pct3x3!r} must be a share between 0 and 1, such as 0.5.")
        require(is_number(self.sr) and 0 < self.sr <= 1, f"sr={self.sr!r} must be a ratio in (0, 1], such as 0.125.")
        within = is_number(self.dropout) and 0 <= self.dropout < 1
        require(within, f"dropout={self.dropout!r} must be a share in [0, 1), such as 0.5.")
        require(type(self.final_relu) is bool, f"final_relu={self.final_relu!r} must be true or false.")
        require(
            isinstance(self.pool_after, list | tuple | set | frozenset)
            and all(is_whole(layer) and 1 <= layer <= NUM_DOWNSAMPLABLE_LAYERS for layer in self.pool_after)
            and len(set(self.pool_after)) == len(self.pool_after),
            f"pool_after={self.pool_after!r} must list layers from 1 to {NUM_DOWNSAMPLABLE_LAYERS}, each once:"
            " (1, 4, 8).",
        )
        one_of("bypass", self.bypass, ("none", "simple", "complex"))
        one_of("stem", self.stem, tuple(STEMS))
        one_of("norm", self.norm, ("none", "batch"))
        one_of("init", self.init, ("standardized", "torchvision", "caffe"))
        self._check_widths()

    def _check_widths(self) -> None:
        widths = [self.fire_widths(layer) for layer in FIRE_LAYERS]
        for layer, fire in zip(FIRE_LAYERS, widths, strict=True):
            for part, num_filters, remedy in (
                ("squeeze1x1", fire.s1x1, "sr"),
                ("expand1x1", fire.e1x1, "base_e or lower pct3x3"),
                ("expand3x3", fire.e3x3, "base_e or pct3x3"),
            ):
                require(num_filters >= 1, f"fire{layer}/{part} would have no filters: raise {remedy}.")
        num_inputs = [STEMS[self.stem].num_filters, *(fire.e for fire in widths)]
        require(
            self.bypass != "simple" or any(before == fire.e for before, fire in zip(num_inputs, widths, strict=False)),
            f"bypass='simple' would bypass nothing: with base_e={self.base_e}, incr_e={self.incr_e}, freq={self.freq}"
            " no fire module has as many outputs as inputs. Use bypass='complex', or freq=2 or more.",
        )

    @property
    def min_side(self) -> int:
        """Side in pixels of the smallest picture of which downsampling leaves something.

        A pooling halves the side, rounded down, and takes none of 1; fire modules keep it.
        """
        conv1 = STEMS[self.stem]
        return conv1.stride * (2 ** len(self.pool_after) - 1) + conv1.kernel_size - 2 * conv1.padding

    @property
    def max_side_of_one_value(self) -> int:
        """Side in pixels of the largest picture of which a BatchNorm layer sees one value per channel; 0: no such.

        A pooling (3x3, stride 2, rounded up) makes one pixel of a side of up to three.
        """
        if self.norm == "none":
            return 0
        conv1, num_poolings = STEMS[self.stem], len(set(self.pool_after) - {NUM_DOWNSAMPLABLE_LAYERS})
        return conv1.stride * (2 ** (num_poolings + 1) - 1) + conv1.kernel_size - 2 * conv1.padding - 1

    def fire_widths(self, layer: int) -> FireWidths:
        """Return the widths of fire module `layer`, 2 to 9 (section 5.1 of the paper).

        With i = 0 for fire2: e_i = base_e + incr_e * floor(i / freq), of which pct3x3 are 3x3 filters; s_i = SR * e_i.
        Fractions of a filter are rounded to the nearest whole one.
        """
        e = self.base_e + self.incr_e * ((layer - FIRE_LAYERS.start) // self.freq)
        e3x3 = round(self.pct3x3 * e)
        return FireWidths(s1x1=round(self.sr * e), e1x1=e - e3x3, e3x3=e3x3)
