"""Tensors that travel as one: flat buckets, and the fragments that are exchanged at different steps of a round."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

BYTES_PER_MEBIBYTE = 1 << 20
DEFAULT_BUCKET_MEGABYTES = 25.0  # DDP's own, where comm.bucket_megabytes is null


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

    @property
    def num_values(self) -> int:
        """Of its tensors together."""
        return self.num_bytes // self.itemsize


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


def share_out(buckets: Sequence[FlatBucket], num_fragments: int) -> list[list[FlatBucket]]:
    """Cut buckets into fragments, in their order: at least one in each, and about as many bytes.

    Args:
        buckets: At least `num_fragments`.
        num_fragments: At least 1.
    """
    assert 1 <= num_fragments <= len(buckets)
    before = list(itertools.accumulate((bucket.num_bytes for bucket in buckets), initial=0))
    cuts = [0]
    for number in range(1, num_fragments):
        allowed = range(cuts[-1] + 1, len(buckets) - (num_fragments - number) + 1)
        goal = before[-1] * number / num_fragments
        cuts.append(min(allowed, key=lambda cut: abs(before[cut] - goal)))
    return [list(buckets[begin:end]) for begin, end in itertools.pairwise([*cuts, len(buckets)])]


def flatten(tensors: Iterable[Tensor]) -> Tensor:
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
