"""Batches for one rank: what order.py says, read by store.py, cut by pixels.py, put together by batches.py.

The sampler names samples, so workers hold no state: which worker makes which batch, and how many there are, changes
nothing. Workers come from a fork server, not by fork: a forked worker would hold copies of the rank's sockets, so that
its peers would not notice for seconds that the rank was killed, and of locks that gloo's threads hold at that moment.
"""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from pipeline.config import DataConfig, InputConfig
from pipeline.data.batches import EvalBatches, EvalSamples, LoadedBatch, TrainBatches, TrainSamples
from pipeline.data.order import BatchOrder
from pipeline.data.store import ShardIndex

MAX_AUTOMATIC_WORKERS = 16
PREFETCH_BATCHES = 2  # per worker
# Slurm sends these to every process of a step; a rank decides what they mean, its workers work on.
SIGNALS_FOR_RANKS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def choose_num_workers(configured: int | None, *, local_world_size: int, on_gpu: bool) -> int:
    """DataLoader processes for a rank; 0: the rank decodes by itself.

    Beside a GPU the cores are free for decoding. On the CPU the network takes some fifty times as long per picture as
    its decoding, so a worker could only take cores from it; one is enough where there are many.
    """
    if configured is not None:
        return configured
    cores = max(1, len(os.sched_getaffinity(0)) // local_world_size)
    if on_gpu:
        return min(MAX_AUTOMATIC_WORKERS, cores - 1)
    return 1 if cores >= 8 else 0


def make_loader(
    dataset: Dataset[LoadedBatch], batches: Sampler, *, num_workers: int, pin_memory: bool
) -> DataLoader[LoadedBatch]:
    """A DataLoader over whole batches. It draws nothing from torch's global generator; its workers ignore signals."""
    if num_workers:
        _start_fork_server()
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=_already_a_batch,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # Iterating draws a seed for the workers; from the global generator it would shift the model's own numbers.
        generator=torch.Generator().manual_seed(0),
        multiprocessing_context="forkserver" if num_workers else None,
        worker_init_fn=_start_worker,
        persistent_workers=num_workers > 0,
        prefetch_factor=PREFETCH_BATCHES if num_workers else None,
    )


class ShardData(pl.LightningDataModule):
    """The loaders of one rank.

    Args:
        index_train, index_val: the splits; without validation the second is None.
        data: augmentation, workers, shuffling.
        input_config: at the crop side of this run.
        seed: of order and augmentation.
        global_batch: pictures per optimiser step.
        rank, world_size: this process among all; local_world_size: processes of this machine.
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
        )
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
        return make_loader(samples, self.batches, num_workers=self.num_workers, pin_memory=self.pin_memory)

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
) -> DataLoader[LoadedBatch]:
    """This rank's share of a split: over all ranks each picture once, with equally many batches on each rank."""
    batches = EvalBatches(index.num_samples, batch_size=batch_size, rank=rank, world_size=world_size)
    return make_loader(EvalSamples(index, config), batches, num_workers=num_workers, pin_memory=pin_memory)


def _already_a_batch(batch: Any) -> Any:
    return batch


def _start_fork_server() -> None:
    """Start the fork server, which imports this wing once for all workers, deaf to the signals meant for ranks.

    A blocked signal stays blocked in what is started meanwhile, and reaches this process when it is unblocked.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    with _blocked(signal.SIGUSR1, signal.SIGUSR2):
        resource_tracker.ensure_running()  # of itself it ignores the others, and unblocks them here
    with _blocked(*SIGNALS_FOR_RANKS):
        forkserver.ensure_running()


@contextmanager
def _blocked(*signals: signal.Signals) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(worker_id: int) -> None:
    """In a new worker. It ends when its rank closes the loader or is gone, whatever signals arrive."""
    del worker_id
    for number in SIGNALS_FOR_RANKS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


@atexit.register
def _kill_remaining_workers() -> None:
    """Runs before multiprocessing's own clean-up, which sends daemons SIGTERM, ignored here, and waits for ever."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
