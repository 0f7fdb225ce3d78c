"""Every kill point times every change of ranks and workers: is the epoch that comes out the unbroken one?

`pure` asks order.py alone; `through_loaders` reads real shards with real worker processes. Both compare with an epoch
that is written down here from `epoch_order`, without global batches, ranks or steps.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.order import BatchOrder, Ids, epoch_order, stripe

if TYPE_CHECKING:
    from pipeline.data.index import ShardIndex

WORLD_SIZES, WORKERS = (1, 2, 3, 4, 6, 8), (0, 1, 3)
GLOBAL_BATCH = 24  # divisible by them all
SEED = 5


@dataclass(frozen=True)
class Rule:
    """What of the configuration shapes the order: data.tail, data.shuffle_block, data.shuffle_groups."""

    tail: str = "drop"
    block: int = 0
    groups: int = 1

    def __str__(self) -> str:
        return f"{self.tail}, block {self.block}, groups {self.groups}"


RULES = tuple(Rule(tail, block, groups) for tail in ("drop", "pad") for block, groups in ((0, 1), (2, 1), (2, 4)))

LOADER_RULES = (Rule("drop"), Rule("pad", block=2, groups=4))
"""The default, and everything at once."""


@dataclass(frozen=True)
class Difference:
    """Of a sequence of samples from the one that should have come."""

    missed: int = 0
    repeated: int = 0
    out_of_order: int = 0
    """Places with another sample than expected, or with none."""

    @classmethod
    def between(cls, found: Ids, expected: Ids) -> "Difference":
        """Samples may be expected twice."""
        size = int(max(found.max(initial=-1), expected.max(initial=-1))) + 1
        lacking = np.bincount(expected, minlength=size) - np.bincount(found, minlength=size)
        common = min(len(found), len(expected))
        other = int((found[:common] != expected[:common]).sum()) + max(len(found), len(expected)) - common
        return cls(int(lacking.clip(min=0).sum()), int((-lacking).clip(min=0).sum()), other)


@dataclass
class Tally:
    """Differences summed over many epochs, each of which was put together in its own way."""

    epochs: int = 0
    missed: int = 0
    repeated: int = 0
    out_of_order: int = 0
    in_flight: int = 0
    """Most batches that one rank's workers held when they were dropped."""

    def add(self, found: Ids, expected: Ids) -> None:
        """One more epoch."""
        difference = Difference.between(found, expected)
        self.epochs += 1
        self.missed += difference.missed
        self.repeated += difference.repeated
        self.out_of_order += difference.out_of_order

    def row(self) -> dict[str, int]:
        """For the result file."""
        return asdict(self)


@dataclass(frozen=True)
class Split:
    """What the order depends on of a split."""

    num_samples: int
    index_hash: str
    shard_of_sample: Any
    """int of shape (num_samples,)."""

    def order(self, rule: Rule) -> BatchOrder:
        """The product's."""
        return BatchOrder(
            num_samples=self.num_samples,
            global_batch=GLOBAL_BATCH,
            seed=SEED,
            index_hash=self.index_hash,
            block=rule.block,
            shard_of_sample=self.shard_of_sample,
            groups=rule.groups,
            tail=rule.tail,
        )

    def unbroken(self, rule: Rule, epoch: int) -> Ids:
        """What an epoch must show, batch by batch, of shape (steps * GLOBAL_BATCH,)."""
        ids = epoch_order(
            self.num_samples,
            seed=SEED,
            epoch=epoch,
            index_hash=self.index_hash,
            block=rule.block,
            shard_of_sample=self.shard_of_sample,
        ).tolist()
        if rule.tail == "drop":
            ids = ids[: len(ids) - len(ids) % GLOBAL_BATCH]
        per_group, num_steps = GLOBAL_BATCH // rule.groups, -(-len(ids) // GLOBAL_BATCH)
        shown = []
        for group in range(rule.groups):
            run = ids[len(ids) * group // rule.groups : len(ids) * (group + 1) // rule.groups]
            shown += run + run[-per_group:][: num_steps * per_group - len(run)]
        of_group = np.array(shown).reshape(rule.groups, num_steps, per_group)
        return np.concatenate(list(of_group.transpose(1, 0, 2).reshape(-1, GLOBAL_BATCH)))


def micro_batches(world_size: int) -> list[int]:
    """Ways to accumulate: not at all, and picture by picture."""
    return sorted({1, GLOBAL_BATCH // world_size})


def kill_points(steps_per_epoch: int) -> list[int]:
    """Steps done when the run dies: the first, half of the epoch, all but its last, all, and one of the next."""
    return [1, steps_per_epoch // 2, steps_per_epoch - 1, steps_per_epoch, steps_per_epoch + 1]


def pure(split: Split, rules: Sequence[Rule] = RULES, world_sizes: Sequence[int] = WORLD_SIZES) -> Tally:
    """Killed after every step of two epochs, on all pairs of world sizes, with and without accumulation."""
    tally = Tally()
    grids = [
        (world_size, num_micro_batches) for world_size in world_sizes for num_micro_batches in micro_batches(world_size)
    ]
    for rule in rules:
        order = split.order(rule)
        num_steps = 2 * order.steps_per_epoch
        expected = np.concatenate([split.unbroken(rule, 0), split.unbroken(rule, 1)])
        steps = {grid: [_on_ranks(split, rule, step, *grid) for step in range(num_steps)] for grid in grids}
        for before, after in itertools.product(grids, grids):
            for done in range(1, num_steps):
                tally.add(np.concatenate(steps[before][:done] + steps[after][done:]), expected)
    return tally


def _on_ranks(split: Split, rule: Rule, step: int, world_size: int, num_micro_batches: int) -> Ids:
    """A step as the ranks show it: in the order in which a batch is cut."""
    batch = split.order(rule).batch_samples(step)  # a new process knows of no earlier epoch
    by_rank = rule.groups > 1
    cut = itertools.product(range(world_size), range(num_micro_batches))
    places = cut if by_rank else ((rank, micro) for micro in range(num_micro_batches) for rank in range(world_size))
    return np.concatenate(
        [
            stripe(
                batch,
                rank=rank,
                world_size=world_size,
                micro=micro,
                num_micro_batches=num_micro_batches,
                by_rank=by_rank,
            )
            for rank, micro in places
        ]
    )


def through_loaders(
    index: "ShardIndex",
    rules: Sequence[Rule],
    world_sizes: Sequence[int] = WORLD_SIZES,
    workers: Sequence[int] = WORKERS,
) -> Tally:
    """Killed at each of `kill_points`, on all pairs of (ranks, workers).

    The part of a run before the kill and the part after it have nothing in common but the number of steps done, so each
    is loaded once and put together with every other.
    """
    split, tally = split_of(index), Tally()
    grids = list(itertools.product(world_sizes, workers))
    for rule in rules:
        steps_per_epoch = split.order(rule).steps_per_epoch
        num_steps = steps_per_epoch + 2
        expected = np.concatenate([split.unbroken(rule, 0), split.unbroken(rule, 1)])[: num_steps * GLOBAL_BATCH]
        for done in kill_points(steps_per_epoch):
            before = {grid: _loaded(index, rule, *grid, range(done), num_steps, tally) for grid in grids}
            after = {grid: _loaded(index, rule, *grid, range(done, num_steps), num_steps, tally) for grid in grids}
            for one, other in itertools.product(grids, grids):
                tally.add(np.concatenate([before[one], after[other]]), expected)
    return tally


def split_of(index: "ShardIndex") -> Split:
    """Of real shards."""
    return Split(index.num_samples, index.index_hash, index.table.shard)


def _loaded(
    index: "ShardIndex", rule: Rule, world_size: int, num_workers: int, steps: range, num_steps: int, tally: Tally
) -> Ids:
    """Global batches `steps` of a run of `num_steps`, from the loaders of all ranks; then these are dropped."""
    ranks = [
        list(_of_rank(index, rule, rank, world_size, num_workers, steps, num_steps, tally))
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {len(steps)}, "the ranks have unequal numbers of batches"
    return np.concatenate([ids for together in zip(*ranks, strict=True) for ids in together])


def _of_rank(
    index: "ShardIndex",
    rule: Rule,
    rank: int,
    world_size: int,
    num_workers: int,
    steps: range,
    num_steps: int,
    tally: Tally,
) -> Iterator[Ids]:
    from pipeline.config.data import AugmentConfig, DataConfig
    from pipeline.config.model import InputConfig
    from pipeline.config.training import BatchSplit
    from pipeline.data.batches import TrainBatches
    from pipeline.data.loader import Reader, training_loader

    data = DataConfig(
        tail=rule.tail,
        shuffle_block=rule.block,
        shuffle_groups=rule.groups,
        augment=AugmentConfig(crop="center", flip=False),
    )
    loader = training_loader(
        index,
        data,
        InputConfig(size=8, resize_side=8),
        Reader(rank=rank, world_size=world_size, num_workers=num_workers),
        BatchSplit(GLOBAL_BATCH, GLOBAL_BATCH // world_size, 1),
        seed=SEED,
        start_step=steps.start,
        num_steps=num_steps,
    )
    batches = loader.batch_sampler
    assert isinstance(batches, TrainBatches)
    loading = iter(loader)
    for _ in steps:
        yield next(loading).sample_ids_B.numpy()
    if batches.place is not None:
        tally.in_flight = max(tally.in_flight, batches.place + 1 - steps.stop)
