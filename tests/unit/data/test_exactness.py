"""Killed anywhere, resumed on any ranks with any workers: the epoch is the unbroken one, sample by sample.

The whole matrix is `python -m benchmarks.exactness`; here is its pure half, and a compact part of the real one.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import exactness_peers
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
from benchmarks.exactness_peers import Job
from pipeline.data.index import ShardIndex
from pipeline.data.order import BatchOrder
from tests.making.shards import write_shards

SIZES = (20, 30, 24, 13)  # 3 batches of 24, and 15 samples that fill none


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return ShardIndex.open(write_shards(tmp_path_factory.mktemp("exact") / "shards", train=SIZES), "train")


def test_every_kill_and_every_change_of_ranks_leaves_the_order_alone(index: ShardIndex) -> None:
    tally = pure(split_of(index))
    assert (tally.missed, tally.repeated, tally.out_of_order) == (0, 0, 0)
    grids = 12  # 6 world sizes, with and without accumulation
    assert tally.epochs == grids**2 * sum(2 * (4 if rule.tail == "pad" else 3) - 1 for rule in RULES)


@pytest.mark.not_quick
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


# The peers' table


def peers_rows(monkeypatch: pytest.MonkeyPatch, **steps_of_rank: list[list[list[int]]]) -> dict[str, dict[str, Any]]:
    """The table's rows by job, of a library whose ranks were given these batches of 8 samples in all."""
    first, killed, last = "unbroken", "killed", "resumed"
    monkeypatch.setattr(exactness_peers, "NUM_SAMPLES", 8)
    monkeypatch.setattr(exactness_peers, "FIRST", first)
    jobs = (Job(first, 2), Job(killed, 2, kill_after=1), Job(last, 1, goes_on_with=killed))
    monkeypatch.setattr(exactness_peers, "JOBS", jobs)
    ended = {name: {"status": "ended", "steps_of_rank": ranks} for name, ranks in steps_of_rank.items()}
    rows = exactness_peers.rows_of(exactness_peers.SUBJECTS[0], ended)
    return {row.pop("job"): row for row in rows}


def test_the_table_of_peers_counts_what_an_epoch_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = peers_rows(
        monkeypatch,
        unbroken=[[[0, 1], [4, 5]], [[2, 3]]],
        killed=[[[0, 1]], [[2, 3]]],
        resumed=[[[4, 5, 6], [0]]],
    )
    name = exactness_peers.SUBJECTS[0].name
    common = {"library": name, "status": "ended"}
    assert rows == {
        "unbroken": {**common, "missed": 2, "repeated": 0, "in_another_step": 0, "steps_of_ranks": [2, 1]},
        "resumed": {**common, "missed": 1, "repeated": 1, "in_another_step": 2, "steps_of_ranks": [3]},
    }


@pytest.mark.slow
def test_jobs_that_are_killed_for_real_go_on_as_the_table_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours and webdataset, which our own environment has; ranks in groups of their own, SIGKILL, other ranks."""
    monkeypatch.chdir(tmp_path)
    ours, theirs = exactness_peers.SUBJECTS[-1], exactness_peers.SUBJECTS[0]
    monkeypatch.setattr(exactness_peers, "SUBJECTS", (theirs, ours))
    chain = {exactness_peers.FIRST, exactness_peers.KILLED, exactness_peers.KILLED_AGAIN, exactness_peers.JOBS[-1].name}
    monkeypatch.setattr(exactness_peers, "JOBS", tuple(job for job in exactness_peers.JOBS if job.name in chain))
    table = exactness_peers.measure(Path(sys.executable))
    assert {row["status"] for row in table["rows"]} == {"ended"}
    by_library = {name: [row for row in table["rows"] if row["library"] == name] for name in (ours.name, theirs.name)}
    for row in by_library[ours.name]:
        assert (row["missed"], row["repeated"], row["in_another_step"]) == (0, 5, 0)
        assert set(row["steps_of_ranks"]) == {42}
    assert any(len(set(row["steps_of_ranks"])) > 1 for row in by_library[theirs.name])
    assert all(row["repeated"] > 0 for row in by_library[theirs.name] if "killed" in row["job"])
