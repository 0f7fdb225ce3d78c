"""Which samples make up which global batch: a pure function of (seed, epoch, index), without ranks or workers in it.

A step is absolute over the run: step s belongs to epoch s // steps_per_epoch. Ranks and micro-batches only cut a global
batch into stripes, so the samples of a step are the same on any number of ranks.

Everything is drawn as raw 64-bit words of Philox, whose stream NumPy promises never to change (NEP 19; for the methods
of `Generator` it does not), so that an upgrade of NumPy in the middle of a run keeps the order.
"""

import itertools
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Places = NDArray[np.uint32]

PADDING = -1
"""Stands for no sample, where ranks would otherwise get unequal counts."""


def epoch_order(
    num_samples: int,
    *,
    seed: int,
    epoch: int,
    index_hash: str,
    block: int = 0,
    shard_of_sample: NDArray[np.integer] | None = None,
) -> Ids:
    """The permutation of 0 .. num_samples - 1 in which epoch `epoch` shows the samples.

    Args:
        num_samples: N.
        seed: of the run.
        epoch: 0-based.
        index_hash: hexadecimal; other samples get another order.
        block: 0: every permutation is equally likely. k > 0: the shards are permuted, and the samples of each k
            neighbouring shards among themselves, so that at any time only k shards (2k at a border) are read from.
        shard_of_sample: of shape (N,), needed for k > 0: the number of the shard that holds each sample.

    Returns:
        int64 of shape (N,).
    """
    entropy = (seed, epoch, int(index_hash, 16))
    words = np.random.Philox(np.random.SeedSequence(entropy)).random_raw
    if not block:
        return argsort_words(words(num_samples))
    assert shard_of_sample is not None and shard_of_sample.shape == (num_samples,)
    num_shards = int(shard_of_sample.max(initial=-1)) + 1
    place_of_shard = np.empty(num_shards, np.int64)
    place_of_shard[np.argsort(words(num_shards), kind="stable")] = np.arange(num_shards)
    group_of_sample = place_of_shard[shard_of_sample] // block
    return np.lexsort((words(num_samples), group_of_sample))


def argsort_words(words: NDArray[np.uint64]) -> Ids:
    """What `np.argsort(words, kind="stable")` returns, several times as fast for millions of random words.

    NumPy sorts 64-bit values with vector instructions, but not their places. So the low bits of each word make room for
    its place; words that are equal in the bits above, a few pairs of millions, are put in order afterwards.
    """
    num_low_bits = np.uint64(max(1, (len(words) - 1).bit_length()))
    low_bits = (np.uint64(1) << num_low_bits) - np.uint64(1)
    keys = words & ~low_bits
    keys |= np.arange(len(words), dtype=np.uint64)
    keys.sort()
    order = (keys & low_bits).astype(np.int64)
    keys >>= num_low_bits
    ties = np.flatnonzero(keys[1:] == keys[:-1])
    for run in np.split(ties, np.flatnonzero(np.diff(ties) > 1) + 1) if len(ties) else ():
        tied = order[run[0] : run[-1] + 2]
        order[run[0] : run[-1] + 2] = tied[np.argsort(words[tied], kind="stable")]
    return order


def steps_per_epoch(num_samples: int, global_batch: int, tail: str = "drop") -> int:
    """Global batches in an epoch, all of them whole.

    Args:
        num_samples: Number of samples of the split.
        global_batch: Number of samples of a step.
        tail: `drop`: the samples that fill no batch are left out, others in each epoch; `pad`: they are filled up.
    """
    return num_samples // global_batch if tail == "drop" else -(-num_samples // global_batch)


def used_in_epoch(order: Ids, global_batch: int, tail: str = "drop", groups: int = 1) -> Ids:
    """What an epoch shows, group by group: as much of `order` as whole batches hold, or more than it.

    Each group takes a run of the order, of equal lengths or, with `pad`, as equal as can be. With `pad` a group's run
    goes on with its last b samples, b = global_batch / groups, from the first of them until its part of the batch is
    full, so that its last part holds exactly those. They lie in the shards that it read last; nothing is fetched again.
    No two groups share a sample, so none comes twice in a batch.

    Args:
        order: The epoch's permutation, of shape (N,), N >= global_batch.
        global_batch: Number of samples of a step.
        tail: `drop` or `pad`.
        groups: Number of groups; divides global_batch.

    Returns:
        of shape (steps_per_epoch * global_batch,).
    """
    assert len(order) >= global_batch and global_batch % groups == 0
    num_steps = steps_per_epoch(len(order), global_batch, tail)
    if tail == "drop":
        return order[: num_steps * global_batch]
    per_group = global_batch // groups
    borders = [group * len(order) // groups for group in range(groups + 1)]
    runs: list[Ids] = []
    for first, last in itertools.pairwise(borders):
        missing = num_steps * per_group - (last - first)  # from 0 to per_group
        runs += [order[first:last], order[last - per_group : last - per_group + missing]]
    return np.concatenate(runs)


@dataclass(frozen=True)
class BatchOrder:
    """The global batches of a run, by absolute step. Keeps the order of one epoch in memory (4 bytes a sample)."""

    num_samples: int
    global_batch: int
    seed: int
    index_hash: str
    block: int = 0
    shard_of_sample: NDArray[np.integer] | None = None
    groups: int = 1
    """Parts of each global batch that walk through parts of the epoch of their own. With `block` each part reads from
    few shards, and ranks that take whole parts need no others. Divides the global batch; independent of the ranks."""
    tail: str = "drop"
    """What becomes of the samples that fill no batch: see `used_in_epoch`."""
    _latest: dict[int, Places] = field(default_factory=dict[int, Places], repr=False, compare=False)

    def __post_init__(self) -> None:
        assert 0 < self.global_batch <= self.num_samples, "less than one global batch: the caller says so to the user"
        assert self.global_batch % self.groups == 0, "TrainConfig refuses this"
        assert self.num_samples < 2**32, "places in a split are kept in 4 bytes"

    @property
    def steps_per_epoch(self) -> int:
        """Steps s with the same s // steps_per_epoch share an epoch."""
        return steps_per_epoch(self.num_samples, self.global_batch, self.tail)

    def epoch_of(self, step: int) -> int:
        """The 0-based epoch of a step."""
        return step // self.steps_per_epoch

    def batch_samples(self, step: int) -> Ids:
        """Sample ids of global batch `step`, of shape (global_batch,), in order."""
        epoch, place = divmod(step, self.steps_per_epoch)
        # Part g of batch p: place p of the g-th of `groups` equal runs of the epoch; with one group, slice p of it.
        parts = self._used(epoch).reshape(self.groups, self.steps_per_epoch, self.global_batch // self.groups)
        return parts[:, place].reshape(-1).astype(np.int64)

    def _used(self, epoch: int) -> Places:
        if epoch not in self._latest:
            self._latest.clear()
            order = epoch_order(
                self.num_samples,
                seed=self.seed,
                epoch=epoch,
                index_hash=self.index_hash,
                block=self.block,
                shard_of_sample=self.shard_of_sample,
            )
            self._latest[epoch] = used_in_epoch(order, self.global_batch, self.tail, self.groups).astype(np.uint32)
        return self._latest[epoch]


def stripe(
    batch: Ids, *, rank: int, world_size: int, micro: int = 0, num_micro_batches: int = 1, by_rank: bool = False
) -> Ids:
    """What rank `rank` takes of a global batch in its micro-batch `micro` of `num_micro_batches`.

    The batch is cut into num_micro_batches x world_size equal runs, micro-batch by micro-batch: at any moment the
    ranks read neighbouring samples, and over ranks and micro-batches each sample is taken exactly once.

    Args:
        batch: Sample ids of shape (B,); B must be divisible by world_size * num_micro_batches.
        rank: Rank that takes the samples.
        world_size: Number of ranks.
        micro: Which of the micro-batches, from 0.
        num_micro_batches: Number of micro-batches of a step.
        by_rank: Rank by rank instead: all micro-batches of a rank are one run of the batch, as groups want it.

    Returns:
        of shape (B / world_size / num_micro_batches,).
    """
    assert 0 <= rank < world_size and 0 <= micro < num_micro_batches
    assert len(batch) % (world_size * num_micro_batches) == 0
    if by_rank:
        return batch.reshape(world_size, num_micro_batches, -1)[rank, micro]
    return batch.reshape(num_micro_batches, world_size, -1)[micro, rank]


def evaluation_stripe(num_samples: int, *, rank: int, world_size: int) -> Ids:
    """Rank `rank`'s samples of an evaluation: a run of neighbours, filled up with PADDING.

    Neighbours lie in few shards, so a server reads only its part of them. Every sample is on exactly one rank, and all
    ranks get ceil(num_samples / world_size) entries, of which at most one is PADDING.
    """
    assert 0 <= rank < world_size
    ids = np.full(-(-num_samples // world_size), PADDING, np.int64)
    mine = np.arange(rank * num_samples // world_size, (rank + 1) * num_samples // world_size)
    ids[: len(mine)] = mine
    return ids
