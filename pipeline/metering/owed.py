"""What the gradients of a step owe, read from the modules and optimisers of a program that says nothing of them."""

import gc
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

MAX_STATES = 8
"""Of an optimiser, between which it changes: a model that is frozen and thawed in turns."""

Part = tuple[str, list[tuple[str, torch.Tensor]]]
"""A model's class, and those of its parameters that are stepped, by name."""


class Owed:
    """Finds out what a step owes the wire: the bytes of the trainable parameters of its optimisers, each once.

    Where modules are wrapped in DistributedDataParallel, it is their parameters which the optimisers hold. Elsewhere
    (FSDP, gradients averaged by hand) it is all that the optimisers hold; of a sharded parameter the whole.
    """

    def __init__(self) -> None:
        self._wrapped: list[weakref.ref[DistributedDataParallel]] = []
        self._known: weakref.WeakKeyDictionary[Optimizer, dict[tuple[object, ...], tuple[str, dict[str, int]]]] = (
            weakref.WeakKeyDictionary()
        )
        self.model = "unknown"
        """Class of the model whose parameters were stepped last."""

    def found(self, module: DistributedDataParallel) -> None:
        """Take a wrapped module into account."""
        self._wrapped.append(weakref.ref(module))
        self._known.clear()

    def find(self) -> None:
        """Take all wrapped modules into account that exist already."""
        for module in _living(DistributedDataParallel):
            self.found(module)

    def of(self, optimizers: Sequence[Optimizer]) -> dict[str, int]:
        """Return the bytes by name of parameter, of optimisers that make one step together.

        Where they step several models, a name begins with the model's position.
        """
        known = self._known.setdefault(optimizers[0], {})
        held = [parameter for optimizer in optimizers for parameter in _parameters(optimizer)]
        state = (len(optimizers), *((id(one), one.numel(), one.dtype, one.requires_grad) for one in held))
        if state not in known:
            if len(known) >= MAX_STATES:
                known.clear()
            known[state] = self._read(optimizers)
        self.model, by_name = known[state]
        return by_name

    @property
    def hook(self) -> str:
        """Name of the communication hook of a wrapped module; `none` where DDP reduces by itself."""
        for module in self._modules():
            for hook, _ in getattr(module, "_comm_hooks", ()):
                return getattr(hook, "__qualname__", type(hook).__name__)
        return "none"

    def _modules(self) -> list[DistributedDataParallel]:
        return [module for reference in self._wrapped if (module := reference()) is not None]

    def _read(self, optimizers: Sequence[Optimizer]) -> tuple[str, dict[str, int]]:
        parts = self._of_wrapped(optimizers) or [_of_owner(optimizer) for optimizer in optimizers]
        parts = [(model, parameters) for model, parameters in parts if parameters]
        by_name, seen = dict[str, int](), set[int]()
        for position, (_, parameters) in enumerate(parts):
            for name, parameter in parameters:
                if id(parameter) not in seen:
                    full = name if len(parts) == 1 else f"{position}.{name}"
                    by_name[full] = parameter.numel() * parameter.element_size()
                    seen.add(id(parameter))
        return (parts[0][0] if parts else "unknown"), by_name

    def _of_wrapped(self, optimizers: Sequence[Optimizer]) -> list[Part]:
        held = {id(one) for optimizer in optimizers for one in _parameters(optimizer) if one.requires_grad}
        parts: list[Part] = []
        for module in self._modules():
            named = [
                (name, parameter)
                for name, parameter in module.module.named_parameters()
                if id(parameter) in held and name not in module.parameters_to_ignore
            ]
            if named:
                parts.append((type(module.module).__name__, named))
        return parts


def _of_owner(optimizer: Optimizer) -> Part:
    """Return what an optimiser holds, named by the module that has all of it and the fewest layers around it."""
    held = {id(one): one for one in _parameters(optimizer) if one.requires_grad}
    owners = [module for module in _living(nn.Module) if held.keys() <= {id(one) for one in module.parameters()}]
    module = min(owners, key=lambda module: sum(1 for _ in module.modules()), default=None)
    names = {} if module is None else {id(value): name for name, value in module.named_parameters()}
    named = [(names.get(key, f"parameter {position}"), one) for position, (key, one) in enumerate(held.items())]
    return type(optimizer if module is None else module).__name__, named


def _parameters(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _living(kind: type[Any]) -> list[Any]:
    """Return all objects of a class. Nothing of them is asked, for some answer by importing half a library."""
    return [found for found in gc.get_objects() if kind in type(found).__mro__]
