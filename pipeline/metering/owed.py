"""What the gradients of a step owe, read from the modules and optimisers of a program that says nothing of them."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer


class Owed:
    """Finds out what an optimiser's step owes the wire: the bytes of its trainable parameters, each once.

    Where modules are wrapped in DistributedDataParallel, it is their parameters which the optimiser holds. Elsewhere
    (FSDP, gradients averaged by hand) it is all that the optimiser holds; of a sharded parameter the whole.
    """

    def __init__(self) -> None:
        self._wrapped: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()
        self._by_optimizer: dict[int, tuple[int, dict[str, int]]] = {}
        self.model = "unknown"
        """Class of the model whose parameters were stepped last."""

    def found(self, module: DistributedDataParallel) -> None:
        """Take a wrapped module into account."""
        self._wrapped.add(module)
        self._by_optimizer.clear()

    def find(self) -> None:
        """Take all wrapped modules into account that exist already."""
        for module in _living(DistributedDataParallel):
            self.found(module)

    def of(self, optimizer: Optimizer) -> dict[str, int]:
        """Return the bytes by name of parameter."""
        num_parameters = sum(len(group["params"]) for group in optimizer.param_groups)
        known = self._by_optimizer.get(id(optimizer))
        if known is None or known[0] != num_parameters:
            known = self._by_optimizer[id(optimizer)] = num_parameters, self._read(optimizer)
        return known[1]

    @property
    def hook(self) -> str:
        """Name of the communication hook of a wrapped module; `none` where DDP reduces by itself."""
        for module in self._wrapped:
            for hook, _ in getattr(module, "_comm_hooks", ()):
                return getattr(hook, "__qualname__", type(hook).__name__)
        return "none"

    def _read(self, optimizer: Optimizer) -> dict[str, int]:
        held = {id(parameter): parameter for parameter in _parameters(optimizer) if parameter.requires_grad}
        by_name = {
            name: parameter.nbytes
            for module in self._wrapped
            for name, parameter in module.module.named_parameters()
            if id(parameter) in held and name not in module.parameters_to_ignore
        }
        if by_name:
            self.model = next(type(module.module).__name__ for module in self._wrapped)
            return by_name
        module = _owner(held)
        self.model = type(optimizer).__name__ if module is None else type(module).__name__
        names = {} if module is None else {id(value): name for name, value in module.named_parameters()}
        return {
            names.get(key, f"parameter {position}"): parameter.numel() * parameter.element_size()
            for position, (key, parameter) in enumerate(held.items())
        }


def _parameters(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _owner(held: dict[int, torch.Tensor]) -> nn.Module | None:
    """Return the module that has all these parameters and the fewest layers around them."""
    owners = [
        module for module in _living(nn.Module) if held.keys() <= {id(parameter) for parameter in module.parameters()}
    ]
    return min(owners, key=lambda module: sum(1 for _ in module.modules()), default=None)


def _living(kind: type[Any]) -> list[Any]:
    """Return all objects of a class. Nothing of them is asked, for some answer by importing half a library."""
    return [found for found in gc.get_objects() if kind in type(found).__mro__]
