"""What a rank's batches hold: samplers that name the samples, datasets that turn names into pixels.

Shape suffixes: B pictures of a micro-batch, H W pixels, C channels.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from pipeline.config.data import AugmentConfig
from pipeline.config.model import InputConfig
from pipeline.data.index import ShardIndex
from pipeline.data.order import PADDING, BatchOrder, Ids, evaluation_stripe, stripe
from pipeline.data.pixels import Draw, SampleError, eval_view, train_draws, train_view
from pipeline.data.quarantine import BadSample

NUM_REPLACEMENT_TRIES = 16
_DOMAIN = 0x7265_706C_6163_6564  # keeps the choice of replacements apart from other streams


class LoadedBatch(NamedTuple):
    """One micro-batch of one rank."""

    images_BCHW: Tensor
    """uint8, RGB, 0..255; channels_last in memory."""
    labels_B: Tensor
    """int64 class indices of the pictures shown."""
    sample_ids_B: Tensor
    """int64. Training: what the order asks for, also where another picture stands in. Evaluation: -1 is no picture."""
    bad: tuple[BadSample, ...] = ()
    """Training: replaced. Evaluation: left out."""

    def to(self, device: torch.device) -> "LoadedBatch":
        """The batch on `device`; to a GPU, from pinned memory, without waiting for the copy."""
        images_BCHW, labels_B, sample_ids_B = (part.to(device, non_blocking=True) for part in self[:3])
        return LoadedBatch(images_BCHW, labels_B, sample_ids_B, self.bad)


class TrainItem(NamedTuple):
    """What the sampler asks a worker for."""

    sample_id: int
    epoch: int


class TrainBatches(Sampler[list[TrainItem]]):
    """The micro-batches of one rank, from the first step not yet committed to the end of the run.

    Args:
        order: the global batches.
        rank: rank that is fed.
        world_size: number of ranks.
        num_micro_batches: micro-batches per step; world_size * num_micro_batches divides the global batch.
        start_step: first step to yield.
        num_steps: steps of the whole run, earlier attempts included; the last one yielded is num_steps - 1.
    """

    def __init__(
        self, order: BatchOrder, *, rank: int, world_size: int, num_micro_batches: int, start_step: int, num_steps: int
    ) -> None:
        assert order.global_batch % (world_size * num_micro_batches) == 0, "BatchConfig.split refuses this"
        self.order = order
        self.rank, self.world_size, self.num_micro_batches = rank, world_size, num_micro_batches
        self.start_step, self.num_steps = start_step, num_steps
        self.place: int | None = None
        """The step that was last asked for, while the batches are iterated over."""

    def __len__(self) -> int:
        return max(0, self.num_steps - self.start_step) * self.num_micro_batches

    def __iter__(self) -> Iterator[list[TrainItem]]:
        for step in range(self.start_step, self.num_steps):
            self.place = step
            batch, epoch = self.order.batch_samples(step), self.order.epoch_of(step)
            for micro in range(self.num_micro_batches):
                ids = self._stripe(batch, self.rank, micro)
                yield [TrainItem(sample_id, epoch) for sample_id in ids.tolist()]
        self.place = None

    def _stripe(self, batch: Ids, rank: int, micro: int) -> Ids:
        return stripe(
            batch,
            rank=rank,
            world_size=self.world_size,
            micro=micro,
            num_micro_batches=self.num_micro_batches,
            by_rank=self.order.groups > 1,
        )

    def samples_ahead(self, ranks: range) -> Iterator[tuple[int, Ids]]:
        """(step, what `ranks` are to show), from the step last asked for. Safe in a thread of its own."""
        order = replace(self.order, _latest={})  # its memory of an epoch must not be taken from the iteration
        for step in range(self.start_step if self.place is None else self.place, self.num_steps):
            batch = order.batch_samples(step)
            yield (
                step,
                np.concatenate([self._stripe(batch, rank, m) for rank in ranks for m in range(self.num_micro_batches)]),
            )


class EvalBatches(Sampler[list[int]]):
    """Every sample once over all ranks; equally many batches of equal sizes on each, filled up with PADDING."""

    def __init__(self, num_samples: int, *, batch_size: int, rank: int, world_size: int) -> None:
        self.ids = evaluation_stripe(num_samples, rank=rank, world_size=world_size)
        self.batch_size = batch_size
        self.num_samples, self.world_size = num_samples, world_size
        self.place: int | None = None
        """The batch that was last asked for, while the batches are iterated over."""

    def __len__(self) -> int:
        return -(-len(self.ids) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for place in range(len(self)):
            self.place = place
            yield self.ids[place * self.batch_size : (place + 1) * self.batch_size].tolist()
        self.place = None

    def samples_ahead(self, ranks: range) -> Iterator[tuple[int, Ids]]:
        """(batch, what `ranks` are to show), from the batch last asked for. Safe in a thread of its own."""
        of_rank = [evaluation_stripe(self.num_samples, rank=rank, world_size=self.world_size) for rank in ranks]
        for place in range(self.place or 0, len(self)):
            ids = np.concatenate([ids[place * self.batch_size : (place + 1) * self.batch_size] for ids in of_rank])
            yield place, ids[ids != PADDING]


class TrainSamples(Dataset[LoadedBatch]):
    """Random views. A picture that does not decode is replaced, so that every batch stays full.

    One that cannot be read is a DataError: what fails in passing would be replaced in this attempt alone.
    """

    def __init__(self, index: ShardIndex, config: InputConfig, augment: AugmentConfig, seed: int) -> None:
        self.index, self.config, self.augment, self.seed = index, config, augment, seed

    def __getitem__(self, item: TrainItem) -> LoadedBatch:
        return self.__getitems__([item])

    def __getitems__(self, items: Sequence[TrainItem]) -> LoadedBatch:
        """The whole batch at once: each picture is written straight to its place."""
        images_BHWC = _room(len(items), self.config.size)
        labels_B, bad = np.empty(len(items), np.int64), []
        draws = train_draws(self.seed, [(item.epoch, item.sample_id) for item in items])
        for place, (item, draw) in enumerate(zip(items, draws, strict=True)):
            for candidate in self._candidates(item.sample_id):
                try:
                    images_BHWC[place] = self._view(candidate, item, draw)
                except SampleError as error:
                    bad.append(BadSample.of(self.index, candidate, error))
                else:
                    labels_B[place] = self.index.label(candidate)
                    break
            else:  # a black picture, with the right label, when the replacements are bad too
                images_BHWC[place], labels_B[place] = 0, self.index.label(item.sample_id)
        return _batch(images_BHWC, labels_B, np.array([item.sample_id for item in items], np.int64), bad)

    def _candidates(self, sample_id: int) -> Iterator[int]:
        """The sample, and who stands in for it: drawn only where that is asked for."""
        yield sample_id
        yield from replacements(sample_id, self.index.num_samples)

    def _view(self, sample_id: int, item: TrainItem, draw: Draw) -> NDArray[np.uint8]:
        """Of the item itself by `draw`; a replacement has numbers of its own."""
        if sample_id != item.sample_id:
            (draw,) = train_draws(self.seed, [(item.epoch, sample_id)])
        content = self.index.read(sample_id)
        return train_view(content, self.config, self.augment, draw, is_checked=self.index.is_checked)


class EvalSamples(Dataset[LoadedBatch]):
    """Centre crops. A picture that does not decode is left out: counting another one twice would be a lie."""

    def __init__(self, index: ShardIndex, config: InputConfig) -> None:
        self.index, self.config = index, config

    def __getitem__(self, sample_id: int) -> LoadedBatch:
        return self.__getitems__([sample_id])

    def __getitems__(self, sample_ids: Sequence[int]) -> LoadedBatch:
        """The whole batch at once; places without a picture are black, with label 0 and id -1."""
        images_BHWC = _room(len(sample_ids), self.config.size)
        labels_B, ids_B = np.zeros(len(sample_ids), np.int64), np.full(len(sample_ids), PADDING, np.int64)
        bad = []
        for place, sample_id in enumerate(sample_ids):
            if sample_id == PADDING:
                images_BHWC[place] = 0
                continue
            try:
                images_BHWC[place] = eval_view(self.index.read(sample_id), self.config)
            except SampleError as error:
                images_BHWC[place] = 0
                bad.append(BadSample.of(self.index, sample_id, error))
            else:
                labels_B[place], ids_B[place] = self.index.label(sample_id), sample_id
        return _batch(images_BHWC, labels_B, ids_B, bad)


def replacements(sample_id: int, num_samples: int) -> list[int]:
    """Who stands in for a bad sample, in this order: drawn from its id alone, so the same on every rank and attempt.

    Drawn from the whole split rather than taken from beside it, because damage comes in runs.
    """
    key = np.array([sample_id, _DOMAIN], np.uint64)
    words = np.random.Philox(key=key).random_raw(NUM_REPLACEMENT_TRIES)
    return [int(word) for word in words % np.uint64(num_samples)]


def _room(num_images: int, size: int) -> NDArray[np.uint8]:
    """For pictures, (num_images, size, size, 3): whatever lay there. In a worker it is memory that the rank sees too.

    Memory of the worker's own would be copied there when the batch is handed over.
    """
    shape = (num_images, size, size, 3)
    if get_worker_info() is None:
        return np.empty(shape, np.uint8)
    num_bytes = math.prod(shape)
    storage = torch.UntypedStorage._new_shared(num_bytes)  # as torch's own collate does
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (num_bytes,), (1,)).numpy().reshape(shape)


def _batch(
    images_BHWC: NDArray[np.uint8], labels_B: NDArray[np.int64], ids_B: NDArray[np.int64], bad: list[BadSample]
) -> LoadedBatch:
    # The permuted view of NHWC memory is channels_last as it stands: nothing is copied.
    images_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2)
    return LoadedBatch(images_BCHW, torch.from_numpy(labels_B), torch.from_numpy(ids_B), tuple(bad))
