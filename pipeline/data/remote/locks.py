"""Locks on files between processes. The kernel lets go of them when their process dies, however it dies."""

import fcntl
import os
import time
from pathlib import Path

POLL_SECONDS = 0.02


def try_lock(descriptor: int, kind: int, seconds: float = 0.0, *, while_changing: bool = False) -> bool:
    """Whether the lock was got. `while_changing`: as long as the file changes, `seconds` begin anew."""
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
        time.sleep(POLL_SECONDS)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False
