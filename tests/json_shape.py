"""Whether JSON is what a TypedDict says: the contracts of pipeline/core/schemas, held against what is written."""

import types
import typing
from typing import Any, Literal, NotRequired, get_args, get_origin, is_typeddict


def mismatches(value: Any, schema: Any, path: str = "") -> list[str]:
    """Return where `value` differs from `schema`: keys missing, unknown or in another order, values of another type."""
    origin, arguments = get_origin(schema), get_args(schema)
    if is_typeddict(schema):
        if not isinstance(value, dict):
            return [f"{path}: {value!r} is no {schema.__name__}"]
        hints = typing.get_type_hints(schema, include_extras=True)
        found = [f"{path}.{key} is missing" for key in schema.__required_keys__ - value.keys()]
        found += [f"{path}.{key} is not in {schema.__name__}" for key in value.keys() - hints.keys()]
        if [key for key in hints if key in value] != [key for key in value if key in hints]:
            found.append(f"{path}: keys in another order than {schema.__name__} has them")
        for key in hints.keys() & value.keys():
            found += mismatches(value[key], hints[key], f"{path}.{key}")
        return found
    if origin is NotRequired:
        return mismatches(value, arguments[0], path)
    if origin is Literal:
        return [] if value in arguments else [f"{path}: {value!r} is none of {arguments}"]
    if origin in (types.UnionType, typing.Union):
        each = [mismatches(value, argument, path) for argument in arguments]
        return [] if [] in each else min(each, key=len)
    if origin is list:
        if not isinstance(value, list):
            return [f"{path}: {value!r} is no list"]
        return [one for index, item in enumerate(value) for one in mismatches(item, arguments[0], f"{path}.{index}")]
    if origin is dict:
        if not isinstance(value, dict):
            return [f"{path}: {value!r} is no object"]
        return [one for key, item in value.items() for one in mismatches(item, arguments[1], f"{path}.{key}")]
    if schema is float and type(value) is int:
        return []
    return [] if type(value) is schema else [f"{path}: {value!r} is no {schema}"]
