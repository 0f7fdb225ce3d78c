"""What a model costs: parameters, gradient bytes, multiply-adds and activation memory, per layer and in all.

Nothing is computed and nothing is allocated: the network runs on torch's meta device, where tensors have shapes but no
memory, and the operators themselves are watched.
"""

import dataclasses
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.config.model import MAX_SIDE
from pipeline.core.errors import ConfigError
from pipeline.core.typed import require
from pipeline.models.tracing import hooks, mode, stand_ins

_KINDS = {"convolution": nn.Conv2d, "fully connected": nn.Linear}


@dataclass(frozen=True)
class LayerCost:
    """One module that owns parameters or keeps activations. Sums over the layers give the model's totals."""

    name: str
    """Path of the module, as in the state dict: `features.3.squeeze`."""
    kind: str
    """Class of the module: `Conv2d`."""
    num_parameters: int
    bytes: int
    """Gradient bytes that its trainable parameters owe per optimiser step."""
    macs: int
    """Multiply-adds of one picture's forward pass; convolutions and linear layers only, biases not counted."""
    output_bytes: int
    """What the layer hands on: bytes of its last output for the whole batch."""
    activation_bytes: int
    """What the layer keeps for the backward pass of the whole batch, counted where it is kept first."""


@dataclass(frozen=True)
class ModelCost:
    """Totals for one batch of `batch_size` pictures of `image_size` by `image_size` pixels."""

    image_size: int
    batch_size: int
    num_parameters: int
    """Trainable or not."""
    gradient_bytes: int
    """Number of elements times bytes per element over the trainable parameters: what data parallelism reduces."""
    buffer_bytes: int
    """BatchNorm statistics and the like, which DDP broadcasts."""
    macs: int
    """Multiply-adds of one picture's forward pass. Training takes about three times as many."""
    inference_peak_activation_bytes: int
    """Most activation bytes alive at once without gradients, input included, weights and workspaces not."""
    training_activation_bytes: int
    """Bytes kept for the backward pass, input included, weights not."""
    layers: tuple[LayerCost, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain containers, for JSON."""
        return dataclasses.asdict(self)


def cost(model: nn.Module, image_size: int = 224, batch_size: int = 1) -> ModelCost:
    """Trace `model` on (batch_size, 3, image_size, image_size) inputs of the dtype of its parameters.

    The model may lie on any device, the meta device too. It is left as it was: mode, weights and buffers.

    Raises:
        ConfigError: pictures of this size do not survive the model's downsampling.
    """
    require(
        1 <= image_size <= MAX_SIDE and batch_size >= 1,
        f"image_size={image_size} must be from 1 to {MAX_SIDE:,}, and batch_size={batch_size} positive.",
    )
    try:
        macs, outputs = _forward_shapes(model, image_size, batch_size)
        peak_bytes = _inference_peak(model, image_size, batch_size)
        saved = _saved_for_backward(model, image_size, batch_size)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{type(model).__name__} cannot take pictures of {image_size}x{image_size} pixels: {error}."
            " Use larger pictures (data.size), or a model for small ones such as squeezenet_small."
        ) from error
    layers = tuple(
        LayerCost(
            name=name,
            kind=type(module).__name__,
            num_parameters=sum(parameter.numel() for parameter in module.parameters(recurse=False)),
            bytes=_gradient_bytes(module.parameters(recurse=False)),
            macs=macs.get(name, 0),
            output_bytes=outputs.get(name, 0),
            activation_bytes=saved.get(name, 0),
        )
        for name, module in model.named_modules()
        if name in saved or next(module.parameters(recurse=False), None) is not None
    )
    return ModelCost(
        image_size=image_size,
        batch_size=batch_size,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        gradient_bytes=gradient_bytes(model),
        buffer_bytes=sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        macs=sum(macs.values()),
        inference_peak_activation_bytes=peak_bytes,
        training_activation_bytes=sum(saved.values()),
        layers=layers,
    )


@dataclass(frozen=True)
class Footprint:
    """What a model takes to ship, to run and to train, in bytes. Workspaces and the framework itself are not in it."""

    export_bytes: int
    """The tensors of the state dict, uncompressed: what must be shipped once."""
    inference_memory_bytes: int
    """Weights, buffers and the most activations alive at once, for one picture."""
    training_memory_bytes: int
    """Memory of one rank: weights, buffers, gradients, one momentum, and the activations kept for the backward pass."""


def footprint(model: nn.Module, image_size: int, batch_size: int) -> Footprint:
    """Return what `model` takes in the dtype of its parameters; training with `batch_size` pictures at once.

    Raises:
        ConfigError: pictures of this size do not survive the model's downsampling.
    """
    one, batch = cost(model, image_size), cost(model, image_size, batch_size)
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters()) + one.buffer_bytes
    return Footprint(
        export_bytes=sum(tensor.nbytes for tensor in model.state_dict().values()),
        inference_memory_bytes=weight_bytes + one.inference_peak_activation_bytes,
        training_memory_bytes=weight_bytes + 2 * batch.gradient_bytes + batch.training_activation_bytes,
    )


def layer_kinds(model: nn.Module) -> dict[str, str]:
    """`convolution`, `fully connected` or `other` for each module that owns parameters, by its path."""
    return {
        name: next((kind for kind, of in _KINDS.items() if isinstance(module, of)), "other")
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }


def gradient_bytes(model: nn.Module) -> int:
    """Bytes that `model` owes the wire per optimiser step: numel * itemsize over its trainable parameters."""
    return _gradient_bytes(model.parameters())


def _gradient_bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters if parameter.requires_grad)


def _forward_shapes(model: nn.Module, image_size: int, batch_size: int) -> tuple[dict[str, int], dict[str, int]]:
    """(multiply-adds of one picture, output bytes of the batch) by module path."""
    macs: dict[str, int] = {}
    output_bytes: dict[str, int] = {}

    def after(name: str, module: nn.Module, output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        output_bytes[name] = output.numel() * output.element_size()
        if isinstance(module, nn.Conv2d):
            macs_per_output = module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
        elif isinstance(module, nn.Linear):
            macs_per_output = module.in_features
        else:
            return
        macs[name] = macs.get(name, 0) + output.numel() // batch_size * macs_per_output

    weights, images_BCHW = stand_ins(model, image_size, batch_size)
    with mode(model, training=False), hooks(model, after=after), torch.no_grad():
        functional_call(model, weights, (images_BCHW,))
    return macs, output_bytes


def _inference_peak(model: nn.Module, image_size: int, batch_size: int) -> int:
    """Most bytes of tensors alive at once while the model runs without gradients."""
    weights, images_BCHW = stand_ins(model, image_size, batch_size)
    live = _LiveBytes(ignored=weights.values())
    live.add(images_BCHW)
    with mode(model, training=False), torch.no_grad(), live:
        functional_call(model, weights, (images_BCHW,))
    return live.peak_bytes


def _saved_for_backward(model: nn.Module, image_size: int, batch_size: int) -> dict[str, int]:
    """Bytes kept for the backward pass by module path."""
    if batch_size > 1:
        return _trace_saved(model, image_size, batch_size)
    # BatchNorm refuses to train on a single value per channel, which one small picture can come to. What is kept is a
    # constant plus a multiple of the batch, so two larger batches tell what one picture keeps.
    two, three = _trace_saved(model, image_size, 2), _trace_saved(model, image_size, 3)
    return {name: 2 * two[name] - three[name] for name in two}


def _trace_saved(model: nn.Module, image_size: int, batch_size: int) -> dict[str, int]:
    weights, images_BCHW = stand_ins(model, image_size, batch_size)
    saved_bytes: dict[str, int] = {}
    seen = {tensor.untyped_storage()._cdata for tensor in weights.values()}
    kept: list[torch.UntypedStorage] = []  # while it is referenced, its address is not given to another storage
    stack: list[str] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            kept.append(storage)
            saved_bytes[stack[-1]] = saved_bytes.get(stack[-1], 0) + storage.nbytes()
        return tensor.detach()

    with (
        mode(model, training=True),
        hooks(model, before=stack.append, after=lambda *_: stack.pop()),
        torch.enable_grad(),
        saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        functional_call(model, weights, (images_BCHW,))
    return saved_bytes


class _LiveBytes(TorchDispatchMode):
    """Follows every storage that an operator makes, from its birth until nothing refers to it."""

    def __init__(self, ignored: Iterable[Tensor]) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        # Operators return views of weights and buffers, which are no activations.
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in ignored)

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        num_bytes = storage.nbytes()
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, num_bytes)

    def _forget(self, num_bytes: int) -> None:
        self.live_bytes -= num_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result
