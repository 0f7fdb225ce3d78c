"""A split that was opened: what reading it needs, wherever its shards lie."""

from dataclasses import dataclass
from typing import Protocol

from pipeline.data.shards.table import SampleTable, ShardFile


class ShardFiles(Protocol):
    """Where the bytes of a split's shards come from. Pickles; what it opens, it opens in the process that reads."""

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Read bytes of shard number `shard`; fewer than `length` only at its end. Raises OSError or DataError."""
        ...

    def close(self) -> None:
        """Close what was opened; it is opened again when needed."""
        ...


@dataclass(frozen=True)
class OpenedSplit:
    """The verified parts of a split: its shards, its samples, and where the bytes come from."""

    shards: tuple[ShardFile, ...]
    """The tars, in order."""
    table: SampleTable
    """Where each sample lies, and what it is."""
    files: ShardFiles
    """Reads the shards."""
    classes: tuple[str, ...] | None
    """Class names in index order, from the manifest; None for foreign shards."""
    is_checked: bool
    """Whether every picture was decoded to its end when the shards were written."""
