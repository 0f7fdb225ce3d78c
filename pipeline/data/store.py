"""The samples of one split: where each lies and what it is. Bytes are read by offset, in any order.

Opening verifies first: the shards against the manifest, the tars by a scan of their headers (tarindex.py), the labels
against the classes. The scan is cached in `<root>/.squeezewire/`, where that can be written, and is used again while
the shards' names, sizes, hashes and times stay the same.
"""

import hashlib
import json
import os
import weakref
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.foreign import find_split
from pipeline.data.manifest import MANIFEST_NAME, Manifest
from pipeline.data.tarindex import ShardSamples, index_shard
from pipeline.errors import DataError
from pipeline.files import sha256_of_file, write_atomic

CACHE_DIRECTORY = ".squeezewire"
SCHEMA = 1
"""Of the cached index and of its hash. Raise it when either changes: a cache of another schema is made anew."""
MAX_OPEN_SHARDS = 128
"""Files one process keeps open; common limits begin at 1024."""
NUM_SCAN_THREADS = 16
"""Waiting for headers is what they share. On local disks the interpreter is the limit, at some 5 us a header."""
TRUST_THE_FIRST = "size"
"""`verify` for the ranks of a machine that follow one which has read and hashed the same files."""


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

    def arrays(self) -> dict[str, NDArray[Any]]:
        """By name, in a fixed order."""
        return {name: getattr(self, name) for name in ("shard", "offset", "length", "label", "key")}

    def hash_with(self, shards: tuple[ShardFile, ...]) -> str:
        """SHA-256 over the shards (name, size, hash where known) and every array: hexadecimal.

        Where the shards lie and when they were written does not enter.
        """
        digest = hashlib.sha256(json.dumps([SCHEMA, [asdict(shard) for shard in shards]]).encode())
        for name, array in self.arrays().items():
            digest.update(f"{name} {array.dtype.str} {len(array)} ".encode())
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        return digest.hexdigest()


class ShardIndex:
    """The samples 0 .. num_samples - 1 of one split, in the order of the shards. Cheap to send to another process.

    `read` may be called in any process that got the index by fork or by pickle: files are opened where they are needed.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        shards: tuple[ShardFile, ...],
        table: SampleTable,
        *,
        num_classes: int,
        classes: tuple[str, ...] | None,
    ) -> None:
        """Use `open`; this takes the parts as verified."""
        self.root, self.split = root, split
        self.shards, self.table = shards, table
        self.num_classes = num_classes
        """From the manifest; of foreign shards the highest label plus one."""
        self.classes = classes
        """Names in index order; None for foreign shards."""
        self.index_hash = table.hash_with(shards)
        """Of content and order, hexadecimal: equal for the same shards anywhere."""
        self._start_empty()

    @classmethod
    def open(cls, root: Path | str, split: str, *, verify: str = "size") -> "ShardIndex":
        """Index the shards of `split` in the directory `root`, or take the cached index.

        Args:
            root: directory with `manifest.json` and its shards, or with foreign shards.
            split: name in the manifest. Without a manifest, as `foreign.find_split` takes it.
            verify: `size` compares each shard's bytes with the manifest; `sha256` reads and hashes it too.

        Raises:
            DataError: shards are missing, damaged, contradict the manifest, or a label is out of range.
        """
        assert verify in ("size", "sha256")
        root = Path(root)
        if not root.is_dir():
            raise DataError(f"data.root={root} is not a directory: give the one that `prepare` made (its out=).")
        manifest = Manifest.load(root) if _has_manifest(root) else None
        foreign = None if manifest else find_split(root, split)
        shards = _listed(manifest, root, split) if manifest else _found(root, foreign.names if foreign else ())
        if verify == "sha256":
            _check_hashes(root, shards)
        table = _cached_table(root, split, shards) if shards else None
        if table is None or not len(table.label):
            raise DataError(f"Split {split!r} in {root} holds no sample: prepare it again.")
        if foreign:
            counts = np.bincount(table.shard, minlength=len(shards)).tolist()
            foreign.check_counts(zip((shard.name for shard in shards), counts, strict=True))
        num_classes = len(manifest.classes) if manifest else int(table.label.max()) + 1
        index = cls(root, split, shards, table, num_classes=num_classes, classes=manifest.classes if manifest else None)
        index._check_labels()
        return index

    @property
    def num_samples(self) -> int:
        """Samples of the split."""
        return len(self.table.label)

    def __len__(self) -> int:
        return self.num_samples

    def label(self, sample_id: int) -> int:
        """Class index of a sample."""
        return int(self.table.label[sample_id])

    def sample_key(self, sample_id: int) -> str:
        """The sample's name inside its shard, without extension."""
        return bytes(self.table.key[sample_id]).decode(errors="backslashreplace")

    def shard_name(self, sample_id: int) -> str:
        """File name of the shard that holds a sample."""
        return self.shards[self.table.shard[sample_id]].name

    def read(self, sample_id: int) -> bytes:
        """The bytes of a sample's picture.

        Raises:
            OSError: the shard is gone, has shrunk, or cannot be read.
        """
        length = int(self.table.length[sample_id])
        content = os.pread(
            self._descriptor(int(self.table.shard[sample_id])), length, int(self.table.offset[sample_id])
        )
        if len(content) != length:
            raise OSError(f"only {len(content)} of {length} bytes could be read")
        return content

    def close(self) -> None:
        """Close the files `read` has opened; it opens them again when called again."""
        _close_all(self._open_files)

    def _descriptor(self, shard: int) -> int:
        """An open file of the shard; the one not used for longest is closed when there are too many.

        A forked child inherits the descriptors, which `pread` may share: it does not move their position.
        """
        if shard in self._open_files:
            self._open_files.move_to_end(shard)
            return self._open_files[shard]
        if len(self._open_files) >= MAX_OPEN_SHARDS:
            os.close(self._open_files.popitem(last=False)[1])
        self._open_files[shard] = os.open(self.root / self.shards[shard].name, os.O_RDONLY | os.O_CLOEXEC)
        return self._open_files[shard]

    def _start_empty(self) -> None:
        self._open_files: OrderedDict[int, int] = OrderedDict()
        weakref.finalize(self, _close_all, self._open_files)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_open_files"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_empty()

    def _check_labels(self) -> None:
        wrong = np.flatnonzero((self.table.label < 0) | (self.table.label >= self.num_classes))
        if len(wrong):
            first = int(wrong[0])
            others = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise DataError(
                f"Sample {self.sample_key(first)!r} of shard {self.shard_name(first)}{others} has label"
                f" {self.label(first)}, and there are {self.num_classes} classes, 0 to {self.num_classes - 1}:"
                " prepare the shards again with the right classes."
            )


def _close_all(open_files: OrderedDict[int, int]) -> None:
    while open_files:
        os.close(open_files.popitem()[1])


def _has_manifest(root: Path) -> bool:
    """Whether `prepare` made this directory; if it is unfinished, loading the manifest that is missing says so."""
    from pipeline.data.writer import STATE_DIRECTORY

    return (root / MANIFEST_NAME).exists() or (root / STATE_DIRECTORY).exists()


def _listed(manifest: Manifest, root: Path, split: str) -> tuple[ShardFile, ...]:
    """The manifest's shards of `split`, each there with its size."""
    shards = tuple(ShardFile(s.name, s.bytes, s.sha256, s.num_samples) for s in manifest.split(split).shards)
    sizes = {shard.name: _size(root / shard.name) for shard in shards}
    missing = [name for name, size in sizes.items() if size is None]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(shards)} shards of split {split!r} are missing in {root}: {', '.join(missing)}."
            " Copy them again, or prepare the shards again."
        )
    for shard in shards:
        if sizes[shard.name] != shard.bytes:
            raise DataError(
                f"Shard {shard.name} in {root} has {sizes[shard.name]} bytes, and the manifest says {shard.bytes}:"
                " copy it again from its source, or prepare the shards again."
            )
    return shards


def _found(root: Path, names: tuple[str, ...]) -> tuple[ShardFile, ...]:
    """Foreign shards, each there."""
    sizes = {name: _size(root / name) for name in names}
    missing = [name for name, size in sizes.items() if size is None]
    if missing:
        raise DataError(f"{len(missing)} of {len(names)} shards are missing in {root}: {', '.join(missing)}.")
    return tuple(ShardFile(name, size or 0, None, None) for name, size in sizes.items())


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _check_hashes(root: Path, shards: tuple[ShardFile, ...]) -> None:
    """Read every shard whose hash is known; hashing lets go of the interpreter, so threads run side by side."""
    known = [shard for shard in shards if shard.sha256 is not None]
    with _threads(len(os.sched_getaffinity(0))) as pool:
        for shard, found in zip(known, pool.map(lambda s: sha256_of_file(root / s.name), known), strict=True):
            if found != shard.sha256:
                raise DataError(
                    f"Shard {shard.name} in {root} has SHA-256 {found}, and the manifest says {shard.sha256}: its"
                    " content was damaged or changed. Copy it again from its source, or prepare the shards again."
                )


def _scanned_table(root: Path, shards: tuple[ShardFile, ...]) -> SampleTable:
    """Scan every shard, several side by side: on a network file system the time goes into waiting for headers."""
    with _threads(NUM_SCAN_THREADS) as pool:
        scans = list(pool.map(lambda shard: _scan(root, shard), shards))
    limits = np.iinfo(np.int32)
    return SampleTable(
        shard=np.repeat(np.arange(len(scans), dtype=np.int32), [len(scan.keys) for scan in scans]),
        offset=np.concatenate([scan.offsets for scan in scans]),
        length=np.concatenate([scan.lengths for scan in scans]),
        # Clipped rather than wrapped around: a label beyond int32 must stay out of range.
        label=np.concatenate([scan.labels for scan in scans]).clip(limits.min, limits.max).astype(np.int32),
        key=np.concatenate([scan.keys for scan in scans]),
    )


def _scan(root: Path, shard: ShardFile) -> ShardSamples:
    """The samples of one shard, as many as the manifest says."""
    try:
        scan = index_shard(root / shard.name)
    except OSError as error:
        raise DataError(
            f"Shard {shard.name} in {root} cannot be read ({error.strerror}): mend its permissions or copy it again."
        ) from error
    if shard.num_samples not in (None, len(scan.keys)):
        raise DataError(
            f"Shard {shard.name} in {root} holds {len(scan.keys)} samples, and the manifest says"
            f" {shard.num_samples}: copy it again from its source, or prepare the shards again."
        )
    return scan


@contextmanager
def _threads(num_threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool that drops what has not begun, once something fails."""
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def _cached_table(root: Path, split: str, shards: tuple[ShardFile, ...]) -> SampleTable:
    """The cached table if it is of these very files, else a new scan, cached where that is possible."""
    path = root / CACHE_DIRECTORY / f"{hashlib.sha256(split.encode()).hexdigest()[:16]}.npz"
    times = [(root / shard.name).stat().st_mtime_ns for shard in shards]
    known = json.dumps([SCHEMA, times, [asdict(shard) for shard in shards]])
    table = _load_table(path, shards, known)
    if table is None:
        table = _scanned_table(root, shards)
        _save_table(path, table, shards, known)
    return table


def _load_table(path: Path, shards: tuple[ShardFile, ...], known: str) -> SampleTable | None:
    """None unless the file is whole, unchanged and about shards of which `known` is true."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if str(archive["known"]) != known:
                return None
            table = SampleTable(**{name: archive[name] for name in SampleTable.__dataclass_fields__})
            return table if table.hash_with(shards) == str(archive["index_hash"]) else None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def _save_table(path: Path, table: SampleTable, shards: tuple[ShardFile, ...], known: str) -> None:
    """Leave the table for the next process. A root that cannot be written costs the next one a scan, nothing else."""
    arrays: dict[str, Any] = {
        **table.arrays(),
        "known": np.array(known),
        "index_hash": np.array(table.hash_with(shards)),
    }
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, lambda file: np.savez(file, **arrays))
    except OSError:
        return
