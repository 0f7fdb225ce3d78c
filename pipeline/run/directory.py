"""The directory of one run: named by the run, made by rank 0, owned by one job at a time."""

import contextlib
import datetime
import errno
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.core.files import (
    fsync_directory,
    sweep_temporaries,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
)
from pipeline.run.lock import ProcessJson, RunLock, this_process

SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@,-]*")
MAX_SEGMENT_LENGTH = 200
# A run's own subdirectories: a run named `a/checkpoints` would lie inside the run `a`.
RESERVED_SEGMENTS = {"checkpoints", "wandb"}
# The write probe: larger than any of the small files of a run, so that an almost full disk is noticed at start.
PROBE_BYTES = 1 << 20
OF_A_FAILING_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}
OF_A_VANISHED_DIRECTORY = {errno.ENOENT, errno.ENOTDIR}

REMEDIES = {
    errno.EROFS: "it is on a read-only file system: make that writable, or set run_root= to another one",
    errno.EACCES: "permission denied: set run_root= to a directory of yours",
    errno.EPERM: "not permitted: set run_root= to a directory of yours",
    errno.ENOSPC: "the disk is full: free some space, or set run_root= to another disk",
    errno.EDQUOT: "the quota is used up: free some space, or set run_root= to another disk",
    errno.ENOTDIR: "a part of that path is a file: set run_root= or name= to another place",
    errno.EEXIST: "a part of that path is a file: set run_root= or name= to another place",
    errno.ENAMETOOLONG: "the path is too long: choose a shorter name=",
    errno.ESTALE: "the network file system has lost it: mount it again, or set run_root= to another disk",
}

NOT_SAID = "not said"


class AttemptJson(ProcessJson):
    """A row of attempts.jsonl: one start of the run, and the process that writes for it."""

    attempt: int
    """Number of the start, from 1."""
    started: str
    world_size: int
    start_step: int
    """Optimiser steps committed before."""
    changed: list[str]
    """Clauses that say what differs from the attempt before."""


class RunDirectory:
    """Paths of a run, and the right to write there.

    Making the object touches nothing: every rank has one. Rank 0 alone calls `open`, and `close` at the end.

    Args:
        run_root: Directory of all runs.
        name: Name of the run: its directory below `run_root`.

    Raises:
        ConfigError: The name is not one or more plain path segments.
    """

    def __init__(self, run_root: str | Path, name: str) -> None:
        validate_name(name)
        self.name = name
        self.path = Path(run_root) / name
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.ledger = self.path / "ledger.json"
        self.quarantine = self.path / "quarantine.jsonl"
        self.attempts = self.path / "attempts.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.wandb = self.path / "wandb"
        self.report = self.path / "report.html"
        self.validation = self.path / "validation.json"
        self._lock = RunLock(self.path / "lock", name)

    def open(self, patience_seconds: float = math.inf) -> None:
        """Make the directory, take its lock, remove leftovers of dead writers, prove that it can be written.

        Args:
            patience_seconds: As in `RunLock.acquire`.

        Raises:
            ConfigError: It cannot be made or written, or another process owns it.
            Preempted: An earlier start of this Slurm job still owns it.
        """
        assert not self._lock.is_held, "already open"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(patience_seconds)
            sweep_temporaries(self.path)
            sweep_temporaries(self.checkpoints, is_guarded=True)
            for directory in (self.path, self.checkpoints):  # which may be a link to another disk
                probe = directory / "probe"
                write_bytes_atomic(probe, bytes(PROBE_BYTES))
                probe.unlink()
        except OSError as error:
            self.close()
            raise ConfigError(_sentence(self.path, error)) from error
        except BaseException:
            self.close()
            raise

    def check_owned(self) -> None:
        """Check before a save. Does nothing on a rank that does not own the directory.

        Raises:
            CheckpointError: Another process has taken the directory over.
        """
        self._lock.check_owned()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turn a disk that fails under a run which has begun into one sentence, with a checkpoint's exit code 4.

        Yields:
            Nothing.

        Raises:
            CheckpointError: In place of the system's error.
        """
        try:
            yield
        except OSError as error:
            is_ours = error.filename is not None and Path(os.fsdecode(error.filename)).is_relative_to(self.path)
            if error.errno not in (OF_A_FAILING_DISK | OF_A_VANISHED_DIRECTORY if is_ours else OF_A_FAILING_DISK):
                raise
            remedy = REMEDIES.get(error.errno or 0, "check the disk, or set run_root= to another one")
            raise CheckpointError(
                f"Cannot write {error.filename or self.path} ({error.strerror}): {remedy}, then run the same command"
                " again. The checkpoints saved before are untouched."
            ) from error

    def close(self) -> None:
        """Release the lock. Does nothing where it is not held."""
        self._lock.release()

    def begin_attempt(
        self, *, world_size: int, start_step: int, changed: Sequence[str] = (), names_host: bool = True
    ) -> int:
        """Record one more start of this run, durably.

        Args:
            world_size: Ranks of this start.
            start_step: Optimiser steps committed before.
            changed: Clauses that say what differs from the attempt before.
            names_host: Whether it is said where.

        Returns:
            Number of the start, 1 for the first.
        """
        assert self._lock.is_held, "only the owner counts attempts"
        before = self.attempts.read_bytes() if self.attempts.exists() else b""
        number = sum(1 for line in before.splitlines() if line.strip()) + 1
        process = this_process()
        if not names_host:
            process["host"] = NOT_SAID
        record: AttemptJson = {
            "attempt": number,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **process,
            "world_size": world_size,
            "start_step": start_step,
            "changed": list(changed),
        }
        # A line cut short by a crash was a start too; it is ended, not overwritten.
        separator = b"" if before.endswith(b"\n") or not before else b"\n"
        with self.attempts.open("ab") as file:
            file.write(separator + json.dumps(record, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        fsync_directory(self.path)
        return number

    def write_config(self, text: str) -> None:
        """Write the resolved configuration, as YAML text."""
        write_text_atomic(self.config, text)

    def write_environment(self, environment: Mapping[str, object]) -> None:
        """Write what `provenance.describe` returned, and what the command adds."""
        write_json_atomic(self.environment, dict(environment))


def validate_name(name: str) -> None:
    """Raise `ConfigError` unless `name` is one or more plain path segments, such as `first` or `sweep/lr=0.1`."""
    segments = name.split("/")
    plain = all(SEGMENT.fullmatch(segment) and len(segment) <= MAX_SEGMENT_LENGTH for segment in segments)
    if not plain or not RESERVED_SEGMENTS.isdisjoint(segments):
        raise ConfigError(
            f"name={name!r} cannot name a run: use letters, digits and any of _ . - + = , @, in parts separated by"
            f" '/', none of which starts with a dot or is {' or '.join(sorted(RESERVED_SEGMENTS))}, such as"
            f" name={_plain(segments)}"
        )


def _plain(segments: Sequence[str]) -> str:
    """Return the nearest name of a run."""
    legal = (re.sub(r"[^A-Za-z0-9_.+=@,-]+", "-", segment).lstrip(".+=@,-") for segment in segments)
    plain = [f"{name}_" if name in RESERVED_SEGMENTS else name[:MAX_SEGMENT_LENGTH] for name in legal if name]
    return "/".join(plain) or "first"


def _sentence(path: Path, error: OSError) -> str:
    """Say what is wrong with the place, and what to do."""
    remedy = REMEDIES.get(error.errno or 0, f"{error.strerror or error}: set run_root= to a place that can be written")
    return f"Cannot write the run directory {path}: {remedy}."
