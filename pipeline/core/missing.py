"""A value that was not measured: its reason stands where the value would, and becomes a null at the border to JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Missing:
    """Stands in place of a value that is not known.

    Attributes:
        reason: One sentence, as `null_reasons` will hold it.
    """

    reason: str


def known(value: T | None, reason: str) -> T | Missing:
    """Return the value, or in place of None why there is none."""
    return Missing(reason) if value is None else value


def to_json(tree: object) -> tuple[Any, dict[str, str]]:
    """Turn each `Missing` in nested mappings and sequences into None.

    Tuples become lists, so that the result is what `json.loads` would give back.

    Returns:
        The tree with nulls, and the reason of each null by its dotted path: `points.0.step_seconds`.
    """
    reasons: dict[str, str] = {}
    return _without(tree, "", reasons), reasons


def _without(tree: object, path: str, reasons: dict[str, str]) -> object:
    if isinstance(tree, Missing):
        reasons[path] = tree.reason
        return None
    if isinstance(tree, Mapping):
        mapping = cast(Mapping[object, object], tree)
        return {key: _without(inner, _join(path, key), reasons) for key, inner in mapping.items()}
    if isinstance(tree, Sequence) and not isinstance(tree, str | bytes):
        sequence = cast(Sequence[object], tree)
        return [_without(inner, _join(path, index), reasons) for index, inner in enumerate(sequence)]
    return tree


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
