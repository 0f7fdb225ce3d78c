"""How well an order mixes what lies side by side in the shards, and what it costs to read in it: pure functions."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.order import Ids


@dataclass(frozen=True)
class Mixing:
    """Of one epoch's order. Neighbours are samples side by side in one shard."""

    distance_ratio: float
    """Mean distance of neighbours in the order, over the (N + 1) / 3 of a perfect shuffle: 1 is perfect."""
    same_batch_share: float
    """Share of neighbours that come in the same global batch."""
    perfect_same_batch_share: float
    """The same of a perfect shuffle: (B - 1) / (N - 1), with the last, partial batch left aside."""
    shards_held: int
    """Most shards that are begun and not finished at any one moment: a cache of so many fetches each shard once."""


def mixing_of(order: Ids, shard_of_sample: NDArray[np.integer], global_batch: int) -> Mixing:
    """Measure an order.

    Args:
        order: a permutation of 0 .. N - 1, N > 1.
        shard_of_sample: of shape (N,): the number of the shard that holds each sample, not decreasing.
        global_batch: samples of a step, B.
    """
    num_samples = len(order)
    place = np.empty(num_samples, np.int64)
    place[order] = np.arange(num_samples)
    are_neighbours = shard_of_sample[1:] == shard_of_sample[:-1]
    distance = np.abs(np.diff(place))[are_neighbours]
    batch = place // global_batch
    together = (batch[1:] == batch[:-1])[are_neighbours]
    has_neighbours = len(distance) > 0
    return Mixing(
        distance_ratio=float(distance.mean() / ((num_samples + 1) / 3)) if has_neighbours else 1.0,
        same_batch_share=float(together.mean()) if has_neighbours else 0.0,
        perfect_same_batch_share=(min(global_batch, num_samples) - 1) / (num_samples - 1),
        shards_held=_most_begun(shard_of_sample[order]),
    )


def _most_begun(shard_of_place: NDArray[np.integer]) -> int:
    """Most shards whose first and last place lie on both sides of, or at, one place."""
    _, first = np.unique(shard_of_place, return_index=True)
    _, from_the_end = np.unique(shard_of_place[::-1], return_index=True)
    change = np.zeros(len(shard_of_place) + 1, np.int64)
    np.add.at(change, first, 1)
    np.add.at(change, len(shard_of_place) - from_the_end, -1)
    return int(np.cumsum(change).max())
