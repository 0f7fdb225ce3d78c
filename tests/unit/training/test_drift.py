"""Checksums of weights: which bits they see, and what their sums tell of all ranks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.training import drift


def flipped(tensor: torch.Tensor, element: int, bit: int) -> torch.Tensor:
    """A copy with one other bit."""
    copy = tensor.clone()
    bits = copy.view(torch.int32).reshape(-1)
    bits[element] = bits[element] ^ (-(2**31) if bit == 31 else 2**bit)
    return copy


def told_apart(first: list[torch.Tensor], second: list[torch.Tensor], num_ranks: int = 2) -> bool:
    """Whether one rank with other weights than all others is noticed in the sums."""
    others = drift.to_sums(drift.checksum(first)) * (num_ranks - 1)
    return not drift.are_same((others + drift.to_sums(drift.checksum(second))).tolist(), num_ranks)


@given(
    st.integers(1, 2 * drift.CHUNK_ON_CPU + 9),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 31),
    st.sampled_from([2, 3, 64, 4096]),
)
def test_one_bit_of_one_weight_of_one_rank_is_seen(size: int, where: float, bit: int, num_ranks: int) -> None:
    weights = [torch.full((7,), 0.5), torch.linspace(-1, 1, size)]
    assert told_apart(weights, [weights[0], flipped(weights[1], int(where * size), bit)], num_ranks)
    assert not told_apart(weights, [weight.clone() for weight in weights], num_ranks)


def test_weights_that_change_places_or_cancel_out_are_seen() -> None:
    size = 3 * drift.CHUNK_ON_CPU
    plain = torch.ones(size)
    up, down = (flipped(plain, 5, 0), 5 + drift.CHUNK_ON_CPU)
    assert told_apart([flipped(plain, 5, 0)], [flipped(plain, down, 0)])  # the same place of another chunk
    assert told_apart([up, plain], [plain, up])
    assert told_apart([torch.tensor([1.0, 2.0])], [torch.tensor([2.0, 1.0])])
    assert told_apart([torch.tensor([1.0, -0.0])], [torch.tensor([1.0, 0.0])])


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8))
def test_the_sums_are_the_same_just_where_the_checksums_are(numbers: list[int]) -> None:
    for checks in (numbers, [numbers[0]] * len(numbers)):
        summed = sum(drift.to_sums(torch.tensor(number)) for number in checks)
        assert isinstance(summed, torch.Tensor)
        assert drift.are_same(summed.tolist(), len(checks)) == (len(set(checks)) == 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_any_type_shape_and_layout_has_a_checksum(dtype: torch.dtype) -> None:
    tensor = torch.arange(24).reshape(1, 2, 3, 4).to(dtype)
    last = tensor.to(memory_format=torch.channels_last)
    names = {"a": tensor, "b": last, "c": tensor[0, 1, 2, 3], "d": tensor[:0]}
    sums = drift.checksums(names)
    assert sums == drift.checksums({name: value.clone() for name, value in names.items()})
    assert all(len(value) == 16 for value in sums.values())
    assert drift.checksum([]).item() == 0
