"""A network's forward pass on torch's meta device, where tensors have shapes but no memory, and watching it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def stand_ins(model: nn.Module, image_size: int, batch_size: int) -> tuple[dict[str, Tensor], Tensor]:
    """(parameters and buffers by name, pictures) with the model's shapes and dtypes, and no memory."""
    weights: dict[str, Tensor] = {
        name: torch.empty_like(parameter, device="meta").requires_grad_(parameter.requires_grad)
        for name, parameter in model.named_parameters()
    }
    dtype = next((parameter.dtype for parameter in weights.values()), torch.float32)
    weights |= {name: torch.empty_like(buffer, device="meta") for name, buffer in model.named_buffers()}
    return weights, torch.empty(batch_size, 3, image_size, image_size, dtype=dtype, device="meta")


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """`model.train(training)`, undone module by module."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


@contextmanager
def hooks(
    model: nn.Module,
    after: Callable[[str, nn.Module, Any], Any],
    before: Callable[[str], Any] = lambda _: None,
) -> Iterator[None]:
    """Call `before(path)` and `after(path, module, output)` around the forward pass of every module."""
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _module, _inputs, name=name: before(name)))
        handles.append(
            module.register_forward_hook(
                lambda module, _inputs, output, name=name: (after(name, module, output), None)[1]
            )
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
