"""Whether the ranks' weights are still the same, bit for bit, as data-parallel training promises.

All ranks apply the same gradient to the same weights, so they stay equal, unless memory or arithmetic of a machine
fails or code changes the weights on one rank. The gradients are averaged whatever they were computed with: nothing else
would ever tell. So every rank forms a checksum of its weights now and then. It travels as numbers that can be added up,
within the sums that travel after a step in any case: c and c squared, of which the sums over all n ranks satisfy
n * sum(c^2) = sum(c)^2 just where all c are equal.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

NUM_PIECES, PIECE_BITS = 4, 16  # of a checksum: the sums of the squares stay exact in float64 up to 2^21 ranks
CHUNK_ON_CPU, CHUNK_ELSEWHERE = 2**15, 2**22  # elements: what stays in a core's cache; few kernels
ODD = 0x1E3779B1


def checksum(tensors: Iterable[Tensor]) -> Tensor:
    """An int64 on the tensors' device, without waiting for it: the bits of all elements, each times an odd number.

    Another bit anywhere gives another checksum, for certain; several other bits almost certainly do. The same values in
    another layout (channels_last) have another.
    """
    sums: list[Tensor] = []
    odd = torch.empty(0)
    for tensor in tensors:
        if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
            tensor = tensor.permute(0, 2, 3, 1)  # as it lies in memory: no copy is made
        bits = tensor.detach().reshape(-1).view(torch.int32 if tensor.itemsize % 4 == 0 else torch.uint8)
        chunk = CHUNK_ON_CPU if bits.device.type == "cpu" else CHUNK_ELSEWHERE
        if not sums:
            odd = _odd_numbers(chunk, torch.int32, bits.device)
        # Products modulo 2^32, of which an odd factor loses no bit; their sum does not overflow.
        sums += [(part * odd[: len(part)]).sum(dtype=torch.int64) for part in bits.split(chunk)]
    if not sums:
        return torch.zeros((), dtype=torch.int64)
    stacked = torch.stack(sums)
    return (stacked * _odd_numbers(len(stacked), torch.int64, stacked.device)).sum()


def _odd_numbers(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return (2 * torch.arange(count, dtype=dtype, device=device) + 1) * ODD


def num_sums(*, is_compared: bool) -> int:
    """Return how many numbers the ranks add up at the end of a round: the metrics' five, and those of `to_sums`."""
    return 5 + (2 * NUM_PIECES if is_compared else 0)


def to_sums(checksum: Tensor) -> Tensor:
    """The checksum as float64 numbers, to be added up over all ranks."""
    pieces = torch.stack([(checksum >> PIECE_BITS * index) & (2**PIECE_BITS - 1) for index in range(NUM_PIECES)])
    return torch.cat([pieces, pieces * pieces]).double()


def are_same(sums: Sequence[float], num_ranks: int) -> bool:
    """Whether all ranks had the same checksum, by the sums of their `to_sums`."""
    numbers = [int(number) for number in sums]
    pairs = zip(numbers[:NUM_PIECES], numbers[NUM_PIECES:], strict=True)
    return all(num_ranks * squares == total * total for total, squares in pairs)


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The checksum of each tensor in hexadecimal, for people."""
    return {name: f"{int(checksum([tensor])) % 2**64:016x}" for name, tensor in tensors.items()}


def refusal(step: int, differences: str) -> str:
    """Say that the ranks have drifted apart, and what to do.

    Args:
        step: optimiser steps committed.
        differences: the weights that differ, each with the checksums of the ranks.
    """
    return (
        f"After step {step} the ranks' weights are not the same (checksums: {differences}). Memory or arithmetic of a"
        " machine failed, or code changed weights on one rank: environment.json names the hosts, in the order of the"
        " ranks. The checkpoints are from before, compared when they were saved: without that machine the same command"
        " goes on from the last one."
    )
