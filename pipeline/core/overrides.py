"""Hydra's override grammar, read and written: one set of rules for every command."""

from collections.abc import Sequence
from typing import Any, cast


def split_override(override: str) -> tuple[str, str]:
    """Return (key, value) of `+key=value`, `~key` and the like."""
    key, _, value = override.partition("=")
    return key.lstrip("+~").partition("@")[0], value


def quoted(override: str) -> str:
    """Return the override, its value in quotes where it holds what Hydra's grammar takes in quotes only.

    Names of runs and of checkpoints hold a `=`: `name=sweep/lr=0.1`; names of shards hold a range in braces:
    `data.train_split=imagenet-train-{0000..1023}.tar`; a path may hold accents and several spaces in a row.
    """
    key, _, value = override.partition("=")
    is_special = "=" in value or ("{" in value and ".." in value) or not value.isascii() or "  " in value
    if not is_special or not value or value[0] in "'\"[{$" or "(" in value:
        return override
    return f"{key}={_in_quotes(value)}"


def _in_quotes(text: str) -> str:
    escaped = text.replace("'", "\\'")
    return f"'{escaped}'"


def literal(value: Any) -> str:
    """Return a value in Hydra's override grammar."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            return value if value.replace("_", "").isalnum() else _in_quotes(value)
        case list() | tuple():
            return f"[{','.join(map(literal, cast(list[Any], value)))}]"
        case _:
            return str(value)


def quote_models(arguments: Sequence[str]) -> list[str]:
    """`models=[squeezenet1_0:sr=0.5,alexnet]` as Hydra's grammar wants it: specs with a colon in quotes.

    A comma inside brackets or before `key=value` continues the spec; anything else is left as it is.
    """
    return [_quote_list(argument) if argument.startswith("models=[") else argument for argument in arguments]


def _quote_list(argument: str) -> str:
    key, _, listed = argument.partition("=")
    if not listed.endswith("]") or ":" not in listed or "'" in listed or '"' in listed:
        return argument
    specs: list[str] = []
    for item in split_outside_brackets(listed[1:-1]):
        continues = specs and "=" in item and ":" not in item.partition("=")[0]
        if continues:
            specs[-1] += f",{item.strip()}"
        else:
            specs.append(item.strip())
    return f"{key}=[{','.join(literal(spec) for spec in specs)}]"


def split_outside_brackets(text: str) -> list[str]:
    """Split at the commas that are not inside [...]."""
    items: list[str] = []
    depth = start = 0
    for position, character in enumerate(text):
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            items.append(text[start:position])
            start = position + 1
    return [*items, text[start:]]
