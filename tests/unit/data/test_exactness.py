"""Killed anywhere, resumed on any ranks with any workers: the epoch is the unbroken one, sample by sample.

The whole matrix is `python -m benchmarks.exactness`; here is its pure half, and a compact part of the real one.
"""

import numpy as np
import pytest
from small_shards import write_shards

from benchmarks.exactness_matrix import (
    LOADER_RULES,
    RULES,
    Difference,
    Rule,
    Split,
    kill_points,
    pure,
    split_of,
    through_loaders,
)
from pipeline.data.order import BatchOrder
from pipeline.data.store import ShardIndex

SIZES = (20, 30, 24, 13)  # 3 batches of 24, and 15 samples that fill none


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return ShardIndex.open(write_shards(tmp_path_factory.mktemp("exact") / "shards", train=SIZES), "train")


def test_every_kill_and_every_change_of_ranks_leaves_the_order_alone(index: ShardIndex) -> None:
    tally = pure(split_of(index))
    assert (tally.missed, tally.repeated, tally.out_of_order) == (0, 0, 0)
    grids = 12  # 6 world sizes, with and without accumulation
    assert tally.epochs == grids**2 * sum(2 * (4 if rule.tail == "pad" else 3) - 1 for rule in RULES)


@pytest.mark.parametrize("rule", LOADER_RULES, ids=str)
def test_real_loaders_killed_with_batches_in_flight_leave_it_alone_too(index: ShardIndex, rule: Rule) -> None:
    tally = through_loaders(index, [rule], world_sizes=(1, 3), workers=(0, 1))
    assert (tally.missed, tally.repeated, tally.out_of_order) == (0, 0, 0)
    assert tally.epochs == 16 * len(kill_points(4))
    assert tally.in_flight >= 1, "no worker had anything in its hands: nothing was killed"


def test_a_run_dies_at_both_ends_of_an_epoch_and_beyond_its_turn() -> None:
    assert kill_points(7) == [1, 3, 6, 7, 8]


def test_the_matrix_would_see_a_sample_lost_repeated_or_moved() -> None:
    ids = np.arange(48)
    assert Difference.between(ids, ids) == Difference()
    assert Difference.between(ids[:-1], ids) == Difference(missed=1, out_of_order=1)
    assert Difference.between(np.append(ids, 3), ids) == Difference(repeated=1, out_of_order=1)
    assert Difference.between(ids[::-1], ids) == Difference(out_of_order=48)
    assert Difference.between(np.append(ids[1:], 50), ids) == Difference(missed=1, repeated=1, out_of_order=48)


def test_the_matrix_would_see_an_order_that_depends_on_where_it_began(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it compares with is written down apart from the order that it tests."""
    true = BatchOrder.batch_samples
    monkeypatch.setattr(BatchOrder, "batch_samples", lambda order, step: true(order, step)[::-1])
    split = split_of(index)
    tally = pure(Split(split.num_samples, split.index_hash, split.shard_of_sample), [Rule()], world_sizes=(2,))
    assert tally.out_of_order > 0 and tally.missed == tally.repeated == 0
    monkeypatch.setattr(BatchOrder, "batch_samples", lambda order, step: true(order, step).clip(min=1))
    tally = pure(split, [Rule("pad")], world_sizes=(2,))
    assert tally.missed > 0 and tally.repeated > 0
