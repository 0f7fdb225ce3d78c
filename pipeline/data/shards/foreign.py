"""Shards that somebody else made: which files a split consists of, and what lies beside them that tells.

Without a manifest a split is `<split>-*.tar`, or itself file names with braces, or a split of timm's `_info.json`. What
`_info.json` says of counts must then be so. All this holds for a directory and behind a URL.
"""

import json
import math
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.core.errors import DataError
from pipeline.core.files import read_regular
from pipeline.data.shards.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, NoSplitError

INFO_NAMES = ("_info.json", "info.json")
"""As timm's reader looks for it."""
MAX_SHARDS = 100_000

_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}")
_LIST = re.compile(r"\{[^{}]*,[^{}]*\}")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


class ForeignSplit:
    """The shards of one split in order, and how many samples each is said to have."""

    def __init__(self, names: Sequence[str], counts: dict[str, int] | None = None, told_by: str = "") -> None:
        self.names = tuple(names)
        self.counts = counts or {}
        """Samples by shard, as far as `_info.json` tells."""
        self._told_by = told_by

    def check_counts(self, found: Iterable[tuple[str, int]]) -> None:
        """Compare (shard, samples found in it) with what was said.

        Raises:
            DataError: they differ; the message names the shards.
        """
        wrong = [
            f"{name} holds {count} samples and not {self.counts[name]}"
            for name, count in found
            if self.counts.get(name, count) != count
        ]
        if wrong:
            raise DataError(
                f"{self._told_by} contradicts {len(wrong)} of the shards: {_listed(wrong)}. Copy these again from"
                " their source, or remove that file if it is of other shards."
            )


@dataclass(frozen=True)
class Info:
    """timm's `_info.json`, as far as it is anybody's business here."""

    where: str
    """Its path or URL, for messages."""
    splits: dict[str, object] = field(default_factory=dict)
    """As they stand there, unchecked; none where there is no such file."""

    @classmethod
    def parse(cls, content: bytes, where: str) -> "Info | None":
        """What it says; None if it is somebody else's file of a common name.

        Raises:
            DataError: it cannot be understood.
        """
        try:
            value = json.loads(content.decode())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} cannot be read: {error}. Copy it again, or remove it.") from error
        if isinstance(value, dict) and isinstance(value.get("splits"), dict):
            return cls(where, value["splits"])
        if PurePosixPath(where).name == INFO_NAMES[0]:
            raise DataError(f"{where} is not what timm writes beside shards: it has no splits. Remove or rename it.")
        return None

    def find(self, split: str, by_prefix: Sequence[str] = ()) -> ForeignSplit | None:
        """The shards of `split`, named with braces or known by this file; None: neither.

        Args:
            split: As for `find_split`.
            by_prefix: The shards `<split>-*.tar` that are there.

        Raises:
            DataError: a name leads out of the root, or the file contradicts itself or what is there.
        """
        if split.endswith(".tar"):
            counts = {name: n for told in self.splits.values() for name, n in _counts_of(told, self.where).items()}
            return ForeignSplit(expand(split), counts, self.where)
        if split not in self.splits:
            return None
        counts = _counts_of(self.splits[split], self.where)
        for name in counts:
            check_name(name)
        if unknown := [name for name in by_prefix if name not in counts]:
            raise DataError(
                f"{self.where} lists {len(counts)} shards of the split {split!r}, and {_listed(unknown)} lies there"
                " too. Remove what does not belong there: the shards, or the file if it is of others."
            )
        return ForeignSplit(tuple(counts), counts, self.where)


def find_split(root: Path, split: str) -> ForeignSplit:
    """The shards of `split` in `root`, by name alone: nothing is opened but `_info.json`.

    Args:
        root: The directory.
        split: A split of `_info.json`; what stands before the `-` in the shards' names; or names with braces, as in
            `imagenet-train-{0000..1023}.tar`.

    Raises:
        DataError: there are none, a name leads out of `root`, or `_info.json` contradicts itself or the directory.
    """
    if _SCHEME.match(split):
        raise DataError(
            f"The split {split!r} begins like a URL. Splits are names of files in data.root, and nothing is ever run"
            " to get them (`pipe:`): give the shards' directory as data.root."
        )
    info = _load_info(root)
    there = sorted(path.name for path in root.glob("*.tar"))
    by_prefix = shards_by_prefix(split, there)
    if found := info.find(split, by_prefix):
        return found
    if not there and not split.endswith(".tar") and not info.splits:
        raise _no_tars(root)
    if not by_prefix:
        known = f"; {info.where} knows the splits {', '.join(sorted(info.splits))}" if info.splits else ""
        tars = f"the tars there are {there[0]} .. {there[-1]}" if there else "no tar at all"
        raise NoSplitError(
            f"{root} has no {MANIFEST_NAME} and no shards {split}-*.tar ({tars}{known}): give the directory of the"
            " shards as data.root, and as the split what stands before the `-`, or file names with braces."
        )
    return ForeignSplit(by_prefix)


def _no_tars(root: Path) -> DataError:
    """The sentence for a directory without shards right in it."""
    folders = sorted({path.parent.name for path in root.glob("*/*.tar")})
    if not folders:
        return DataError(
            f"{root} holds no shards: no tar at all lies there. Give the directory that `prepare` wrote, or make one:"
            f" `python -m pipeline.prepare source=builtin {shlex.quote(f'out={root}')}`."
        )
    names = sorted(path.stem for path in (root / folders[0]).glob("*.tar"))
    example = f"{folders[0]}/{{{names[0]}..{names[-1]}}}.tar" if len(names) > 1 else f"{folders[0]}/{names[0]}.tar"
    return DataError(
        f"{root} holds no shards right in it, but its folders {_listed(folders)} do: give their names as the split, as"
        f" in 'data.train_split=\"{example}\"', or give one of the folders."
    )


def shards_by_prefix(split: str, there: Iterable[str]) -> list[str]:
    """Those of the files that are shards of `split` by their names."""
    return sorted(name for name in there if name.startswith(f"{split}-") and name.endswith(".tar"))


def find_all(root: Path) -> dict[str, ForeignSplit]:
    """Every tar in `root` or in a folder of it, by the split of `_info.json` that it belongs to.

    Others by what stands before the last `-`, those in a folder by the folder.

    Raises:
        DataError: there is no tar, or `_info.json` contradicts itself or the directory.
    """
    found = {split: find_split(root, split) for split in _load_info(root).splits}
    listed = {name for split in found.values() for name in split.names}
    rest: dict[str, list[str]] = {}
    for path in sorted([*root.glob("*.tar"), *root.glob("*/*.tar")]):
        name = str(path.relative_to(root))
        if name not in listed:
            folder, _, base = name.removesuffix(".tar").rpartition("/")
            prefix = base.rpartition("-")[0]
            rest.setdefault("/".join(filter(None, (folder, prefix))) or base, []).append(name)
    if not found and not rest:
        raise _no_tars(root)
    return found | {split: ForeignSplit(names) for split, names in rest.items() if split not in found}


def expand(pattern: str) -> tuple[str, ...]:
    """The file names that a name with braces stands for: `a-{00..02}.tar` is `a-00.tar`, `a-01.tar`, `a-02.tar`.

    Raises:
        DataError: unbalanced braces, more than MAX_SHARDS names, one name twice, or one that leads elsewhere.
    """
    from braceexpand import braceexpand

    # Counted before they are made: ten characters can stand for more names than memory holds.
    sizes = [
        abs(int(end) - int(first)) // max(1, abs(int(step or 1))) + 1 for first, end, step in _RANGE.findall(pattern)
    ]
    sizes += [group.count(",") + 1 for group in _LIST.findall(pattern)]
    too_many = DataError(f"{pattern!r} stands for more than {MAX_SHARDS:,} shards: shorten what its braces hold.")
    if math.prod(sizes) > MAX_SHARDS:
        raise too_many
    try:
        names = tuple(islice(braceexpand(pattern), MAX_SHARDS + 1))
    except (ValueError, RecursionError):
        raise DataError(f"{pattern!r} has a brace without its partner: write {{first..last}}.") from None
    if len(names) > MAX_SHARDS:
        raise too_many
    if len(set(names)) < len(names):
        raise DataError(f"{pattern!r} names a shard twice, so that its samples would come twice in an epoch.")
    for name in names:
        check_name(name)
    return names


def check_name(name: str) -> None:
    """Raise `DataError` unless `name` is the name of a file below the root."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or _SCHEME.match(name) or not name.isprintable():
        raise DataError(
            f"The shard name {name!r} does not stay inside data.root: names are of files there, never URLs, and `pipe:`"
            " is never run."
        )


def _load_info(root: Path) -> Info:
    """What timm's file says; nothing where there is none."""
    for path in (root / name for name in INFO_NAMES):
        try:
            info = Info.parse(read_regular(path, MAX_MANIFEST_BYTES), str(path))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}. Copy it again, or remove it.") from error
        if info:
            return info
    return Info(str(root / INFO_NAMES[0]))


def _counts_of(told: Any, where: str) -> dict[str, int]:
    """Samples by shard of one split of `_info.json`, in its order.

    Raises:
        DataError: the split is not of the form that timm reads, contradicts itself, or takes its labels elsewhere.
    """
    try:
        names, lengths, total = told["filenames"], told["shard_lengths"], told["num_samples"]
        sound = all(isinstance(name, str) for name in names) and all(type(n) is int and n >= 0 for n in lengths)
        is_sound = sound and len(names) == len(lengths) == len(set(names))
    except (KeyError, TypeError):
        is_sound, names, lengths, total = False, [], [], 0
    if not is_sound:
        raise DataError(f"{where}: a split must have as many shard_lengths as distinct filenames. Copy it again.")
    if sum(lengths) != total:
        raise DataError(
            f"{where} contradicts itself: it says {total} samples, and its {len(names)} shard_lengths sum to"
            f" {sum(lengths)}. Copy it again, or remove it."
        )
    if told.get("alt_label"):
        raise DataError(
            f"{where} takes labels from the field {told['alt_label']!r} of each .json, which is not supported: prepare"
            " shards whose .cls is the label."
        )
    return dict(zip(names, lengths, strict=True))


def _listed(names: Sequence[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
