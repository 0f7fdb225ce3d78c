"""Weights averaged over the ranks in place, on flat buckets, and which collectives a step of local SGD owes."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.comm.collectives import Call
from pipeline.comm.rounds import Rounds

BYTES_PER_MEBIBYTE = 1 << 20
DEFAULT_BUCKET_MEGABYTES = 25.0  # DDP's own, where comm.bucket_megabytes is null
SUM_BYTES = 8
"""Sums for the metrics travel as float64."""


@dataclass(frozen=True)
class FlatBucket:
    """Tensors that travel as one."""

    origin: str
    """`parameters` or `buffers`."""
    first: int
    """Position of its first tensor among those of its origin."""
    end: int
    """Position after its last."""
    num_bytes: int
    itemsize: int


Sizes = Mapping[str, Sequence[tuple[int, int]]]
"""By origin: (bytes, bytes per element) of each tensor that is averaged, in the model's order."""


def flat_buckets(sizes: Sizes, bucket_megabytes: float | None) -> list[FlatBucket]:
    """Share tensors out to buckets, in their order: of one type each, and closed before it would exceed the limit.

    Args:
        sizes: What is averaged.
        bucket_megabytes: The limit in MiB, which a tensor alone may exceed; None: 25.
    """
    limit = (bucket_megabytes or DEFAULT_BUCKET_MEGABYTES) * BYTES_PER_MEBIBYTE
    buckets: list[FlatBucket] = []
    for origin, tensors in sizes.items():
        first, total = 0, 0
        for position, (num_bytes, itemsize) in enumerate(tensors):
            if position > first and (total + num_bytes > limit or itemsize != tensors[first][1]):
                buckets.append(FlatBucket(origin, first, position, total, tensors[first][1]))
                first, total = position, 0
            total += num_bytes
        if tensors:
            buckets.append(FlatBucket(origin, first, len(tensors), total, tensors[first][1]))
    return buckets


def owed_calls(
    rounds: Rounds, step: int, sizes: Sizes, *, bucket_megabytes: float | None, num_sums: int, world_size: int
) -> Counter[Call] | None:
    """Return the collectives that a step owes in the phase `train`, or None where it owes DDP's buckets of gradients.

    Args:
        rounds: Of the run.
        step: From 1.
        sizes: What is averaged.
        bucket_megabytes: As of `flat_buckets`.
        num_sums: Numbers that the ranks add up at a synchronisation, for the metrics.
        world_size: Number of ranks.
    """
    if world_size == 1:
        return Counter()
    if rounds.exchanges_gradients(step):
        return None
    if not rounds.averages(step):
        return Counter()
    calls = Counter(
        Call("train", bucket.origin, "all_reduce", bucket.num_bytes, bucket.itemsize, -1)
        for bucket in flat_buckets(sizes, bucket_megabytes)
    )
    calls[Call("train", "metrics", "all_reduce", SUM_BYTES * num_sums, SUM_BYTES, -1)] += 1
    return calls


class Averaging:
    """The mean over all ranks of a model's trainable parameters and of its buffers that are not integers.

    Buffers of frozen modules, which are the same on all ranks, stay as they are: a mean would round them.

    Args:
        module: The model.
        bucket_megabytes: As of `flat_buckets`.
        exchanging: Context that labels the collectives inside it.
        frozen: Modules whose statistics do not change.
    """

    def __init__(
        self,
        module: nn.Module,
        bucket_megabytes: float | None,
        exchanging: Callable[[str], AbstractContextManager[Any]] = lambda _: nullcontext(),
        frozen: Sequence[nn.Module] = (),
    ) -> None:
        self._module, self._bucket_megabytes, self._exchanging = module, bucket_megabytes, exchanging
        self._frozen = frozen

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return what is averaged, by origin and name, in the model's order."""
        of_frozen = {id(one) for module in self._frozen for one in module.buffers()}
        parameters = {name: one.detach() for name, one in self._module.named_parameters() if one.requires_grad}
        buffers = {
            name: one
            for name, one in self._module.named_buffers()
            if one.is_floating_point() and id(one) not in of_frozen
        }
        return {"parameters": parameters, "buffers": buffers}

    def owed(self, rounds: Rounds, step: int, num_sums: int, world_size: int) -> Counter[Call] | None:
        """Return what `owed_calls` says of this model."""
        return owed_calls(
            rounds,
            step,
            self._sizes,
            bucket_megabytes=self._bucket_megabytes,
            num_sums=num_sums,
            world_size=world_size,
        )

    @torch.no_grad()
    def average(self) -> None:
        """Take the mean. Collective.

        Only values change: addresses and strides stay, so that optimiser and DDP keep what they refer to. Multiplied
        by 1/n before the sum, as DDP does; the sum is the same on every rank, and so are the weights.
        """
        factor = 1.0 / dist.get_world_size()
        under_way: list[tuple[dist.Work, Tensor, list[Tensor], str]] = []
        for origin, tensors in self._by_bucket():
            flat = flatten(tensors).mul_(factor)
            with self._exchanging(origin):
                work = dist.all_reduce(flat, async_op=True)
            assert work is not None
            under_way.append((work, flat, tensors, origin))
        for work, flat, tensors, origin in under_way:
            with self._exchanging(origin):
                work.wait()
            fill(tensors, flat)

    def _by_bucket(self) -> Iterator[tuple[str, list[Tensor]]]:
        tensors = {origin: list(some.values()) for origin, some in self.tensors().items()}
        for bucket in flat_buckets(self._sizes, self._bucket_megabytes):
            yield bucket.origin, tensors[bucket.origin][bucket.first : bucket.end]

    @functools.cached_property
    def _sizes(self) -> Sizes:
        """Asked for in every step, and the same in all."""
        return {
            origin: [(one.nbytes, one.itemsize) for one in some.values()] for origin, some in self.tensors().items()
        }


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Return a copy of the values of tensors, one after the other."""
    return torch.cat([one.detach().reshape(-1) for one in tensors])


@torch.no_grad()
def fill(tensors: Sequence[Tensor], flat: Tensor) -> None:
    """Write values as `flatten` gives them into tensors in place, whatever their layout."""
    for one, values in zip(tensors, flat.split([one.numel() for one in tensors]), strict=True):
        one.copy_(values.view(one.shape))


def stack_on_first(tensor: Tensor) -> Tensor:
    """Every rank's `tensor`, stacked by rank, on rank 0's CPU; nothing elsewhere. Collective."""
    if dist.get_world_size() == 1:
        return tensor.unsqueeze(0).cpu().clone()
    is_first = dist.get_rank() == 0
    received = [torch.empty_like(tensor) for _ in range(dist.get_world_size())] if is_first else None
    dist.gather(tensor, received, dst=0)
    return torch.stack([one.cpu() for one in received]) if received is not None else tensor.new_empty(0, device="cpu")
