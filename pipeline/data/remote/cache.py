"""A bounded directory of fetched objects on a local disk, shared by every process of a server: ranks, workers, jobs.

    <directory>/<key>          an object, whole and proven; its time of change is its last use
    <directory>/<key>.part     one that is being fetched, locked by who fetches it
    <directory>/lock           held while room is made, counted, or an object gets its name

Whatever else lies in the directory is not counted, not removed and not opened (cachefiles.py).

Every lock is a `flock`, which the kernel lets go of when its process dies, however it dies: an unlocked `.part` is
nobody's, and nothing else needs mending after a SIGKILL. Objects are never changed once they are there. While one is
read it is locked for reading, and what is locked is not evicted.
"""

import errno
import json
import math
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.config.data import DataConfig
from pipeline.core.errors import DataError
from pipeline.core.files import fsync_directory, try_lock
from pipeline.data.remote.cache_files import PART, evict, is_at, is_there, open_own, open_part, own_files, sweep
from pipeline.data.remote.transfer import FetchBudget

FAILED = b"squeezewire could not fetch this: "
LOCK_NAME = "lock"
POLL_SECONDS = 0.02
READ_LOCK_SECONDS = 1.0
GRACE_SECONDS = 30.0
RELEASED_SECONDS = 1e8  # three years: longer ago than anything was used
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

Produce = Callable[[BinaryIO, Path], object]
"""Writes an object into the file that it is given (which lies at that path) and proves it, or raises."""


@dataclass(frozen=True)
class CacheEntry:
    """An object that the cache has or could have."""

    key: str
    """Names the content: hexadecimal."""
    name: str
    """Name of the object, for messages."""
    num_bytes: int | None = None
    """Size in bytes, if it is known beforehand."""


class Busy(Exception):
    """Another process fetches this object, or there is no room now."""


@dataclass(frozen=True)
class CacheSettings:
    """Where, how much, and how long a server may take."""

    directory: Path
    num_bytes: int
    budget: FetchBudget

    @classmethod
    def of(cls, data: DataConfig) -> "CacheSettings":
        """As configured: squeezewire in data.cache_dir, else in the user's cache directory.

        A directory of its own, because the one that is given may hold other things.
        """
        base = data.cache_dir or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        directory = Path(base).expanduser() / "squeezewire"
        return cls(directory, data.cache_bytes, FetchBudget(data.fetch_timeout_seconds))


class Cache:
    """See the module. Pickles; holds no open file between calls.

    Args:
        origin: where the objects come from; with the settings it tells who shares a failure to fetch one.

    Raises (all methods):
        DataError: the directory cannot be used, is full, or holds less than one object.
    """

    def __init__(self, settings: CacheSettings, origin: str) -> None:
        self.directory = settings.directory.absolute()
        self._identity = [origin, settings.num_bytes, settings.budget.seconds]
        self.num_bytes = settings.num_bytes
        self.budget = settings.budget

    def prepare(self) -> None:
        """Make the directory, prove that it is ours and can be written, and sweep what dead processes left."""
        with self._disk_errors():
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            status = self.directory.stat()
            if status.st_uid != os.geteuid():
                raise DataError(
                    f"The cache {self.directory} belongs to user {status.st_uid}, who could put other pictures there:"
                    " give a data.cache_dir of your own."
                )
            if status.st_mode & WRITABLE_BY_OTHERS:
                raise DataError(
                    f"Others may write to the cache {self.directory}, and could put other pictures there: chmod go-w"
                    f" {self.directory}, or give another data.cache_dir."
                )
            with self._locked():
                for file in own_files(self.directory):
                    if file.is_part:
                        sweep(file.path)

    @contextmanager
    def open(self, entry: CacheEntry, produce: Produce, *, max_age_seconds: float | None = None) -> Iterator[int]:
        """A descriptor of the object, to read from by offset; fetched before if it is not there.

        Args:
            entry: The object.
            produce: Fetches it.
            max_age_seconds: An older object is fetched anew.

        Raises:
            DataError: it could not be fetched. Processes that wait for the same object get the same error.
        """
        with self._disk_errors():
            descriptor = self._find(entry, max_age_seconds)
            while descriptor is None:
                with suppress(Busy):
                    descriptor = self._fetch(entry, produce, max_age_seconds, wait=True)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def look(self, entry: CacheEntry) -> Iterator[int | None]:
        """As `open`, without fetching: None if the object is not here. It counts as used."""
        with self._disk_errors():
            descriptor = self._find(entry, None)
        try:
            yield descriptor
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def fetch_ahead(self, entry: CacheEntry, produce: Produce) -> bool:
        """Fetch an object that is needed later. False if that must wait: another process is at it, or there is no room.

        One that is there counts as used now.
        """
        with self._disk_errors():
            descriptor = self._find(entry, None)
            try:
                descriptor = self._fetch(entry, produce, None, wait=False) if descriptor is None else descriptor
            except Busy:
                return False
            if descriptor is not None:
                os.close(descriptor)
            return descriptor is not None

    def release(self, entry: CacheEntry) -> None:
        """Let an object go first: it is not needed soon. Being read again, it counts as used again."""
        with suppress(OSError):
            released = time.time() - RELEASED_SECONDS
            os.utime(self.path(entry), (released, released), follow_symlinks=False)

    def remove(self, entry: CacheEntry) -> None:
        """Forget an object."""
        with self._disk_errors():
            self.path(entry).unlink(missing_ok=True)

    def has(self, entry: CacheEntry) -> bool:
        """Whether the object is here."""
        return is_there(self.path(entry))

    def used_bytes(self) -> int:
        """Size in bytes of all objects at one moment, those under way included."""
        with self._disk_errors(), self._locked():
            return sum(file.num_bytes for file in own_files(self.directory))

    # --- finding ---

    def path(self, entry: CacheEntry) -> Path:
        """Where the object lies, if it is here."""
        return self.directory / entry.key

    def _find(self, entry: CacheEntry, max_age_seconds: float | None) -> int | None:
        """A descriptor of the object, locked for reading and marked as used, or None."""
        path = self.path(entry)
        descriptor = open_own(path, os.O_RDONLY)
        if descriptor is None:
            return None
        status = os.fstat(descriptor)
        age = time.time() - status.st_mtime
        is_old = max_age_seconds is not None and not 0 <= age <= max_age_seconds
        if is_old or entry.num_bytes not in (None, status.st_size):
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return None
        # An evictor holds the lock for an instant; what it unlinks stays readable through the descriptor.
        try_lock(descriptor, shared=True, seconds=READ_LOCK_SECONDS)
        if max_age_seconds is None:
            with suppress(OSError):
                os.utime(descriptor)
        return descriptor

    # --- fetching ---

    def _fetch(self, entry: CacheEntry, produce: Produce, max_age_seconds: float | None, *, wait: bool) -> int | None:
        """Fetch the object under its lock; None if meanwhile something changed and it is to be looked for again.

        Raises:
            Busy: another process fetches it, and `wait` is False.
        """
        path = self.path(entry)
        part = path.with_name(f"{entry.key}{PART}")
        descriptor = open_part(part)
        if descriptor is None:
            raise DataError(f"{part} has the name of an object under way, and is no file of yours: remove it.")
        keep = False
        try:
            self._lock_part(descriptor, entry, wait=wait)
            if not is_at(descriptor, part):  # renamed: it is there now. Removed: it failed, or was swept.
                self._raise_failure(descriptor)
                return self._find(entry, max_age_seconds)
            found = self._find(entry, max_age_seconds)  # finished between our looking and our locking
            if found is not None:
                os.ftruncate(descriptor, 0)
                part.unlink()
                return found
            self._produce(entry, descriptor, part, produce, wait=wait)
            with self._locked():  # whoever makes room meanwhile would see it under neither of its names
                part.replace(path)
            keep = True
            fsync_directory(self.directory)
            try_lock(descriptor, shared=True, seconds=math.inf)  # others may read it now
            return descriptor
        finally:
            if not keep:
                os.close(descriptor)

    def _produce(self, entry: CacheEntry, descriptor: int, part: Path, produce: Produce, *, wait: bool) -> None:
        """Fill the locked `.part`. On failure it is removed, and holds the reason for those who wait for its lock."""
        try:
            os.ftruncate(descriptor, 0)
            self._reserve(entry, descriptor, wait=wait)
            with os.fdopen(os.dup(descriptor), "r+b", buffering=0) as file:
                produce(file, part)
            if entry.num_bytes is None:
                with self._locked():
                    self._make_room(0, entry)
            os.fsync(descriptor)
            os.fchmod(descriptor, 0o400)
        except BaseException as error:
            part.unlink(missing_ok=True)
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
                if isinstance(error, DataError):
                    os.pwrite(descriptor, FAILED + json.dumps([self._identity, str(error)]).encode(), 0)
            raise

    def _lock_part(self, descriptor: int, entry: CacheEntry, *, wait: bool) -> None:
        """Lock the `.part`, as long as its owner shows life by writing to it."""
        longest = 2 * self.budget.seconds + GRACE_SECONDS if wait else 0.0
        while not try_lock(descriptor, seconds=longest, while_changing=True):
            if not wait:
                raise Busy
            raise DataError(
                f"Another process has been fetching {entry.name} into {self.directory} for"
                f" {longest:g} s without a byte: end it, or give another data.cache_dir."
            )

    def _raise_failure(self, descriptor: int) -> None:
        """Raise what a process of this very job, for which this one waited, left as its reason."""
        status = os.fstat(descriptor)
        if status.st_nlink or not status.st_mode & stat.S_IWUSR:  # it is there; or was, and is evicted already
            return
        content = os.pread(descriptor, 2**16, 0)
        if content.startswith(FAILED):  # a sweep leaves nothing, and a killed process whatever it had
            identity, reason = json.loads(content.removeprefix(FAILED))
            if identity == self._identity:
                raise DataError(reason)

    # --- room ---

    def _reserve(self, entry: CacheEntry, descriptor: int, *, wait: bool) -> None:
        """Make room and take it, so that nobody else does and a full disk is known before the transfer."""
        num_bytes = entry.num_bytes or 0
        if num_bytes > self.num_bytes:
            raise DataError(
                f"data.cache_bytes={self.num_bytes} holds not even {entry.name}, which has {num_bytes} bytes: raise it."
            )
        deadline = time.monotonic() + self.budget.seconds
        while True:
            with self._locked():
                has_room = self._make_room(num_bytes, entry)
                is_taken = has_room and self._allocate(descriptor, num_bytes)
            if is_taken:
                return
            if not wait:
                raise Busy
            if time.monotonic() > deadline:
                raise DataError(
                    f"The cache {self.directory} has no room for {entry.name} ({num_bytes} bytes): all of its"
                    f" {self.used_bytes()} bytes are in use, of data.cache_bytes={self.num_bytes}. Raise it, or give"
                    " each job a data.cache_dir of its own."
                )
            time.sleep(POLL_SECONDS)

    def _make_room(self, num_bytes: int, entry: CacheEntry) -> bool:
        """Evict what was not used for longest until `num_bytes` more are within the bound. Not what is in use."""
        files = own_files(self.directory)
        excess = sum(file.num_bytes for file in files) + num_bytes - self.num_bytes
        for file in files:
            if excess <= 0:
                break
            if file.path.name != entry.key and not file.is_part and evict(file.path):
                excess -= file.num_bytes
        return excess <= 0

    def _allocate(self, descriptor: int, num_bytes: int) -> bool:
        """Take the bytes from the disk; if it is full, evict and try again. False if nothing can be evicted now."""
        while num_bytes:
            try:
                os.posix_fallocate(descriptor, 0, num_bytes)
                return True
            except OSError as error:
                if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
                    os.ftruncate(descriptor, num_bytes)
                    return True
                if error.errno not in FULL:
                    raise
                if not any(evict(file.path) for file in own_files(self.directory) if not file.is_part):
                    raise
        return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone with the directory, for an instant."""
        descriptor = os.open(self.directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if not try_lock(descriptor, seconds=GRACE_SECONDS):
                raise DataError(
                    f"Another process holds {self.directory / LOCK_NAME} for {GRACE_SECONDS:g} s: end it, or give"
                    " another data.cache_dir."
                )
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """One sentence about the directory instead of an OSError."""
        try:
            yield
        except OSError as error:
            if error.errno in FULL:
                raise DataError(
                    f"The disk of the cache {self.directory} is full ({error.strerror}), and everything in the cache"
                    " is in use: free space there, or give a data.cache_dir on a larger disk."
                ) from None
            raise DataError(
                f"The cache {self.directory} cannot be used ({error.strerror or error}): give as data.cache_dir a"
                " directory on a local disk that you may write to."
            ) from None
