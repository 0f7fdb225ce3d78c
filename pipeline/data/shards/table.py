"""What is known of every sample of a split without reading a picture: where it lies, its label, its key."""

import hashlib
import json
import os
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import DataError
from pipeline.core.files import open_regular, sha256_of_file
from pipeline.data.shards.manifest import Manifest
from pipeline.data.shards.tar import MAX_IMAGE_BYTES, MAX_KEY_BYTES, ShardSamples

SCHEMA = 1
"""Version of the index and of its hash. Raise it when either changes: a stored index of another schema is made anew."""
INDEX_KEY = "index"
"""In a split of the manifest: {name, bytes, sha256} of the index that lies beside the shards."""
SAMPLE_BYTES = 20 + MAX_KEY_BYTES
"""Most that a sample takes in a table."""
ARRAYS = ("shard", "offset", "length", "label", "key")
"""Of a table, in the order in which they are hashed."""
MIN_SAMPLE_BYTES = 3 * 512
"""Least that a sample takes in a tar: two headers and a label."""


@dataclass(frozen=True)
class ShardFile:
    """One tar of the split, and what is known of it before it is read."""

    name: str
    bytes: int
    """Size of the file."""
    sha256: str | None
    """From the manifest; None for foreign shards."""
    num_samples: int | None
    """From the manifest; None for foreign shards."""


def shards_of(manifest: Manifest, split: str) -> tuple[ShardFile, ...]:
    """The shards that the manifest lists. Raises DataError if there is no such split."""
    return tuple(ShardFile(s.name, s.bytes, s.sha256, s.num_samples) for s in manifest.split(split).shards)


@dataclass(frozen=True)
class SampleTable:
    """What the index holds per sample: NumPy arrays of shape (num_samples,), about 40 bytes a sample and no objects."""

    shard: NDArray[np.int32]
    """Position of the shard in the split's list."""
    offset: NDArray[np.int64]
    """Bytes from the start of the tar to the picture."""
    length: NDArray[np.int32]
    """Bytes of the picture."""
    label: NDArray[np.int32]
    """Class index."""
    key: NDArray[np.bytes_]
    mapped_from: "tuple[Path, str] | None" = field(default=None, kw_only=True, repr=False)
    """The file whose pages the arrays are, and its index_hash; None: they are this process's own."""
    _hashes: dict[tuple[ShardFile, ...], str] = field(init=False, default_factory=dict, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by name where the arrays are a file's: a process that is sent the table maps the same pages."""
        if self.mapped_from:
            return SampleTable.map, self.mapped_from
        return SampleTable, tuple(self.arrays().values())

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name, in a fixed order."""
        return {name: getattr(self, name) for name in ARRAYS}

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays().values())

    def hash_with(self, shards: tuple[ShardFile, ...]) -> str:
        """SHA-256 over the shards (name, size, hash where known) and every array: hexadecimal.

        Where the shards lie and when they were written does not enter.
        """
        if shards in self._hashes:
            return self._hashes[shards]
        digest = hashlib.sha256(json.dumps([SCHEMA, [asdict(shard) for shard in shards]]).encode())
        for name, array in self.arrays().items():
            digest.update(f"{name} {array.dtype.str} {len(array)} ".encode())
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        self._hashes[shards] = digest.hexdigest()
        return self._hashes[shards]

    @classmethod
    def of(cls, scans: Sequence[ShardSamples]) -> "SampleTable":
        """The samples of all shards, in their order."""
        limits = np.iinfo(np.int32)
        return cls(
            shard=np.repeat(np.arange(len(scans), dtype=np.int32), [len(scan.keys) for scan in scans]),
            offset=np.concatenate([scan.offsets for scan in scans]),
            length=np.concatenate([scan.lengths for scan in scans]),
            # Clipped rather than wrapped around: a label beyond int32 must stay out of range.
            label=np.concatenate([scan.labels for scan in scans]).clip(limits.min, limits.max).astype(np.int32),
            key=np.concatenate([scan.keys for scan in scans]),
        )

    def agrees_with(self, shard: int, scan: ShardSamples) -> bool:
        """Whether the samples of shard number `shard` are those that a scan of its headers finds."""
        first, last = np.searchsorted(self.shard, [shard, shard + 1])
        mine = {name: array[first:last] for name, array in self.arrays().items() if name != "shard"}
        other = SampleTable.of([scan]).arrays()
        return all(np.array_equal(array, other[name]) for name, array in mine.items())

    def save(self, file: BinaryIO) -> None:
        """Write the table as a compressed `.npz`."""
        np.savez_compressed(file, allow_pickle=False, **self.arrays())

    @classmethod
    def load(cls, path: Path, shards: tuple[ShardFile, ...]) -> "SampleTable":
        """Read what `save` wrote; nothing in it is trusted.

        Raises:
            DataError: it is damaged, or is not about these shards.
        """
        try:
            with open_regular(path) as file, zipfile.ZipFile(file) as archive:
                if sum(item.file_size for item in archive.infolist()) > most_bytes(shards):
                    raise ValueError("more samples than there is room for")
            with np.load(path, allow_pickle=False) as arrays:
                table = cls(**{name: arrays[name] for name in ARRAYS})
            table.check(shards)
        except Exception as error:  # zlib, zipfile and NumPy have many words for a file that is not theirs
            raise DataError(
                f"The index of the shards is not of these shards ({error}): prepare them again into an empty out=, or"
                " copy again all that `prepare` made."
            ) from error
        return table

    @classmethod
    def map(cls, path: Path, index_hash: str | None = None) -> "SampleTable":
        """Take the arrays of an uncompressed `.npz` as pages of the file, which all processes of a machine share.

        Args:
            path: What `numpy.savez` wrote, `index_hash` among it; replaced if it changes, never written over.
            index_hash: The one that it must have; None: any. Servers that start at once may each have written the file.

        Raises:
            OSError: the file cannot be read.
            KeyError, ValueError: it is not such a file.
            DataError: it is of another index by now.
        """
        with open_regular(path) as file:
            with np.load(file, allow_pickle=False) as archive:
                found = str(archive["index_hash"])
            if index_hash not in (None, found):
                raise DataError(f"The index {path} was replaced while it was in use: run the same command again.")
            with zipfile.ZipFile(file) as archive:
                members = {item.filename.removesuffix(".npy"): item for item in archive.infolist()}
            return cls(*(_mapped(file, members[name]) for name in ARRAYS), mapped_from=(path, found))

    def check(self, shards: tuple[ShardFile, ...]) -> None:
        """Raise ValueError unless every sample lies in its shard and every shard has its samples."""
        if self.num_bytes > most_bytes(shards):
            raise ValueError("more samples than there is room for")
        kinds = {"shard": "<i4", "offset": "<i8", "length": "<i4", "label": "<i4"}
        for name, array in self.arrays().items():
            is_right = array.dtype.str == kinds[name] if name in kinds else array.dtype.kind == "S"
            if not is_right or array.shape != self.shard.shape or array.ndim != 1:
                raise ValueError(f"array {name} of type {array.dtype} and shape {array.shape}")
        if np.any(np.diff(self.shard) < 0) or np.any(self.shard < 0) or np.any(self.shard >= len(shards)):
            raise ValueError("a sample of no shard")
        counts = np.bincount(self.shard, minlength=len(shards)).tolist()
        if any(shard.num_samples not in (None, count) for shard, count in zip(shards, counts, strict=True)):
            raise ValueError("other numbers of samples")
        sizes = np.array([shard.bytes for shard in shards])[self.shard]
        if np.any(self.offset < 0) or np.any(self.length < 0) or np.any(self.offset > sizes - self.length):
            raise ValueError("a sample beyond the end of its shard")
        if np.any(self.length > MAX_IMAGE_BYTES):
            raise ValueError(f"a picture of more than {MAX_IMAGE_BYTES} bytes")


def most_bytes(shards: tuple[ShardFile, ...]) -> int:
    """Return what the arrays of a table of these shards can take, with what an archive puts around them."""
    return sum(shard.bytes // MIN_SAMPLE_BYTES for shard in shards) * SAMPLE_BYTES + 2**16


def _mapped(file: BinaryIO, member: zipfile.ZipInfo) -> NDArray[Any]:
    """The array of a member of an `.npz`, as pages of the file. Its place is told by the member's own header.

    Source: APPNOTE.TXT of PKWARE, 4.3.7 (30 bytes, of which the last four are the lengths of name and extra field).
    """
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{member.filename} is compressed")
    file.seek(member.header_offset + 26)
    file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError(f"{member.filename} is not an array of version 1.0")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject or not all(shape):
        raise ValueError(f"{member.filename} holds {dtype} of shape {shape}")
    return np.memmap(file, dtype, "r", file.tell(), shape).view(np.ndarray)


def index_name(split: str) -> str:
    """File name of a split's index."""
    return f"{split}.index.npz"


def load_beside(root: Path, split: str, shards: tuple[ShardFile, ...], described: Any) -> SampleTable | None:
    """The index that `prepare` wrote into the directory of the shards; None where it is not the one described.

    Args:
        root: Directory of the shards.
        split: Name of the split.
        shards: The shards that the index must be about.
        described: What the manifest says of it; None: nothing.
    """
    path = root / index_name(split)
    try:
        return SampleTable.load(path, shards) if sha256_of_file(path) == described["sha256"] else None
    except (OSError, KeyError, TypeError, DataError):
        return None
