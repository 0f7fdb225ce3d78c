"""The weights that a run begins with, and which of them stay as they are."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from pipeline.config.training import TrainConfig
from pipeline.core.errors import ConfigError
from pipeline.core.files import sha256_of_file
from pipeline.core.typed import nearest
from pipeline.models import zoo
from pipeline.models.external import is_external
from pipeline.models.trial import try_out
from pipeline.training.setup import Shards
from pipeline.training.trained import Trained, find_checkpoint, load_trained

ALL_BUT_HEAD = "all_but_head"


def make_model(
    config: TrainConfig, shards: Shards, say: Callable[[str], None], *, num_ranks: int, is_fresh: bool
) -> tuple[nn.Module, list[nn.Module]]:
    """Return the model with the weights that a run begins with, and its modules that are not trained.

    Args:
        config: Of the command.
        shards: Give the classes.
        say: Told where the weights come from.
        num_ranks: That train it.
        is_fresh: Whether there is no checkpoint yet to go on from.

    Raises:
        CheckpointError, ConfigError: As `begin_from` and `freeze`.
        ConfigError: As `zoo.build`; or a network that others wrote cannot be trained.
    """
    told, num_classes = config.model, shards.num_classes
    model = zoo.build(told.name, num_classes, allow_code=told.allow_code, **told.metaparameters)
    if is_external(told.name):
        per_rank = config.batch.split(num_ranks).per_rank
        try_out(model, told.name, num_classes=num_classes, side=config.input.size, per_rank=per_rank)
    if config.init.checkpoint is not None and is_fresh:
        for said in begin_from(config, model, num_classes, shards.training.classes):
            say(f"{config.name} {said}.")
    return model, freeze(model, config.init.freeze, num_classes)


def sha256_of_beginning(config: TrainConfig) -> str | None:
    """Return the hexadecimal SHA-256 of the weights that a new run begins with; None: they are drawn."""
    path = config.init.checkpoint
    return None if path is None else sha256_of_file(find_checkpoint(Path(path)))


def begin_from(config: TrainConfig, model: nn.Module, num_classes: int, classes: Sequence[str] | None) -> list[str]:
    """Take the weights of `init.checkpoint` over into a model that was just drawn.

    Args:
        config: Of the command; its `init.checkpoint` is given.
        model: Takes them over.
        num_classes: Number of its outputs.
        classes: Class names of the training split in the order of its labels; None: they are not known.

    Returns:
        Sentences: where the weights come from, and in what this run is not like their training.

    Raises:
        CheckpointError: No such file, damaged, or of another model.
        ConfigError: The head is of other classes, and nobody says what shall become of it.
    """
    assert config.init.checkpoint is not None
    asked = replace(config.model, num_classes=None)
    trained = load_trained(Path(config.init.checkpoint), asked, size=config.data.size)
    head = zoo.head_of(model, num_classes)
    state = trained.model.state_dict()
    keeps_head = _keeps_head(config.init.head, trained, num_classes, classes)
    if not keeps_head:
        state = {name: value for name, value in state.items() if not name.startswith(f"{head}.")}
    model.load_state_dict(state, strict=keeps_head)
    what = "the head included" if keeps_head else f"but for the head ({head}), which is drawn anew"
    said = [f"begins with {trained.name} from {trained.origin}{trained.unwrapped}, {what}"]
    if keeps_head and trained.classes is not None and classes is not None and list(trained.classes) != list(classes):
        said.append("keeps a head whose classes have other names or another order (init.head=keep)")
    for key in ("channel_order", "mean", "std"):
        was, now = getattr(trained.input, key), getattr(config.input, key)
        if was != now:
            said.append(f"model.input.{key} is {now}, and was {was} where the weights come from")
    if dict(trained.metaparameters) != config.model.metaparameters:
        said.append(
            f"model.metaparameters are {config.model.metaparameters}, and were {dict(trained.metaparameters)} where the"
            " weights come from"
        )
    return said


def _keeps_head(asked: str | None, trained: Trained, num_classes: int, classes: Sequence[str] | None) -> bool:
    are_as_many = trained.num_outputs == num_classes
    are_same = are_as_many and (trained.classes is None or classes is None or list(trained.classes) == list(classes))
    if asked == "new":
        return False
    if asked is None and are_same:
        return True
    if asked is None:
        what = (
            f"{trained.num_outputs} outputs, and this run has {num_classes} classes"
            if not are_as_many
            else "a head of classes with other names or in another order"
        )
        raise ConfigError(
            f"init.checkpoint: {trained.origin} has {what}: add init.head=new to draw the last layer anew"
            f"{', or init.head=keep to go on with it as it is' if are_as_many else ''}."
        )
    if not are_as_many:
        raise ConfigError(
            f"init.head=keep: {trained.origin} has {trained.num_outputs} outputs, and this run has {num_classes}"
            f" classes: use init.head=new, or set model.num_classes={trained.num_outputs} if there are no more classes."
        )
    return True


def freeze(model: nn.Module, names: Iterable[str], num_classes: int) -> list[nn.Module]:
    """Take parameters out of the training; returns the modules that were named.

    Args:
        model: Whose parameters no longer require a gradient.
        names: Of its modules, such as `features.3`, or `all_but_head`.
        num_classes: Its outputs.

    Raises:
        ConfigError: A name is of no module with parameters, or nothing would be left to train.
    """
    modules = {
        name: module for name, module in model.named_modules() if name and any(True for _ in module.parameters())
    }
    head = zoo.head_of(model, num_classes)
    frozen: list[nn.Module] = []
    for name in names:
        if name == ALL_BUT_HEAD:
            frozen += [module for at, module in modules.items() if not f"{head}.".startswith(f"{at}.")]
        elif name in modules:
            frozen.append(modules[name])
        else:
            tops = ", ".join(at for at in modules if "." not in at)
            guess = nearest(name, [*modules, ALL_BUT_HEAD])
            raise ConfigError(
                f"init.freeze: the model has no module {name!r} with parameters.{guess} Its parts are {tops};"
                f" {ALL_BUT_HEAD} is all but {head}."
            )
    for module in frozen:
        module.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("init.freeze leaves nothing to train: name fewer modules.")
    return frozen
