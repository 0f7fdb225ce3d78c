"""From a word on the command line to a source of pictures."""

from collections import Counter
from pathlib import Path, PurePosixPath

from pipeline.core.errors import ConfigError, DataError
from pipeline.core.files import read_regular
from pipeline.data.prepare.builtin import BuiltinPictures, open_builtin
from pipeline.data.prepare.ilsvrc2012 import VAL_PREFIX, holds_archives, labels_of_val, open_ilsvrc2012
from pipeline.data.prepare.label_files import read_labels
from pipeline.data.prepare.labelling import Asked
from pipeline.data.prepare.listing import is_hidden, tar_members
from pipeline.data.prepare.sources import Kind, PictureSource, open_folders, open_tar

BUILTIN = "builtin"
MAX_CLASSES_BYTES = 100_000_000


def recognise(source: str) -> Kind:
    """What kind of source `source` is.

    Raises:
        DataError: there is nothing, or nothing that is known.
    """
    if source == BUILTIN:
        return "builtin"
    path = Path(source)
    if not path.exists():
        raise DataError(f"source={source} does not exist. Give a directory, a tar, or source=builtin.")
    if path.is_dir():
        return "ilsvrc2012" if holds_archives(path) else "folders"
    if not path.is_file():
        raise DataError(f"source={source} is neither a file nor a directory. Give one of them, or source=builtin.")
    names = (PurePosixPath(member.name) for member in tar_members(path) if member.isfile())
    first = next((name for name in names if not any(is_hidden(part) for part in name.parts)), None)
    if first is None:
        raise DataError(f"source={source} is a tar without files. Fetch it again.")
    return "ilsvrc2012" if first.suffix == ".tar" or first.name.startswith(VAL_PREFIX) else "tar"


def open_source(
    source: str,
    *,
    kind: Kind | None,
    split: str | None,
    classes: tuple[str, ...] | None,
    devkit: Path | None,
    builtin: BuiltinPictures,
    layout: str | None = None,
    labels: Path | None = None,
    out: Path | None = None,
) -> PictureSource:
    """List the pictures of `source`.

    Args:
        source: A path, or `builtin`.
        kind: What it is; None: recognise it.
        split: The split wanted; None: all.
        classes: Names in index order; None: the source's own, sorted.
        devkit: Archive or directory of ILSVRC2012's devkit.
        builtin: The set to make if the source is the generator.
        layout: What the outermost folders are, `classes` or `splits`; None: recognise it.
        labels: File that says the classes of pictures in no class folder; None: looked for beside them.
        out: Where shards are going to be written; it is no part of the source.

    Raises:
        DataError: the source is not what it must be.
        ConfigError: `layout` or `labels` mean nothing for this kind.
    """
    recognised = recognise(source)
    kind = kind or recognised
    if (kind == "builtin") != (recognised == "builtin"):
        raise DataError(f"kind={kind} and source={source} exclude each other: leave out kind=.")
    for key, value in (("layout", layout), ("labels", labels)):
        if value is not None and kind not in ("folders", "tar"):
            raise ConfigError(
                f"{key}={value} is for folders and tars of them, and this source is {kind}: leave it out."
            )
    if kind == "builtin":
        return open_builtin(builtin, split, classes)
    path = Path(source)
    try:
        if kind == "ilsvrc2012":
            return open_ilsvrc2012(path, split, classes, devkit)
        asked = Asked(f"source={path}", split, classes, layout, *_labels(labels, devkit))
        return open_folders(path, asked, out) if kind == "folders" else open_tar(path, asked)
    except OSError as error:
        raise DataError(f"source={source} cannot be read as kind={kind}: {error}. Check its permissions.") from error


def _labels(labels: Path | None, devkit: Path | None) -> tuple[dict[str, str], str]:
    """(class by file name without suffix, where that stands), as far as the user says it."""
    if labels is not None:
        return read_labels(labels), f"labels={labels}"
    return (labels_of_val(devkit), f"devkit={devkit}") if devkit else ({}, "no file")


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names in index order from a text file, one per line; empty lines at the end do not count.

    Raises:
        DataError: the file is missing or empty, or names a class twice.
    """
    try:
        names = tuple(
            line.strip() for line in read_regular(path, MAX_CLASSES_BYTES).decode("utf-8-sig").strip().splitlines()
        )
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"classes={path} cannot be read: {error}. Give a text file with one name per line.") from error
    if not names or "" in names:
        raise DataError(f"classes={path} is empty or has an empty line between names. Give one name per line.")
    if len(set(names)) < len(names):
        ((twice, _),) = Counter(names).most_common(1)
        raise DataError(f"classes={path} names {twice!r} twice. An index must mean one class.")
    return names
