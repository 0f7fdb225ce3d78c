"""The shards of a directory: verified, indexed and read.

Where the samples lie is told by the index that `prepare` wrote beside the shards, if it is the one that the manifest
names, else by a scan of all tars' headers (shards/tar.py). The scan is cached in `<root>/.squeezewire/`, where that can
be written, and is used again while the shards' names, sizes, hashes and times stay the same.
"""

import contextlib
import hashlib
import json
import os
import shlex
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import DataError
from pipeline.core.files import open_regular, sha256_of_file, write_atomic
from pipeline.data.remote.transfer import say
from pipeline.data.shards.foreign import ForeignSplit, find_split
from pipeline.data.shards.manifest import MANIFEST_NAME, STATE_DIRECTORY, Manifest
from pipeline.data.shards.opened import OpenedSplit
from pipeline.data.shards.scan import scanned_table, threads
from pipeline.data.shards.table import INDEX_KEY, SCHEMA, SampleTable, ShardFile, index_name, load_beside, shards_of

CACHE_DIRECTORY = ".squeezewire"
SHARED_BYTES = 4 * 2**20
"""Least that an index takes for its pages to be shared by the ranks of a machine and their workers. Smaller ones are
copied: a page of a file that somebody removes from a network file system is a crash."""
MAX_OPEN_SHARDS = 128
"""Files one process keeps open; common limits begin at 1024."""


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

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_open_files"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._start_empty()


def _close_all(open_files: OrderedDict[int, int]) -> None:
    while open_files:
        os.close(open_files.popitem()[1])


def open_local(root: Path, split: str, verify: str, *, is_local_leader: bool) -> OpenedSplit:
    """Verify the shards of `split` in the directory `root`, and index them or take the index that is there.

    Args:
        root: The directory.
        split: As for `ShardIndex.open`.
        verify: `size` or `sha256`.
        is_local_leader: Whether to warn if the index cannot be kept; other processes of this machine need not.

    Raises:
        DataError: Shards are missing, damaged, or contradict the manifest.
    """
    manifest, foreign, shards = shards_there(root, split)
    if verify == "sha256":
        _check_hashes(root, shards)
    described = manifest.split(split).extra.get(INDEX_KEY) if manifest else None
    truth = scanned_table(root, shards) if verify == "sha256" else None
    table = _table(root, split, shards, described, is_local_leader, truth)
    if not len(table.label):
        raise _no_sample(root, split)
    if foreign:
        counts = np.bincount(table.shard, minlength=len(shards)).tolist()
        foreign.check_counts(zip((shard.name for shard in shards), counts, strict=True))
    files = LocalFiles(root, shards)
    if manifest is None:
        return OpenedSplit(shards, table, files, classes=None, is_checked=False)
    return OpenedSplit(shards, table, files, manifest.classes, manifest.split(split).is_checked)


def shards_there(root: Path, split: str) -> tuple[Manifest | None, ForeignSplit | None, tuple[ShardFile, ...]]:
    """(the manifest, or else what is told of foreign shards; the shards, each there with its size). None is opened.

    Args:
        root: The directory.
        split: As for `ShardIndex.open`.

    Raises:
        DataError: There are none, some are missing, or they contradict the manifest.
    """
    if not root.is_dir():
        raise DataError(
            f"data.root={root} is not a directory: make shards there with `python -m pipeline.prepare source=builtin"
            f" {shlex.quote(f'out={root}')}` (or from your pictures), or give the directory that holds them (the"
            " out= of `prepare`)."
        )
    manifest = Manifest.load(root) if _has_manifest(root) else None
    foreign = None if manifest else find_split(root, split)
    shards = _listed(manifest, root, split) if manifest else _found(root, foreign.names if foreign else ())
    if not shards:
        raise _no_sample(root, split)
    return manifest, foreign, shards


def _no_sample(root: Path, split: str) -> DataError:
    return DataError(f"Split {split!r} in {root} holds no sample: prepare it again into an empty out=.")


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
        return path.stat().st_size if path.is_file() else None  # a FIFO would be waited for
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
                    " content was damaged or changed. Copy it again from its source, or remove it and prepare the"
                    " shards again."
                )


def _table(
    root: Path,
    split: str,
    shards: tuple[ShardFile, ...],
    described: Any,
    is_local_leader: bool,
    truth: SampleTable | None,
) -> SampleTable:
    """The index beside the shards, else one made of their headers and cached. All processes share a large one's pages.

    The index beside the shards is compressed and cannot be shared: a large one is cached too, as it is in memory.

    Args:
        root: Directory of the shards.
        split: Name of the split.
        shards: Its shards, each there with its size.
        described: What the manifest says of the index beside them.
        is_local_leader: Whether to warn.
        truth: What the headers say, where they were read in any case: an index that says otherwise does not count.
    """
    path = root / CACHE_DIRECTORY / f"{hashlib.sha256(split.encode()).hexdigest()[:16]}.npz"
    index_hash = described.get("sha256") if isinstance(described, dict) else None
    known = _known(shards, index_hash)
    agrees = _agreement(truth, shards)
    if index_hash and (table := _load_table(path, shards, known)) and agrees(table):
        return table
    table = load_beside(root, split, shards, described)
    if is_local_leader and index_hash and (root / index_name(split)).exists() and not (table and agrees(table)):
        say(
            f"the index of split {split!r} beside the shards in {root} is not what the manifest and the shards say, and"
            " is not believed: their headers are read instead. Copy it again, or prepare the shards again."
        )
    if table and agrees(table):
        if table.num_bytes < SHARED_BYTES:
            return table
        otherwise = "every process holds a copy of its own: start once as somebody who may write there"
    else:
        known = _known(shards, [(root / shard.name).stat().st_mtime_ns for shard in shards])
        if (table := _load_table(path, shards, known)) and agrees(table):
            return table
        table = truth or scanned_table(root, shards)
        otherwise = (
            f"every start reads the headers of all {len(shards)} shards: start once as somebody who may write there, or"
            f" copy beside them the {index_name(split)} that `prepare` wrote with the shards"
        )
    try:
        _save_table(path, table, shards, known)
    except OSError as error:
        if is_local_leader:
            say(
                f"the index of split {split!r} cannot be kept in {path.parent} ({error.strerror or error}), so"
                f" {otherwise}"
            )
        return table
    return table if table.num_bytes < SHARED_BYTES else _load_table(path, shards, known) or table


def _agreement(truth: SampleTable | None, shards: tuple[ShardFile, ...]) -> Callable[[SampleTable], bool]:
    """Return whether a table says what is true, as far as that is known."""
    return lambda table: truth is None or table.hash_with(shards) == truth.hash_with(shards)


def _known(shards: tuple[ShardFile, ...], of_when: Any) -> str:
    """What a cached table is of: the shards, and the index it was taken from or the times they were written."""
    return json.dumps([SCHEMA, of_when, [asdict(shard) for shard in shards]])


def _load_table(path: Path, shards: tuple[ShardFile, ...], known: str) -> SampleTable | None:
    """None unless the file is whole, unchanged and about shards of which `known` is true."""
    try:
        with open_regular(path) as file, np.load(file, allow_pickle=False) as archive:
            if str(archive["known"]) != known:
                return None
            table = SampleTable.map(path)
            table.check(shards)  # before its pages are read: what lies there may be of any size
            if table.num_bytes < SHARED_BYTES:
                table = SampleTable(*(array.copy() for array in table.arrays().values()))
            return table if table.hash_with(shards) == str(archive["index_hash"]) else None
    except Exception:  # zlib, zipfile and NumPy have many words for a file that is not theirs
        return None


def _save_table(path: Path, table: SampleTable, shards: tuple[ShardFile, ...], known: str) -> None:
    """Leave the table for the next process. Raises OSError where the root cannot be written.

    What another server has left meanwhile stays: its ranks may have mapped that very file.
    """
    arrays: dict[str, NDArray[Any]] = {
        **table.arrays(),
        "known": np.array(known),
        "index_hash": np.array(table.hash_with(shards)),
    }

    def write(file: BinaryIO) -> None:
        np.savez(file, allow_pickle=False, **arrays)
        if _load_table(path, shards, known) is not None:
            raise _LeftByAnother

    path.parent.mkdir(exist_ok=True)
    with contextlib.suppress(_LeftByAnother):
        write_atomic(path, write)


class _LeftByAnother(Exception):
    """The file is there by now."""
