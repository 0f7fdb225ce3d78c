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

    from benchmarks.synthetic import first_rank
    from pipeline.data.index import ShardIndex

    torch.set_num_threads(1)
    source, batch = arguments[0], int(arguments[1])
    index = ShardIndex.open(source, "train")
    steps = index.num_samples // batch
    batches = iter(first_rank(index, seed=SEED, global_batch=batch))

    def epoch() -> Iterator[Any]:
        return itertools.islice(batches, steps)

    serve(epoch, versions())


if __name__ == "__main__":
    main(sys.argv[1:])
