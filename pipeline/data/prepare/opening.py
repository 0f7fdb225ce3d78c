"""From a word on the command line to a source of pictures."""

from pathlib import Path, PurePosixPath

from pipeline.core.errors import DataError
from pipeline.data.prepare.builtin import BuiltinPictures, open_builtin
from pipeline.data.prepare.ilsvrc2012 import VAL_PREFIX, holds_archives, open_ilsvrc2012
from pipeline.data.prepare.sources import Kind, PictureSource, open_folders, open_tar, tar_members

BUILTIN = "builtin"


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
    first = next((PurePosixPath(member.name) for member in tar_members(path)), None)
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
) -> PictureSource:
    """List the pictures of `source`.

    Args:
        source: A path, or `builtin`.
        kind: What it is; None: recognise it.
        split: The split wanted; None: all.
        classes: Names in index order; None: the source's own, sorted.
        devkit: Archive or directory of ILSVRC2012's devkit.
        builtin: The set to make if the source is the generator.

    Raises:
        DataError: the source is not what it must be.
    """
    recognised = recognise(source)
    kind = kind or recognised
    if (kind == "builtin") != (recognised == "builtin"):
        raise DataError(f"kind={kind} and source={source} exclude each other: leave out kind=.")
    if kind == "builtin":
        return open_builtin(builtin, split, classes)
    path = Path(source)
    try:
        if kind == "ilsvrc2012":
            return open_ilsvrc2012(path, split, classes, devkit)
        return open_folders(path, split, classes) if kind == "folders" else open_tar(path, split, classes)
    except OSError as error:
        raise DataError(f"source={source} cannot be read as kind={kind}: {error}. Check its permissions.") from error


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names in index order from a text file, one per line; empty lines at the end do not count.

    Raises:
        DataError: the file is missing or empty, or names a class twice.
    """
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").strip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"classes={path} cannot be read: {error}. Give a text file with one name per line.") from error
    if not names or "" in names:
        raise DataError(f"classes={path} is empty or has an empty line between names. Give one name per line.")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"classes={path} names {twice!r} twice. An index must mean one class.")
    return names
