"""Files that are either whole or absent: atomic, durable writes in the directory they belong to; and locks on them."""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import secrets
import stat
import time
import zipfile
from collections.abc import Callable, Generator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.core.units import format_bytes

# The temporary name cannot be guessed, so that nobody lays a link in its place; it ends with the writer's pid, by which
# a sweep tells what is left over from what is being written.
TEMPORARY_MARK = ".tmp."

NO_LOCKS_HERE = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK})
"""What `try_lock` raises, as an OSError's errno, on a file system without locks."""
LOCK_POLL_SECONDS = 0.02
MOST_SWELLING = 16
"""Times its own size that an archive may take unpacked: weights, many of them zero, become a tenth when packed."""
FREE_UNPACKED_BYTES = 2**24
"""Bytes that any archive may take besides."""


def write_atomic(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write `path` through a temporary file beside it: flush, fsync, replace, fsync of the directory.

    The temporary file lies in the same directory, because a rename is only atomic within one file system. `write`
    receives the open binary file. On any failure the temporary file is removed and `path` is untouched.

    Raises:
        Exception: Whatever `write` or the file system raises.
    """
    with temporary_beside(path) as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
        file.close()
        Path(file.name).replace(path)
    fsync_directory(path.parent)


@contextlib.contextmanager
def temporary_beside(path: Path) -> Generator[BinaryIO]:
    """Make a file in the directory of `path`, to be renamed to it; what still has its temporary name at the end goes.

    It is made anew: nothing that lies there is opened, no link followed.

    Args:
        path: What it shall become.

    Yields:
        The open file.
    """
    temporary = path.with_name(f"{path.name}{TEMPORARY_MARK}{secrets.token_hex(8)}.{os.getpid()}")
    with temporary.open("xb") as file:
        try:
            yield file
        finally:
            temporary.unlink(missing_ok=True)


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Write content that is in memory already, as `write_atomic` does."""
    write_atomic(path, lambda file: file.write(content))


def write_text_atomic(path: Path, text: str) -> None:
    """Write UTF-8 text, as `write_atomic` does."""
    write_bytes_atomic(path, text.encode())


def write_json_atomic(path: Path, value: Any) -> None:
    """Write indented JSON, as `write_atomic` does. NaN and infinity are refused: they are not JSON."""
    write_text_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def open_regular(path: Path, *, most_bytes: float = math.inf) -> BufferedReader:
    """Open a file for reading that somebody else may have laid there.

    A FIFO would be waited for, and a device read without end.

    Args:
        path: The file; links are followed.
        most_bytes: Its largest size, where it will be read as a whole.

    Raises:
        OSError: It is no regular file, or larger, or cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    wrong = "Not a regular file" if not stat.S_ISREG(status.st_mode) else ""
    if not wrong and status.st_size > most_bytes:
        wrong = f"{status.st_size:,} bytes, where at most {most_bytes:,} are read"
    if wrong:
        os.close(descriptor)
        raise OSError(errno.EINVAL, wrong, str(path))
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, most_bytes: int) -> bytes:
    """Read a file whole, as `open_regular` opens it."""
    with open_regular(path, most_bytes=most_bytes) as file:
        return file.read()


def fsync_directory(directory: Path) -> None:
    """Make the names in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sweep_temporaries(directory: Path, *, is_guarded: bool = False) -> list[Path]:
    """Remove temporary files that no process will finish, and return what was removed.

    Only the pid can tell a leftover from a file that another process is writing: those go whose process is not alive on
    this host. Not for files of a size that matters, nor for a directory that two hosts write to.

    Args:
        directory: Where they lie.
        is_guarded: Whether this process holds a lock without which no other writes there, and is not writing: then all
            are stale, its own pid's too. The pid would tell less: in containers every writer has the same small one,
            which always is alive, and one of another host says nothing here.
    """
    removed: list[Path] = []
    for path in directory.glob(f"*{TEMPORARY_MARK}*"):
        owner = path.name.rpartition(TEMPORARY_MARK)[2].rpartition(".")[2]
        if owner.isdigit() and (is_guarded or not Path(f"/proc/{owner}").exists()):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def try_lock(descriptor: int, *, shared: bool = False, seconds: float = 0.0, while_changing: bool = False) -> bool:
    """Lock an open file against other processes; the kernel unlocks it when it is closed, however its process dies.

    Args:
        descriptor: The open file. A lock that it holds already is changed to the one asked for.
        shared: Whether others may hold a shared lock beside this one.
        seconds: How long to wait for the lock; infinity waits in the kernel.
        while_changing: Whether `seconds` begin anew each time the file changes: its owner shows life by writing.

    Returns:
        Whether the lock was got; False if another process has held it all the time.

    Raises:
        OSError: The lock cannot be asked for; one of NO_LOCKS_HERE where the file system has none.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    if seconds == math.inf:
        fcntl.flock(descriptor, kind)
        return True
    changed, since = -1, time.monotonic()
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            pass
        if while_changing and (now := os.fstat(descriptor).st_mtime_ns) != changed:
            changed, since = now, time.monotonic()
        if time.monotonic() - since >= seconds:
            return False
        time.sleep(LOCK_POLL_SECONDS)


def would_unpack(file: BinaryIO) -> str:
    """Say in a clause that a zip archive would take far more memory than its own size; empty if it would not.

    Args:
        file: The archive, which is left at its start.

    Raises:
        OSError, ValueError, zipfile.BadZipFile: It cannot be read, or is none.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        unpacked_bytes = sum(part.file_size for part in archive.infolist())
    file.seek(0)
    if unpacked_bytes <= MOST_SWELLING * num_bytes + FREE_UNPACKED_BYTES:
        return ""
    return f"would take {format_bytes(unpacked_bytes)} of memory, from {format_bytes(num_bytes)}"


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins as one in the format safetensors does: the length of its header, then JSON.

    Raises:
        OSError: It cannot be read.
    """
    with open_regular(path) as file:
        return _begins_as_safetensors(file.read(9), file.seek(0, os.SEEK_END))


def _begins_as_safetensors(head: bytes, num_bytes: int) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= num_bytes - 8


def what_it_is(path: Path) -> str:
    """Say in a clause what a file is that holds no weights; empty if nothing is known against it.

    Raises:
        OSError: It cannot be read.
    """
    with open_regular(path) as file:
        head = file.read(512)
        num_bytes = file.seek(0, os.SEEK_END)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if num_bytes == 0:
        return "is empty: copy it again"
    if text.startswith(b"version https://git-lfs"):
        return "is a pointer of git-LFS, not the file itself: run `git lfs pull` in its repository"
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "is a web page, not the file itself: fetch it from its direct address, logged in where that is needed"
    if text.startswith((b"{", b"[")) and head.isascii() and not _begins_as_safetensors(head, num_bytes):
        return "is JSON, not weights: give the file that holds the weights themselves"
    if head.startswith(b"PK\x03\x04"):
        if not zipfile.is_zipfile(path):
            return "is cut short: its end is missing, so copy it again"
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return (
                    "is a TorchScript archive: give the state dict of its model, saved by"
                    " torch.save(model.state_dict(), ...)"
                )
    return ""
