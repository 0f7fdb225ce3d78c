"""Files without arithmetic of their own: safetensors, deltas; and what every file says of its network."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from pipeline.core.errors import CheckpointError
from pipeline.core.files import read_regular
from pipeline.models.normalizer import Normalizer
from pipeline.models.sqz.decoder import PackageError
from pipeline.models.sqz.delta import apply_delta, make_delta
from pipeline.run.checkpoint_files import SECTION
from pipeline.training.shipped import MAX_PACKAGE_BYTES
from pipeline.training.trained import Trained

NUM_TOLD = 5
"""Classes of the test picture's answer that a file holds."""


def description_of(trained: Trained) -> dict[str, Any]:
    """Return what inference needs besides the weights: the keys of a checkpoint's own part."""
    return {
        "model": trained.name,
        "metaparameters": dict(trained.metaparameters),
        "num_classes": trained.num_outputs,
        "classes": None if trained.classes is None else list(trained.classes),
        "input": dataclasses.asdict(trained.input),
    }


def test_picture(trained: Trained) -> Tensor:
    """Return the test picture as the network is fed it: float32 (1, 3, H, W).

    Every device can make it: red grows to the right, green downwards, blue along both, as integers of 0..255.
    """
    side = trained.input.size
    most = max(1, side - 1)
    across_HW = (torch.arange(side) * 255 // most).expand(side, side)
    both_HW = (torch.arange(side)[:, None] + torch.arange(side)) * 255 // (2 * most)
    picture_BCHW = torch.stack([across_HW, across_HW.T, both_HW])[None].to(torch.uint8)
    return Normalizer(trained.input)(picture_BCHW, torch.contiguous_format)


@torch.inference_mode()
def self_test(network: nn.Module, trained: Trained) -> list[tuple[int, float]]:
    """Return the labels and logits of the test picture's most probable classes, the most probable first."""
    logits_K = network(test_picture(trained))[0].float()
    values, labels = logits_K.topk(min(NUM_TOLD, len(logits_K)))
    return list(zip(labels.tolist(), values.tolist(), strict=True))


def safetensors(trained: Trained, *, is_half: bool) -> tuple[bytes, nn.Module, dict[str, int]]:
    """Return the weights as a .safetensors file, the network that is read from it, and where its bytes are.

    Args:
        trained: The network.
        is_half: Whether floating-point tensors are rounded to fp16.
    """
    state = {
        name: (value.half() if is_half and value.is_floating_point() else value).clone(  # of two names for one tensor
            memory_format=torch.contiguous_format
        )
        for name, value in trained.model.state_dict().items()
    }
    network = copy.deepcopy(trained.model)
    network.load_state_dict({name: value.to(trained.model.state_dict()[name].dtype) for name, value in state.items()})
    said = {**description_of(trained), "self_test": self_test(network, trained)}
    content = save_safetensors(state, {SECTION: json.dumps(said, sort_keys=True)})
    back = load_safetensors(content)
    assert all(torch.equal(back[name], value) for name, value in state.items())
    num_tensor_bytes = sum(value.nbytes for value in state.values())
    return content, network, {"header": len(content) - num_tensor_bytes, "tensors": num_tensor_bytes}


def read(path: Path) -> bytes:
    """Return the content of a package's file.

    Raises:
        CheckpointError: It is not there, or no regular file of a package's size.
    """
    try:
        return read_regular(path, MAX_PACKAGE_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}): give the path of a .sqz.") from error


def delta(base: bytes, new: bytes) -> bytes:
    """Return what makes the older package the newer one; tried before it is given.

    Raises:
        CheckpointError: They are not of one model on one grid.
    """
    try:
        made = make_delta(base, new)
    except PackageError as error:
        raise CheckpointError(f"base= and the new package do not go together: {error}.") from error
    assert apply_delta(base, made) == new
    return made
