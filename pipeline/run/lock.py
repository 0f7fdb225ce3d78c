"""One owner of a run directory at a time, and proof before a dead one's place is taken.

The kernel's lock decides wherever owner and newcomer share it: one machine, or a network file system that passes locks
on. It vanishes with its owner, however that ends. Where it is not passed on (or there are none), the newcomer gets one
though the owner lives; so the owner also writes a beat into the file, and the record of another host is only replaced

- when it says that its owner ended by itself, or
- when it is of an earlier start of the same Slurm job, which Slurm never runs twice at a time, or
- after no beat came for SILENCE_SECONDS, counted here: clocks of two hosts are never compared.

An owner may only have been suspended (its host, or a network file system under it), and wake when its place is taken.
So each beat and each save first looks whose name stands there, and an owner whose successor it finds ends. Every
successor's `term` is higher than the one before: a beat that was on its way for long, and arrives over the name of the
successor, ends nobody.
"""

import contextlib
import json
import math
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn, NotRequired, TypedDict, cast

from pipeline.core.errors import CheckpointError, ConfigError, ExitCode, Preempted
from pipeline.core.files import NO_LOCKS_HERE, try_lock

# A killed owner may need a moment to disappear; the kernel drops its lock when it has.
DEAD_OWNER_SECONDS = 20.0
# The server keeps the lock of a lost host until that host's lease ends: 90 s with NFSv4, about 100 s with Lustre. Twice
# the shorter, for a rank 0 that lived on for a while and renewed it.
EARLIER_START_SECONDS = 180.0
BEAT_SECONDS = 5.0
SILENCE_SECONDS = 4 * BEAT_SECONDS
# Where nothing locks, two that start at the same moment both write; the last one stays.
RACE_SECONDS = 2.0
POLL_SECONDS = 0.1


class ProcessJson(TypedDict):
    """A process as the lock file and attempts.jsonl name it."""

    host: str
    pid: int
    job: NotRequired[str]
    """Slurm's number of the job."""
    restart: NotRequired[str]
    """How often Slurm has restarted the job."""


class OwnerJson(TypedDict, total=False):
    """What the lock file says; empty where nothing can be read. Any key may be missing from a damaged file."""

    host: str
    pid: int
    job: str
    restart: str
    term: int
    """Number of this owner among all that the run has had."""
    token: str
    """Random name of the owner's `RunLock`."""
    beat: int
    """How often the owner has written."""
    ended: bool
    """Whether the owner gave the lock back."""


def this_process() -> ProcessJson:
    """Return host, pid and, in a Slurm job, its id and how often it was restarted."""
    process: ProcessJson = {"host": socket.gethostname(), "pid": os.getpid()}
    if job := os.environ.get("SLURM_JOB_ID"):
        process["job"], process["restart"] = job, os.environ.get("SLURM_RESTART_COUNT", "0")
    return process


class RunLock:
    """The lock of a run.

    Args:
        path: The lock file.
        name: Name of the run, for messages.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self._descriptor: int | None = None
        self._token = secrets.token_hex(8)  # host and pid of two owners can be the same: pid 7 of two containers
        self._term = 0
        self._beats = 0
        self._ends = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def is_held(self) -> bool:
        """Whether this process holds the lock."""
        return self._descriptor is not None

    def acquire(self, patience_seconds: float = math.inf) -> None:
        """Become the owner.

        Args:
            patience_seconds: How long to wait, at most, for an earlier start of this Slurm job to release the kernel's
                lock; never longer than EARLIER_START_SECONDS.

        Raises:
            ConfigError: Another process is the owner.
            Preempted: An earlier start of this Slurm job still is.
            OSError: The lock file cannot be written.
        """
        # O_CLOEXEC by default keeps the lock from programs we start; forked workers close it themselves, below.
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            is_locked = self._lock(min(patience_seconds, EARLIER_START_SECONDS))
            self._require_dead(_read(self.path), is_locked=is_locked)
            self._term = int(_read(self.path).get("term", 0)) + 1
            self._write(ended=False)
            if not is_locked:
                time.sleep(RACE_SECONDS)
                found = _read(self.path)
                if found.get("token") != self._token:
                    raise self._refusal(found)
        except BaseException:
            self._drop()
            raise
        # A lock belongs to the open file, which forked data loader workers share: an orphan would keep it for its
        # owner, and a restart would be refused.
        os.register_at_fork(after_in_child=self._drop)
        self._ends.clear()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Release the lock and record that in the file, unless another process owns it by now.

        Does nothing where the lock is not held.
        """
        if self._thread is not None:
            self._ends.set()
            self._thread.join()
            self._thread = None
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                if not self._successor():
                    self._write(ended=True)
        self._drop()

    def check_owned(self) -> None:
        """Check before a write that a second owner must not make. Does nothing where the lock is not held.

        Raises:
            CheckpointError: Another process has taken the run over.
        """
        if self.is_held and (successor := self._successor()):
            raise CheckpointError(self._loss(successor))

    def _drop(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _lock(self, patience_seconds: float) -> bool:
        """Get the kernel's lock; False on a file system without locks."""
        try:
            self._wait_for_lock(patience_seconds)
        except OSError as error:
            if error.errno not in NO_LOCKS_HERE:
                raise
            _warn(f"no file locks at {self.path.parent}: the owner's beats alone keep a second job out")
            return False
        return True

    def _wait_for_lock(self, patience_seconds: float) -> None:
        assert self._descriptor is not None
        began = time.monotonic()
        is_said = False
        while not try_lock(self._descriptor):
            owner, waited = _read(self.path), time.monotonic() - began
            if _is_earlier_start(owner, this_process()):
                said = f"run {self.name!r} is still locked by an earlier start of this job ({_name(owner)})"
                if waited >= patience_seconds:
                    raise Preempted(
                        f"{said[0].upper()}{said[1:]} after {patience_seconds:g} s of waiting: nothing is lost,"
                        " and the same command goes on once the lock is free."
                    )
                if not is_said:
                    _warn(f"{said}; waiting up to {patience_seconds:g} s for it")
                    is_said = True
            elif _may_live(owner) or waited >= DEAD_OWNER_SECONDS:
                raise self._refusal(owner)
            time.sleep(POLL_SECONDS)

    def _require_dead(self, owner: OwnerJson, *, is_locked: bool) -> None:
        """Raise `ConfigError` unless the recorded owner is proven to be gone; waits for a beat of one elsewhere."""
        here = this_process()
        if not owner or owner.get("ended") or _is_earlier_start(owner, here):
            return
        if owner.get("host") == here["host"]:
            if not is_locked and _may_live(owner) and not _is_same(owner, here):
                raise self._refusal(owner)
            return
        _warn(f"run {self.name!r} was left by {_name(owner)}; waiting {SILENCE_SECONDS:g} s for a sign of life")
        deadline = time.monotonic() + SILENCE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            now = _read(self.path)
            if now != owner:
                if now.get("ended"):
                    return
                raise self._refusal(now)
        silent = f"nothing was heard for {SILENCE_SECONDS:g} s"
        _warn(f"run {self.name!r} is taken over from {_name(owner)}, of which {silent}")

    def _refusal(self, owner: OwnerJson) -> ConfigError:
        return ConfigError(
            f"Run {self.name!r} is being written by another process ({_name(owner)}): wait for it, end it, or choose"
            " another name=."
        )

    def _beat(self) -> None:
        while not self._ends.wait(BEAT_SECONDS):
            if successor := self._successor():
                self._leave(successor)
            with contextlib.suppress(OSError):  # a full disk ends the run elsewhere, if at all
                self._write(ended=False)

    def _successor(self) -> OwnerJson:
        """Return the record of the process that has taken this one's place; empty if there is or can be read none."""
        found = _read(self.path)
        is_ours = not found or found.get("token") == self._token
        return {} if is_ours or found.get("term", math.inf) < self._term else found

    def _loss(self, successor: OwnerJson) -> str:
        return (
            f"Run {self.name!r} was taken over by another process ({_name(successor)}) while this one gave no sign of"
            " life: this one ends and writes no more; that one goes on."
        )

    def _leave(self, successor: OwnerJson) -> NoReturn:
        """The end of the process, whatever its other threads are writing."""
        with contextlib.suppress(OSError):  # a pipe that nobody reads
            os.write(sys.stderr.fileno(), f"error: {self._loss(successor)}\n".encode())
        os._exit(int(ExitCode.CHECKPOINT))

    def _write(self, *, ended: bool) -> None:
        assert self._descriptor is not None
        self._beats += 1
        # As long as before or longer, and in one call: a reader sees one record, and a full disk takes it in place.
        owner: OwnerJson = {
            **this_process(),
            "term": self._term,
            "token": self._token,
            "beat": self._beats,
            "ended": ended,
        }
        record = json.dumps(owner).encode().ljust(300)
        os.pwrite(self._descriptor, record, 0)
        os.ftruncate(self._descriptor, len(record))
        os.fsync(self._descriptor)


def _read(path: Path) -> OwnerJson:
    """Read the record; empty where none can be read. The file is opened each time, for the sake of NFS's caches."""
    try:
        owner = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return cast(OwnerJson, owner) if isinstance(owner, dict) else {}


def _may_live(owner: OwnerJson) -> bool:
    """Whether the recorded owner must be taken to be alive: it is on another host, or its process is there."""
    if not owner:
        return False
    return owner.get("host") != socket.gethostname() or Path(f"/proc/{owner.get('pid')}").exists()


def _is_earlier_start(owner: OwnerJson, here: ProcessJson) -> bool:
    """Whether the owner is this Slurm job before it was requeued.

    A later start does not count: this process may be what is left of an earlier one.
    """
    if "job" not in here or owner.get("job") != here["job"]:
        return False
    return int(owner.get("restart", 0)) < int(here.get("restart", 0))


def _is_same(owner: OwnerJson, here: ProcessJson) -> bool:
    return (owner.get("host"), owner.get("pid")) == (here["host"], here["pid"])


def _name(owner: OwnerJson) -> str:
    return ", ".join(f"{key} {owner.get(key)}" for key in ("host", "pid", "job") if key in owner) or "unknown"


def _warn(text: str) -> None:
    print(f"warning: {text}.", file=sys.stderr, flush=True)
