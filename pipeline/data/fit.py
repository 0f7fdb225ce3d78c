"""Does what a run reads fit into its cache? Said at the start, with what would fit."""

import math

from pipeline.config.data import DataConfig
from pipeline.data.index import ShardIndex
from pipeline.data.prefetch import SHARE_OF_CACHE
from pipeline.data.remote.shards import RemoteFiles

NUM_BLOCKS_HELD = 3
"""The block being read, the next, and the one before, which other ranks and workers may not have left yet."""


def origin_sentence(index: ShardIndex) -> str | None:
    """Where remote shards come from and where they are kept; None for a directory."""
    if not isinstance(index.files, RemoteFiles):
        return None
    cache, shards = index.files.cache, index.shards
    num_bytes = sum(shard.bytes for shard in shards)
    return (
        f"{len(shards):,} shards, {num_bytes / 1e9:.3g} GB, from {index.files.url}; a server keeps up to"
        f" {cache.num_bytes / 1e9:.3g} GB in {cache.directory}"
    )


def misfit_sentence(
    index: ShardIndex, data: DataConfig, *, global_batch: int, local_world_size: int, world_size: int
) -> str | None:
    """What a server will fetch again and again, and which settings avoid it; None if there is nothing to say.

    Args:
        index: The training split.
        data: The cache's size, and how the order is mixed.
        global_batch: Pictures per step.
        local_world_size: Number of ranks of a server.
        world_size: Number of ranks of the run.
    """
    if not isinstance(index.files, RemoteFiles):
        return None
    sizes = [shard.bytes for shard in index.shards]
    total, mean, usable = sum(sizes), sum(sizes) / len(sizes), SHARE_OF_CACHE * data.cache_bytes
    groups_here = math.ceil(data.shuffle_groups * local_world_size / world_size)
    of_batch = math.ceil(global_batch / data.shuffle_groups * len(sizes) / index.num_samples)  # shards it touches
    block = max(data.shuffle_block, of_batch)
    at_once = total if not data.shuffle_block else NUM_BLOCKS_HELD * block * groups_here * mean
    if total <= data.cache_bytes or at_once <= usable:
        return None
    fitting = int(usable / (NUM_BLOCKS_HELD * groups_here * mean))
    advice = f"set data.shuffle_block={fitting}, or " if fitting >= of_batch else ""
    reads = f"from {data.shuffle_block} at a time" if data.shuffle_block else "from all of them all the time"
    again = index.num_samples * (1 - min(1.0, usable / at_once)) * mean
    return (
        f"data.cache_bytes={data.cache_bytes} holds {data.cache_bytes / total:.0%} of the {len(sizes)} training shards"
        f" ({total / 1e9:.3g} GB), and data.shuffle_block={data.shuffle_block} reads {reads}: shards will be fetched"
        f" again and again, up to {again / 1e9:.3g} GB per epoch. To avoid it {advice}set"
        f" data.cache_bytes={total + math.ceil(total / 10)}."
    )
