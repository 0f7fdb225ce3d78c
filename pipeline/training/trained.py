"""A network with its weights and what it was made for, from any file that holds weights.

A checkpoint of ours says all of it: the model with its metaparameters, the names of its classes, the pictures it
expects. Others say less, and what they leave open is asked for, never guessed.
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config.model import InputConfig, ModelConfig
from pipeline.config.registry import preset_input
from pipeline.core.errors import CheckpointError, ConfigError, DataError
from pipeline.core.typed import build
from pipeline.data.pixels import Pixels, SampleError, eval_view
from pipeline.models import zoo
from pipeline.models.caffe import load_npz
from pipeline.models.external import source_sha256
from pipeline.models.normalizer import Normalizer
from pipeline.run import checkpoint as checkpoints
from pipeline.run.wrappers import unwrap
from pipeline.training.shipped import ONNX, PACKAGE, read_onnx, read_package

NUM_IMAGENET_CLASSES = 1000
_NEEDED = frozenset(("model", "num_classes", "metaparameters"))
_OLD_INPUT = "model.input."
"""What checkpoints without a field of its own tell of the input, by dotted key of the configuration."""


class Prediction(NamedTuple):
    """One class of a picture."""

    label: int
    """Number of the output, from 0."""
    name: str | None
    """Of the class; None: the weights do not tell."""
    probability: float


@dataclass(frozen=True)
class Trained:
    """A network with weights, and what is needed to use it."""

    model: nn.Module
    """Maps normalised (B, 3, H, W) pictures to (B, num_outputs) logits. In evaluation mode, on the CPU."""
    name: str
    """Of the model, as in `model=NAME`."""
    num_outputs: int
    input: InputConfig
    """The pictures it expects."""
    classes: tuple[str, ...] | None
    """Class names in the order of the outputs; None: the file does not tell."""
    metaparameters: Mapping[str, object]
    """What makes it a variant of the model."""
    origin: str
    """Where the weights come from, in words."""
    unwrapped: str = ""
    """What the weights were taken out of, as a clause in brackets."""
    differences: tuple[str, ...] = ()
    """A clause for each thing that the caller asked for and that is not as in the training."""
    source_sha256: str | None = None
    """Hexadecimal, of the code that a factory of the user's comes from; None: the model is a library's."""

    def preprocess(self, *pictures: bytes | str | Path) -> Tensor:
        """Return pictures as the network is fed them: cut as in evaluation and normalised.

        Args:
            *pictures: Contents of JPEG or PNG files, or paths of such files.

        Returns:
            float32, (B, 3, size, size), on the device of the weights.

        Raises:
            DataError: One cannot be read, or is no picture.
        """
        views = np.empty((len(pictures), self.input.size, self.input.size, 3), np.uint8)
        for view, picture in zip(views, pictures, strict=True):
            view[:] = _cut(picture, self.input)
        images_BCHW = torch.from_numpy(views).permute(0, 3, 1, 2).to(next(self.model.parameters()).device)
        return Normalizer(self.input)(images_BCHW, torch.contiguous_format)

    @torch.inference_mode()
    def predict(self, *pictures: bytes | str | Path, top: int = 5) -> list[list[Prediction]]:
        """Return the most probable classes of each picture, the most probable first.

        Args:
            *pictures: As of `preprocess`.
            top: How many classes of each.

        Raises:
            DataError: As `preprocess`.
        """
        if not pictures:
            return []
        probabilities_BK = self.model(self.preprocess(*pictures)).float().softmax(dim=1)
        best = probabilities_BK.topk(min(top, self.num_outputs), dim=1)
        return [
            [Prediction(label, self.class_name(label), probability) for label, probability in zip(*row, strict=True)]
            for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def class_name(self, label: int) -> str | None:
        """Return the name of an output; None: it has none, or the file does not tell."""
        return None if self.classes is None or label >= len(self.classes) else self.classes[label]


def _cut(picture: bytes | str | Path, seen: InputConfig) -> Pixels:
    """Return the evaluation view of a picture, or of the regular file at a path; `DataError` names the file."""
    if isinstance(picture, bytes):
        content, where = picture, ""
    else:
        where = f"{picture}: "
        try:
            if not Path(picture).is_file():  # a FIFO would be waited for
                raise DataError(f"{where}there is no such file, or it is no regular one.")
            content = Path(picture).read_bytes()
        except (OSError, ValueError) as error:
            raise DataError(f"{where}cannot be read ({getattr(error, 'strerror', error)}).") from None
    try:
        return eval_view(content, seen)
    except SampleError as error:
        raise DataError(f"{where}{error}.") from None


def find_checkpoint(path: Path) -> Path:
    """Return the file that a path stands for: of a run directory its best checkpoint, else its newest sound one.

    Raises:
        CheckpointError: There is no such file, or no checkpoint in the directory.
    """
    if not path.is_dir():
        return path
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    info = checkpoints.find_best(directory) or checkpoints.find_latest(directory)
    if info is None:
        raise CheckpointError(f"There is no checkpoint in {directory}: train first, or give the path of a file.")
    return info.path


def load_trained(checkpoint: Path, asked: ModelConfig, *, size: int | None = None) -> Trained:
    """Return the network of a checkpoint, a torchvision state dict or the Caffe `.npz`. Nothing in it is executed.

    Args:
        checkpoint: A run directory (its best checkpoint, else its last) or a file.
        asked: What the caller says of the model. A name must be the checkpoint's own, and may be empty where that
            tells it. Fields of `input` that are not the model's usual ones win over the checkpoint's.
        size: Side of the crop in pixels; None: as in the training.

    Raises:
        CheckpointError: No such file, damaged, or of another model.
        ConfigError: It does not say which model it is, and neither does the caller; or pictures of that size are too
            small for it.
    """
    path = find_checkpoint(checkpoint)
    is_caffe = path.suffix == ".npz"
    network, content = read_onnx(path) if path.suffix == ONNX else (None, {} if is_caffe else _read(path))
    section: Mapping[str, Any] = checkpoints.section_of(content, path) if checkpoints.SECTION in content else {}
    if section and (lost := _NEEDED - section.keys()):  # without them another network might fit the weights
        raise CheckpointError(f"{path} is not as it was saved (its {min(lost)!r} is missing): {checkpoints.RESTORE}.")
    with checkpoints.taking("the weights", path):
        state, said = (None, []) if is_caffe or network else _state_dict(content, path)
    name = asked.name or section.get("model")
    if name is None:
        raise ConfigError(f"{path} does not say which model it is: add model=NAME.{_that_fit(state)}")
    metaparameters = {**section.get("metaparameters", {}), **asked.metaparameters}
    num_outputs = (
        asked.num_classes
        or section.get("num_classes")
        or _num_outputs(state, name, metaparameters, allow_code=asked.allow_code)
    )
    with checkpoints.taking("what it says of its pictures", path):
        trained_input = _trained_input(section)
    seen, differences = _input(asked, name, trained_input, size)
    zoo.check_pictures(ModelConfig(name=name, metaparameters=metaparameters), seen.size)
    if state is not None:  # without memory first: the file may say that it is of any size
        shapes = zoo.build_shapes(name, num_outputs, allow_code=asked.allow_code, **metaparameters)
        wanted = shapes.state_dict()
        with checkpoints.taking("the weights", path):
            checkpoints.require_same_model(wanted, state, path=path, model=name, found_model=section.get("model"))
    if network is not None and seen.size != (trained_input or seen).size:
        raise ConfigError(
            f"{path} takes pictures of its own size only: leave data.size out, or export it anew with"
            f" data.size={seen.size}."
        )
    model = network or zoo.build(name, num_outputs, allow_code=asked.allow_code, **metaparameters)
    if state is not None:
        model.load_state_dict(state)
    elif is_caffe:
        load_npz(path, model)
    source = source_sha256(name, allow_code=asked.allow_code)
    was = section.get("must_match", {}).get("model.source_sha256", source)
    if was != source:
        differences.append(f"the code of {name} is another one than in the training")
    classes = section.get("classes")
    return Trained(
        model=model.eval(),
        name=name,
        num_outputs=num_outputs,
        input=seen,
        classes=None if classes is None else tuple(classes),
        metaparameters=metaparameters,
        origin=f"{path} (step {section['step']})" if "step" in section else str(path),
        unwrapped=f" ({'; '.join(said)})" if said else "",
        differences=tuple(differences),
        source_sha256=source,
    )


def _read(path: Path) -> checkpoints.Content:
    """One of our checkpoints, proven by its sidecar, or a file of any origin; nothing in it is executed."""
    if path.suffix == PACKAGE:
        return read_package(path)
    return checkpoints.load(path) if checkpoints.sidecar_path(path).exists() else checkpoints.load_foreign(path)


def _state_dict(content: checkpoints.Content, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Weights under the model's own names, and out of what they were taken where the file is not ours.

    A run with averaged weights validates, and so is judged by, the average.
    """
    if checkpoints.SECTION in content:
        average = content[checkpoints.SECTION].get("learner", {}).get("average")
        state, said = unwrap(average or content["state_dict"])[0], []
    else:
        state, said = unwrap(content)
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} holds no weights: {key!r} is of type {type(value).__name__}, not a tensor. Give a checkpoint,"
                " or the state dict of a model."
            )
    return state, said


def _num_outputs(
    state: Mapping[str, Tensor] | None, name: str, metaparameters: Mapping[str, object], *, allow_code: bool
) -> int:
    """As many as the classifier's weights are for."""
    if state is None:
        return NUM_IMAGENET_CLASSES
    shapes = zoo.build_shapes(name, NUM_IMAGENET_CLASSES, allow_code=allow_code, **metaparameters)
    found = state.get(f"{zoo.head_of(shapes, NUM_IMAGENET_CLASSES)}.weight")
    return len(found) if found is not None and found.ndim else NUM_IMAGENET_CLASSES


def _shapes(name: str, num_outputs: int, metaparameters: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    state = zoo.build_shapes(name, num_outputs, allow_code=False, **metaparameters).state_dict()
    return {key: tuple(value.shape) for key, value in state.items()}


@functools.cache
def _entries(name: str) -> frozenset[str]:
    """Names of a model's weights."""
    return frozenset(_shapes(name, NUM_IMAGENET_CLASSES, {}))


def _that_fit(state: Mapping[str, Tensor] | None) -> str:
    """Name the models whose weights have these names and shapes, as a sentence."""
    if state is None:
        return " The authors' weights are model=squeezenet1_0_caffe."
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    has_filters = any(len(shape) == 4 for shape in shapes.values())  # each model takes a good part of a second to build
    fit = [
        f"model={name}"
        for name in (zoo.names() if has_filters else ())
        if _entries(name) == shapes.keys()
        and _shapes(name, _num_outputs(state, name, {}, allow_code=False), {}) == shapes
    ]
    return f" Its weights have the shapes of {' and of '.join(fit)}." if fit else " No model here has weights like it."


def _input(
    asked: ModelConfig, name: str, trained: InputConfig | None, size: int | None
) -> tuple[InputConfig, list[str]]:
    """The pictures to feed, and what in them is not as in the training, as far as that is known."""
    usual = preset_input(name)
    if trained is None:
        return (asked.input if asked.name else usual).resized(size), []
    base = usual if asked.name else InputConfig()
    wanted = {
        entry.name: getattr(asked.input, entry.name)
        for entry in dataclasses.fields(InputConfig)
        if getattr(asked.input, entry.name) != getattr(base, entry.name)
    }
    seen = dataclasses.replace(trained.resized(size), **wanted)
    return seen, [
        f"model.input.{entry.name} was {getattr(trained, entry.name)} and is {getattr(seen, entry.name)} here"
        for entry in dataclasses.fields(InputConfig)
        if getattr(seen, entry.name) != getattr(trained, entry.name)
    ]


def _trained_input(section: Mapping[str, Any]) -> InputConfig | None:
    """The input of the training; None: the file does not tell."""
    told = section.get("input")
    if told is not None:
        return build(InputConfig, told)
    old = section.get("free_fields") or {}
    told = {key.removeprefix(_OLD_INPUT): value for key, value in old.items() if key.startswith(_OLD_INPUT)}
    return build(InputConfig, told).resized(old.get("data.size")) if told else None
