"""Checkpoints that are either whole and proven, or not there.

Saving, by one process (rank 0, which holds the run's lock):

1. Write the state to a temporary file in the directory of the checkpoint, hashing what is written. (In the same
   directory, because a rename is atomic only within one file system.)
2. Flush, fsync.
3. Drop the file from the page cache, read it back and compare the hash: what is on the disk is what was meant.
4. Write the sidecar `<name>.json` (hash, bytes, step, ranks, model, versions), atomically and durably. Where it takes
   the place of the sidecar of a file of the same name, the old record stays inside it under `replaces`: until step 5
   that file is still the one there, and still proven.
5. Rename the temporary file to its final name: from this instant the checkpoint exists. Never before.
6. fsync the directory.
7. Point `last.json` at it. (For people and tools; loading trusts no pointer.)
8. Remove older checkpoints, keeping at least two that verify. The file goes before its sidecar.

Loading: of all checkpoints, `best.ckpt` included, the newest by step (not by date: clocks jump) whose bytes match its
sidecar. Each newer one that fails is named in a warning with the reason. If there are checkpoints and none verifies,
loading refuses: a run never starts from scratch in silence. Files are only ever read with `weights_only=True`, which
builds tensors and plain values and executes nothing.
"""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning_fabric.plugins import CheckpointIO
from typing_extensions import override

from pipeline.core.errors import CheckpointError
from pipeline.core.files import fsync_directory, sweep_temporaries, temporary_beside, write_json_atomic
from pipeline.run.checkpoint_checks import RESTORE, require_same_model, taking
from pipeline.run.checkpoint_files import (
    BEST_NAME,
    POINTER_NAME,
    SECTION,
    STEP_NAME,
    CheckpointInfo,
    Content,
    SectionJson,
    SidecarFactsJson,
    checkpoint_path,
    find_best,
    find_latest,
    is_ours,
    load,
    load_foreign,
    load_proven,
    print_warning,
    section_of,
    sidecar_path,
    step_of,
    verify,
)
from pipeline.run.provenance import versions

__all__ = [
    "BEST_NAME",
    "RESTORE",
    "SECTION",
    "AtomicCheckpointIO",
    "CheckpointInfo",
    "Content",
    "SectionJson",
    "checkpoint_path",
    "find_best",
    "find_latest",
    "load",
    "load_foreign",
    "load_proven",
    "require_same_model",
    "section_of",
    "sidecar_path",
    "taking",
    "verify",
]

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class AtomicCheckpointIO(CheckpointIO):
    """The protocol above, as Lightning's way to files. Only rank 0 saves and removes; every rank may load.

    Args:
        keep: How many of the newest checkpoints that verify to keep; at least 2, for the newest may be damaged.
        raises: Whether `save_checkpoint` raises its failure. False: keep it for `raise_failure`. Lightning lets all
            ranks meet after a save, where a rank 0 that had raised would be missing.
    """

    def __init__(self, keep: int = 2, *, raises: bool = True) -> None:
        assert keep >= 2, keep
        self.keep = keep
        self._raises = raises
        self._failure: CheckpointError | None = None
        # (bytes, mtime in ns) of files proven by this process, so that retention need not read them again.
        self._proven: dict[Path, tuple[int, int]] = {}

    @override
    def save_checkpoint(
        self, checkpoint: Content, path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Save a checkpoint.

        Args:
            checkpoint: What to save; the sidecar repeats some facts of its section SECTION, if it has one.
            path: A name of `checkpoint_path`.
            storage_options: Not used.

        Raises:
            CheckpointError: The disk is full or fails. What was there before is untouched.
        """
        assert storage_options is None, "not used"
        try:
            self._save(checkpoint, Path(path))
        except CheckpointError as error:
            if self._raises:
                raise
            self._failure = error

    def raise_failure(self) -> None:
        """Raise what the last save kept, once.

        Raises:
            CheckpointError: What `save_checkpoint` would have raised.
        """
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _save(self, checkpoint: Content, path: Path) -> None:
        named = STEP_NAME.fullmatch(path.name)
        assert named, f"{path.name} is not a name of checkpoint_path"
        section = checkpoint.get(SECTION, {})
        assert section.get("step", int(named[1])) == int(named[1]), f"{path.name} does not hold step {section['step']}"

        def write(file: BinaryIO) -> str:
            writer = _HashingWriter(file)
            try:
                torch.save(checkpoint, writer)  # pyright: ignore[reportArgumentType]  it asks for no more than write
            except RuntimeError as error:
                # torch reports its own confusion about the failed write; the cause is the one that helps.
                raise writer.error or error from error
            return writer.sha256

        facts: SidecarFactsJson = {
            "step": int(named[1]),
            "world_size": section.get("world_size"),
            "model": section.get("model"),
            "num_parameters": section.get("num_parameters"),
        }
        with _as_checkpoint_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._commit(path, write, facts)
            pointer = {"file": path.name, "step": int(named[1])}
            write_json_atomic(path.with_name(POINTER_NAME), pointer)
        self._retain(path.parent)

    def keep_as_best(self, path: Path, score: float, metric: str) -> None:
        """Keep a saved checkpoint as `best.ckpt` too, whatever retention does to it.

        Args:
            path: The checkpoint.
            score: Validation result that it is kept for.
            metric: Name of that result.

        Raises:
            CheckpointError: It does not verify, or the disk is full or fails.
        """
        info = verify(path)
        best = path.with_name(BEST_NAME)
        facts: SidecarFactsJson = {
            "step": info.step,
            "world_size": info.world_size,
            "model": info.model,
            "num_parameters": info.num_parameters,
            "score": score,
            "metric": metric,
        }

        def copy(file: BinaryIO) -> str:
            # A second name costs nothing, and no file of ours is ever changed in place; not every disk has it.
            temporary = Path(file.name)
            temporary.unlink()
            try:
                temporary.hardlink_to(path)
            except OSError:
                shutil.copyfile(path, temporary)
                with temporary.open("rb") as copied:
                    os.fsync(copied.fileno())
            return info.sha256

        with _as_checkpoint_error(best):
            self._commit(best, copy, facts)

    @override
    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any | None = None, weights_only: bool | None = None
    ) -> Content:
        """Load a checkpoint to CPU tensors and plain values; nothing in it is executed.

        Args:
            path: The checkpoint.
            map_location: Not used.
            weights_only: Not used: always true.

        Returns:
            The content.

        Raises:
            CheckpointError: It does not verify.
        """
        del map_location, weights_only
        return load(Path(path))

    @override
    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint, then its sidecar. One that cannot be removed is named, and does no harm."""
        path = Path(path)
        try:
            path.unlink(missing_ok=True)
            sidecar_path(path).unlink(missing_ok=True)
            fsync_directory(path.parent)
        except OSError as error:
            print_warning(f"old checkpoint {path} cannot be removed: {error.strerror}.")

    def sweep(self, directory: Path) -> None:
        """Remove temporary files, and sidecars whose checkpoint never came or is gone.

        Called at start by the process that holds the run's lock: whatever is half written was a dead one's.
        """
        sweep_temporaries(directory, is_guarded=True)
        for sidecar in directory.glob("*.ckpt.json"):
            if not sidecar.with_suffix("").exists():
                sidecar.unlink(missing_ok=True)

    def _commit(self, path: Path, write: Callable[[BinaryIO], str], facts: SidecarFactsJson) -> None:
        """Do steps 1 to 6. `write` fills the temporary file and returns the SHA-256 of what it meant to write."""
        with temporary_beside(path) as file:  # which goes also where both names are one file: a rename leaves them
            temporary = Path(file.name)
            try:
                sha256 = write(file)
                file.flush()
                os.fsync(file.fileno())
                file.close()
                _compare(temporary, sha256)
                status = temporary.stat()
                record = {**facts, "num_bytes": status.st_size, "sha256": sha256, "versions": versions()}
                with contextlib.suppress(CheckpointError):
                    record["replaces"] = _as_json(verify(path)) if path.exists() else None
                write_json_atomic(sidecar_path(path), record)
                temporary.replace(path)
            finally:
                if not path.exists():
                    sidecar_path(path).unlink(missing_ok=True)
        fsync_directory(path.parent)
        self._proven[path] = (status.st_size, status.st_mtime_ns)

    def _retain(self, directory: Path) -> None:
        """Do step 8. Damaged files newer than the oldest one kept stay, to be looked at or saved over."""
        num_valid = 0
        for path in sorted(filter(is_ours, directory.glob("step=*.ckpt")), key=step_of, reverse=True):
            if num_valid >= self.keep:
                self._proven.pop(path, None)
                self.remove_checkpoint(path)
            elif self._is_valid(path):
                num_valid += 1

    def _is_valid(self, path: Path) -> bool:
        try:
            status = path.stat()
            signature = (status.st_size, status.st_mtime_ns)
            if self._proven.get(path) != signature:
                verify(path)
                self._proven[path] = signature
        except (OSError, CheckpointError):
            return False
        return True


class _HashingWriter:
    """A file for torch.save that hashes what passes, and remembers why a write failed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        """Write as a binary file does."""
        try:
            num_bytes = self._file.write(content)
        except OSError as error:
            self.error = error
            raise
        self._digest.update(content)
        return num_bytes

    def flush(self) -> None:
        """Flush as a binary file does."""
        self._file.flush()

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of all that was written."""
        return self._digest.hexdigest()


def _compare(path: Path, sha256: str) -> None:
    """Read the file back from the disk, past the page cache where the system lets us, and compare."""
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise OSError(errno.EIO, "the disk returned other bytes than were written")


@contextlib.contextmanager
def _as_checkpoint_error(path: Path) -> Iterator[None]:
    """Turn a failing disk into one sentence."""
    try:
        yield
    except OSError as error:
        remedy = "check the disk, or set run_root= to another one"
        if error.errno in NO_SPACE:
            with contextlib.suppress(OSError):
                remedy = f"{shutil.disk_usage(path.parent).free / 1e6:,.1f} MB are free there; make room"
        raise CheckpointError(
            f"Cannot save {path}: {error.strerror or error}; {remedy}, then run the same command again. The checkpoints"
            " saved before are untouched."
        ) from error


def _as_json(info: CheckpointInfo) -> dict[str, object]:
    names = info.__dataclass_fields__.keys() - {"path"}
    return {name: getattr(info, name) for name in sorted(names)}
