"""Batches for one rank: what order.py says, read by store.py, cut by pixels.py, put together by batches.py.

The sampler names samples, so workers hold no state: which worker makes which batch, and how many there are, changes
nothing.
"""

from contextlib import AbstractContextManager

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from pipeline.config.training import DataConfig, InputConfig
from pipeline.data.batches import EvalBatches, EvalSamples, LoadedBatch, TrainBatches, TrainSamples
from pipeline.data.index import ShardIndex
from pipeline.data.order import BatchOrder
from pipeline.data.prefetch import Course, Prefetcher
from pipeline.data.remote.shards import RemoteFiles
from pipeline.data.workers import PREFETCH_BATCHES, choose_num_workers, make_loader


class ShardData(pl.LightningDataModule):
    """The loaders of one rank.

    Args:
        index_train, index_val: the splits; without validation the second is None.
        data: augmentation, workers, shuffling.
        input_config: at the crop side of this run.
        seed: of order and augmentation.
        global_batch: pictures per optimiser step.
        rank, world_size: this process among all; local_rank, local_world_size: among those of this machine.
        accumulate: micro-batches per step.
        start_step: steps committed by earlier attempts.
        num_steps: steps of the whole run.
        evaluation_batch: pictures per rank and batch in validation.
        pin_memory: for a GPU.
    """

    def __init__(
        self,
        index_train: ShardIndex,
        index_val: ShardIndex | None,
        data: DataConfig,
        input_config: InputConfig,
        *,
        seed: int,
        global_batch: int,
        rank: int,
        world_size: int,
        accumulate: int,
        start_step: int,
        num_steps: int,
        evaluation_batch: int = 64,
        local_rank: int = 0,
        local_world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        self.index_train, self.index_val = index_train, index_val
        self.data_config, self.input_config = data, input_config
        self.rank, self.world_size = rank, world_size
        self.evaluation_batch = evaluation_batch
        self.pin_memory = pin_memory
        self.seed = seed
        self.num_workers = choose_num_workers(data.num_workers, local_world_size=local_world_size, on_gpu=pin_memory)
        order = BatchOrder(
            num_samples=index_train.num_samples,
            global_batch=global_batch,
            seed=seed,
            index_hash=index_train.index_hash,
            block=data.shuffle_block,
            shard_of_sample=index_train.table.shard,
            groups=data.shuffle_groups,
            tail=data.tail,
        )
        self.ranks_served = ranks_served(rank, local_rank, local_world_size, world_size)
        self.batches = TrainBatches(
            order,
            rank=rank,
            world_size=world_size,
            accumulate=accumulate,
            start_step=start_step,
            num_steps=num_steps,
        )

    def train_dataloader(self) -> DataLoader[LoadedBatch]:
        """The micro-batches still to do."""
        samples = TrainSamples(self.index_train, self.input_config, self.data_config.augment, self.seed)
        return make_loader(
            samples,
            self.batches,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            ahead=_prefetcher(self.index_train, self.batches, self.ranks_served, self.num_workers),
        )

    def val_dataloader(self) -> DataLoader[LoadedBatch] | list[DataLoader[LoadedBatch]]:
        """This rank's share of the validation split; an empty list without one."""
        if self.index_val is None:
            return []
        return evaluation_loader(
            self.index_val,
            self.input_config,
            batch_size=self.evaluation_batch,
            rank=self.rank,
            world_size=self.world_size,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            ranks_served=self.ranks_served,
        )


def evaluation_loader(
    index: ShardIndex,
    config: InputConfig,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    ranks_served: range | None = None,
) -> DataLoader[LoadedBatch]:
    """This rank's share of a split: over all ranks each picture once, with equally many batches on each rank.

    `ranks_served`: those for which this one fetches shards ahead; None: itself.
    """
    batches = EvalBatches(index.num_samples, batch_size=batch_size, rank=rank, world_size=world_size)
    served = range(rank, rank + 1) if ranks_served is None else ranks_served
    ahead = _prefetcher(index, batches, served, num_workers)
    return make_loader(EvalSamples(index, config), batches, num_workers=num_workers, pin_memory=pin_memory, ahead=ahead)


def ranks_served(rank: int, local_rank: int, local_world_size: int, world_size: int) -> range:
    """The first rank of a machine fetches ahead for all of them, which are numbered in a row as launchers do it."""
    return range(rank, min(rank + local_world_size, world_size)) if local_rank == 0 else range(0)


def _prefetcher(
    index: ShardIndex, course: Course, ranks: range, num_workers: int
) -> AbstractContextManager[None] | None:
    """None for local shards, and for ranks that fetch nothing ahead."""
    if isinstance(index.files, RemoteFiles) and ranks:
        # The batches that workers hold, and one where ranks wait for one another in every step.
        lag = PREFETCH_BATCHES * num_workers + (len(ranks) > 1)
        return Prefetcher(index.files, index.table.shard, course, ranks, lag=lag)
    return None
