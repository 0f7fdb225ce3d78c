"""Shards read for what they hold: the headers of whole files on a disk, several files side by side."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from pipeline.core.errors import DataError
from pipeline.data.shards.table import SampleTable, ShardFile
from pipeline.data.shards.tar import ShardSamples, index_shard

NUM_SCAN_THREADS = 16  # on a network file system the time goes into waiting for headers


def scanned_table(root: Path, shards: Sequence[ShardFile]) -> SampleTable:
    """The samples of shards in a directory.

    Raises:
        DataError: one cannot be read, is damaged, or holds another number of samples than the manifest says.
    """
    with threads(NUM_SCAN_THREADS) as pool:
        return SampleTable.of(list(pool.map(lambda shard: scan_shard(root / shard.name, shard, f"in {root}"), shards)))


def scan_shard(path: Path, shard: ShardFile, where: str) -> ShardSamples:
    """The samples of one shard that lies at `path`; `where` says in messages where it belongs. Raises DataError."""
    try:
        found = index_shard(path)
    except OSError as error:
        raise DataError(
            f"Shard {shard.name} {where} cannot be read ({error.strerror}): mend its permissions or copy it again."
        ) from error
    except DataError as error:
        if path.name == shard.name:
            raise
        raise DataError(str(error).replace(path.name, f"{shard.name} {where}")) from error
    if shard.num_samples not in (None, len(found.keys)):
        raise DataError(
            f"Shard {shard.name} {where} holds {len(found.keys)} samples, and the manifest says"
            f" {shard.num_samples}: copy it again from its source, or remove it and prepare the shards again."
        )
    return found


@contextmanager
def threads(num_threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool that drops what has not begun, once something fails."""
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
