"""Weights made elsewhere: the Caffe-named `.npz` of SqueezeNet v1.0, loaded strictly."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.core.errors import CheckpointError
from pipeline.core.files import open_regular, what_it_is, would_unpack
from pipeline.models.squeezenet import SqueezeNet

if TYPE_CHECKING:
    from numpy.lib.npyio import NpzFile

MAX_NAMES_IN_MESSAGE = 4


def load_npz(path: Path | str, model: nn.Module) -> None:
    """Copy Caffe-named arrays into our SqueezeNet.

    The file holds `<layer>.weight` (filters, channels, height, width) and `<layer>.bias` for every convolution:
    `conv1`, `fire2/squeeze1x1`, `fire2/expand1x1`, `fire2/expand3x3`, ..., `conv10`. Caffe's networks expect BGR pixels
    of 0..255 minus a mean, which is the input of the `*_caffe` models.

    Raises:
        CheckpointError: the file is missing or damaged; a name is missing or unknown; a shape differs; a value is not
            finite; the model is no SqueezeNet. The model is then unchanged.
    """
    path = Path(path)
    if not isinstance(model, SqueezeNet):
        raise CheckpointError(
            f"{path} holds SqueezeNet's Caffe layers, which do not fit {type(model).__name__}:"
            " use model=squeezenet1_0_caffe."
        )
    targets: dict[str, Tensor] = {}
    for name, conv in model.named_convolutions():
        targets[f"{name}.weight"] = conv.weight
        if conv.bias is not None:  # a BatchNorm stands in its place, of which the file knows nothing
            targets[f"{name}.bias"] = conv.bias
    try:
        if wrong := what_it_is(path):
            raise CheckpointError(f"{path} is not a readable .npz file: it {wrong}.")
        with open_regular(path) as file:
            if wrong := would_unpack(file):
                raise CheckpointError(f"{path} {wrong}: it holds no weights.")
            with np.load(file, allow_pickle=False) as archive:
                arrays = _tensors_of(archive)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist: give the path of a .npz file.") from error
    except CheckpointError:
        raise
    except Exception as error:  # zlib, zipfile and NumPy have many words for a file that is not theirs
        reason = "it holds pickled objects" if "pickle" in str(error) else error  # numpy advises to run them
        raise CheckpointError(f"{path} is not a readable .npz file ({reason}): copy it again.") from error
    _copy_strictly(arrays, targets, path)


def _tensors_of(archive: "NpzFile") -> dict[str, Tensor]:
    """Return every array of an open archive; `TypeError` for one that is not of real numbers."""
    return {name: torch.from_numpy(archive[name]) for name in archive.files}


def _copy_strictly(source: Mapping[str, Tensor], targets: Mapping[str, Tensor], path: Path) -> None:
    """Copy all or nothing: names and shapes must agree one to one and every value must be finite."""
    missing = [name for name in targets if name not in source]
    unknown = [name for name in source if name not in targets]
    if missing or unknown:
        parts = [f"{verb} {_shorten(found)}" for verb, found in (("lacks", missing), ("also holds", unknown)) if found]
        raise CheckpointError(
            f"{path} {' and '.join(parts)}: it belongs to another model; choose the one it was made by."
        )
    for name, target in targets.items():
        if source[name].shape != target.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(source[name].shape)}, the model {tuple(target.shape)}:"
                " choose the model, its metaparameters and num_classes that the file was made with. The authors'"
                " weights of SqueezeNet v1.0 are model=squeezenet1_0_caffe."
            )
        if not torch.isfinite(source[name]).all():
            raise CheckpointError(f"{path}: {name} holds values that are not finite: copy the file again.")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(source[name])


def _shorten(found: Iterable[str]) -> str:
    listed = list(found)
    more = len(listed) - MAX_NAMES_IN_MESSAGE
    return ", ".join(listed[:MAX_NAMES_IN_MESSAGE]) + (f" and {more} more" if more > 0 else "")
