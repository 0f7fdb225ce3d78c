"""The files of a cache (cache.py), told from whatever else may lie in its directory: nothing but these is touched.

A cache's own are regular files of this user with the names that it gives. Nothing is followed or waited for: links,
FIFOs and directories are not its own, whatever their names.
"""

import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pipeline.core.files import try_lock

PART = ".part"
_NAME = re.compile(rf"[0-9a-f]{{64}}(?:{re.escape(PART)})?")
# A FIFO would be waited for without O_NONBLOCK, which means nothing to a regular file.
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class OwnFile(NamedTuple):
    """An object, or one under way."""

    path: Path
    num_bytes: int
    used_ns: int
    """Time of its last use in nanoseconds."""

    @property
    def is_part(self) -> bool:
        """Whether it is under way."""
        return self.path.suffix == PART


def is_own(status: os.stat_result) -> bool:
    """Whether this may be a file of the cache, as far as kind and owner tell."""
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()


def is_there(path: Path) -> bool:
    """Whether `path` is a file of the cache's own."""
    try:
        return is_own(path.lstat())
    except OSError:
        return False


def open_own(path: Path, flags: int) -> int | None:
    """A descriptor of a file of the cache's own; None: there is none. Raises OSError."""
    if not is_there(path):
        return None
    try:
        descriptor = os.open(path, flags | _FLAGS)
    except FileNotFoundError:
        return None
    if is_own(os.fstat(descriptor)):
        return descriptor
    os.close(descriptor)
    return None


def open_part(path: Path) -> int | None:
    """A descriptor of a `.part`, made if it is not there; None: something else has its name. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o600)
    if is_own(os.fstat(descriptor)):
        return descriptor
    os.close(descriptor)
    return None


def is_at(descriptor: int, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def own_files(directory: Path) -> list[OwnFile]:
    """Every object in a directory, those under way included, the one unused for longest first."""
    found = []
    with os.scandir(directory) as listing:
        for item in listing:
            if not _NAME.fullmatch(item.name):
                continue
            with suppress(FileNotFoundError):
                status = item.stat(follow_symlinks=False)
                if is_own(status):
                    found.append(OwnFile(Path(item.path), status.st_size, status.st_mtime_ns))
    return sorted(found, key=lambda file: file.used_ns)


def evict(path: Path) -> bool:
    """Remove an object unless somebody reads it; whether it is gone."""
    descriptor = open_own(path, os.O_RDONLY)
    if descriptor is None:
        return True
    try:
        is_free = try_lock(descriptor)
        if is_free:
            path.unlink(missing_ok=True)
        return is_free
    finally:
        os.close(descriptor)


def sweep(part: Path) -> None:
    """Remove a `.part` that nobody fetches any more."""
    with suppress(FileNotFoundError):
        descriptor = open_own(part, os.O_RDWR)
        if descriptor is None:
            return
        try:
            if try_lock(descriptor) and is_at(descriptor, part):
                os.ftruncate(descriptor, 0)
                part.unlink()
        finally:
            os.close(descriptor)
