"""What must hold of a checkpoint's content before it is used: its types, its tensors, the model it is of."""

import contextlib
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import IO, Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from pipeline.core.errors import CheckpointError
from pipeline.core.files import open_regular, would_unpack
from pipeline.core.units import format_bytes

LONGEST_CAUSE = 300
"""Characters of what a library says that are repeated."""
MOST_PICKLE_BYTES = 2**24
"""Ours take some 100 KB: the names of the tensors, and what is no tensor."""
NUM_LEGACY_PICKLES = 5
"""At the start of what torch.save wrote before it wrote archives: magic number, version, system, content, keys."""
RESTORE = "restore it with its .json from a backup, or give another checkpoint"


def is_of_type(value: object, hint: Any) -> bool:
    """Return whether a value read from a file is of a type; a bool is no number."""
    if hint is Any:
        return True
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(is_of_type(value, option) for option in inner)
    if origin is list:
        return isinstance(value, list) and all(is_of_type(item, inner[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, origin or hint) and (hint is bool or not isinstance(value, bool))


def of_another_type(record: Mapping[str, Any], schema: Any) -> str:
    """Say in a clause which value of a record is not of the type its schema has for it; empty if all are."""
    hints = get_type_hints(schema)
    wrong = (key for key, value in record.items() if key in hints and not is_of_type(value, hints[key]))
    return next((f"its {key!r} is of type {type(record[key]).__name__}" for key in wrong), "")


def would_swell(path: Path) -> str:
    """Say in a clause why reading a file that torch.save may have written would take far more memory than its size.

    Nothing is read but the names of its parts and its pickle, which is not run. What else is wrong is torch's to say.

    Raises:
        OSError, ValueError, zipfile.BadZipFile: It cannot be read as a pickle or an archive.
    """
    with open_regular(path) as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            return next(filter(None, (_swells(file) for _ in range(NUM_LEGACY_PICKLES))), "")
        if swells := would_unpack(file):
            return swells
        with zipfile.ZipFile(file) as archive:
            pickles = [part for part in archive.infolist() if part.filename.rpartition("/")[2] == "data.pkl"]
            return next(filter(None, (_swells(archive.open(part)) for part in pickles)), "")


def _swells(pickle: IO[bytes]) -> str:
    """Judge one pickle: an operation of a byte may make an object of 64, and `bytearray(n)` takes n bytes."""
    start = pickle.tell()
    for operation, argument, position in pickletools.genops(pickle):
        if position is not None and position - start > MOST_PICKLE_BYTES:
            return f"holds more than {format_bytes(MOST_PICKLE_BYTES)} of values beside its tensors"
        if operation.name == "GLOBAL" and str(argument).endswith("bytearray"):
            return "holds a bytearray, which may be of any size"
    return ""


@contextlib.contextmanager
def taking(what: str, path: Path) -> Iterator[None]:
    """Take a part of a checkpoint over; what it raises because it is not as it was saved becomes a sentence.

    Args:
        what: The part, in words.
        path: The checkpoint.

    Raises:
        CheckpointError: The part is not as it was saved.
    """
    try:
        yield
    except (torch.OutOfMemoryError, CheckpointError):  # the latter says already what is wrong
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())[:LONGEST_CAUSE]
        raise CheckpointError(
            f"{path} is not as it was saved: {what} cannot be taken over ({type(error).__name__}: {said}): {RESTORE}."
        ) from error


def require_same_model(
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    *,
    path: Path,
    model: str,
    found_model: str | None = None,
    remedy: str = "give model= and model.metaparameters= as they are of these weights, or other weights",
) -> None:
    """Raise `CheckpointError` unless two state dicts have the same keys and shapes.

    Args:
        expected: State dict of the model that is built.
        found: State dict of the checkpoint.
        path: The checkpoint.
        model: Name of the model that is built.
        found_model: Name of the model the checkpoint says it holds; None where it says nothing.
        remedy: What to do, after a colon.
    """
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    common = [key for key in expected if key in found]
    if wrong := next(filter(None, (unusable(key, found[key], expected[key]) for key in common)), ""):
        raise CheckpointError(f"{path} holds no weights that a model can have: {wrong}. Give another checkpoint.")
    differing = [
        f"{key} is {_shape(found[key])} there and {_shape(expected[key])} here"
        for key in common
        if _shape(found[key]) != _shape(expected[key])
    ]
    problems = [
        f"{what}: {', '.join(items[:3])}{f' and {len(items) - 3} more' if len(items) > 3 else ''}"
        for what, items in (("missing", missing), ("unknown", unexpected), ("shapes", differing))
        if items
    ]
    if problems:
        raise CheckpointError(
            f"{path} holds {found_model or 'another model'}, which does not fit {model} ({'; '.join(problems)}):"
            f" {remedy}."
        )


def unusable(key: str, found: object, expected: Tensor) -> str:
    """Say in a clause why a value cannot be one for the parameter or buffer `expected`; empty if its type can.

    Args:
        key: Its name.
        found: The value. One of another shape is not looked into.
        expected: Of the type and shape that are needed.
    """
    if not isinstance(found, Tensor):
        return f"{key} is of type {type(found).__name__}, not a tensor"
    if found.layout != torch.strided or found.is_meta or found.is_quantized:
        return f"{key} is a tensor without plain values"
    if found.is_floating_point() != expected.is_floating_point() or found.is_complex():
        return f"{key} is of type {found.dtype}, where {expected.dtype} is needed"
    if found.shape == expected.shape and not found.isfinite().all():
        return f"{key} holds values that are not finite"
    return ""


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
