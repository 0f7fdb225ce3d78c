"""From plain containers to frozen dataclasses, with a sentence for everything that does not fit.

A field's name is its key. Unknown keys, missing keys and wrong types raise `ConfigError` naming the key and the remedy.
"""

import dataclasses
import difflib
import math
import shlex
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeGuard, TypeVar

from pipeline.core.errors import ConfigError
from pipeline.core.trees import flat

T = TypeVar("T")
_IS_PATH = "path"
PathText = Annotated[str, _IS_PATH]
"""Path or URL in a configuration: `~` at its start is the home directory, and it is never empty."""


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


def is_text(text: str) -> bool:
    """Return whether UTF-8 can write a text: bytes that were not UTF-8 come as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def optional(hint: Any) -> tuple[Any, bool]:
    """Return the type without what annotates it, and whether None is one of its values."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (inner,) = (argument for argument in typing.get_args(hint) if argument is not type(None))
        return optional(inner)[0], True
    return (typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint), False


def is_path(hint: Any) -> bool:
    """Return whether a type is `PathText`, or that or None."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(map(is_path, typing.get_args(hint)))
    return typing.get_origin(hint) is Annotated and _IS_PATH in typing.get_args(hint)


def text_items(hint: Any) -> bool:
    """Return whether a type is a tuple of any number of texts."""
    arguments = typing.get_args(hint)
    return typing.get_origin(hint) is tuple and arguments[-1] is Ellipsis and optional(arguments[0])[0] is str


def leaf_hints(schema: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, type) of every key that is no group, those of open dictionaries as far as they are known."""
    hints = typing.get_type_hints(schema, include_extras=True)
    for entry in dataclasses.fields(schema):
        group = entry.metadata.get("keys", hints[entry.name])
        if dataclasses.is_dataclass(group):
            yield from leaf_hints(group, f"{prefix}{entry.name}.")
        else:
            yield f"{prefix}{entry.name}", hints[entry.name]


def build(schema: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Make a dataclass of type `schema` from plain containers, recursively.

    Args:
        schema: The dataclass.
        values: Its fields by name.
        path: Prefix of the keys in messages.

    Raises:
        ConfigError: unknown key, missing key, wrong type, or what `__post_init__` refuses.
    """
    hints = typing.get_type_hints(schema, include_extras=True)
    fields = {entry.name: entry for entry in dataclasses.fields(typing.cast(Any, schema))}
    for key in values:
        require(str(key) in fields, f"Unknown key {path}{key}.{nearest(str(key), fields)}")
    arguments = {key: _convert(hints[key], value, f"{path}{key}") for key, value in values.items()}
    for key, entry in fields.items():
        optional = entry.default is not dataclasses.MISSING or entry.default_factory is not dataclasses.MISSING
        require(optional or key in arguments, f"{path}{key} is not set: add {path}{key}=... to the command.")
    return schema(**arguments)


def check_known(schema: Any, values: Mapping[str, Any], path: str = "") -> None:
    """Raise `ConfigError` where a value is not of the type that `schema` has for its key.

    For what other versions of the program wrote: keys that are unknown or missing, and nulls, are passed over.

    Args:
        schema: The dataclass.
        values: Its fields by name, as far as they are there.
        path: Prefix of the keys in messages.
    """
    hints = typing.get_type_hints(schema, include_extras=True)
    for key, value in values.items():
        hint = hints.get(str(key))
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            check_known(hint, typing.cast(Mapping[str, Any], value), f"{path}{key}.")
        elif hint is not None and value is not None:
            _convert(hint, value, f"{path}{key}")


def _convert(hint: Any, value: Any, key: str) -> Any:
    """Return `value` as the type `hint`, or raise `ConfigError` naming `key`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _convert(inner, value, key)
    if origin is Annotated:
        return _path(_convert(arguments[0], value, key), key)
    require(value is not None, f"{key} is null: give it a value.")
    if dataclasses.is_dataclass(hint):
        require(isinstance(value, Mapping), f"{key}={value!r} must be a group of keys.")
        return build(typing.cast(Any, hint), value, f"{key}.")
    if origin is tuple:
        require(
            isinstance(value, list | tuple),
            f"{key}={value!r} must be a list in brackets: {shlex.quote(f'{key}=[{value}]')}.",
        )
        inner = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        require(len(inner) == len(value), f"{key}={value!r} must have {len(inner)} entries.")
        return tuple(
            _convert(hint, item, f"{key}[{i}]") for i, (hint, item) in enumerate(zip(inner, value, strict=True))
        )
    if origin is dict or hint is dict:
        require(isinstance(value, Mapping), f"{key}={value!r} must be a group of keys.")
        for name, inner in flat(value, f"{key}.").items():
            for item in typing.cast("list[object]", inner) if isinstance(inner, list | tuple) else [inner]:
                _check_scalar(item, name)
        return dict(value)
    if hint is Any:
        return value
    return _convert_scalar(hint, value, key)


def _convert_scalar(hint: type, value: Any, key: str) -> Any:
    """Return a bool, int, float or str; an int is taken as a float, a bool is no number."""
    if hint is float and is_whole(value):
        require(abs(value) <= sys.float_info.max, f"{key} has more digits than a number to compute with may have.")
        return float(value)
    require(
        hint is not str or not isinstance(value, int | float),
        f"{key}={value!r} stands without quotes in a YAML file, where it is no text, and how it was written is lost"
        f" (2024_11_29 is 20241129 there): put it in quotes.",
    )
    _check_scalar(value, key)
    matches = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    require(matches, f"{key}={value!r} must be of type {hint.__name__}.")
    return value


def _check_scalar(value: object, key: str) -> None:
    """Raise `ConfigError` for what no key may hold, whatever its type."""
    require(
        not isinstance(value, str) or "\0" not in value,
        f"{key}={value!r} holds a character of value 0, which stands in no name and no text: write it without.",
    )
    require(
        not isinstance(value, str) or is_text(value),
        f"{key}={value!r} holds half a character (a lone surrogate), which can be written into no file: correct it.",
    )
    require(
        not is_whole(value) or -(2**63) <= value < 2**63,
        f"{key} has more digits than a number to compute with may have.",
    )
    require(
        not isinstance(value, float) or math.isfinite(value),
        f"{key}={value} is no number to compute with: give a finite one.",
    )


def _path(text: str, key: str) -> str:
    """Return a path with the home directory in place of its `~`."""
    require(text != "", f"{key}= is empty: give a path, or leave {key}= out.")
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError as error:
        raise ConfigError(
            f"{key}={text} begins with the home directory of a user that is not known here: for a file of that name"
            f" write {shlex.quote(f'{key}=./{text}')}"
        ) from error
