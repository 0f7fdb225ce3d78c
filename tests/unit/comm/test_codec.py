"""What a codec loses: a bound, and nothing for good."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comm.codec import BLOCK, CODECS, Codec, shard_values

codecs = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)


def values(seed: int, num_blocks: int, exponent: int) -> torch.Tensor:
    """A row of blocks of very different size, one of them all 0."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(num_blocks, BLOCK, generator=generator) * 10.0**exponent
    row *= 10.0 ** torch.randint(-3, 4, (num_blocks, 1), generator=generator)
    row[seed % num_blocks] = 0
    return row.view(1, -1)


@codecs
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(-12, 12))
def test_what_comes_back_is_within_half_a_step(codec: Codec, seed: int, num_blocks: int, exponent: int) -> None:
    row = values(seed, num_blocks, exponent)
    encoded = codec.encode(row)
    assert encoded.dtype == torch.uint8 and encoded.shape == (1, codec.num_bytes(row.numel()))
    back = codec.decode(encoded)
    blocks, errors = row.view(-1, BLOCK), (row - back).view(-1, BLOCK).abs()
    half = blocks.abs() / 256 if codec.largest is None else blocks.abs().amax(1, keepdim=True) / codec.largest / 2
    assert (errors <= half * (1 + 1e-5)).all()
    assert torch.equal(codec.decode(codec.encode(back)), back) or codec.largest is not None
    assert not back.view(-1, BLOCK)[seed % num_blocks].any()


@codecs
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 30))
def test_sent_and_kept_is_what_was_owed(codec: Codec, seed: int, num_blocks: int, num_rounds: int) -> None:
    """By feeding the error back, all that was sent in many rounds is all that was owed, but for the last error."""
    kept = torch.zeros(1, num_blocks * BLOCK, dtype=torch.float64)
    owed, sent = kept.clone(), kept.clone()
    largest = 0.0
    for number in range(num_rounds):
        change = values(seed + number, num_blocks, 0)
        owed += change
        due = (change + kept).float()
        arrived = codec.decode(codec.encode(due))
        kept = (due - arrived).double()
        sent += arrived
        largest = max(largest, float(due.abs().max()))
    torch.testing.assert_close(sent + kept, owed, rtol=0, atol=1e-6 * largest * num_rounds)


@codecs
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_block_with_no_number_has_none_when_it_comes_back(codec: Codec, bad: float) -> None:
    row = torch.ones(2, 2 * BLOCK)
    row[1, 3] = bad
    back = codec.decode(codec.encode(row))
    assert back[0].isfinite().all() and back[1, BLOCK:].isfinite().all()
    assert not back[1, 3].isfinite()


@given(st.integers(1, 10**7), st.integers(2, 64))
def test_shares_hold_all_values_in_whole_blocks(num_values: int, num_ranks: int) -> None:
    width = shard_values(num_values, num_ranks)
    assert width % BLOCK == 0 and width * num_ranks >= num_values > (width - BLOCK) * num_ranks
