"""Where pictures come from: class folders, a tar of class folders, ILSVRC2012's archives, the built-in generator.

Nothing is unpacked. A source lists where the bytes of every picture lie (file, offset, length), so that any worker can
read any picture and a shard can be written by whoever is free.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pipeline.core.errors import DataError
from pipeline.core.files import open_regular
from pipeline.data.prepare.label_files import labels_beside
from pipeline.data.prepare.labelling import Asked, refuse_split
from pipeline.data.prepare.layout import work_out
from pipeline.data.prepare.listing import Listed, list_folder, list_tar
from pipeline.data.prepare.spellings import SPLIT_ASKED_FOR
from pipeline.data.prepare.tree import some

Kind = Literal["folders", "tar", "ilsvrc2012", "builtin"]
KINDS: tuple[Kind, ...] = ("folders", "tar", "ilsvrc2012", "builtin")


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One picture: its name, its class, and where its bytes lie."""

    name: str
    """Unique within the split, such as `airplane/0000.jpg`."""
    class_name: str
    path: str
    """File that holds the bytes; empty for the generator."""
    offset: int
    """First byte within `path`; for the generator, the index of the picture."""
    num_bytes: int
    """Length; for the generator, the expected one."""
    mtime_ns: int = 0
    """When `path` was last changed: a picture changed between two attempts is written again."""
    problem: str = ""
    """Why the bytes cannot be read, as a clause."""


Reader = Callable[[SourceImage], bytes]


@dataclass(frozen=True)
class PictureSource:
    """Every picture of every split, by class."""

    kind: Kind
    classes: tuple[str, ...]
    """Names in index order."""
    splits: dict[str, Sequence[SourceImage]]
    read: Reader
    """Bytes of one picture; pickles, and raises OSError if they are not there."""
    notes: tuple[str, ...] = ()
    """Sentences the user should see, such as what was not read."""
    tree: tuple[str, ...] = ()
    """Lines that show which folder was taken for what, with counts."""
    extra: dict[str, int | str] = field(default_factory=dict)
    """Further facts to record in the manifest."""


def read_image(image: SourceImage) -> bytes:
    """The bytes of a picture that lies in a file.

    Raises:
        OSError: the file is gone, unreadable, or shorter than it was.
    """
    if image.problem:
        raise OSError(image.problem)
    with open_regular(Path(image.path)) as file:
        file.seek(image.offset)
        content = file.read(image.num_bytes)
    if len(content) != image.num_bytes:
        raise OSError(f"{image.path} ended after {len(content)} of {image.num_bytes} bytes")
    return content


def expect_image(image: SourceImage) -> None:
    """Tell the kernel that `read_image` will ask for this picture: it is read while others are worked on.

    A picture that is not there is none of this function's business.
    """
    if not image.path or image.problem or not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError):
        descriptor = os.open(image.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, image.offset, image.num_bytes, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)


def open_folders(path: Path, asked: Asked, out: Path | None = None) -> PictureSource:
    """Class folders: `path/<class>/<image>`, or `path/<split>/<class>/<image>`; layout.py says what else.

    Args:
        path: The directory.
        asked: What the user says about it.
        out: Where shards are going to be written; what lies there is no source.

    Raises:
        DataError: no pictures, a layout that could be read in two ways, or a folder that cannot be looked into.
    """
    if not path.is_dir():
        raise DataError(f"source={path} is not a directory, so kind=folders cannot read it.")
    entries = list_folder(path, out)
    return _laid_out("folders", entries, labels_beside(asked, entries, path))


def open_tar(path: Path, asked: Asked) -> PictureSource:
    """A tar of class folders, with or without split folders above them and one directory around everything.

    Raises:
        DataError: as `open_folders`, and if the archive is compressed, damaged or cut short.
    """
    if not path.is_file():
        raise DataError(f"source={path} is not a file, so kind=tar cannot read it.")
    entries, replaced = list_tar(path)
    source = _laid_out("tar", entries, labels_beside(asked, entries, None))
    if replaced:
        note = f"{len(replaced):,} members give way to later ones of the same name, as in unpacking ({some(replaced)})."
        source = replace(source, notes=(*source.notes, note))
    return source


def _laid_out(kind: Kind, entries: Sequence[Listed], asked: Asked) -> PictureSource:
    layout = work_out(entries, asked)
    splits: dict[str, Sequence[SourceImage]] = {
        split: [
            SourceImage(picture.name, picture.class_name, *picture.listed[1:5], picture.listed.problem)
            for picture in pictures
        ]
        for split, pictures in layout.splits.items()
    }
    return PictureSource(kind, layout.classes, splits, read_image, layout.notes, layout.tree)


def chosen(root: Path, splits: dict[str, list[SourceImage]], split: str | None) -> dict[str, Sequence[SourceImage]]:
    """All splits, or the one asked for."""
    if split is None:
        return dict(splits)
    name = split if split in splits else SPLIT_ASKED_FOR.get(split, split)
    if name not in splits:
        refuse_split(f"source={root}", split, splits)
    return {name: splits[name]}
