"""The most activations that lie in memory at once when one picture is answered, by three plans of where they lie.

Definition: with the operators in the order in which they run, and each value alive from the operator that makes it to
the last that reads it, the peak is the largest sum over the values alive at one operator. Network input and output
count, weights do not, and nothing is split: a plan of memory needs at least so much. The same rule gives the 1,372 kB
that MCUNetV2 (arXiv 2110.15352) states for MobileNetV2 in int8.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.models.tracing import hooks, mode, stand_ins

INPUT = "input"
_CONCAT, _CONVOLUTION, _POOLINGS = "cat", "convolution", ("max_pool2d_with_indices", "max_pool2d")
ELEMENTWISE = frozenset(
    "add mul div relu hardtanh hardswish hardsigmoid sigmoid silu gelu clamp native_batch_norm".split()  # noqa: SIM905
)
"""Operators that may write each result where the value of the same place was read."""


@dataclass(frozen=True)
class Operation:
    """One operator of the forward pass, in the order in which they run."""

    kind: str
    """torch's name: `convolution`, `cat`, `relu_`."""
    module: str
    """Path of the module that ran it."""
    reads: tuple[int, ...]
    """Numbers of the values it reads."""
    makes: int | None
    """Number of the value it makes; None: it writes into, or looks at, one that was there."""
    num_elements: int
    """Of what it makes; 0: nothing."""
    is_depthwise: bool = False
    """Whether each channel of its result comes from one channel, so that channels may be replaced one by one."""


@dataclass(frozen=True)
class Peak:
    """Where most activations are alive."""

    num_elements: int
    """Of one picture: bytes in int8; four times as many bytes in fp32."""
    module: str
    """Path of the module that is running."""


@dataclass(frozen=True)
class Peaks:
    """The peaks of the three plans."""

    in_place: Peak
    """The inputs of a Concat are written to where its output lies, and a depthwise convolution replaces its input."""
    copied: Peak
    """A Concat copies. As in the two others, ReLU, batch normalisation and additions replace what they read."""
    streamed: Peak | None
    """As `in_place`, and the first convolution and pooling go by rows, so that what lies between is never whole. None:
    the first convolution does not end in a pooling."""


def peaks(model: nn.Module, image_size: int) -> Peaks:
    """Return the peaks for one picture of `image_size` by `image_size` pixels.

    The model may lie on any device, the meta device too, and is left as it was.
    """
    operations = trace(model, image_size)
    between = _before_first_pooling(operations)
    return Peaks(
        in_place=_peak(operations, _plan(operations, concats=True)),
        copied=_peak(operations, _plan(operations, concats=False)),
        streamed=None if between is None else _peak(operations, _plan(operations, concats=True, without=between)),
    )


def trace(model: nn.Module, image_size: int) -> tuple[Operation, ...]:
    """Return what the network does with one picture. The first operation makes the picture, the last is the end.

    Args:
        model: Any network from pictures to one tensor.
        image_size: Side of the picture in pixels.
    """
    weights, images_BCHW = stand_ins(model, image_size, 1)
    modules: list[str] = []
    watch = _Watch(modules, weights=list(weights.values()))
    watch.note("input", (), images_BCHW)
    with (
        mode(model, training=False),
        hooks(model, before=modules.append, after=lambda *_: modules.pop()),
        torch.no_grad(),
        watch,
    ):
        output_BK = functional_call(model, weights, (images_BCHW,))
    watch.note("output", (output_BK,), None)
    return tuple(watch.operations)


class _Watch(TorchDispatchMode):
    """Notes each operator. Tensors are told apart by their storages, all of which are kept: a view is no new value."""

    def __init__(self, modules: list[str], weights: list[Tensor]) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._modules = modules
        self._kept: list[Tensor] = [*weights]
        self._numbers: dict[int, int] = {weight.untyped_storage()._cdata: -1 for weight in weights}

    def note(self, kind: str, reads: tuple[Tensor, ...], made: Tensor | None, *, is_depthwise: bool = False) -> None:
        """Note one operator; what is made in a storage that is known is not new."""
        numbers = (self._numbers.setdefault(tensor.untyped_storage()._cdata, -1) for tensor in reads)
        known = tuple(dict.fromkeys(number for number in numbers if number >= 0))
        new = made is not None and made.numel() > 0 and made.untyped_storage()._cdata not in self._numbers
        if not known and not new:
            return  # an empty tensor, or a look at a weight
        if made is not None and new:
            self._kept.append(made)
            self._numbers[made.untyped_storage()._cdata] = len(self._kept)
        operation = Operation(
            kind=kind,
            module=self._modules[-1] if self._modules else INPUT if made is not None else "",
            reads=known,
            makes=len(self._kept) if new else None,
            num_elements=made.numel() if made is not None and new else 0,
            is_depthwise=is_depthwise,
        )
        self.operations.append(operation)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        reads = tuple(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        kind = func._schema.name.partition("::")[2]
        depthwise = kind == _CONVOLUTION and args[8] == args[0].shape[1] == made[0].shape[1]  # args[8]: groups
        # Of several results, the first is the network's; the others (places of maxima, statistics) serve training.
        self.note(kind, reads, made[0] if made else None, is_depthwise=depthwise)
        return result


@dataclass
class _Life:
    """One value, from the operator that makes it to the last that needs it in memory."""

    num_elements: int
    first: int
    last: int


def _lives(operations: tuple[Operation, ...]) -> dict[int, _Life]:
    lives = {
        operation.makes: _Life(operation.num_elements, at, at)
        for at, operation in enumerate(operations)
        if operation.makes is not None
    }
    for at, operation in enumerate(operations):
        for number in operation.reads:
            lives[number].last = at
    return lives


def _plan(
    operations: tuple[Operation, ...], *, concats: bool, without: frozenset[int] = frozenset()
) -> dict[int, _Life]:
    """Let values lie where others lay. From the end: what is placed in a later value lives as long as that one."""
    lives = _lives(operations)
    last_read = {number: life.last for number, life in lives.items()}
    for at, operation in reversed([*enumerate(operations)]):
        if operation.makes is None:
            continue
        own = lives[operation.makes]
        dying = [number for number in operation.reads if last_read[number] == at]
        if concats and operation.kind == _CONCAT:
            for number in dying:
                if lives[number].first > 0:  # the picture has a place of its own
                    lives[number].last = own.last
                    own.num_elements -= lives[number].num_elements
        elif (operation.kind in ELEMENTWISE or (concats and operation.is_depthwise)) and any(
            lives[number].num_elements >= own.num_elements for number in dying
        ):
            own.first = at + 1  # while it runs, both are one
    for number in without:
        lives[number].num_elements = 0
    return lives


def _before_first_pooling(operations: tuple[Operation, ...]) -> frozenset[int] | None:
    """Values between the picture and the first pooling's output, which rows can pass through; None: not so made."""
    between: set[int] = set()
    newest = operations[0].makes
    for operation in operations[1:]:
        if operation.reads != (newest,):
            return None
        if operation.kind in _POOLINGS and between:
            # Nothing else may read them, or they must be whole.
            readers = [other for other in operations if between & {*other.reads}]
            return frozenset(between) if readers[-1] is operation else None
        if operation.makes is not None:
            if operation.kind not in (_CONVOLUTION, *ELEMENTWISE):
                return None
            between.add(newest := operation.makes)
    return None


def _peak(operations: tuple[Operation, ...], lives: dict[int, _Life]) -> Peak:
    alive = [0] * (len(operations) + 1)
    for life in lives.values():
        if life.first <= life.last:
            alive[life.first] += life.num_elements
            alive[life.last + 1] -= life.num_elements
    best, total, where = 0, 0, 0
    for at, change in enumerate(alive):
        total += change
        if total > best:
            best, where = total, at
    return Peak(best, operations[where].module)
