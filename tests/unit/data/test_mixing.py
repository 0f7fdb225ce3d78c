"""What is said about an order is what one would count by hand, and the knob moves it the way it should."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.mixing import Mixing, mixing_of
from pipeline.data.order import epoch_order

HASH = hashlib.sha256(b"an index").hexdigest()


@given(
    seed=st.integers(0, 1000), num_samples=st.integers(2, 60), num_shards=st.integers(1, 9), batch=st.integers(1, 70)
)
def test_it_is_what_counting_finds(seed: int, num_samples: int, num_shards: int, batch: int) -> None:
    rng = np.random.default_rng(seed)
    shards = np.sort(rng.integers(0, num_shards, num_samples))
    order = rng.permutation(num_samples)
    found = mixing_of(order, shards, batch)
    place = {sample: number for number, sample in enumerate(order.tolist())}
    pairs = [(a, b) for a, b in pairwise(range(num_samples)) if shards[a] == shards[b]]
    if pairs:
        mean = sum(abs(place[a] - place[b]) for a, b in pairs) / len(pairs)
        assert found.distance_ratio == pytest.approx(3 * mean / (num_samples + 1))
        together = sum(place[a] // batch == place[b] // batch for a, b in pairs)
        assert found.same_batch_share == pytest.approx(together / len(pairs))
    held = 0
    for now in range(num_samples):
        before, after = set(shards[order[: now + 1]]), set(shards[order[now:]])
        held = max(held, len(before & after))
    assert found.shards_held == held


def test_reading_shard_after_shard_mixes_nothing() -> None:
    found = mixing_of(np.arange(1000), np.arange(1000) // 100, 50)
    assert found.distance_ratio == pytest.approx(3 / 1001) and found.shards_held == 1
    assert found.same_batch_share == 49 * 20 / (99 * 10)


def test_larger_blocks_mix_better_and_hold_more_and_no_block_is_perfect() -> None:
    num_samples, shards, batch = 40_000, np.arange(40_000) // 400, 100

    def mixed(block: int) -> Mixing:
        order = epoch_order(num_samples, seed=1, epoch=0, index_hash=HASH, block=block, shard_of_sample=shards)
        return mixing_of(order, shards, batch)

    blocks = [mixed(block) for block in (1, 4, 16, 64)]
    assert [one.shards_held for one in blocks] == [1, 4, 16, 64]
    ratios = [one.distance_ratio for one in blocks]
    assert ratios == sorted(ratios) and ratios[0] < 0.02
    assert blocks[0].same_batch_share > 10 * blocks[2].same_batch_share
    perfect = mixed(0)
    # Of 39,900 pairs: the mean of |x - y| has a relative standard error of 0.4 %; five of them would be no accident.
    assert abs(perfect.distance_ratio - 1) < 5 / np.sqrt(2 * 39_900)
    assert perfect.shards_held == 100
    assert perfect.same_batch_share < 2 * perfect.perfect_same_batch_share
