"""Each epoch is a permutation, each global batch a slice of it, and ranks only cut slices into stripes."""

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.data.order import (
    PADDING,
    BatchOrder,
    argsort_words,
    epoch_order,
    evaluation_stripe,
    steps_per_epoch,
    stripe,
    used_in_epoch,
)

HASH = hashlib.sha256(b"an index").hexdigest()
OTHER_HASH = hashlib.sha256(b"another index").hexdigest()

seeds = st.integers(0, 2**63 - 1)
epochs = st.integers(0, 10_000)


def shards_of(num_samples: int, num_shards: int) -> np.ndarray:
    return np.arange(num_samples, dtype=np.int32) * num_shards // max(1, num_samples)


@given(
    num_samples=st.integers(0, 500), seed=seeds, epoch=epochs, block=st.integers(0, 5), num_shards=st.integers(1, 20)
)
def test_an_epoch_is_a_permutation_and_a_pure_function(
    num_samples: int, seed: int, epoch: int, block: int, num_shards: int
) -> None:
    shards = shards_of(num_samples, num_shards)

    def order() -> np.ndarray:
        return epoch_order(num_samples, seed=seed, epoch=epoch, index_hash=HASH, block=block, shard_of_sample=shards)

    first = order()
    np.random.default_rng().random(7)  # nothing outside the arguments matters
    assert first.dtype == np.int64
    assert sorted(first.tolist()) == list(range(num_samples))
    assert np.array_equal(first, order())


@pytest.mark.parametrize("block", [0, 2])
def test_seed_epoch_and_index_each_change_the_order(block: int) -> None:
    shards = shards_of(200, 10)

    def order(**changed: Any) -> tuple[int, ...]:
        arguments = {"seed": 1, "epoch": 2, "index_hash": HASH, **changed}
        return tuple(epoch_order(200, block=block, shard_of_sample=shards, **arguments))

    variants = [order(), order(seed=2), order(epoch=1), order(seed=2, epoch=1), order(index_hash=OTHER_HASH)]
    assert len(set(variants)) == len(variants)


@given(st.lists(st.integers(0, 40) | st.integers(0, 2**64 - 1) | st.integers(0, 40).map(lambda high: high << 58)))
def test_words_are_ordered_as_numpy_does_it_ties_included(words: list[int]) -> None:
    words_N = np.array(words, np.uint64)
    np.testing.assert_array_equal(argsort_words(words_N), np.argsort(words_N, kind="stable"))


def test_the_order_stays_what_it_was_in_earlier_versions() -> None:
    """A run begun with one version of the program or of NumPy may be resumed with another."""
    order = epoch_order(8, seed=3, epoch=5, index_hash=HASH)
    assert order.tolist() == [7, 6, 1, 3, 4, 0, 2, 5]
    in_blocks = epoch_order(8, seed=3, epoch=5, index_hash=HASH, block=2, shard_of_sample=shards_of(8, 4))
    assert in_blocks.tolist() == [3, 7, 2, 6, 4, 0, 5, 1]


@given(num_shards=st.integers(1, 30), per_shard=st.integers(1, 9), block=st.integers(1, 8), seed=seeds)
def test_a_block_shuffle_reads_from_few_shards_at_a_time(
    num_shards: int, per_shard: int, block: int, seed: int
) -> None:
    num_samples = num_shards * per_shard
    shards = np.repeat(np.arange(num_shards), per_shard)
    order = epoch_order(num_samples, seed=seed, epoch=0, index_hash=HASH, block=block, shard_of_sample=shards)
    groups = [
        set(shards[order[start : start + block * per_shard]]) for start in range(0, num_samples, block * per_shard)
    ]
    assert all(len(group) <= block for group in groups)
    assert sum(map(len, groups)) == num_shards  # a shard is left behind before the next group begins


def test_full_and_block_shuffle_put_every_sample_anywhere() -> None:
    """Over many epochs each sample's mean place is the middle: 40 standard errors would be no accident."""
    num_samples, num_epochs = 64, 400
    shards = shards_of(num_samples, 8)
    for block in (0, 2):
        place = np.zeros(num_samples)
        for epoch in range(num_epochs):
            order = epoch_order(num_samples, seed=0, epoch=epoch, index_hash=HASH, block=block, shard_of_sample=shards)
            place[order] += np.arange(num_samples) / num_epochs
        standard_error = num_samples / np.sqrt(12 * num_epochs)
        assert np.abs(place - (num_samples - 1) / 2).max() < 5 * standard_error


@given(data=st.data(), seed=seeds, per_rank=st.integers(1, 4), tail=st.integers(0, 20))
def test_steps_cover_each_epoch_once_and_drop_the_tail(
    data: st.DataObject, seed: int, per_rank: int, tail: int
) -> None:
    global_batch = 6 * per_rank
    num_steps = data.draw(st.integers(1, 5))
    num_samples = num_steps * global_batch + tail % global_batch
    order = BatchOrder(num_samples=num_samples, global_batch=global_batch, seed=seed, index_hash=HASH)
    assert order.steps_per_epoch == steps_per_epoch(num_samples, global_batch) == num_steps
    for epoch in range(2):
        steps = range(epoch * num_steps, (epoch + 1) * num_steps)
        assert {order.epoch_of(step) for step in steps} == {epoch}
        shown = np.concatenate([order.batch_samples(step) for step in steps])
        whole = epoch_order(num_samples, seed=seed, epoch=epoch, index_hash=HASH)
        assert np.array_equal(shown, whole[: num_steps * global_batch])


@given(seed=seeds, per_rank=st.integers(1, 4), whole=st.integers(1, 5), tail=st.integers(0, 23))
def test_a_padded_epoch_shows_every_sample_and_its_last_batch_again_some_of_the_one_before(
    seed: int, per_rank: int, whole: int, tail: int
) -> None:
    global_batch = 6 * per_rank
    num_samples = whole * global_batch + tail % global_batch
    order = BatchOrder(num_samples=num_samples, global_batch=global_batch, seed=seed, index_hash=HASH, tail="pad")
    num_steps = whole + bool(tail % global_batch)
    assert order.steps_per_epoch == steps_per_epoch(num_samples, global_batch, "pad") == num_steps
    repeated = -num_samples % global_batch
    assert repeated == num_steps * global_batch - num_samples
    for epoch in range(2):
        batches = [order.batch_samples(epoch * num_steps + place) for place in range(num_steps)]
        shown = np.concatenate(batches)
        whole_order = epoch_order(num_samples, seed=seed, epoch=epoch, index_hash=HASH)
        assert np.array_equal(shown[:num_samples], whole_order)
        counts = np.bincount(shown, minlength=num_samples)
        assert counts.min() == 1 and (counts == 2).sum() == repeated and counts.max() <= 2
        assert all(len(set(batch.tolist())) == global_batch for batch in batches)  # none has a sample twice
        assert set(batches[-1].tolist()) == set(whole_order[-global_batch:].tolist())


def test_the_samples_that_pad_stay_what_they_were_in_earlier_versions() -> None:
    order = BatchOrder(num_samples=8, global_batch=6, seed=3, index_hash=HASH, tail="pad")
    assert epoch_order(8, seed=3, epoch=5, index_hash=HASH).tolist() == [7, 6, 1, 3, 4, 0, 2, 5]
    assert order.batch_samples(11).tolist() == [2, 5, 1, 3, 4, 0]


@given(
    data=st.data(),
    seed=seeds,
    epoch=st.integers(0, 3),
    tail=st.sampled_from(["drop", "pad"]),
    groups=st.integers(1, 4),
    per_group=st.integers(1, 3),
    num_steps=st.integers(1, 6),
    block=st.integers(0, 3),
)
def test_groups_share_out_the_same_samples_of_an_epoch(
    data: st.DataObject, seed: int, epoch: int, tail: str, groups: int, per_group: int, num_steps: int, block: int
) -> None:
    """Each group's part of the batches, in a row, is one run of the epoch."""
    global_batch = groups * per_group
    num_samples = num_steps * global_batch + data.draw(st.integers(0, global_batch - 1))
    num_steps = steps_per_epoch(num_samples, global_batch, tail)
    shards = shards_of(num_samples, 5)
    order = BatchOrder(
        num_samples=num_samples,
        global_batch=global_batch,
        seed=seed,
        index_hash=HASH,
        block=block,
        shard_of_sample=shards,
        groups=groups,
        tail=tail,
    )
    steps = [order.batch_samples(epoch * num_steps + place) for place in range(num_steps)]
    of_group = [np.concatenate([step.reshape(groups, -1)[group] for step in steps]) for group in range(groups)]
    whole = epoch_order(num_samples, seed=seed, epoch=epoch, index_hash=HASH, block=block, shard_of_sample=shards)
    assert np.array_equal(np.concatenate(of_group), used_in_epoch(whole, global_batch, tail, groups))
    if tail == "drop":
        assert np.array_equal(np.concatenate(of_group), whole[: num_steps * global_batch])


@given(
    data=st.data(),
    seed=seeds,
    epoch=st.integers(0, 3),
    groups=st.integers(1, 6),
    per_group=st.integers(1, 6),
    num_whole=st.integers(1, 4),
    block=st.integers(0, 3),
)
@example(data=None, seed=3, epoch=0, groups=4, per_group=6, num_whole=1, block=0)
def test_padding_shows_every_sample_and_none_twice_in_a_step_in_any_groups(
    data: st.DataObject, seed: int, epoch: int, groups: int, per_group: int, num_whole: int, block: int
) -> None:
    """Nor does any group of a batch need what another group walks through."""
    global_batch = groups * per_group
    num_samples = num_whole * global_batch + (4 if data is None else data.draw(st.integers(0, global_batch - 1)))
    order = BatchOrder(
        num_samples=num_samples,
        global_batch=global_batch,
        seed=seed,
        index_hash=HASH,
        block=block,
        shard_of_sample=shards_of(num_samples, 5),
        groups=groups,
        tail="pad",
    )
    num_steps = order.steps_per_epoch
    batches = [order.batch_samples(epoch * num_steps + place) for place in range(num_steps)]
    assert {len(batch) for batch in batches} == {len(set(batch.tolist())) for batch in batches} == {global_batch}
    counts = np.bincount(np.concatenate(batches), minlength=num_samples)
    assert counts.min() == 1 and counts.max() <= 2
    assert (counts == 2).sum() == -num_samples % global_batch
    of_group = [
        set(np.concatenate([b.reshape(groups, -1)[group] for b in batches]).tolist()) for group in range(groups)
    ]
    assert sum(map(len, of_group)) == num_samples
    assert max(map(len, of_group)) - min(map(len, of_group)) <= 1


@pytest.mark.parametrize(("world_size", "num_micro_batches"), [(1, 1), (2, 1), (4, 1), (4, 3), (2, 6)])
def test_ranks_that_divide_the_groups_read_shards_of_their_own(world_size: int, num_micro_batches: int) -> None:
    """16 shards, 4 groups: a rank of W reads 16 / W shards in an epoch, and the batches are those of any other W."""
    num_samples, global_batch = 16 * 24, 24
    shards = shards_of(num_samples, 16)
    order = BatchOrder(
        num_samples=num_samples,
        global_batch=global_batch,
        seed=3,
        index_hash=HASH,
        block=2,
        shard_of_sample=shards,
        groups=4,
    )
    read: list[set[int]] = [set() for _ in range(world_size)]
    for step in range(order.steps_per_epoch):
        batch = order.batch_samples(step)
        stripes = [
            stripe(
                batch, rank=rank, world_size=world_size, micro=micro, num_micro_batches=num_micro_batches, by_rank=True
            )
            for rank in range(world_size)
            for micro in range(num_micro_batches)
        ]
        assert np.array_equal(np.concatenate(stripes), batch)
        for rank in range(world_size):
            read[rank].update(shards[np.concatenate(stripes[rank * num_micro_batches :][:num_micro_batches])].tolist())
    assert [len(of_rank) for of_rank in read] == [16 // world_size] * world_size
    assert set.union(*read) == set(range(16))


@given(step=st.integers(0, 200), start=st.integers(0, 200))
def test_a_step_is_the_same_from_wherever_the_run_came(step: int, start: int) -> None:
    def order() -> BatchOrder:
        return BatchOrder(num_samples=37, global_batch=12, seed=1, index_hash=HASH)

    came_from_elsewhere = order()
    came_from_elsewhere.batch_samples(start)
    assert np.array_equal(order().batch_samples(step), came_from_elsewhere.batch_samples(step))


@given(world_size=st.integers(1, 9), num_micro_batches=st.integers(1, 4), per_stripe=st.integers(1, 5))
def test_stripes_of_all_ranks_and_micro_batches_are_the_batch(
    world_size: int, num_micro_batches: int, per_stripe: int
) -> None:
    batch = np.random.default_rng(0).permutation(world_size * num_micro_batches * per_stripe)
    stripes = [
        stripe(batch, rank=rank, world_size=world_size, micro=micro, num_micro_batches=num_micro_batches)
        for micro in range(num_micro_batches)
        for rank in range(world_size)
    ]
    assert {len(one) for one in stripes} == {per_stripe}
    assert np.array_equal(np.concatenate(stripes), batch)  # the sequence, not only the set


@given(num_samples=st.integers(0, 100), world_size=st.integers(1, 12))
def test_evaluation_stripes_are_equally_long_runs_that_hold_each_sample_once(num_samples: int, world_size: int) -> None:
    stripes = [evaluation_stripe(num_samples, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(one) for one in stripes}) == 1
    everything = np.concatenate(stripes)
    assert everything[everything != PADDING].tolist() == list(range(num_samples))  # in a row, rank by rank
    assert all((one == PADDING).sum() <= 1 for one in stripes)
