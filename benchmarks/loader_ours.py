"""Our loader as a contender of `benchmarks.loader`: an epoch for every line on stdin.

python -m benchmarks.loader_ours SHARDS BATCH
"""

import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.peers.loaders import serve, versions

NUM_EPOCHS, SEED = 1000, 0


def main(arguments: Sequence[str]) -> None:
    """The loader of a training on one rank, without worker processes; epochs follow one another as in a training."""
    import torch

    from pipeline.config import DataConfig, InputConfig
    from pipeline.data.loader import ShardData
    from pipeline.data.store import ShardIndex

    torch.set_num_threads(1)
    source, batch = arguments[0], int(arguments[1])
    index = ShardIndex.open(source, "train")
    steps = index.num_samples // batch
    data = ShardData(
        index,
        None,
        DataConfig(num_workers=0),
        InputConfig(),
        seed=SEED,
        global_batch=batch,
        rank=0,
        world_size=1,
        accumulate=1,
        start_step=0,
        num_steps=NUM_EPOCHS * steps,
    )
    batches = iter(data.train_dataloader())

    def epoch() -> Iterator[Any]:
        return itertools.islice(batches, steps)

    serve(epoch, versions())


if __name__ == "__main__":
    main(sys.argv[1:])
