"""`manifest.json`: what lies beside the shards, and the promise that they are complete. It is written last."""

import json
import re
import shlex
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from pipeline.core.errors import DataError
from pipeline.core.files import open_regular, write_json_atomic
from pipeline.core.schemas.manifest import ManifestJson, ShardJson, SplitJson

MANIFEST_NAME = "manifest.json"
STATE_DIRECTORY = ".prepare"
"""Beside the manifest while `prepare` is at work: what it has finished."""
SCHEMA = 1
MAKE_ANEW = "Copy it again from where it was made, or run `prepare` again into an empty out=."
"""What to do about a damaged manifest: `prepare` reads the one that is there, and leaves shards that it names alone."""
MAX_MANIFEST_BYTES = 256_000_000
"""A shard takes some 200 bytes of it and a bad picture some 100: no set comes near. It is read into memory as a whole,
and may come from a server that sends without end."""
WAYS_TO_A_SPLIT = (
    "Name one of them (data.val_split=, data.train_split=, data.split=), prepare the pictures anew with"
    " val_fraction=0.1, or train without validation (trainer.validate_every_steps=0)."
)
# Neither a path nor a URL, whose scheme ends with a colon: `pipe:` would be a command.
_PLAIN_NAME = re.compile(r"(?!\.{0,2}$)[^/:\x00-\x1f]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class NoSplitError(DataError):
    """The shards are there, and the split asked for is not one of theirs."""


@dataclass(frozen=True)
class Shard:
    """One tar file of a split."""

    name: str
    """File name, relative to the manifest's directory; never a path."""
    bytes: int
    """Size of the file in bytes."""
    sha256: str
    """Hexadecimal SHA-256 of the file."""
    num_samples: int


@dataclass(frozen=True)
class Split:
    """One split: its shards in order, and what else was recorded when it was written."""

    shards: tuple[Shard, ...]
    extra: dict[str, object] = field(default_factory=dict)
    """Further JSON keys of the split (seed, source, kind, short_side, ...)."""

    @property
    def is_checked(self) -> bool:
        """Whether `prepare` decoded every picture to its end."""
        request = self.extra.get("request")
        return isinstance(request, dict) and request.get("check", "pixels") == "pixels"

    @property
    def num_samples(self) -> int:
        """Number of samples over all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Size of all shards in bytes."""
        return sum(shard.bytes for shard in self.shards)


@dataclass(frozen=True)
class Manifest:
    """Classes in index order and the splits by name."""

    classes: tuple[str, ...]
    splits: dict[str, Split]
    extra: dict[str, object] = field(default_factory=dict)
    """Further top-level JSON keys."""

    @classmethod
    def load(cls, root: Path) -> "Manifest":
        """Read `root/manifest.json`.

        Raises:
            DataError: there is no manifest, it is too large or not JSON, its schema is another, or its counts
                contradict themselves.
        """
        path = root / MANIFEST_NAME
        try:
            with open_regular(path) as file:
                content = file.read(MAX_MANIFEST_BYTES + 1)
            return cls.parse(content, str(path))
        except FileNotFoundError:
            raise DataError(
                f"{path} does not exist: `prepare` writes it last, so the shards are unfinished or lie elsewhere. "
                f"Run `python -m pipeline.prepare source=... {shlex.quote(f'out={root}')}` (again), or correct the"
                " directory."
            ) from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}. {MAKE_ANEW}") from error

    @classmethod
    def parse(cls, content: bytes, path: str) -> "Manifest":
        """The manifest with this content; `path` says in messages where it lies.

        Raises:
            DataError: as `load`.
        """
        if len(content) > MAX_MANIFEST_BYTES:
            raise DataError(f"{path} has more than {MAX_MANIFEST_BYTES} bytes, as no manifest has. {MAKE_ANEW}")
        try:
            value = json.loads(content.decode())
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{path} cannot be read: {error}. {MAKE_ANEW}") from error
        return _parse(value, path)

    def save(self, root: Path) -> Path:
        """Write `root/manifest.json` atomically; returns its path. The shards must be complete and durable by now.

        Raises:
            OSError: the directory cannot be written.
        """
        path = root / MANIFEST_NAME
        write_json_atomic(path, self.to_json())
        return path

    def to_json(self) -> ManifestJson:
        """Return what `manifest.json` holds."""
        splits = {
            name: {
                "num_samples": split.num_samples,
                "shards": [
                    {"name": shard.name, "bytes": shard.bytes, "sha256": shard.sha256, "num_samples": shard.num_samples}
                    for shard in split.shards
                ],
                **split.extra,
            }
            for name, split in sorted(self.splits.items())
        }
        return cast(ManifestJson, {"schema": SCHEMA, "classes": list(self.classes), "splits": splits, **self.extra})

    def split(self, name: str) -> Split:
        """The split called `name`.

        Raises:
            NoSplitError: there is none; the message names those that exist, and every way out.
        """
        if name not in self.splits:
            known = ", ".join(sorted(self.splits)) or "none"
            raise NoSplitError(f"There is no split {name!r} in these shards (there is: {known}). {WAYS_TO_A_SPLIT}")
        return self.splits[name]


def _parse(value: Any, path: str) -> Manifest:
    """The typed manifest, or `DataError` naming the first thing that is not as it must be."""
    try:
        if value["schema"] != SCHEMA:
            raise DataError(f"{path} has schema {value['schema']!r}, and this version reads schema {SCHEMA}.")
        classes = tuple(value["classes"])
        if (
            not isinstance(value["classes"], list)
            or not all(isinstance(name, str) for name in classes)
            or len(set(classes)) != len(classes)
        ):
            raise DataError(f"{path}: `classes` must be distinct strings in index order. {MAKE_ANEW}")
        splits = {name: _parse_split(name, split, path) for name, split in value["splits"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not a manifest of squeezewire ({type(error).__name__}: {error}). {MAKE_ANEW}"
        ) from error
    extra = {key: inner for key, inner in value.items() if key not in ("schema", "classes", "splits")}
    return Manifest(classes=classes, splits=splits, extra=extra)


def _parse_split(name: str, value: SplitJson, path: str) -> Split:
    shards = tuple(_parse_shard(shard, path) for shard in value["shards"])
    extra = {key: inner for key, inner in value.items() if key not in ("num_samples", "shards")}
    split = Split(shards=shards, extra=extra)
    names = [shard.name for shard in shards]
    if len(set(names)) < len(names):
        ((twice, _),) = Counter(names).most_common(1)
        raise DataError(f"{path}: split {name!r} lists {twice!r} twice. {MAKE_ANEW}")
    if split.num_samples != value["num_samples"]:
        raise DataError(
            f"{path}: split {name!r} says {value['num_samples']} samples, and its shards sum to {split.num_samples}. "
            f"The file was edited or damaged. {MAKE_ANEW}"
        )
    return split


def _parse_shard(value: ShardJson, path: str) -> Shard:
    shard = Shard(name=value["name"], bytes=value["bytes"], sha256=value["sha256"], num_samples=value["num_samples"])
    is_plain_name = isinstance(shard.name, str) and bool(_PLAIN_NAME.fullmatch(shard.name))
    is_hash = isinstance(shard.sha256, str) and bool(_SHA256.fullmatch(shard.sha256))
    counts = (shard.bytes, shard.num_samples)
    if not is_plain_name or not is_hash or not all(type(count) is int and 0 <= count < 2**63 for count in counts):
        raise DataError(
            f"{path}: the shard {value!r} must have a plain file name, a SHA-256 of 64 hexadecimal digits and counts"
            f" that are not negative. {MAKE_ANEW}"
        )
    return shard
