"""Everything that lies below a folder or in a tar, by name: what cannot be used is listed too, with the reason.

Nothing is judged here but single things. What they are together is layout.py's.
"""

import os
import posixpath
import stat
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from errno import ELOOP, ENOENT
from operator import attrgetter
from pathlib import Path, PurePosixPath
from tarfile import ReadError
from typing import NamedTuple, Self

from typing_extensions import override

from pipeline.core.errors import DataError
from pipeline.data.shards.manifest import MANIFEST_NAME, STATE_DIRECTORY

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
NO_PICTURES = frozenset(
    (
        *(".txt", ".xml", ".json", ".jsonl", ".csv", ".tsv", ".md", ".rst", ".html", ".pdf", ".log", ".lst", ".mat"),
        *(".tar", ".gz", ".tgz", ".zip", ".xz", ".bz2", ".zst", ".py", ".ipynb", ".sh", ".yaml", ".yml", ".toml"),
        *(".pkl", ".parquet", ".pth", ".pt", ".npz", ".h5", ".db", ".mdb", ".sha256", ".md5"),
    )
)
"""Kinds of files that lie beside pictures. A folder of other files that are not read may be meant as a class."""
SOURCES_NAME = ".sources.json"
"""Beside shards: {split: digest of its source's path}. Not in the manifest, which is the same wherever the same
pictures lay, and by which copies are compared. Where it is missing nothing is compared."""
HIDDEN = "hidden, or left by a system"
SHARDS = "shards, which are no source"
LINK_UP = "a link to a folder above it"
LINK_TO_NOTHING = "is a link to nothing"
LINK_OUT = "a link out of the archive"
NAME_OUT = "a name that leads out of the archive"
MAX_LINKS = 40
"""Links followed one after another, as in Linux; and ways in which links may lead to one folder."""
MAX_HEADERS = 16
"""Before one member: long names, and records of pax. Two or three are usual, and tarfile calls itself for each."""
MAX_EXTENDED_BYTES = 2**22
"""Of one such header: macOS keeps what it attaches to a file in them."""
EXTENDED_KINDS = frozenset((b"x", b"g", b"X", b"L", b"K"))
"""Headers whose content tarfile reads whole."""
_NAMES_OF_SYSTEMS = frozenset(
    (
        *("lost+found", "system volume information", "$recycle.bin", "#recycle", "@recycle", "#snapshot"),
        *("@recently-snapshot", "@eadir", "__macosx", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini"),
    )
)


class Listed(NamedTuple):
    """One thing: a file, a folder without anything in it, or what is left out with all that may lie in it."""

    name: str
    """Below the root, with `/` between folders."""
    path: str = ""
    """File that holds the bytes."""
    offset: int = 0
    """First byte within `path`."""
    num_bytes: int = 0
    mtime_ns: int = 0
    """When `path` was last changed."""
    identity: tuple[int, int] | None = None
    """Equal for two names of the same bytes: device and inode, or a place in the tar."""
    is_folder: bool = False
    """A folder, or what may be meant as one; of no interest if something else lies in it."""
    is_empty: bool = True
    """Of a folder: whether nothing lies in it."""
    problem: str = ""
    """Why its bytes cannot be read, as a clause."""
    left_out: str = ""
    """Why it is no part of the source, whatever it is."""

    @property
    def is_picture(self) -> bool:
        """Whether it is called like a picture."""
        return not self.is_folder and not self.left_out and is_image_name(self.name)


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for a picture."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def suffix(name: str) -> str:
    """What tells the kind of a file, in small letters."""
    return PurePosixPath(name).suffix.lower()


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is nobody's data: hidden, or what systems and file servers leave."""
    return name.startswith(".") or name.casefold() in _NAMES_OF_SYSTEMS


def list_folder(root: Path, out: Path | None = None) -> list[Listed]:
    """All that lies below `root`, links followed.

    Args:
        root: The directory.
        out: Where shards are going to be written: left out if it lies within and holds nothing.

    Raises:
        DataError: A folder cannot be listed, or links lead to one in very many ways.
    """
    found: list[Listed] = []
    visits: Counter[tuple[int, int]] = Counter()
    identity_of_out = _identity(os.stat(out)) if out and out.exists() else None  # noqa: PTH116
    # Links to what lies above the root lead to all of it once more.
    start = tuple(_identity(folder.stat()) for folder in (*reversed(root.resolve().parents), root))
    folders = [(str(root), "", start)]
    while folders:
        directory, prefix, above = folders.pop()
        children = _children(root, directory)
        visits[above[-1]] += 1
        if visits[above[-1]] > MAX_LINKS:
            raise DataError(f"source={root}: links lead to {directory} in more than {MAX_LINKS} ways: remove some.")
        names = {child.name for child in children}
        is_bare = all(is_hidden(name) for name in names)
        if prefix and (_holds_shards(children, names) or (is_bare and above[-1] == identity_of_out)):
            found.append(Listed(prefix.rstrip("/"), left_out=SHARDS))
            continue
        if not children and not prefix:
            raise DataError(f"The folder {root} is empty. Put images there, or give another source=.")
        if not children:
            found.append(Listed(prefix.rstrip("/"), is_folder=True))
        for child in children:
            listed, identity = _of_entry(root, child, prefix)
            if identity is None or listed.left_out:
                found.append(listed)
            elif identity in above:
                found.append(listed._replace(left_out=LINK_UP))
            else:
                folders.append((child.path, f"{listed.name}/", (*above, identity)))
    return sorted(found, key=attrgetter("name"))


def _children(root: Path, directory: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except OSError as error:
        raise _unreadable(root, directory, error) from error


def _unreadable(root: Path, path: str, error: OSError) -> DataError:
    return DataError(
        f"source={root}: {path} cannot be looked into ({error.strerror or error}), and what lies there would be missing"
        " without a word. Make it readable (chmod, chown), or move it out of the source."
    )


def _of_entry(root: Path, child: os.DirEntry[str], prefix: str) -> tuple[Listed, tuple[int, int] | None]:
    """(what it is, the identity of a folder that is to be looked into)."""
    listed = Listed(f"{prefix}{child.name}", child.path)
    if is_hidden(child.name):
        return listed._replace(left_out=HIDDEN), None
    try:
        status = child.stat()
    except OSError as error:
        if error.errno not in (ENOENT, ELOOP):
            raise _unreadable(root, child.path, error) from error
        return listed._replace(problem=LINK_TO_NOTHING, is_folder=_may_be_folder(child.name)), None
    if stat.S_ISDIR(status.st_mode):
        return listed, _identity(status)
    if not stat.S_ISREG(status.st_mode):
        return listed._replace(problem="is a FIFO, a socket or a device"), None
    return listed._replace(num_bytes=status.st_size, mtime_ns=status.st_mtime_ns, identity=_identity(status)), None


def _may_be_folder(name: str) -> bool:
    """Whether a link to nothing may have been meant as a folder of pictures, by its name."""
    return suffix(name) not in NO_PICTURES and not is_image_name(name)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _holds_shards(children: list[os.DirEntry[str]], names: set[str]) -> bool:
    """Whether `prepare` has written, or begun to write, into a folder, and nothing else lies there."""
    has_marks = STATE_DIRECTORY in names or SOURCES_NAME in names
    has_marks |= MANIFEST_NAME in names and any(name.endswith(".tar") for name in names)
    return has_marks and not any(
        is_image_name(child.name) or child.is_dir() for child in children if not is_hidden(child.name)
    )


class _Header(tarfile.TarInfo):
    """A header that is refused where tarfile would believe it and read gigabytes, or go round in circles."""

    @classmethod
    @override
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        """Read the next header; extended ones make tarfile call this again before they return."""
        assert isinstance(tarfile, GuardedTar)
        tarfile.num_headers += 1
        if tarfile.num_headers > MAX_HEADERS:
            raise ReadError(f"more than {MAX_HEADERS} headers before one member at byte {tarfile.offset}")
        return super().fromtarfile(tarfile)

    @classmethod
    @override
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Parse a header."""
        header = super().frombuf(buf, encoding, errors)
        is_extended = header.type in EXTENDED_KINDS
        if not 0 <= header.size <= (MAX_EXTENDED_BYTES if is_extended else sys.maxsize):
            raise ReadError(f"{'an extended header' if is_extended else 'a member'} of {header.size} bytes")
        return header


class GuardedTar(tarfile.TarFile):
    """A tar that gets on with each member, in bounded memory."""

    tarinfo = _Header
    num_headers = 0

    @override
    def next(self) -> tarfile.TarInfo | None:
        """Return the next member; a size that leads back raises tarfile.ReadError."""
        self.num_headers = 0
        member = super().next()
        if member is not None and (member.size < 0 or self.offset <= member.offset):
            raise ReadError(f"the member at byte {member.offset} ends before it begins")
        return member


def tar_members(path: Path, *, start: int = 0, stop: int | None = None) -> Iterator[tarfile.TarInfo]:
    """Members of an uncompressed tar that begins at byte `start` of `path` and ends before byte `stop`.

    `offset_data` of a member counts from the beginning of the file.

    Raises:
        DataError: it is compressed, damaged or cut short. (tarfile itself takes a damaged header for the end.)
    """
    remedy = "Fetch it again; if it is compressed, unpack it once (gunzip) and give the .tar."
    with path.open("rb") as file:
        file.seek(start)
        try:
            with GuardedTar.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None and (stop is None or member.offset < stop):
                    yield member
                end = tar.offset if member is None else member.offset
        except (tarfile.TarError, ArithmeticError, LookupError, ValueError) as error:  # of damaged numbers, too
            raise DataError(f"{path} is not a whole, uncompressed tar: {error}. {remedy}") from error
        file.seek(end)
        if (stop is None or end < stop) and any(file.read(tarfile.BLOCKSIZE)):
            raise DataError(f"{path} is damaged at byte {end}: there is no tar header. {remedy}")


def list_tar(path: Path) -> tuple[list[Listed], list[str]]:
    """(all that unpacking `path` would give, names of members that a later one of the same name replaces).

    Hard links are what they name when they come, symbolic links what they lead to in the end, folders included.

    Raises:
        DataError: as `tar_members`.
    """
    mtime_ns = path.stat().st_mtime_ns
    found: dict[str, Listed] = {}
    left_out: dict[str, Listed] = {}
    links: dict[str, str] = {}
    replaced = []
    for member in tar_members(path):
        name = _name_of(member.name)
        listed = _of_member(member, name, str(path), mtime_ns)
        if listed.left_out:
            left_out[listed.name] = listed
            continue
        if name in found and not (found[name].is_folder and member.isdir()):
            replaced.append(name)
        links.pop(name, None)
        found[name] = listed
        if member.islnk():
            target = found.get(_name_of(member.linkname))
            found[name] = target._replace(name=name) if target else listed._replace(problem=LINK_TO_NOTHING)
        elif member.issym():
            links[name] = member.linkname
    filled = {str(parent) for name in (*found, *left_out) for parent in PurePosixPath(name).parents}
    everything = (*_with_links(found, links, filled), *left_out.values())
    marked = (listed._replace(is_empty=False) if listed.name in filled else listed for listed in everything)
    return sorted(marked, key=attrgetter("name")), replaced


def _name_of(said: str) -> str:
    """Where a member lands when it is unpacked: absolute names lose their first slash."""
    return posixpath.normpath(said).lstrip("/") or "."


def _of_member(member: tarfile.TarInfo, name: str, path: str, mtime_ns: int) -> Listed:
    if name.startswith("../") or name == "..":
        return Listed(name, left_out=NAME_OUT)
    parts = name.split("/")
    for number, part in enumerate(parts, 1):
        if is_hidden(part) and name != ".":
            return Listed("/".join(parts[:number]), left_out=HIDDEN)
    if member.isdir():
        return Listed("" if name == "." else name, is_folder=True)
    listed = Listed(name, path, member.offset_data, member.size, mtime_ns, (0, member.offset_data))
    if member.issparse() or any(key.startswith("GNU.sparse.") for key in member.pax_headers):
        return listed._replace(problem="is a sparse file")
    if not member.isreg() and not member.islnk() and not member.issym():
        return listed._replace(problem="is a FIFO or a device")
    return listed


def _with_links(found: dict[str, Listed], links: dict[str, str], folders: set[str]) -> Iterator[Listed]:
    """Everything, with what symbolic links lead to in their place."""
    num_within = 0
    for name, listed in found.items():
        if name not in links:
            yield listed
            continue
        target = _led_to(name, links)
        if target is not None and f"{name}/".startswith(f"{target}/" if target else ""):
            yield listed._replace(left_out=LINK_UP)
        elif target in found and target not in links and not found[target].is_folder:
            yield found[target]._replace(name=name)
        else:
            inside = f"{target}/" if target in folders else None
            within = [other for other in found if inside and other.startswith(inside) and other not in links]
            num_within += len(within)
            if num_within > MAX_LINKS * len(found):
                raise DataError(f"{listed.path}: links lead to its folders in very many ways: remove some.")
            yield from (found[other]._replace(name=f"{name}/{other.removeprefix(inside or '')}") for other in within)
            if not within and target is None and is_image_name(name):
                yield listed._replace(left_out=LINK_OUT)
            elif not within:
                yield listed._replace(problem=LINK_TO_NOTHING, is_folder=_may_be_folder(name))


def _led_to(name: str, links: dict[str, str]) -> str | None:
    """Where a name in a tar leads through symbolic links; None: out of the archive, or round in circles."""
    done: list[str] = []
    rest = name.split("/")
    num_links = 0
    while rest:
        part = rest.pop(0)
        if part == "..":
            if not done:
                return None
            done.pop()
        elif part not in ("", "."):
            done.append(part)
            if (target := links.get("/".join(done))) is not None:
                num_links += 1
                if num_links > MAX_LINKS or target.startswith("/"):
                    return None
                done.pop()
                rest = [*target.split("/"), *rest]
    return "/".join(done)
