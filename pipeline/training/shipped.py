"""Files that `export` wrote, as weights to use: packages and ONNX."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline.core.errors import CheckpointError
from pipeline.core.files import read_regular, what_it_is
from pipeline.run import checkpoint as checkpoints

if TYPE_CHECKING:
    from pipeline.models.onnx_network import OnnxNetwork

PACKAGE, ONNX = ".sqz", ".onnx"
MAX_PACKAGE_BYTES = 1 << 30


def read_package(path: Path) -> checkpoints.Content:
    """Return what an over-the-air package holds, in the form of a checkpoint.

    Raises:
        CheckpointError: There is no such file, or it is no sound package.
    """
    from pipeline.models.sqz.decoder import decode

    try:
        package = decode(read_regular(path, MAX_PACKAGE_BYTES))
        state = {name: torch.from_numpy(values.copy()) for name, values in package.tensors().items()}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}): give the path of a file.") from error
    except Exception as error:  # whatever the decoder stumbles over in a file made to harm
        raise CheckpointError(f"{path} is no sound package ({error}): copy it again, or export it anew.") from error
    as_float = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    return {checkpoints.SECTION: dict(package.meta), "state_dict": as_float}


def read_onnx(path: Path) -> "tuple[OnnxNetwork, checkpoints.Content]":
    """Return the network of an ONNX file of ours, and what it says of itself in the form of a checkpoint.

    Raises:
        CheckpointError: There is no such file, ONNX Runtime cannot read it, or `export` did not write it.
    """
    from pipeline.models.onnx_network import OnnxNetwork, description_of, session_of

    if wrong := what_it_is(path):
        raise CheckpointError(f"{path} {wrong}.")
    try:
        session = session_of(path)
        section = description_of(session)
    except Exception as error:  # its own classes, which have no base of their own
        first = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} is no ONNX file that can be run ({first}): export it anew.") from error
    if section is None:
        raise CheckpointError(f"{path} does not say what its pictures and classes are: `export` did not write it.")
    return OnnxNetwork(session), {checkpoints.SECTION: section}
