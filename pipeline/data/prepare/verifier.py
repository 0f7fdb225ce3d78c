"""Are these shards what they must be? Everything is read: sizes, hashes, headers, labels, and every picture is decoded.

Nothing stops at the first thing that is wrong: whoever has to mend shards wants to know all of it.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from pipeline.core.errors import DataError
from pipeline.core.files import sha256_of_file
from pipeline.core.schemas.manifest import IndexJson
from pipeline.data.index import MAX_FOREIGN_CLASSES
from pipeline.data.pictures import BadImageError, check_picture
from pipeline.data.shards.foreign import find_all, find_split
from pipeline.data.shards.manifest import MANIFEST_NAME, STATE_DIRECTORY, Manifest, Split
from pipeline.data.shards.table import INDEX_KEY, index_name
from pipeline.data.shards.tar import ShardSamples, index_shard


@dataclass(frozen=True)
class ExpectedFile:
    """One shard and what is known of it beforehand: all from the manifest, or nothing but counts of foreign shards.

    The index that `prepare` writes beside the shards is checked like one, but holds no samples.
    """

    split: str
    name: str
    num_bytes: int | None = None
    sha256: str | None = None
    num_samples: int | None = None
    num_classes: int | None = None
    is_index: bool = False


@dataclass(frozen=True)
class Found:
    """What checking a file found."""

    expected: ExpectedFile
    num_bytes: int = 0
    num_pictures: int = 0
    """Number of pictures with a label that were decoded."""
    labels: tuple[int, int] | None = None
    """Lowest and highest label."""
    ignored: dict[str, int] = field(default_factory=dict)
    """Members that are not read, by extension."""
    problems: tuple[str, ...] = ()
    """Clauses, each about the shard or one of its samples."""


def expected_shards(root: Path, split: str | None) -> tuple[list[ExpectedFile], list[str]]:
    """(the shards to check, sentences about what lies beside them).

    Args:
        root: Directory of the shards.
        split: The one wanted; None: all. Without a manifest as `foreign.find_split` takes it.

    Raises:
        DataError: there is no such directory or split, or the manifest cannot be believed.
    """
    if not root.is_dir():
        raise DataError(f"out={root} is not a directory: give the one that holds the shards.")
    if not ((root / MANIFEST_NAME).exists() or (root / STATE_DIRECTORY).exists()):
        found = find_all(root) if split is None else {split: find_split(root, split)}
        shards = [
            ExpectedFile(name, shard, num_samples=foreign.counts.get(shard))
            for name, foreign in sorted(found.items())
            for shard in foreign.names
        ]
        return shards, [f"{root} has no {MANIFEST_NAME}: sizes and hashes are not known, and only damage can be found."]
    manifest = Manifest.load(root)
    splits = manifest.splits if split is None else {split: manifest.split(split)}
    shards = [shard for name, found in sorted(splits.items()) for shard in _of_manifest(manifest, name, found)]
    listed = {shard.name for found in manifest.splits.values() for shard in found.shards}
    strays = sorted(path.name for path in root.glob("*.tar") if path.name not in listed)
    return shards, [f"{name} is in no split of {MANIFEST_NAME}, and is not read." for name in strays]


def _of_manifest(manifest: Manifest, name: str, split: Split) -> list[ExpectedFile]:
    shards = [
        ExpectedFile(name, shard.name, shard.bytes, shard.sha256, shard.num_samples, len(manifest.classes))
        for shard in split.shards
    ]
    try:
        index = cast(IndexJson, split.extra[INDEX_KEY])
        sha256 = str(index["sha256"])
        shards.append(ExpectedFile(name, index_name(name), int(index["bytes"]), sha256, is_index=True))
    except (KeyError, TypeError, ValueError):
        pass  # of an earlier version; who needs one says so
    return shards


@dataclass(frozen=True)
class ShardVerifier:
    """Checks one shard; pickles, so that a worker process can."""

    root: Path

    def __call__(self, expected: ExpectedFile, tick: Callable[[int], None]) -> Found:
        """Read all of it.

        Args:
            expected: What is known of the file.
            tick: Called with the number of bytes checked since the last call; it may raise to stop the work.
        """
        path = self.root / expected.name
        if path.exists() and not path.is_file():
            return Found(expected, problems=("is no regular file",))
        try:
            num_bytes = path.stat().st_size
            found = self._read(path, expected, num_bytes, tick)
        except FileNotFoundError:
            return Found(expected, problems=("is missing",))
        except OSError as error:
            return Found(expected, problems=(f"cannot be read: {error.strerror or error}",))
        return found

    def _read(self, path: Path, expected: ExpectedFile, num_bytes: int, tick: Callable[[int], None]) -> Found:
        problems = []
        if expected.num_bytes not in (None, num_bytes):
            problems.append(f"has {num_bytes} bytes, and the manifest says {expected.num_bytes}")
        elif expected.sha256 is not None and (sha256 := sha256_of_file(path)) != expected.sha256:
            problems.append(f"has SHA-256 {sha256}, and the manifest says {expected.sha256}: its content was changed")
        if expected.is_index:
            tick(num_bytes)
            return Found(expected, num_bytes, problems=tuple(problems))
        num_whole: list[int] = []
        try:
            samples = index_shard(path, lambda error: problems.append(str(error)), num_whole.append)
        except DataError as error:
            of_how_many = "" if expected.num_samples is None else f" of {expected.num_samples}"
            holds = f"Before that it holds {sum(num_whole)}{of_how_many} whole samples."
            problems.append(f"{error} {holds} None of its pictures was checked.")
            tick(num_bytes)
            return Found(expected, num_bytes, problems=tuple(problems))
        if expected.num_samples not in (None, len(samples.keys)):
            problems.append(f"holds {len(samples.keys)} whole samples and not {expected.num_samples}")
        problems += _wrong_labels(samples, expected.num_classes)
        bad = _bad_pictures(path, samples, num_bytes, tick)
        labels = (int(samples.labels.min()), int(samples.labels.max())) if len(samples.labels) else None
        num_pictures = len(samples.keys) - len(bad)
        return Found(expected, num_bytes, num_pictures, labels, samples.ignored, tuple(problems + bad))


def _wrong_labels(samples: ShardSamples, num_classes: int | None) -> list[str]:
    limit = MAX_FOREIGN_CLASSES if num_classes is None else num_classes
    return [
        f"sample {_text(key)}: its label is {label}, and there are {limit} classes, 0 to {limit - 1}"
        if num_classes is not None
        else f"sample {_text(key)}: its label is {label}, which cannot be the index of a class"
        for key, label in zip(samples.keys, samples.labels.tolist(), strict=True)
        if not 0 <= label < limit
    ]


def _bad_pictures(path: Path, samples: ShardSamples, num_bytes: int, tick: Callable[[int], None]) -> list[str]:
    """A clause for each picture that training could not use."""
    bad, num_ticked = [], 0
    with path.open("rb") as file:
        for key, offset, length in zip(samples.keys, samples.offsets.tolist(), samples.lengths.tolist(), strict=True):
            try:
                check_picture(os.pread(file.fileno(), length, offset))
            except BadImageError as error:
                bad.append(f"sample {_text(key)}: {error}")
            tick(max(0, offset + length - num_ticked))
            num_ticked = max(num_ticked, offset + length)
    tick(num_bytes - num_ticked)
    return bad


def _text(key: bytes) -> str:
    return repr(bytes(key).decode(errors="backslashreplace"))
