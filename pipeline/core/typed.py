"""From plain containers to frozen dataclasses, with a sentence for everything that does not fit.

A field's name is its key. Unknown keys, missing keys and wrong types raise `ConfigError` naming the key and the remedy.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard, TypeVar

from pipeline.core.errors import ConfigError

T = TypeVar("T")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest known word, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise `ConfigError` naming the nearest allowed value unless `value` is one."""
    require(value in allowed, f"{key}={value!r} is not one of {', '.join(allowed)}.{nearest(str(value), allowed)}")


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether `value` is an int; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether `value` is an int or a float; a bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def build(schema: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Make a dataclass of type `schema` from plain containers, recursively.

    Args:
        schema: The dataclass.
        values: Its fields by name.
        path: Prefix of the keys in messages.

    Raises:
        ConfigError: unknown key, missing key, wrong type, or what `__post_init__` refuses.
    """
    hints = typing.get_type_hints(schema)
    fields = {entry.name: entry for entry in dataclasses.fields(typing.cast(Any, schema))}
    for key in values:
        require(str(key) in fields, f"Unknown key {path}{key}.{nearest(str(key), fields)}")
    arguments = {key: _convert(hints[key], value, f"{path}{key}") for key, value in values.items()}
    for key, entry in fields.items():
        optional = entry.default is not dataclasses.MISSING or entry.default_factory is not dataclasses.MISSING
        require(optional or key in arguments, f"{path}{key} is not set: add {path}{key}=... to the command.")
    return schema(**arguments)


def _convert(hint: Any, value: Any, key: str) -> Any:
    """Return `value` as the type `hint`, or raise `ConfigError` naming `key`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _convert(inner, value, key)
    require(value is not None, f"{key} is null: give it a value.")
    if dataclasses.is_dataclass(hint):
        require(isinstance(value, Mapping), f"{key}={value!r} must be a group of keys.")
        return build(typing.cast(Any, hint), value, f"{key}.")
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{key}={value!r} must be a list.")
        inner = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        require(len(inner) == len(value), f"{key}={value!r} must have {len(inner)} entries.")
        return tuple(
            _convert(hint, item, f"{key}[{i}]") for i, (hint, item) in enumerate(zip(inner, value, strict=True))
        )
    if origin is dict or hint is dict:
        require(isinstance(value, Mapping), f"{key}={value!r} must be a group of keys.")
        return dict(value)
    if hint is Any:
        return value
    return _convert_scalar(hint, value, key)


def _convert_scalar(hint: type, value: Any, key: str) -> Any:
    """Return a bool, int, float or str; an int is taken as a float, a bool is no number."""
    if hint is float and is_whole(value):
        return float(value)
    if hint is str and is_number(value):
        return str(value)  # names such as 2026 arrive as numbers
    matches = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    require(matches, f"{key}={value!r} must be of type {hint.__name__}.")
    return value
