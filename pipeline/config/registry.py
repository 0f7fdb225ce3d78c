"""Every model by name: what `model=NAME` builds, which metaparameters it takes, and what is published about it.

A model joins with a row here. If its input is not that of torchvision's older weights (`InputConfig`'s defaults), it
has a file `conf/model/NAME.yaml` too; without one, the row is all that `model=NAME` needs.
"""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, cast

from pipeline.config.model import InputConfig, ModelConfig
from pipeline.config.squeezenet import SqueezeNetConfig
from pipeline.core.groups import CONF_DIRECTORY
from pipeline.core.overrides import BY_REFERENCE
from pipeline.core.typed import build


@dataclass(frozen=True)
class PublishedAccuracy:
    """Accuracy on ImageNet's 50,000 validation pictures that others report, as fractions of 1."""

    top1: float
    top5: float
    source: str


@dataclass(frozen=True)
class PublishedRecipe:
    """For how long the training took that led, or is said to have led, to the published accuracy."""

    epochs: float
    """Passes over ImageNet's training split."""
    source: str


TORCHVISION_STEMS = ("torchvision", "small")
"""What ResNets and mobilenet_v2 take as `stem`: their own, or one that halves a picture twice less, so that 32x32
pixels reach the end as 4x4."""


@dataclass(frozen=True)
class ModelEntry:
    """One row of the table."""

    accepts: tuple[str, ...]
    """Metaparameters that the model takes."""
    preset: SqueezeNetConfig | None = None
    """The SqueezeNet that this name stands for; a metaparameter given wins. None: the model is torchvision's."""
    published: PublishedAccuracy | None = None
    recipe: PublishedRecipe | None = None
    min_side: int = 1
    """Torchvision's models: side in pixels of the smallest picture of which downsampling leaves something."""
    max_side_of_one_value: int = 0
    """Side of the largest picture of which a BatchNorm layer sees one value per channel; 0: there is none. Training
    refuses a batch of one such picture."""


_SQUEEZENET_METAPARAMETERS = tuple(entry.name for entry in fields(SqueezeNetConfig))
_V1_0 = SqueezeNetConfig()
_V1_1 = SqueezeNetConfig(stem="v1.1", pool_after=(1, 3, 5))
# v1.1's places to downsample: 32x32 becomes 16, 8 and 4, and late enough for a plain CPU.
# conv10's ReLU is off: with it, ln(classes) is an absorbing state, and the author knew no reason for it
# (forresti/SqueezeNet issue 10).
_SMALL = SqueezeNetConfig(stem="small", pool_after=(1, 3, 5), final_relu=False)

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
    preset: SqueezeNetConfig, published: PublishedAccuracy | None = None, recipe: PublishedRecipe | None = None
) -> ModelEntry:
    return ModelEntry(_SQUEEZENET_METAPARAMETERS, preset, published, recipe)


def _torchvision(
    top1_percent: float, top5_percent: float, *accepts: str, recipe: PublishedRecipe | None = None, min_side: int = 1
) -> ModelEntry:
    accuracy = PublishedAccuracy(round(top1_percent / 100, 5), round(top5_percent / 100, 5), _TORCHVISION)
    # Those that take pictures of any size halve them five times, rounded up, and then have a BatchNorm layer.
    of_one_value = 2**5 if min_side == 1 else 0
    return ModelEntry(accepts, None, accuracy, recipe, min_side, of_one_value)


# Without a recipe: EfficientNet, whose weights are not torchvision's own; mnasnet0_5 and the bypass variants, whose
# recipe was not found.
# Repeated augmentation (--ra-reps) does not change how many pictures an epoch has.
MODELS: dict[str, ModelEntry] = {
    "squeezenet1_0": _squeezenet(_V1_0, PublishedAccuracy(0.58092, 0.80420, _TORCHVISION), _EPOCHS_100),
    "squeezenet1_1": _squeezenet(_V1_1, PublishedAccuracy(0.58178, 0.80624, _TORCHVISION), _EPOCHS_100),
    "squeezenet1_0_caffe": _squeezenet(
        replace(_V1_0, conv10_pad=1, init="caffe"),
        PublishedAccuracy(0.575, 0.803, _PAPER.format(2)),
        _SQUEEZENET_AUTHORS,
    ),
    "squeezenet1_1_caffe": _squeezenet(
        replace(_V1_1, init="caffe"),
        PublishedAccuracy(0.58382, 0.810, "the authors' Caffe weights as evaluated in OpenVINO's model documentation"),
        _SQUEEZENET_AUTHORS,
    ),
    "squeezenet1_0_simple_bypass": _squeezenet(
        replace(_V1_0, bypass="simple"), PublishedAccuracy(0.604, 0.825, _PAPER.format(3))
    ),
    "squeezenet1_0_complex_bypass": _squeezenet(
        replace(_V1_0, bypass="complex"), PublishedAccuracy(0.588, 0.820, _PAPER.format(3))
    ),
    "squeezenet_small": _squeezenet(_SMALL),
    "squeezenet_small_simple_bypass": _squeezenet(replace(_SMALL, bypass="simple")),
    "alexnet": _torchvision(56.522, 79.066, "dropout", recipe=_EPOCHS_90, min_side=63),
    "vgg11": _torchvision(69.020, 88.628, "dropout", recipe=_EPOCHS_90, min_side=32),
    "vgg11_bn": _torchvision(70.370, 89.810, "dropout", recipe=_EPOCHS_90, min_side=32),
    "vgg13": _torchvision(69.928, 89.246, "dropout", recipe=_EPOCHS_90, min_side=32),
    "vgg13_bn": _torchvision(71.586, 90.374, "dropout", recipe=_EPOCHS_90, min_side=32),
    "vgg16": _torchvision(71.592, 90.382, "dropout", recipe=_EPOCHS_90, min_side=32),
    "vgg16_bn": _torchvision(73.360, 91.516, "dropout", recipe=_EPOCHS_90, min_side=32),
    "vgg19": _torchvision(72.376, 90.876, "dropout", recipe=_EPOCHS_90, min_side=32),
    "vgg19_bn": _torchvision(74.218, 91.842, "dropout", recipe=_EPOCHS_90, min_side=32),
    "resnet18": _torchvision(69.758, 89.078, "zero_init_residual", "stem", recipe=_EPOCHS_90),
    "resnet34": _torchvision(73.314, 91.420, "zero_init_residual", "stem", recipe=_EPOCHS_90),
    "resnet50": _torchvision(76.130, 92.862, "zero_init_residual", "stem", recipe=_EPOCHS_90),
    "resnet101": _torchvision(77.374, 93.546, "zero_init_residual", "stem", recipe=_EPOCHS_90),
    "resnet152": _torchvision(78.312, 94.046, "zero_init_residual", "stem", recipe=_EPOCHS_90),
    "mobilenet_v2": _torchvision(71.878, 90.286, "width_mult", "dropout", "stem", recipe=_EPOCHS_300),
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


def preset_input(name: str) -> InputConfig:
    """Return the pictures that `model=NAME` expects unless it is told otherwise."""
    # Listed, not asked for: a checkpoint of others may say any name.
    path = next((one for one in (CONF_DIRECTORY / "model").glob("*.yaml") if one.stem == name), None)
    if path is None:
        return InputConfig()
    from omegaconf import OmegaConf

    return build(InputConfig, cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path).input)))


def register() -> None:
    """Make each model without a file in conf/model a choice of Hydra's group `model`, and `own`, for those of others.

    Without Hydra no command runs, but the networks, the pixels and a step's arithmetic do.
    """
    try:
        from hydra.core.config_store import ConfigStore
    except ModuleNotFoundError:
        return

    for choice, name in {**{name: name for name in MODELS}, BY_REFERENCE: "???"}.items():
        if not (CONF_DIRECTORY / "model" / f"{choice}.yaml").exists():
            node: dict[str, Any] = asdict(ModelConfig(name=name))
            ConfigStore.instance().store(group="model", name=choice, node=node)
