"""Models by name: built, checked, and written as specs such as `squeezenet1_0:sr=0.5`. The table is `config.registry`;
those of others, such as `timm:resnet10t`, are `external`'s.

Nothing here imports torch until `build` is called, so that a command can list, check and explain names at once.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline.config.model import MAX_CLASSES, ModelConfig
from pipeline.config.registry import MODELS, TORCHVISION_STEMS, PublishedAccuracy, PublishedRecipe
from pipeline.core.errors import ConfigError
from pipeline.core.overrides import split_outside_brackets
from pipeline.core.typed import is_number, is_whole, nearest, require
from pipeline.models import external

if TYPE_CHECKING:
    from torch import nn

MAX_WIDTH_FACTOR = 100
FOR_SMALL_PICTURES = "squeezenet_small"
_OF_OTHERS = re.compile(r"[\w.-]+(?=:|$)", re.ASCII)
"""What follows the colon of somebody else's model; metaparameters come after one more colon."""


def names() -> tuple[str, ...]:
    """Return every model that `build` knows, SqueezeNet first, then by family and size."""
    return tuple(MODELS)


def check(name: str, metaparameters: Iterable[str] = ()) -> None:
    """Refuse a model that is not in the table, or metaparameters that it does not take; values are not looked at.

    Which models and arguments others have, only they know: `build` asks them.

    Raises:
        ConfigError: unknown model or metaparameter, with the nearest one that exists.
    """
    if external.is_external(name) and name.partition(":")[0] not in MODELS:
        external.check(name, metaparameters)
        return
    base, colon, _ = name.partition(":")
    require(
        not colon,
        f"model={name!r} is not taken: write model={base}, and model.metaparameters.KEY=VALUE for what differs.",
    )
    require(
        name in MODELS,
        f"There is no model {name!r}.{nearest(name, MODELS)} Known: {', '.join(MODELS)}; and {external.FORMS}.",
    )
    accepts = MODELS[name].accepts
    for key in metaparameters:
        if key not in accepts:
            known = f"It takes {', '.join(accepts)}." if accepts else "It takes none."
            raise ConfigError(f"{name} has no metaparameter {key!r}.{nearest(str(key), accepts)} {known}")


def check_pictures(model: ModelConfig, side: int, *, per_rank: int | None = None) -> None:
    """Refuse pictures that the model cannot take, or cannot train on.

    Args:
        model: Name and metaparameters of the model.
        side: Side of a picture in pixels.
        per_rank: Pictures that a rank trains on at once; None: nothing is trained.

    Raises:
        ConfigError: with the smallest side that is taken. As `check`, and for impossible values of SqueezeNet's
            metaparameters.
    """
    check(model.name, model.metaparameters)
    if external.is_external(model.name):
        return  # trial.py tries it
    entry = MODELS[model.name]
    given: dict[str, Any] = model.metaparameters
    sides = entry if entry.preset is None else replace(entry.preset, **given)
    require(
        side >= sides.min_side,
        f"{model.name} cannot take pictures of {side} x {side} pixels, of which its downsampling leaves nothing: set"
        f" data.size to {sides.min_side} or more, or take a model for small pictures, such as"
        f" model={FOR_SMALL_PICTURES}.",
    )
    require(
        per_rank != 1 or side > sides.max_side_of_one_value,
        f"{model.name} cannot train on one picture of {side} x {side} pixels at a time: BatchNorm layers would see a"
        " single value per channel. Give each rank two or more at once (raise batch.global_size and"
        f" batch.max_per_rank), or set data.size to {sides.max_side_of_one_value + 1} or more.",
    )


def build(name: str, num_classes: int = 1000, *, allow_code: bool = False, **metaparameters: object) -> "nn.Module":
    """Return a freshly initialised network that maps normalised (B, 3, H, W) pictures to (B, num_classes) logits.

    Weights are drawn from torch's global generator and made on torch's default device (`with torch.device("meta")`
    gives a network without memory).

    Args:
        name: Of the model.
        num_classes: Outputs of the classifier.
        allow_code: Whether `package.module:factory` and `path/to/file.py:factory` may run.
        **metaparameters: What makes a variant of the model.

    Raises:
        ConfigError: unknown model, unknown metaparameter, or an impossible value; somebody else's code that may not
            run, or fails.
    """
    check(name, metaparameters)
    require(
        is_whole(num_classes) and 1 <= num_classes <= MAX_CLASSES,
        f"num_classes={num_classes!r} must be a whole number from 1 to {MAX_CLASSES:,}.",
    )
    if external.is_external(name):
        return external.build(name, num_classes, metaparameters, allow_code=allow_code)
    entry = MODELS[name]
    if entry.preset is not None:
        from pipeline.models.squeezenet import SqueezeNet

        return SqueezeNet(num_classes, replace(entry.preset, **metaparameters))

    _check_values(name, metaparameters)
    import torchvision

    stem = metaparameters.pop("stem", TORCHVISION_STEMS[0])
    model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **metaparameters)
    if stem == "small":
        from pipeline.models.small_stems import make_small

        make_small(model)
    return model


def build_shapes(name: str, num_classes: int, *, allow_code: bool = False, **metaparameters: object) -> "nn.Module":
    """Return a network of which only names and shapes matter: without memory, unless its maker cannot do without.

    Raises:
        ConfigError: As `build`.
    """
    import torch

    try:
        with torch.device("meta"):
            return build(name, num_classes, allow_code=allow_code, **metaparameters)
    except ConfigError:
        if not external.is_external(name):
            raise
    return build(name, num_classes, allow_code=allow_code, **metaparameters)


def _check_values(name: str, metaparameters: Mapping[str, object]) -> None:
    """Check the ranges of torchvision's arguments, which it does not check itself."""
    for key, value in metaparameters.items():
        if key == "zero_init_residual":
            valid, rule = isinstance(value, bool), "true or false"
        elif key == "stem":
            valid, rule = value in TORCHVISION_STEMS, f"one of {', '.join(TORCHVISION_STEMS)}"
        elif key == "width_mult":
            valid, rule = (
                is_number(value) and 0 < value <= MAX_WIDTH_FACTOR,
                (f"a factor above 0 and at most {MAX_WIDTH_FACTOR}, such as 0.5"),
            )
        else:
            valid, rule = is_number(value) and 0 <= value < 1, "a share in [0, 1), such as 0.2"
        require(valid, f"{name}: {key}={value!r} must be {rule}.")


def published_accuracy(name: str) -> PublishedAccuracy | None:
    """Return what others report for this model on ImageNet with its default metaparameters; None: nothing is published.

    torchvision's figures are those of the first recipe of each model (V1), the ones closest to the papers.

    Raises:
        ConfigError: unknown model.
    """
    check(name)
    return external.published_accuracy(name) if external.is_external(name) else MODELS[name].published


def published_recipe(name: str) -> PublishedRecipe | None:
    """Return for how long the model was trained to its published accuracy; None: no source was found.

    Raises:
        ConfigError: unknown model.
    """
    check(name)
    return None if external.is_external(name) else MODELS[name].recipe


def parse_spec(spec: str) -> tuple[str, dict[str, object]]:
    """Return the name and metaparameters that `squeezenet1_0:sr=0.5,pool_after=[1,2,3],bypass=simple` stands for.

    `timm:resnet10t:drop_rate=0.1` is `timm:resnet10t` with what comes after the second colon.

    A value is JSON where it is valid JSON (numbers, true, false, null, lists), otherwise a word.

    Raises:
        ConfigError: not of this form, or a model or metaparameter that does not exist.
    """
    name, colon, tail = spec.strip().partition(":")
    if colon and name not in MODELS and _OF_OTHERS.match(tail):
        what, colon, tail = tail.partition(":")
        name = f"{name}:{what}"
    metaparameters: dict[str, object] = {}
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


def format_spec(name: str, metaparameters: Mapping[str, object]) -> str:
    """Write the spec that `parse_spec` reads, without spaces, metaparameters in alphabetical order."""
    items = (
        f"{key}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'), default=str)}"
        for key, value in sorted(metaparameters.items())
    )
    return f"{name}:{','.join(items)}" if metaparameters else name


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def head_of(model: "nn.Module", num_classes: int) -> str:
    """Return the name of the layer that gives the classes: the last one with so many outputs, else with weights.

    Args:
        model: Any network.
        num_classes: Its outputs.
    """
    from torch import nn

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    fitting = [name for name, layer in layers if len(layer.weight) == num_classes]
    return fitting[-1] if fitting else list(model.state_dict())[-1].rpartition(".")[0]
