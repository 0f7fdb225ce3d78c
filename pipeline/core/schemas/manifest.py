"""`manifest.json`: what lies beside the shards, and the promise that they are complete. It is written last.

A reader needs what is required here; the rest is what `prepare` records, and a hand-made manifest may lack it.
"""

from typing import Literal, NotRequired, TypedDict


class ShardJson(TypedDict):
    """One tar file of a split."""

    name: str
    """File name, beside the manifest; never a path."""
    bytes: int
    """Size of the file in bytes."""
    sha256: str
    """Hexadecimal SHA-256 of the file."""
    num_samples: int
    """Number of samples in it."""


class BadPictureJson(TypedDict):
    """A picture of the source that is in no shard because it cannot be decoded."""

    name: str
    """Name of the picture in its source."""
    reason: str
    """What is wrong with it."""


class IndexJson(TypedDict):
    """The file that says where each sample lies in its tar, for readers who fetch the shards from elsewhere."""

    name: str
    """File name, beside the manifest."""
    bytes: int
    """Size of the file in bytes."""
    sha256: str
    """Hexadecimal SHA-256 of the file."""


class SplitJson(TypedDict):
    """One split: its shards in order, and what made them. A kind of source may add keys of its own."""

    num_samples: int
    """Number of samples over all shards."""
    shards: list[ShardJson]
    """The shards, in order."""
    kind: NotRequired[str]
    """Kind of source that was recognised or asked for."""
    seed: NotRequired[int]
    """Seed of the order of the samples."""
    order: NotRequired[str]
    """The rule by which the samples were ordered."""
    short_side: NotRequired[int | None]
    """Pixels of the shorter side that pictures were reduced to; null: as they came."""
    request: NotRequired[dict[str, str | int | None]]
    """The settings that determine the shards, to be compared with those of a later command."""
    is_whole_source: NotRequired[bool]
    """Whether all splits of the source were asked for."""
    num_bad: NotRequired[int]
    """Number of pictures that were left out."""
    bad: NotRequired[list[BadPictureJson]]
    """The pictures that were left out."""
    index: NotRequired[IndexJson]
    """The index of the split's samples."""


class ManifestJson(TypedDict):
    """`manifest.json`: the classes and the splits of a set of shards."""

    schema: Literal[1]
    """Version of this format."""
    classes: list[str]
    """Names of the classes; the label is the position, from 0."""
    splits: dict[str, SplitJson]
    """The splits by name."""
