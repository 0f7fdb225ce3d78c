"""Checkpoints as files: their names, their sidecars, how they are proven and read. Saving is in `checkpoint`."""

import argparse
import json
import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import safetensors
import safetensors.torch
import torch

from pipeline.core.errors import CheckpointError
from pipeline.core.files import is_safetensors, read_regular, sha256_of_file, what_it_is
from pipeline.run.checkpoint_checks import RESTORE, of_another_type, would_swell

STEP_NAME = re.compile(r"step=(\d{9,})\.ckpt")
BEST_NAME = "best.ckpt"
POINTER_NAME = "last.json"
LARGEST_SIDECAR_BYTES = 1 << 20


SECTION = "squeezewire"
"""Key of the facts about a run that we put into a checkpoint, beside what Lightning puts there."""

Content = dict[str, Any]
"""A checkpoint or state dict as it is read: tensors and plain values by name."""


class SectionJson(TypedDict):
    """What a checkpoint holds under SECTION. What older ones lack is not required."""

    step: int
    """Optimiser steps committed."""
    world_size: int
    model: str
    num_parameters: int
    num_classes: int
    classes: NotRequired[list[str] | None]
    """Class names in the order of the outputs; null: the shards did not name them."""
    metaparameters: dict[str, object]
    input: NotRequired[dict[str, object]]
    """How the pictures were cut and normalised: the fields of the configuration's InputConfig."""
    must_match: dict[str, object]
    """Fields that a resumed run may not change, by dotted key."""
    free_fields: NotRequired[dict[str, object]]
    """Fields that it may change, by dotted key."""
    best_score: float | None
    """Validation top-1 of the best."""
    best_loss: NotRequired[float | None]
    """Its mean cross-entropy."""
    best_step: NotRequired[int | None]
    """Optimiser steps after which it took place."""
    owed_row: NotRequired[dict[str, float | int | None] | None]
    """Row of a step whose validation was broken off."""
    ledger: Any
    """The ledger's own state, a TypedDict of `comm`, which this room does not import."""
    learner: dict[str, Any]
    """What neither the weights nor the optimiser hold: averaged weights, masks of what is pruned."""
    powersgd: NotRequired[dict[str, Any] | None]
    """Matrices and error memories of the compression, where the run has it."""
    rank_states: NotRequired[dict[str, Any]]
    """Momenta, and within a round weights, of every rank, where ranks train by themselves."""
    outer: NotRequired[dict[str, Any]]
    """Outer momentum and the fragment under way, where the weights that ranks have in common make outer steps."""


class SidecarFactsJson(TypedDict, total=False):
    """What is known of a checkpoint before it is written."""

    step: int
    world_size: int | None
    model: str | None
    num_parameters: int | None
    score: float
    metric: str


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """A checkpoint whose bytes match its sidecar."""

    path: Path
    step: int
    """Optimiser steps committed."""
    num_bytes: int
    sha256: str
    world_size: int | None = None
    model: str | None = None
    num_parameters: int | None = None
    score: float | None = None
    """Validation result that `best.ckpt` is kept for."""
    metric: str | None = None
    versions: dict[str, str] = field(default_factory=dict)


def checkpoint_path(directory: Path, step: int) -> Path:
    """Return the path of the checkpoint after `step` committed steps."""
    return directory / f"step={step:09d}.ckpt"


def sidecar_path(path: Path) -> Path:
    """Return the path of the sidecar of the checkpoint at `path`."""
    return path.with_name(f"{path.name}.json")


def print_warning(text: str) -> None:
    """Print a warning on standard error."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def verify(path: Path) -> CheckpointInfo:
    """Prove that a file is the one its sidecar describes.

    Args:
        path: The checkpoint.

    Returns:
        What the sidecar says of it.

    Raises:
        CheckpointError: It is another file, or there is no file or no readable sidecar.
    """
    try:
        num_bytes = path.stat().st_size
        records = read_records(path)
        fitting = [record for record in records if record.num_bytes == num_bytes]
        if not fitting:
            raise CheckpointError(f"{path}: {num_bytes:,} bytes where {records[0].num_bytes:,} were saved.")
        sha256 = sha256_of_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist: give the path of a checkpoint.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    proven = [record for record in fitting if record.sha256 == sha256]
    if not proven:
        raise CheckpointError(f"{path}: its bytes have changed since they were saved (SHA-256 differs).")
    named = STEP_NAME.fullmatch(path.name)
    if named and int(named[1]) != proven[0].step:
        raise CheckpointError(f"{path}: it holds step {proven[0].step}, so it was renamed.")
    return proven[0]


def find_latest(directory: Path, warn: Callable[[str], None] = print_warning) -> CheckpointInfo | None:
    """Find the newest checkpoint by step that verifies.

    Args:
        directory: The run's directory of checkpoints.
        warn: Called for each checkpoint that is skipped, with the reason.

    Returns:
        The checkpoint; None where nothing was ever saved.

    Raises:
        CheckpointError: There are checkpoints, or a pointer to one, and none verifies.
    """
    for path in sorted(directory.glob("*.ckpt")):
        if not is_ours(path):
            warn(f"{path} is not a checkpoint of this run and is not read.")
    candidates = sorted(filter(is_ours, directory.glob("*.ckpt")), key=step_of, reverse=True)
    newest = None
    for path in candidates:
        if newest is not None and step_of(path) <= newest.step:
            break
        try:
            found = verify(path)
        except CheckpointError as error:
            warn(f"checkpoint passed over: {error}")
        else:
            newest = found if newest is None or found.step > newest.step else newest
    if newest is not None:
        return newest
    if candidates or (directory / POINTER_NAME).exists():
        raise CheckpointError(
            f"No checkpoint in {directory} can be trusted ({len(candidates)} there, none verifies): restore one with"
            f" its .json from a backup, or remove {directory} to train from the start."
        )
    return None


def find_best(directory: Path) -> CheckpointInfo | None:
    """Find the checkpoint kept for its validation result.

    Args:
        directory: The run's directory of checkpoints.

    Returns:
        The checkpoint; None where there is none.

    Raises:
        CheckpointError: It does not verify.
    """
    path = directory / BEST_NAME
    return verify(path) if path.exists() else None


def load(path: Path) -> Content:
    """Read a checkpoint of ours, after proving it.

    Args:
        path: The checkpoint.

    Returns:
        CPU tensors and plain values.

    Raises:
        CheckpointError: It does not verify, or holds anything else.
    """
    return load_proven(path)[1]


def load_proven(path: Path) -> tuple[CheckpointInfo, Content]:
    """Read a checkpoint as `load` does; return what was proven of the file, and its content."""
    info = verify(path)
    return info, _load(path)


def load_foreign(path: Path) -> Content:
    """Read a state dict or checkpoint of any origin, which nothing vouches for. Nothing in it is executed.

    Args:
        path: A file that torch.save wrote, or one in the format safetensors.

    Returns:
        CPU tensors and plain values.

    Raises:
        CheckpointError: It cannot be read, is damaged, or holds more than tensors and plain values.
    """
    return _load(path, is_proven=False)


def _load(path: Path, *, is_proven: bool = True) -> Content:
    """Read a file of weights; one that nothing has proven by the checksums within it, which torch does not look at."""
    try:
        if not (wrong := what_it_is(path)) and is_safetensors(path):
            return _safetensors(path)
        if wrong := wrong or would_swell(path) or ("" if is_proven else _damaged_member(path)):
            raise CheckpointError(f"{path} {wrong}.")
        with torch.serialization.safe_globals([argparse.Namespace]):  # of torchvision's references; mere values
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist: give the path of a checkpoint.") from error
    except CheckpointError:
        raise
    except Exception as error:  # a torn file raises EOFError, RuntimeError, OSError, UnpicklingError or KeyError
        raise CheckpointError(f"{path} {_why_unread(error)}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict.")
    return content


def _safetensors(path: Path) -> Content:
    """Read weights in the format safetensors; those of `export` say in its metadata what a checkpoint of ours says."""
    state = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        told = (file.metadata() or {}).get(SECTION)
    if told is None:
        return state
    as_float = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    return {SECTION: json.loads(told), "state_dict": as_float}


def _damaged_member(path: Path) -> str:
    """Say in a clause which part of a zip archive is not what its checksum says; empty if none is, or it is no zip."""
    if not zipfile.is_zipfile(path):
        return ""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    return f"is damaged: the checksum of its part {damaged!r} is another, so copy it again" if damaged else ""


def section_of(content: Content, path: Path, step: int | None = None) -> SectionJson:
    """Return what we put into a checkpoint.

    Args:
        content: Of the checkpoint.
        path: The checkpoint, for messages.
        step: The step that its sidecar says; None: it has none.

    Raises:
        CheckpointError: There is no such part, it is not as it was saved, or it is of another step.
    """
    section = content.get(SECTION)
    if not isinstance(section, dict):
        raise CheckpointError(f"{path} was not saved by a training of squeezewire: {RESTORE}.")
    if wrong := of_another_type(section, SectionJson) or _lost_average(section):
        raise CheckpointError(f"{path} is not as it was saved ({wrong}): {RESTORE}.")
    classes = section.get("classes") or []
    if len(set(classes)) < len(classes) or len(classes) > section.get("num_classes", len(classes)):
        raise CheckpointError(f"{path} is not as it was saved (its classes are not those of its outputs): {RESTORE}.")
    if step is not None and section.get("step") != step:
        raise CheckpointError(f"{path} holds step {section.get('step')}, and its sidecar says {step}: {RESTORE}.")
    return cast(SectionJson, section)


def _lost_average(section: Mapping[str, Any]) -> str:
    """Say in a clause that averaged weights are missing: what is judged in their place would be other weights."""
    decay = (section.get("free_fields") or {}).get("recipe.ema_decay")
    average = (section.get("learner") or {}).get("average")
    is_lost = isinstance(decay, float) and decay > 0 and not (isinstance(average, Mapping) and average)
    return "its averaged weights are missing" if is_lost else ""


def _why_unread(error: Exception) -> str:
    """Say in a clause why torch.load does not read a file; its own words advise to let the file run code."""
    text = str(error)
    if found := re.search(r"GLOBAL ([\w.]+) was not an allowed", text):
        return (
            f"holds more than tensors and plain values ({found[1]}), which could run code, and was not read:"
            " give the state dict alone, saved by torch.save(model.state_dict(), ...)"
        )
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror or error})"
    return (
        f"is damaged or holds more than tensors and plain values, and was not read ({type(error).__name__}):"
        " copy it again, or give a checkpoint or a state dict saved by torch.save"
    )


def is_ours(path: Path) -> bool:
    """Whether the name is one that a run gives a checkpoint."""
    return path.name == BEST_NAME or STEP_NAME.fullmatch(path.name) is not None


def step_of(path: Path) -> int:
    """Return the step of a checkpoint by its name; of `best.ckpt` the latest that its sidecar speaks of.

    Where a process was killed between the two, that is the step of the one that was to come, and not of the file.
    -1: the sidecar cannot be read.
    """
    named = STEP_NAME.fullmatch(path.name)
    if named:
        return int(named[1])
    try:
        return max(record.step for record in read_records(path))
    except CheckpointError:
        return -1


def read_records(path: Path) -> list[CheckpointInfo]:
    """Read the sidecar of a checkpoint.

    Args:
        path: The checkpoint.

    Returns:
        What is said of the file now meant to be there, then of the one it replaces.

    Raises:
        CheckpointError: There is no sidecar, or not one of ours.
    """
    sidecar = sidecar_path(path)
    try:
        content = json.loads(read_regular(sidecar, LARGEST_SIDECAR_BYTES))
        records = [content] + ([content["replaces"]] if content.get("replaces") else [])
        names = CheckpointInfo.__dataclass_fields__.keys() - {"path"}
        infos = [
            CheckpointInfo(path=path, **{key: record[key] for key in names if key in record}) for record in records
        ]
        if wrong := next(filter(None, (of_another_type(vars(info), CheckpointInfo) for info in infos)), ""):
            raise TypeError(wrong)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: its sidecar {sidecar.name} is missing, so nothing proves it whole.") from error
    except OSError as error:
        raise CheckpointError(f"{path}: its sidecar {sidecar.name} cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{path}: its sidecar {sidecar.name} is damaged ({error}).") from error
    return infos
