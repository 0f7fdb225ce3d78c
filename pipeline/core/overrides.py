"""Hydra's override grammar, read and written: one set of rules for every command.

The grammar types what it reads: `2024_11_29` is a number to it, `12e4567` infinity, and a path with a blank, a bracket
or a `~` is no value at all. So the value of a key that the schema declares as text is put in quotes before Hydra sees
it (`as_typed`), and what a program writes for another is in quotes from the start (`literal`).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from pipeline.core.errors import ConfigError
from pipeline.core.typed import leaf_hints, optional, text_items

NULL = re.compile(r"null", re.IGNORECASE)
QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
WORD = re.compile(r"[A-Za-z_]\w*", re.ASCII)
TYPED_WORDS = {"null", "true", "false", "inf", "nan"}
BY_REFERENCE = "own"
"""Choice of the group `model` that says nothing but that its key `name` is to be given."""
_INTERPOLATION = re.compile(r"(\\*)\$\{")
_SWEEP = re.compile(r"(?:choice|glob|interval|range|shuffle|sort|tag)\(.*\)", re.DOTALL)


def split_override(override: str) -> tuple[str, str]:
    """Return (key, value) of `+key=value`, `~key` and the like."""
    key, _, value = override.partition("=")
    return key.lstrip("+~").partition("@")[0], value


def as_typed(overrides: Sequence[str], schema: type[Any], *, is_sweep: bool = False) -> list[str]:
    r"""Return the overrides, the values of text keys in quotes, so that Hydra hands on what was typed.

    A value that stands in quotes as a whole is the text between them. `null` is no value where a key may have none,
    and text elsewhere. `${key}` is the value of another key, as everywhere in Hydra; `\${` is the text `${`.

    Args:
        overrides: As they were typed.
        schema: Dataclass of the command's configuration.
        is_sweep: Under --multirun commas separate the values of one key.
    """
    hints = dict(leaf_hints(schema))
    expanded = [each for override in overrides for each in _expand(override, hints, is_sweep=is_sweep)]
    return [_quote(override, hints, is_sweep=is_sweep) for override in expanded]


def _expand(override: str, hints: Mapping[str, Any], *, is_sweep: bool) -> list[str]:
    """Return `model=timm:resnet10t` as a choice of the group and a name; no file of the group has such a name."""
    start, _, value = override.partition("=")
    if start != "model" or ":" not in value or "model.name" not in hints:
        return [override]
    mixed = [each for each in (split_outside_brackets(value) if is_sweep else ()) if ":" not in each]
    if mixed:
        raise ConfigError(
            f"{override}: --multirun takes models by their own names or such as timm:NAME, not both ({mixed[0]}):"
            " sweep each kind in a command of its own."
        )
    return [f"model={BY_REFERENCE}", f"model.name={value}"]


def _quote(override: str, hints: Mapping[str, Any], *, is_sweep: bool) -> str:
    start, equals, value = override.partition("=")
    key, _ = split_override(override)
    inner, may_be_null = optional(hints.get(key))
    if not equals or start.startswith("~") or (is_sweep and _SWEEP.fullmatch(value)):
        return override
    if text_items(inner):
        return f"{start}={_quote_list(value, has_specs=key == 'models', is_sweep=is_sweep)}"
    if inner is not str:
        return override
    values = split_outside_brackets(value) if is_sweep else [value]
    return f"{start}={','.join(_quote_text(item, may_be_null=may_be_null) for item in values)}"


def _quote_text(text: str, *, may_be_null: bool) -> str:
    """Return typed text in quotes, unless it is already, or is the word for no value."""
    if QUOTED.fullmatch(text) or (may_be_null and NULL.fullmatch(text)):
        return text
    return _in_quotes(text)


def _in_quotes(text: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()


def _quote_list(value: str, *, has_specs: bool, is_sweep: bool) -> str:
    """Return `[a,b]` with each item in quotes; what is no list in brackets, as text.

    Args:
        value: What was typed.
        has_specs: Items are specs of models, `squeezenet1_0:sr=0.5,base_e=128`: a comma before `key=value` continues
            the spec.
        is_sweep: Commas outside the brackets separate lists.
    """
    if is_sweep:
        lists = split_outside_brackets(value)
        return ",".join(_quote_list(item, has_specs=has_specs, is_sweep=False) for item in lists)
    if NULL.fullmatch(value) or value.startswith("${"):
        return value
    if not (value.startswith("[") and value.endswith("]")):
        return _quote_text(value, may_be_null=False)
    items: list[str] = []
    for item in map(str.strip, split_outside_brackets(value[1:-1])):
        if has_specs and items and re.match(r"[^:'\"=]+=", item):
            items[-1] += f",{item}"
        else:
            items.append(item)
    return f"[{','.join(_quote_text(item, may_be_null=False) for item in items if item)}]"


def literal(value: Any) -> str:
    """Return a value in Hydra's override grammar, the same whatever key it is given to."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            is_word = WORD.fullmatch(value) and value.lower() not in TYPED_WORDS
            return value if is_word else _in_quotes(_INTERPOLATION.sub(r"\1\1\\${", value))
        case list() | tuple():
            return f"[{','.join(map(literal, cast(list[Any], value)))}]"
        case _:
            return str(value)


def split_outside_brackets(text: str) -> list[str]:
    """Split at the commas that are not inside brackets, braces or quotes."""
    return list(_split(text))


def _split(text: str) -> Iterator[str]:
    depth = start = position = 0
    while position < len(text):
        character = text[position]
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(character, 0)
        quoted = QUOTED.match(text, position) if position == start or text[position - 1] in ", [" else None
        if character == "," and depth <= 0:
            yield text[start:position]
            start = position + 1
        position = quoted.end() if quoted else position + 1
    yield text[start:]
