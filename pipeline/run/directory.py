"""The directory of one run: named by the run, made by rank 0, owned by one job at a time."""

import contextlib
import datetime
import errno
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.core.files import (
    fsync_directory,
    sweep_temporaries,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
)
from pipeline.run.lock import RunLock, this_process

SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@,-]*")
MAX_SEGMENT_LENGTH = 200
# A run's own subdirectories: a run named `a/checkpoints` would lie inside the run `a`.
RESERVED_SEGMENTS = {"checkpoints", "wandb"}
# The write probe: larger than any of the small files of a run, so that an almost full disk is noticed at start.
PROBE_BYTES = 1 << 20
OF_A_FAILING_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}
OF_A_VANISHED_DIRECTORY = {errno.ENOENT, errno.ENOTDIR}

REMEDIES = {
    errno.EROFS: "it is on a read-only file system: set run_root= to a place that can be written",
    errno.EACCES: "permission denied: set run_root= to a directory of yours",
    errno.EPERM: "not permitted: set run_root= to a directory of yours",
    errno.ENOSPC: "the disk is full: free some space, or set run_root= to another disk",
    errno.EDQUOT: "the quota is used up: free some space, or set run_root= to another disk",
    errno.ENOTDIR: "a part of that path is a file: set run_root= or name= to another place",
    errno.EEXIST: "a part of that path is a file: set run_root= or name= to another place",
    errno.ENAMETOOLONG: "the path is too long: choose a shorter name=",
    errno.ESTALE: "the network file system has lost it: mount it again, or set run_root= to another disk",
}


class RunDirectory:
    """Paths of a run, and the right to write there.

    Making the object touches nothing: every rank has one. Rank 0 alone calls `open`, and `close` at the end.

    Raises:
        ConfigError: the name is not one or more plain path segments.
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
        self._lock = RunLock(self.path / "lock", name)

    def open(self, patience_seconds: float = math.inf) -> None:
        """Make the directory, take its lock, remove leftovers of dead writers, prove that it can be written.

        patience_seconds: as in `RunLock.acquire`.

        Raises:
            ConfigError: it cannot be made or written, or another process owns it. Preempted: an earlier start of this
            Slurm job still does.
        """
        assert not self._lock.is_held, "already open"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(patience_seconds)
            sweep_temporaries(self.path)
            sweep_temporaries(self.checkpoints, is_guarded=True)
            probe = self.path / "probe"
            write_bytes_atomic(probe, bytes(PROBE_BYTES))
            probe.unlink()
        except OSError as error:
            self.close()
            raise ConfigError(_sentence(self.path, error)) from error
        except BaseException:
            self.close()
            raise

    def check_owned(self) -> None:
        """Before a save. Harmless on a rank that does not own the directory.

        Raises:
            CheckpointError: another process has taken it over.
        """
        self._lock.check_owned()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """A disk that fails under a run which has begun is a sentence, and a checkpoint's matter: exit code 4.

        Raises:
            CheckpointError: in place of the system's error.
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
        """Give the lock back. Harmless when there is none."""
        self._lock.release()

    def begin_attempt(self, **conditions: Any) -> int:
        """Record one more start of this run, durably. Returns its number, 1 for the first.

        `conditions`: plain values worth keeping, such as the world size and the step it starts from.
        """
        assert self._lock.is_held, "only the owner counts attempts"
        before = self.attempts.read_bytes() if self.attempts.exists() else b""
        number = sum(1 for line in before.splitlines() if line.strip()) + 1
        record = {
            "attempt": number,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **this_process(),
            **conditions,
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
        """The resolved configuration, as YAML text."""
        write_text_atomic(self.config, text)

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """What `provenance.describe` returned."""
        write_json_atomic(self.environment, dict(environment))


def validate_name(name: str) -> None:
    """Raise `ConfigError` unless `name` is one or more plain path segments, such as `first` or `sweep/lr=0.1`."""
    segments = name.split("/")
    plain = all(SEGMENT.fullmatch(segment) and len(segment) <= MAX_SEGMENT_LENGTH for segment in segments)
    if not plain or not RESERVED_SEGMENTS.isdisjoint(segments):
        raise ConfigError(
            f"name={name!r} cannot name a run: use letters, digits and any of _ . - + = , @, in parts separated by"
            f" '/', none of which starts with a dot or is {' or '.join(sorted(RESERVED_SEGMENTS))}."
        )


def _sentence(path: Path, error: OSError) -> str:
    """What is wrong with the place, and what to do."""
    remedy = REMEDIES.get(error.errno or 0, f"{error.strerror or error}: set run_root= to a place that can be written")
    return f"Cannot write the run directory {path}: {remedy}."
