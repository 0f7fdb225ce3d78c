"""Checkpoints as files: their names, their sidecars, how they are proven and read. Saving is in `checkpoint`."""

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.core.errors import CheckpointError
from pipeline.core.files import sha256_of_file

STEP_NAME = re.compile(r"step=(\d{9,})\.ckpt")
BEST_NAME = "best.ckpt"
POINTER_NAME = "last.json"


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
    """Of `best.ckpt`: the validation result it is kept for."""
    metric: str | None = None
    versions: dict[str, str] = field(default_factory=dict)


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint after `step` committed steps lies."""
    return directory / f"step={step:09d}.ckpt"


def sidecar_path(path: Path) -> Path:
    """Of the checkpoint at `path`."""
    return path.with_name(f"{path.name}.json")


def print_warning(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def verify(path: Path) -> CheckpointInfo:
    """Prove that the file at `path` is the one its sidecar describes.

    Raises:
        CheckpointError: it is not, or there is no file or no readable sidecar.
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
    """The newest checkpoint by step that verifies; None where nothing was ever saved.

    Each one that is passed over is told to `warn`, with the reason.

    Raises:
        CheckpointError: there are checkpoints, or a pointer to one, and none verifies.
    """
    for path in sorted(directory.glob("*.ckpt")):
        if not is_ours(path):
            warn(f"{path} is not a checkpoint of this run and is not read.")
    candidates = sorted(filter(is_ours, directory.glob("*.ckpt")), key=step_of, reverse=True)
    for path in candidates:
        try:
            return verify(path)
        except CheckpointError as error:
            warn(f"checkpoint passed over: {error}")
    if candidates or (directory / POINTER_NAME).exists():
        raise CheckpointError(
            f"No checkpoint in {directory} can be trusted ({len(candidates)} there, none verifies): restore one with"
            f" its .json from a backup, or remove {directory} to train from the start."
        )
    return None


def find_best(directory: Path) -> CheckpointInfo | None:
    """The checkpoint kept for its validation result; None where there is none.

    Raises:
        CheckpointError: it does not verify.
    """
    path = directory / BEST_NAME
    return verify(path) if path.exists() else None


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours, to CPU tensors and plain values, after proving it.

    Raises:
        CheckpointError: it does not verify, or holds anything else.
    """
    return load_proven(path)[1]


def load_proven(path: Path) -> tuple[CheckpointInfo, dict[str, Any]]:
    """`load`, and what was proven of the file."""
    info = verify(path)
    return info, load_foreign(path)


def load_foreign(path: Path) -> dict[str, Any]:
    """Read a state dict or checkpoint of any origin, which nothing vouches for. Nothing in it is executed.

    Raises:
        CheckpointError: it cannot be read, is damaged, or holds more than tensors and plain values.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist: give the path of a checkpoint.") from error
    except Exception as error:  # a torn file raises EOFError, RuntimeError, OSError, UnpicklingError or KeyError
        reason = str(error).partition("\n")[0][:200]
        raise CheckpointError(
            f"{path} is damaged or holds more than tensors and plain values, and was not read"
            f" ({type(error).__name__}: {reason}): give a checkpoint or a state dict saved by torch.save."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict.")
    return content


def require_same_model(
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    *,
    path: Path,
    model: str,
    found_model: str | None = None,
) -> None:
    """Raise `CheckpointError` unless the state dicts have the same keys and shapes.

    `model` names what is being built, `found_model` what the checkpoint says it holds, if it does.
    """
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    differing = [
        f"{key} is {_shape(found[key])} there and {_shape(expected[key])} here"
        for key in expected
        if key in found and _shape(found[key]) != _shape(expected[key])
    ]
    problems = [
        f"{what}: {', '.join(items[:3])}{f' and {len(items) - 3} more' if len(items) > 3 else ''}"
        for what, items in (("missing", missing), ("unknown", unexpected), ("shapes", differing))
        if items
    ]
    if problems:
        raise CheckpointError(
            f"{path} holds {found_model or 'another model'}, which does not fit {model} ({'; '.join(problems)}):"
            " give the model it was saved from, or another name= for a new run."
        )


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def is_ours(path: Path) -> bool:
    return path.name == BEST_NAME or STEP_NAME.fullmatch(path.name) is not None


def step_of(path: Path) -> int:
    """By its name, or for `best.ckpt` by its sidecar; -1 if that cannot be read."""
    named = STEP_NAME.fullmatch(path.name)
    if named:
        return int(named[1])
    try:
        return read_records(path)[0].step
    except CheckpointError:
        return -1


def read_records(path: Path) -> list[CheckpointInfo]:
    """What the sidecar of `path` says: of the file now meant to be there, then of the one it replaces.

    Raises:
        CheckpointError: no sidecar, or not one of ours.
    """
    sidecar = sidecar_path(path)
    try:
        content = json.loads(sidecar.read_bytes())
        records = [content] + ([content["replaces"]] if content.get("replaces") else [])
        names = CheckpointInfo.__dataclass_fields__.keys() - {"path"}
        infos = [
            CheckpointInfo(path=path, **{key: record[key] for key in names if key in record}) for record in records
        ]
        if not all(type(info.step) is type(info.num_bytes) is int for info in infos):
            raise TypeError("step or num_bytes is not a number")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: its sidecar {sidecar.name} is missing, so nothing proves it whole.") from error
    except OSError as error:
        raise CheckpointError(f"{path}: its sidecar {sidecar.name} cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{path}: its sidecar {sidecar.name} is damaged ({error}).") from error
    return infos
