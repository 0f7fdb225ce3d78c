"""The registry: every model by name, with its metaparameters, its published accuracy and for how long it was trained.

Nothing here imports torch until `build` is called, so that a command can list, check and explain names at once.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import ConfigError
from pipeline.core.overrides import split_outside_brackets
from pipeline.core.typed import nearest, require

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class PublishedAccuracy:
    """Accuracy on ImageNet's 50,000 validation pictures that somebody else reports, as fractions of 1."""

    top1: float
    top5: float
    source: str


@dataclass(frozen=True)
class PublishedRecipe:
    """For how long the training took that led, or is said to have led, to the published accuracy."""

    epochs: float
    """Passes over ImageNet's training split."""
    source: str


@dataclass(frozen=True)
class Entry:
    """One name of the registry."""

    accepts: tuple[str, ...]
    """Metaparameters that `build` takes for it."""
    preset: Mapping[str, Any] = field(default_factory=dict)
    """SqueezeNet metaparameters that make this variant; what the caller gives wins."""
    published: PublishedAccuracy | None = None
    recipe: PublishedRecipe | None = None
    ours: bool = False
    """Built by `pipeline.models.squeezenet`, not by torchvision."""


SQUEEZENET_METAPARAMETERS = (
    "base_e",
    "incr_e",
    "freq",
    "pct3x3",
    "sr",
    "bypass",
    "pool_after",
    "stem",
    "conv10_pad",
    "final_relu",
    "dropout",
    "init",
)
_V1_0 = {"stem": "v1.0", "pool_after": (1, 4, 8)}
_V1_1 = {"stem": "v1.1", "pool_after": (1, 3, 5)}
# v1.1's places to downsample: 32x32 becomes 16, 8 and 4, and late enough for a plain CPU.
# conv10's ReLU is off: with it, ln(classes) is an absorbing state, and the author knew no reason for it
# (forresti/SqueezeNet issue 10).
_SMALL = {"stem": "small", "pool_after": (1, 3, 5), "final_relu": False}

_PAPER = "arXiv 1602.07360, table {}"
_TORCHVISION = "torchvision 0.29, weights IMAGENET1K_V1"

IMAGENET_TRAINING_PICTURES = 1_281_167  # ILSVRC2012's training split
_REFERENCES = "torchvision, references/classification/README.md"
_PULL_REQUEST = "pytorch/vision pull request {}, which added these weights"
_SQUEEZENET_AUTHORS = PublishedRecipe(
    170_000 * 512 / IMAGENET_TRAINING_PICTURES, "the authors' Caffe solver: 170,000 steps of 512 pictures"
)
_SHUFFLENET_AUTHORS = PublishedRecipe(
    300_000 * 1024 / IMAGENET_TRAINING_PICTURES,
    "the authors' 300,000 steps of 1,024 pictures (arXiv 1707.01083); torchvision's weights come without a recipe",
)
_EPOCHS_100 = PublishedRecipe(100, _PULL_REQUEST.format(49))
_EPOCHS_90, _EPOCHS_300, _EPOCHS_600 = (PublishedRecipe(epochs, _REFERENCES) for epochs in (90, 300, 600))
_MNASNET_1_0, _MNASNET_OTHERS = (
    PublishedRecipe(200, _PULL_REQUEST.format(829)),
    PublishedRecipe(600, _PULL_REQUEST.format(6019)),
)


def _squeezenet(
    preset: Mapping[str, Any], published: PublishedAccuracy | None = None, recipe: PublishedRecipe | None = None
) -> Entry:
    return Entry(accepts=SQUEEZENET_METAPARAMETERS, preset=preset, published=published, recipe=recipe, ours=True)


def _torchvision(
    top1_percent: float, top5_percent: float, *accepts: str, recipe: PublishedRecipe | None = None
) -> Entry:
    accuracy = PublishedAccuracy(round(top1_percent / 100, 5), round(top5_percent / 100, 5), _TORCHVISION)
    return Entry(accepts=accepts, published=accuracy, recipe=recipe)


# Without a recipe: EfficientNet, whose weights are not torchvision's own; mnasnet0_5 and the bypass variants, whose
# recipe was not found.
# Repeated augmentation (--ra-reps) does not change how many pictures an epoch has.
_REGISTRY: dict[str, Entry] = {
    "squeezenet1_0": _squeezenet(_V1_0, PublishedAccuracy(0.58092, 0.80420, _TORCHVISION), _EPOCHS_100),
    "squeezenet1_1": _squeezenet(_V1_1, PublishedAccuracy(0.58178, 0.80624, _TORCHVISION), _EPOCHS_100),
    "squeezenet1_0_caffe": _squeezenet(
        {**_V1_0, "conv10_pad": 1, "init": "caffe"},
        PublishedAccuracy(0.575, 0.803, _PAPER.format(2)),
        _SQUEEZENET_AUTHORS,
    ),
    "squeezenet1_1_caffe": _squeezenet(
        {**_V1_1, "init": "caffe"},
        PublishedAccuracy(0.58382, 0.810, "the authors' Caffe weights as evaluated in OpenVINO's model documentation"),
        _SQUEEZENET_AUTHORS,
    ),
    "squeezenet1_0_simple_bypass": _squeezenet(
        {**_V1_0, "bypass": "simple"}, PublishedAccuracy(0.604, 0.825, _PAPER.format(3))
    ),
    "squeezenet1_0_complex_bypass": _squeezenet(
        {**_V1_0, "bypass": "complex"}, PublishedAccuracy(0.588, 0.820, _PAPER.format(3))
    ),
    "squeezenet_small": _squeezenet(_SMALL),
    "squeezenet_small_simple_bypass": _squeezenet({**_SMALL, "bypass": "simple"}),
    "alexnet": _torchvision(56.522, 79.066, "dropout", recipe=_EPOCHS_90),
    "vgg11": _torchvision(69.020, 88.628, "dropout", recipe=_EPOCHS_90),
    "vgg11_bn": _torchvision(70.370, 89.810, "dropout", recipe=_EPOCHS_90),
    "vgg13": _torchvision(69.928, 89.246, "dropout", recipe=_EPOCHS_90),
    "vgg13_bn": _torchvision(71.586, 90.374, "dropout", recipe=_EPOCHS_90),
    "vgg16": _torchvision(71.592, 90.382, "dropout", recipe=_EPOCHS_90),
    "vgg16_bn": _torchvision(73.360, 91.516, "dropout", recipe=_EPOCHS_90),
    "vgg19": _torchvision(72.376, 90.876, "dropout", recipe=_EPOCHS_90),
    "vgg19_bn": _torchvision(74.218, 91.842, "dropout", recipe=_EPOCHS_90),
    "resnet18": _torchvision(69.758, 89.078, "zero_init_residual", recipe=_EPOCHS_90),
    "resnet34": _torchvision(73.314, 91.420, "zero_init_residual", recipe=_EPOCHS_90),
    "resnet50": _torchvision(76.130, 92.862, "zero_init_residual", recipe=_EPOCHS_90),
    "resnet101": _torchvision(77.374, 93.546, "zero_init_residual", recipe=_EPOCHS_90),
    "resnet152": _torchvision(78.312, 94.046, "zero_init_residual", recipe=_EPOCHS_90),
    "mobilenet_v2": _torchvision(71.878, 90.286, "width_mult", "dropout", recipe=_EPOCHS_300),
    "mobilenet_v3_small": _torchvision(67.668, 87.402, "width_mult", "dropout", recipe=_EPOCHS_600),
    "mobilenet_v3_large": _torchvision(74.042, 91.340, "width_mult", "dropout", recipe=_EPOCHS_600),
    "shufflenet_v2_x0_5": _torchvision(60.552, 81.746, recipe=_SHUFFLENET_AUTHORS),
    "shufflenet_v2_x1_0": _torchvision(69.362, 88.316, recipe=_SHUFFLENET_AUTHORS),
    "shufflenet_v2_x1_5": _torchvision(72.996, 91.086, recipe=_EPOCHS_600),
    "shufflenet_v2_x2_0": _torchvision(76.230, 93.006, recipe=_EPOCHS_600),
    "mnasnet0_5": _torchvision(67.734, 87.490, "dropout"),
    "mnasnet0_75": _torchvision(71.180, 90.496, "dropout", recipe=_MNASNET_OTHERS),
    "mnasnet1_0": _torchvision(73.456, 91.510, "dropout", recipe=_MNASNET_1_0),
    "mnasnet1_3": _torchvision(76.506, 93.522, "dropout", recipe=_MNASNET_OTHERS),
    "efficientnet_b0": _torchvision(77.692, 93.532, "dropout", "stochastic_depth_prob"),
    "efficientnet_b1": _torchvision(78.642, 94.186, "dropout", "stochastic_depth_prob"),
    "efficientnet_b2": _torchvision(80.608, 95.310, "dropout", "stochastic_depth_prob"),
    "efficientnet_b3": _torchvision(82.008, 96.054, "dropout", "stochastic_depth_prob"),
}


def names() -> tuple[str, ...]:
    """Every model that `build` knows, SqueezeNet first, then by family and size."""
    return tuple(_REGISTRY)


def check(name: str, metaparameters: Iterable[str] = ()) -> None:
    """Whether the registry has the model and the model takes these metaparameters; their values are not looked at.

    Raises:
        ConfigError: unknown model or metaparameter, with the nearest one that exists.
    """
    require(name in _REGISTRY, f"There is no model {name!r}.{nearest(name, _REGISTRY)} Known: {', '.join(_REGISTRY)}.")
    accepts = _REGISTRY[name].accepts
    for key in metaparameters:
        if key not in accepts:
            known = f"It takes {', '.join(accepts)}." if accepts else "It takes none."
            raise ConfigError(f"{name} has no metaparameter {key!r}.{nearest(str(key), accepts)} {known}")


def build(name: str, num_classes: int = 1000, **metaparameters: Any) -> "nn.Module":
    """A freshly initialised network that maps normalised (B, 3, H, W) pictures to (B, num_classes) logits.

    Weights are drawn from torch's global generator and made on torch's default device (`with torch.device("meta")`
    gives a network without memory).

    Raises:
        ConfigError: unknown model, unknown metaparameter, or an impossible value.
    """
    check(name, metaparameters)
    require(
        isinstance(num_classes, int) and num_classes >= 1,
        f"num_classes={num_classes!r} must be a whole number of at least 1.",
    )
    entry = _REGISTRY[name]
    if entry.ours:
        from pipeline.models.squeezenet import SqueezeNet

        return SqueezeNet(num_classes, **{**entry.preset, **metaparameters})

    _check_values(name, metaparameters)
    import torchvision

    return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **metaparameters)


def _check_values(name: str, metaparameters: Mapping[str, Any]) -> None:
    """Ranges of torchvision's arguments, which it does not check itself."""
    for key, value in metaparameters.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key == "zero_init_residual":
            valid, rule = isinstance(value, bool), "true or false"
        elif key == "width_mult":
            valid, rule = is_number and value > 0, "a factor above 0, such as 0.5"
        else:
            valid, rule = is_number and 0 <= value < 1, "a share in [0, 1), such as 0.2"
        require(valid, f"{name}: {key}={value!r} must be {rule}.")


def published_accuracy(name: str) -> PublishedAccuracy | None:
    """What others report for this model on ImageNet with its default metaparameters; None: nothing is published.

    torchvision's figures are those of the first recipe of each model (V1), the ones closest to the papers.

    Raises:
        ConfigError: unknown model.
    """
    check(name)
    return _REGISTRY[name].published


def published_recipe(name: str) -> PublishedRecipe | None:
    """For how long the model was trained to its published accuracy; None: no source was found.

    Raises:
        ConfigError: unknown model.
    """
    check(name)
    return _REGISTRY[name].recipe


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """`squeezenet1_0:sr=0.5,pool_after=[1,2,3],bypass=simple` as a name and metaparameters for `build`.

    A value is JSON where it is valid JSON (numbers, true, false, null, lists), otherwise a word.

    Raises:
        ConfigError: not of this form, or a model or metaparameter that does not exist.
    """
    name, colon, tail = spec.strip().partition(":")
    metaparameters: dict[str, Any] = {}
    for item in split_outside_brackets(tail) if colon else ():
        key, equals, value = (part.strip() for part in item.partition("="))
        require(
            bool(key and equals and value),
            f"{spec!r}: {item!r} is not of the form key=value, as in squeezenet1_0:sr=0.5,bypass=simple.",
        )
        require(key not in metaparameters, f"{spec!r} gives {key} twice: keep one.")
        metaparameters[key] = _value(value)
    check(name, metaparameters)
    return name, metaparameters


def format_spec(name: str, metaparameters: Mapping[str, Any]) -> str:
    """The inverse of `parse_spec`, without spaces, metaparameters in alphabetical order."""
    items = (
        f"{key}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"
        for key, value in sorted(metaparameters.items())
    )
    return f"{name}:{','.join(items)}" if metaparameters else name


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
