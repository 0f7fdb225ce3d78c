"""The samples of one split: where each lies and what it is. Bytes are read by offset, in any order.

Opening verifies first: the shards' sizes against the manifest, the labels against the classes. Where the samples lie
is told by the index that `prepare` wrote beside the shards, if it is the one that the manifest names, else by a scan
of all tars' headers (tarindex.py). The scan is cached in `<root>/.squeezewire/`, where that can be written,
and is used again while the shards' names, sizes, hashes and times stay the same. Shards behind a URL: remoteshards.py.
"""

import hashlib
import json
import os
import time
import weakref
import zipfile
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.config.training import DataConfig
from pipeline.core.errors import DataError
from pipeline.core.files import sha256_of_file, write_atomic
from pipeline.data.remote.cache import CacheSettings
from pipeline.data.remote.opening import is_url
from pipeline.data.remote.transfer import say
from pipeline.data.shards.foreign import find_split
from pipeline.data.shards.manifest import MANIFEST_NAME, STATE_DIRECTORY, Manifest
from pipeline.data.shards.scan import scanned_table, threads
from pipeline.data.shards.table import INDEX_KEY, SCHEMA, SampleTable, ShardFile, index_name, load_beside, shards_of

CACHE_DIRECTORY = ".squeezewire"
MAX_OPEN_SHARDS = 128
"""Files one process keeps open; common limits begin at 1024."""
MAX_FOREIGN_CLASSES = 1_000_000
"""Shards without a manifest have as many classes as their highest label says, up to here. The largest public sets have
some 22,000; a number beyond this is an identifier or damage, and a classifier of its size would fill the memory."""
READ_AGAIN_SECONDS = 0.5
"""Before a read that failed is tried again."""
TRUST_THE_FIRST = "size"
"""`verify` for the ranks of a machine that follow one which has read and hashed the same files."""


class ShardFiles(Protocol):
    """Where the bytes of a split's shards come from. Pickles; what it opens, it opens where it is used."""

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Bytes of shard number `shard`. Fewer only at its end. Raises OSError or DataError."""
        ...

    def close(self) -> None:
        """Let go of what was opened; it is opened again when needed."""
        ...


class ShardIndex:
    """The samples 0 .. num_samples - 1 of one split, in the order of the shards. Cheap to send to another process.

    `read` may be called in any process that got the index by fork or by pickle: files are opened where they are needed.
    """

    def __init__(
        self,
        root: Path | str,
        split: str,
        shards: tuple[ShardFile, ...],
        table: SampleTable,
        files: ShardFiles,
        classes: tuple[str, ...] | None,
        is_checked: bool = False,
    ) -> None:
        """Use `open`; this takes the parts as verified."""
        self.root, self.split = root, split
        self.shards, self.table, self.files = shards, table, files
        self.num_classes = int(table.label.max()) + 1 if classes is None else len(classes)
        """From the manifest; of foreign shards the highest label plus one."""
        self.classes = classes
        """Names in index order; None for foreign shards."""
        self.is_checked = is_checked
        """Every picture was decoded to its end when the shards were written."""
        self.index_hash = table.hash_with(shards)
        """Of content and order, hexadecimal: equal for the same shards anywhere."""

    @classmethod
    def open(
        cls,
        root: Path | str,
        split: str,
        *,
        verify: str = "size",
        cache: CacheSettings | None = None,
        is_first: bool = True,
    ) -> "ShardIndex":
        """Index the shards of `split` at `root`, or take the index that is there.

        Args:
            root: directory or URL with `manifest.json` and its shards, or with foreign shards.
            split: name in the manifest. Without a manifest, as `foreign.find_split` takes it; web servers do not
                list their files, so that there it is file names with braces or a split of `_info.json`.
            verify: `size` compares each shard's bytes with the manifest; `sha256` reads and hashes it too.
            cache: for URLs; None: as without configuration.
            is_first: False: another process of this server has opened it and warned.

        Raises:
            DataError: shards are missing, damaged, contradict the manifest, or a label is out of range.
        """
        assert verify in ("size", "sha256")
        if is_url(root):
            from pipeline.data.remote.shards import open_remote

            index = cls(
                str(root), split, *open_remote(str(root), split, verify, cache or CacheSettings.of(DataConfig()))
            )
        else:
            index = cls(root, split, *_open_local(Path(root), split, verify, is_first))
        if index.classes is None:
            index.require_labels(
                MAX_FOREIGN_CLASSES,
                f"and shards without a manifest may have at most {MAX_FOREIGN_CLASSES:,} classes: prepare the shards"
                " again with the right classes.",
            )
        last = index.num_classes - 1
        index.require_labels(
            index.num_classes,
            f"and there are {index.num_classes} classes, 0 to {last}: prepare the shards again with the right classes.",
        )
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
        """The bytes of a sample's picture. A read that fails is tried once more, from files opened anew.

        Raises:
            DataError: the shard is gone, has shrunk, or cannot be read.
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


def open_split(data: DataConfig, split: str, *, is_first: bool = True) -> ShardIndex:
    """`ShardIndex.open` as configured.

    Args:
        is_first: False: another process of this server has just opened and verified the same split.
    """
    assert data.root is not None
    verify = data.verify if is_first else TRUST_THE_FIRST
    return ShardIndex.open(data.root, split, verify=verify, cache=CacheSettings.of(data), is_first=is_first)


class LocalFiles:
    """The shards of a directory. A bounded number of them stays open."""

    def __init__(self, root: Path, shards: tuple[ShardFile, ...]) -> None:
        self.root, self.shards = root, shards
        self._start_empty()

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """See ShardFiles."""
        return os.pread(self._descriptor(shard), length, offset)

    def close(self) -> None:
        """See ShardFiles."""
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


def _close_all(open_files: OrderedDict[int, int]) -> None:
    while open_files:
        os.close(open_files.popitem()[1])


Opened = tuple[tuple[ShardFile, ...], SampleTable, ShardFiles, tuple[str, ...] | None, bool]
"""(shards, table, files, classes, whether its pictures are checked) of a split."""


def _open_local(root: Path, split: str, verify: str, is_first: bool) -> Opened:
    if not root.is_dir():
        raise DataError(f"data.root={root} is not a directory: give the one that `prepare` made (its out=).")
    manifest = Manifest.load(root) if _has_manifest(root) else None
    foreign = None if manifest else find_split(root, split)
    shards = _listed(manifest, root, split) if manifest else _found(root, foreign.names if foreign else ())
    if verify == "sha256":
        _check_hashes(root, shards)
    described = manifest.split(split).extra.get(INDEX_KEY) if manifest else None
    table = load_beside(root, split, shards, described)
    if table is None and shards:
        table = _cached_table(root, split, shards, is_first)
    if table is None or not len(table.label):
        raise DataError(f"Split {split!r} in {root} holds no sample: prepare it again.")
    if foreign:
        counts = np.bincount(table.shard, minlength=len(shards)).tolist()
        foreign.check_counts(zip((shard.name for shard in shards), counts, strict=True))
    files = LocalFiles(root, shards)
    if manifest is None:
        return shards, table, files, None, False
    return shards, table, files, manifest.classes, manifest.split(split).is_checked


def _has_manifest(root: Path) -> bool:
    """Whether `prepare` made this directory; if it is unfinished, loading the manifest that is missing says so."""
    return (root / MANIFEST_NAME).exists() or (root / STATE_DIRECTORY).exists()


def _listed(manifest: Manifest, root: Path, split: str) -> tuple[ShardFile, ...]:
    """The manifest's shards of `split`, each there with its size."""
    shards = shards_of(manifest, split)
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
    with threads(len(os.sched_getaffinity(0))) as pool:
        for shard, found in zip(known, pool.map(lambda s: sha256_of_file(root / s.name), known), strict=True):
            if found != shard.sha256:
                raise DataError(
                    f"Shard {shard.name} in {root} has SHA-256 {found}, and the manifest says {shard.sha256}: its"
                    " content was damaged or changed. Copy it again from its source, or prepare the shards again."
                )


def _cached_table(root: Path, split: str, shards: tuple[ShardFile, ...], is_first: bool) -> SampleTable:
    """The cached table if it is of these very files, else a new scan, cached where that is possible."""
    path = root / CACHE_DIRECTORY / f"{hashlib.sha256(split.encode()).hexdigest()[:16]}.npz"
    times = [(root / shard.name).stat().st_mtime_ns for shard in shards]
    known = json.dumps([SCHEMA, times, [asdict(shard) for shard in shards]])
    table = _load_table(path, shards, known)
    if table is None:
        table = scanned_table(root, shards)
        try:
            _save_table(path, table, shards, known)
        except OSError as error:
            if is_first:
                say(
                    f"the index of split {split!r} cannot be kept in {path.parent} ({error.strerror or error}), so"
                    f" every start reads the headers of all {len(shards)} shards: start once as somebody who may write"
                    f" there, or copy beside them the {index_name(split)} that `prepare` wrote with the shards"
                )
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
    """Leave the table for the next process. Raises OSError where the root cannot be written."""
    arrays: dict[str, Any] = {
        **table.arrays(),
        "known": np.array(known),
        "index_hash": np.array(table.hash_with(shards)),
    }
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, lambda file: np.savez(file, **arrays))


def check_root(data: DataConfig, split: str) -> None:
    """Raise `DataError` unless there are shards of `split` at `data.root`.

    In a directory: a manifest that has it, or shards of that name. At a URL: every shard, as far as the server tells.
    """
    root = data.root
    assert root is not None
    if is_url(root):
        from pipeline.data.remote.shards import check_remote

        check_remote(root, split, CacheSettings.of(data))
        return
    path = Path(root)
    if not path.is_dir():
        raise DataError(
            f"data.root={root} is not a directory: make shards there with `python -m pipeline.prepare source=builtin"
            f" out={root}` (or from your pictures), or give the directory that holds them."
        )
    if (path / MANIFEST_NAME).exists():
        Manifest.load(path).split(split)
    elif not any(path.glob("*.tar")):
        raise DataError(f"data.root={root} holds no shards (*.tar): give the directory that `prepare` wrote.")
    else:
        find_split(path, split)
