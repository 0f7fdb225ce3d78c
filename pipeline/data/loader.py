"""Batches for one rank: what order.py says, read by index.py, cut by pixels.py, put together by batches.py.

The sampler names samples, so workers hold no state: which worker makes which batch, and how many there are, changes
nothing.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch.utils.data import DataLoader

from pipeline.config.data import DataConfig
from pipeline.config.model import InputConfig
from pipeline.config.training import BatchSplit
from pipeline.data.batches import EvalBatches, EvalSamples, LoadedBatch, TrainBatches, TrainSamples
from pipeline.data.index import ShardIndex
from pipeline.data.order import BatchOrder
from pipeline.data.prefetch import Course, Prefetcher
from pipeline.data.remote.shards import RemoteFiles
from pipeline.data.workers import PREFETCH_BATCHES, BatchLoader, choose_num_workers, make_loader


@dataclass(frozen=True, kw_only=True)
class Reader:
    """The rank that is fed, and how: its share of every batch, and the processes that read for it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    num_workers: int = 0
    """DataLoader processes; 0: the rank reads and decodes by itself."""
    pin_memory: bool = False
    """Hand batches over in memory from which a GPU copies without waiting."""

    @classmethod
    def choose(
        cls, configured: int | None, *, rank: int, world_size: int, local_rank: int, local_world_size: int, on_gpu: bool
    ) -> "Reader":
        """The reader of a rank with as many workers as `configured`, or, where that is null, as its cores allow."""
        num_workers = choose_num_workers(configured, local_world_size=local_world_size, on_gpu=on_gpu)
        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=local_world_size,
            num_workers=num_workers,
            pin_memory=on_gpu,
        )

    @property
    def ranks_served(self) -> range:
        """Ranks for which this one fetches shards ahead: the first of a machine for all of them, the others for none.

        The ranks of a machine are numbered in a row, as launchers do it.
        """
        last = min(self.rank + self.local_world_size, self.world_size)
        return range(self.rank, last) if self.local_rank == 0 else range(0)


def training_loader(
    index: ShardIndex,
    data: DataConfig,
    input_config: InputConfig,
    reader: Reader,
    batch: BatchSplit,
    *,
    seed: int,
    start_step: int,
    num_steps: int,
) -> DataLoader[LoadedBatch]:
    """The micro-batches of one rank that are still to do.

    Args:
        index: the training split.
        data: augmentation and shuffling.
        input_config: at the crop side of this run.
        reader: the rank that is fed.
        batch: how the ranks share an optimiser step.
        seed: of order and augmentation.
        start_step: steps committed by earlier attempts.
        num_steps: steps of the whole run.
    """
    order = BatchOrder(
        num_samples=index.num_samples,
        global_batch=batch.global_size,
        seed=seed,
        index_hash=index.index_hash,
        block=data.shuffle_block,
        shard_of_sample=index.table.shard,
        groups=data.shuffle_groups,
        tail=data.tail,
    )
    batches = TrainBatches(
        order,
        rank=reader.rank,
        world_size=reader.world_size,
        num_micro_batches=batch.num_micro_batches,
        start_step=start_step,
        num_steps=num_steps,
    )
    return _loader(index, TrainSamples(index, input_config, data.augment, seed), batches, reader)


def evaluation_loader(
    index: ShardIndex, config: InputConfig, reader: Reader, *, batch_size: int
) -> DataLoader[LoadedBatch]:
    """One rank's share of a split: over all ranks each picture once, with equally many batches on each rank.

    Args:
        index: the split.
        config: how pictures are cut.
        reader: the rank that is fed.
        batch_size: pictures per rank and batch.
    """
    batches = EvalBatches(index.num_samples, batch_size=batch_size, rank=reader.rank, world_size=reader.world_size)
    return _loader(index, EvalSamples(index, config), batches, reader)


def _loader(
    index: ShardIndex, samples: TrainSamples | EvalSamples, batches: TrainBatches | EvalBatches, reader: Reader
) -> BatchLoader:
    return make_loader(
        samples,
        batches,
        num_workers=reader.num_workers,
        pin_memory=reader.pin_memory,
        ahead=_prefetcher(index, batches, reader),
    )


def _prefetcher(index: ShardIndex, course: Course, reader: Reader) -> AbstractContextManager[None] | None:
    """None for local shards, and for ranks that fetch nothing ahead."""
    ranks = reader.ranks_served
    if isinstance(index.files, RemoteFiles) and ranks:
        # The batches that workers hold, and one where ranks wait for one another in every step.
        lag = PREFETCH_BATCHES * reader.num_workers + (len(ranks) > 1)
        return Prefetcher(index.files, index.table.shard, course, ranks, lag=lag)
    return None
