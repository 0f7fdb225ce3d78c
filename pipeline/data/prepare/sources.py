"""Where pictures come from: class folders, a tar of class folders, ILSVRC2012's archives, the built-in generator.

Nothing is unpacked. A source lists where the bytes of every picture lie (file, offset, length), so that any worker can
read any picture and a shard can be written by whoever is free.
"""

import os
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.core.errors import DataError

Kind = Literal["folders", "tar", "ilsvrc2012", "builtin"]
KINDS: tuple[Kind, ...] = ("folders", "tar", "ilsvrc2012", "builtin")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
SPLIT_ALIASES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "val"}
"""Directories that are splits. A test set with labels is used as the validation set and said to be."""
DEFAULT_SPLIT = "train"


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
    """Sentences the user should see, such as what was ignored."""
    extra: dict[str, int | str] = field(default_factory=dict)
    """Further facts to record in the manifest."""


def read_image(image: SourceImage) -> bytes:
    """The bytes of a picture that lies in a file.

    Raises:
        OSError: the file is gone, unreadable, or shorter than it was.
    """
    with Path(image.path).open("rb") as file:
        file.seek(image.offset)
        content = file.read(image.num_bytes)
    if len(content) != image.num_bytes:
        raise OSError(f"{image.path} ended after {len(content)} of {image.num_bytes} bytes")
    return content


def expect_image(image: SourceImage) -> None:
    """Tell the kernel that `read_image` will ask for this picture: it is read while others are worked on.

    A picture that is not there is none of this function's business.
    """
    if not image.path or not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError):
        descriptor = os.open(image.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, image.offset, image.num_bytes, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)


def open_folders(path: Path, split: str | None, classes: tuple[str, ...] | None) -> PictureSource:
    """Class folders: `path/<class>/<image>`, or `path/<split>/<class>/<image>`.

    Args:
        path: The directory.
        split: The one wanted; None: all. Without split folders it is the name that the only split gets.
        classes: Names in index order; by default the sorted names of the folders.

    Raises:
        DataError: no pictures, an empty class folder, or a folder that is not among `classes`.
    """
    if not path.is_dir():
        raise DataError(f"source={path} is not a directory, so kind=folders cannot read it.")
    return _sorted_out("folders", path, _walk(path), split, classes)


def open_tar(path: Path, split: str | None, classes: tuple[str, ...] | None) -> PictureSource:
    """A tar of class folders, with or without split folders above them and one directory around everything.

    Raises:
        DataError: as `open_folders`, and if the archive is compressed, damaged or cut short.
    """
    if not path.is_file():
        raise DataError(f"source={path} is not a file, so kind=tar cannot read it.")
    mtime_ns = path.stat().st_mtime_ns
    images = ((member.name, str(path), member.offset_data, member.size, mtime_ns) for member in tar_members(path))
    return _sorted_out("tar", path, images, split, classes)


def tar_members(path: Path, *, start: int = 0, stop: int | None = None) -> Iterator[tarfile.TarInfo]:
    """Regular files of an uncompressed tar that begins at byte `start` of `path` and ends before byte `stop`.

    `offset_data` of a member counts from the beginning of the file. Links and devices are left out.

    Raises:
        DataError: it is compressed, damaged or cut short. (tarfile itself takes a damaged header for the end.)
    """
    remedy = "Fetch it again; if it is compressed, unpack it once (gunzip) and give the .tar."
    with path.open("rb") as file:
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None and (stop is None or member.offset < stop):
                    if member.isreg():
                        yield member
                end = tar.offset if member is None else member.offset
        except tarfile.TarError as error:
            raise DataError(f"{path} is not a whole, uncompressed tar: {error}. {remedy}") from error
        file.seek(end)
        if (stop is None or end < stop) and any(file.read(tarfile.BLOCKSIZE)):
            raise DataError(f"{path} is damaged at byte {end}: there is no tar header. {remedy}")


_ListedFile = tuple[str, str, int, int, int]  # name below the root, file, offset, length, mtime


def _walk(root: Path) -> Iterator[_ListedFile]:
    """Every file below `root`, in sorted order."""
    for directory, names, files in os.walk(root, followlinks=True):
        names.sort()
        if not names and not files:
            raise DataError(f"The folder {directory} is empty. Put images there, or remove it.")
        prefix = Path(directory).relative_to(root).as_posix()
        for name in sorted(files):
            path = os.path.join(directory, name)  # noqa: PTH118  # a million Path objects are slow
            status = os.stat(path)  # noqa: PTH116
            yield f"{prefix}/{name}", path, 0, status.st_size, status.st_mtime_ns


def _sorted_out(
    kind: Kind, root: Path, entries: Iterable[_ListedFile], split: str | None, classes: tuple[str, ...] | None
) -> PictureSource:
    """Images by split and class, from their names alone."""
    found, ignored = _images_among(entries)
    notes = []
    if ignored:
        notes.append(f"Ignored {len(ignored)} files that are not {' '.join(IMAGE_SUFFIXES)} (first: {ignored[0]}).")
    if not found:
        raise DataError(f"source={root} holds no images. Expected <class>/<image> with {', '.join(IMAGE_SUFFIXES)}.")
    found = _without_wrapper(found)
    folders = {parts[0] for parts, _ in found}
    if folders <= set(SPLIT_ALIASES) and all(len(parts) >= 3 for parts, _ in found):
        by_folder = {folder: [(p[1:], e) for p, e in found if p[0] == folder] for folder in sorted(folders)}
        names = {folder: _split_name(folder, folders) for folder in by_folder}
        notes.extend(
            f"The folder {folder}/ becomes the split {name!r}." for folder, name in names.items() if folder != name
        )
        splits = {names[folder]: _with_classes(root, entries) for folder, entries in by_folder.items()}
    else:
        if mixed := sorted(folders & {"train", "val", "test"}):
            raise DataError(
                f"source={root} holds {mixed[0]}/ beside {min(folders - set(mixed), default='loose images')!r}: "
                "are these splits or classes? Give the folder of one split, or move the rest away."
            )
        splits = {split or DEFAULT_SPLIT: _with_classes(root, found)}
    return PictureSource(
        kind=kind,
        classes=check_classes(root, {image.class_name for images in splits.values() for image in images}, classes),
        splits=chosen(root, splits, split),
        read=read_image,
        notes=tuple(notes),
    )


def _images_among(entries: Iterable[_ListedFile]) -> tuple[list[tuple[tuple[str, ...], _ListedFile]], list[str]]:
    """(images with the parts of their names, names of what is not an image). Hidden files are not images."""
    found, ignored = [], []
    for entry in entries:
        parts = tuple(part for part in entry[0].split("/") if part not in ("", "."))
        is_image = parts[-1].lower().endswith(IMAGE_SUFFIXES) and not any(part.startswith(".") for part in parts)
        if is_image:
            found.append((parts, entry))
        else:
            ignored.append("/".join(parts))
    return found, ignored


def _without_wrapper(found: list[tuple[tuple[str, ...], _ListedFile]]) -> list[tuple[tuple[str, ...], _ListedFile]]:
    """Without directories that lie around everything and are neither split nor class."""
    while True:
        first = found[0][0][0]
        if first in SPLIT_ALIASES or any(len(parts) < 3 or parts[0] != first for parts, _ in found):
            return found
        found = [(parts[1:], entry) for parts, entry in found]


def _split_name(folder: str, folders: set[str]) -> str:
    """`val` for whatever plays that part; `test` keeps its name beside a real validation set."""
    return folder if folder == "test" and len(folders - {"train"}) > 1 else SPLIT_ALIASES[folder]


def _with_classes(root: Path, found: list[tuple[tuple[str, ...], _ListedFile]]) -> list[SourceImage]:
    images = []
    for parts, (_, path, offset, num_bytes, mtime_ns) in found:
        if len(parts) < 2:
            raise DataError(f"source={root}: the image {path} lies in no class folder. Move it into <class>/.")
        # A class's name once, not once per picture.
        images.append(SourceImage("/".join(parts), sys.intern(parts[0]), path, offset, num_bytes, mtime_ns))
    return images


def check_classes(root: Path, found: set[str], classes: tuple[str, ...] | None) -> tuple[str, ...]:
    """The classes in index order: those given, which must cover what was found, or what was found, sorted."""
    if classes is None:
        return tuple(sorted(found))
    if unknown := sorted(found - set(classes)):
        raise DataError(
            f"source={root} holds {len(unknown)} classes that are not among the {len(classes)} known ones "
            f"(first: {unknown[0]!r}). Add them to the file given as classes=, or leave them out of the source."
        )
    return classes


def chosen(root: Path, splits: dict[str, list[SourceImage]], split: str | None) -> dict[str, Sequence[SourceImage]]:
    """All splits, or the one asked for."""
    if split is None:
        return dict(splits)
    name = split if split in splits else SPLIT_ALIASES.get(split, split)
    if name not in splits:
        raise DataError(f"split={split} is not in source={root}; it has {', '.join(sorted(splits))}.")
    return {name: splits[name]}
