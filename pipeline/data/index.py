"""The samples of one split: where each lies and what it is. Bytes are read by offset, in any order.

Opening verifies first: the shards' sizes against the manifest, the labels against the classes. Shards in a directory
are local.py's, shards behind a URL remote/shards.py's.
"""

import time
from pathlib import Path

import numpy as np

from pipeline.config.data import DataConfig
from pipeline.core.errors import DataError
from pipeline.data.local import open_local
from pipeline.data.remote.cache import CacheSettings
from pipeline.data.remote.opening import is_url
from pipeline.data.remote.shards import open_remote
from pipeline.data.shards.opened import OpenedSplit

MAX_FOREIGN_CLASSES = 1_000_000
"""Shards without a manifest have as many classes as their highest label says, up to here. The largest public sets have
some 22,000; a number beyond this is an identifier or damage, and a classifier of its size would fill the memory."""
READ_AGAIN_SECONDS = 0.5
"""Seconds before a read that failed is tried again."""
TRUST_THE_FIRST = "size"
"""`verify` for the ranks of a machine that follow one which has read and hashed the same files."""


class ShardIndex:
    """The samples 0 .. num_samples - 1 of one split, in the order of the shards. Cheap to send to another process.

    `read` may be called in any process that got the index by fork or by pickle: files are opened where they are needed.
    """

    def __init__(self, root: Path | str, split: str, opened: OpenedSplit) -> None:
        """Index a split that was verified: most callers want `ShardIndex.open`."""
        self.root, self.split = root, split
        self.shards, self.table, self.files = opened.shards, opened.table, opened.files
        self.classes = opened.classes
        """Class names in index order; None for foreign shards."""
        self.num_classes = int(self.table.label.max()) + 1 if self.classes is None else len(self.classes)
        """Number of classes in the manifest; of foreign shards the highest label plus one."""
        self.is_checked = opened.is_checked
        """Whether every picture was decoded to its end when the shards were written."""
        self.index_hash = self.table.hash_with(self.shards)
        """Hexadecimal SHA-256 of content and order: equal for the same shards anywhere."""

    @classmethod
    def open(
        cls,
        root: Path | str,
        split: str,
        *,
        verify: str = "size",
        cache: CacheSettings | None = None,
        is_local_leader: bool = True,
    ) -> "ShardIndex":
        """Index the shards of `split` at `root`, or take the index that is there.

        Args:
            root: Directory or URL with `manifest.json` and its shards, or with foreign shards.
            split: Name in the manifest. Without a manifest, as `foreign.find_split` takes it; web servers do not
                list their files, so that there it is file names with braces or a split of `_info.json`.
            verify: `size` compares each shard's bytes with the manifest; `sha256` reads and hashes it too.
            cache: Where shards behind a URL are kept; None: as without configuration.
            is_local_leader: Whether this process is the first of its machine to open the split, and warns.

        Raises:
            DataError: Shards are missing, damaged, contradict the manifest, or a label is out of range.
        """
        assert verify in ("size", "sha256")
        if is_url(root):
            cache = cache or CacheSettings.of(DataConfig())
            index = cls(str(root), split, open_remote(str(root), split, verify, cache))
        else:
            index = cls(root, split, open_local(Path(root), split, verify, is_local_leader=is_local_leader))
        if index.classes is None:
            index.require_labels(
                MAX_FOREIGN_CLASSES,
                f"and shards without a manifest may have at most {MAX_FOREIGN_CLASSES:,} classes: prepare the shards"
                " again with the right classes into an empty out=.",
            )
        last = index.num_classes - 1
        index.require_labels(
            index.num_classes,
            f"and there are {index.num_classes} classes, 0 to {last}: prepare the shards again with the right"
            " classes into an empty out=.",
        )
        return index

    @property
    def num_samples(self) -> int:
        """Number of samples of the split."""
        return len(self.table.label)

    def __len__(self) -> int:
        return self.num_samples

    def label(self, sample_id: int) -> int:
        """Class index of a sample."""
        return int(self.table.label[sample_id])

    def sample_key(self, sample_id: int) -> str:
        """Name of a sample inside its shard, without extension."""
        return bytes(self.table.key[sample_id]).decode(errors="backslashreplace")

    def shard_name(self, sample_id: int) -> str:
        """File name of the shard that holds a sample."""
        return self.shards[self.table.shard[sample_id]].name

    def read(self, sample_id: int) -> bytes:
        """Read the bytes of a sample's picture. A read that fails is tried once more, from files opened anew.

        Raises:
            DataError: The shard is gone, has shrunk, or cannot be read.
        """
        try:
            return self._read(sample_id)
        except OSError:
            self.close()  # a stale handle of a network file system stays stale
            time.sleep(READ_AGAIN_SECONDS)
        try:
            return self._read(sample_id)
        except OSError as error:
            shard = f"{self.root}/{self.shard_name(sample_id)}"
            raise DataError(
                f"Sample {self.sample_key(sample_id)!r} of shard {shard} cannot be read ({error.strerror or error}):"
                " put the shard back as it was or mend its disk, and run the same command again."
            ) from error

    def _read(self, sample_id: int) -> bytes:
        length = int(self.table.length[sample_id])
        content = self.files.read(int(self.table.shard[sample_id]), int(self.table.offset[sample_id]), length)
        if len(content) != length:
            raise OSError(f"only {len(content)} of {length} bytes could be read")
        return content

    def close(self) -> None:
        """Close the files `read` has opened; it opens them again when called again."""
        self.files.close()

    def require_labels(self, num_classes: int, rule: str) -> None:
        """Raise `DataError` unless every label is one of 0 to num_classes - 1; `rule` ends the sentence."""
        wrong = np.flatnonzero((self.table.label < 0) | (self.table.label >= num_classes))
        if len(wrong):
            first = int(wrong[0])
            others = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise DataError(
                f"Sample {self.sample_key(first)!r} of shard {self.shard_name(first)}{others} has label"
                f" {self.label(first)}, {rule}"
            )


def open_split(data: DataConfig, split: str, *, is_local_leader: bool = True) -> ShardIndex:
    """Open a split as configured.

    Args:
        data: Where the shards lie, and how they are verified and kept.
        split: As for `ShardIndex.open`.
        is_local_leader: Whether this process is the first of its machine to open and verify the split.
    """
    assert data.root is not None
    return ShardIndex.open(
        data.root,
        split,
        verify=data.verify if is_local_leader else TRUST_THE_FIRST,
        cache=CacheSettings.of(data),
        is_local_leader=is_local_leader,
    )
