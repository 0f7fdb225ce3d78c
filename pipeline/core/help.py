"""The text of `--help`, made of a command's dataclasses: every key, its default, and the string under its field."""

import ast
import dataclasses
import importlib.metadata
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from pipeline.core.groups import check_choice, config_groups, defaults

WIDTH = 100
_CHOICE = re.compile(r"(\w+)=([\w-]+)", re.ASCII)
"""`recipe=adamw`; neither a sweep, nor an addition or removal, nor a model of others."""


def version_text() -> str:
    """Return what `--version` prints."""
    try:
        return f"squeezewire {importlib.metadata.version('squeezewire')}"
    except importlib.metadata.PackageNotFoundError:
        return "squeezewire, from a checkout that is not installed"


def help_text(
    command: str,
    schema: type[Any],
    arguments: Sequence[str] = (),
    *,
    program: str | None = None,
    about: str | None = None,
) -> str:
    """Return what `squeezewire COMMAND --help` prints.

    Args:
        command: Name of the configuration.
        schema: Its dataclass.
        arguments: Beside `--help`. Of those that choose in a group (`recipe=adamw`) the values are shown; others
            change nothing.
        program: As of `run_command`.
        about: As of `run_command`.

    Raises:
        ConfigError: there is no such choice.
    """
    values = defaults(command)
    of_train = ("experiment", "prune") if command == "train" else ()  # which are no key of their own
    groups = {group: names for group, names in config_groups().items() if group in values or group in of_train}
    chosen: dict[str, str] = {}
    for match in filter(None, map(_CHOICE.fullmatch, arguments)):
        if match[1] in groups:
            check_choice(match[1], match[2], groups)
            chosen[match[1]] = match[0]
    values = defaults(command, [*chosen.values()]) if chosen else values
    return _format(program or command, schema, groups, values, chosen=[*chosen.values()], about=about)


def _format(
    command: str,
    schema: type[Any],
    groups: Mapping[str, tuple[str, ...]],
    values: dict[str, object],
    *,
    chosen: Sequence[str] = (),
    about: str | None = None,
) -> str:
    """Return what can be set: groups with their choices, then every key with its default and meaning.

    Args:
        command: Name of the command.
        schema: Dataclass of its configuration.
        groups: Hydra groups that the command takes, and the choices in each.
        values: The configuration without overrides, but for those in `chosen`.
        chosen: Choices of groups that `values` are of, as `recipe=adamw`.
        about: What the command does; None: what `schema` says.
    """
    told = textwrap.fill(" ".join((schema.__doc__ or "").split()), WIDTH) if about is None else inspect.cleandoc(about)
    lines = [f"squeezewire {command} key=value ...    (or python -m pipeline.{command} key=value ...)", "", told, ""]
    if groups:
        lines.append("Groups (GROUP=CHOICE):")
        for group, choices in groups.items():
            names = ", ".join(choices)
            lines.append(textwrap.fill(names, WIDTH, initial_indent=f"  {group}: ", subsequent_indent="      "))
        lines.append("")
    lines.append(f"Keys (key=value){', with ' if chosen else ''}{' '.join(chosen)}:")
    lines.extend(_lines_of_fields(schema, values, ""))
    lines += [
        "",
        "Text is taken as it is typed: 2024_11_29, 1e5 and a path with blanks are no numbers and need no quotes of",
        "Hydra's. `null` is no value where a key may have none, `${key}` another key's value, `~` a home directory.",
    ]
    lines += ["", "--cfg job prints the composed configuration; --multirun sweeps, as in any Hydra application."]
    return "\n".join(lines)


def _lines_of_fields(schema: Any, values: dict[str, object], prefix: str) -> Iterator[str]:
    """Yield the lines of each field.

    A field whose metadata hold `keys` is a dictionary; that dataclass says which keys it may have.
    """
    hints, docs = typing.get_type_hints(schema), field_docs(schema)
    for entry in dataclasses.fields(schema):
        key, hint = f"{prefix}{entry.name}", hints[entry.name]
        value: Any = values.get(entry.name, entry.default)
        if dataclasses.is_dataclass(hint):
            yield from _lines_of_fields(
                hint, cast(dict[str, object], value) if isinstance(value, dict) else {}, f"{key}."
            )
            continue
        shown = "null" if value is None else "" if value is dataclasses.MISSING else value
        yield f"  {key}={list(cast(tuple[Any], shown)) if isinstance(shown, tuple) else shown}"
        if entry.name in docs:
            yield textwrap.fill(docs[entry.name], WIDTH, initial_indent="      ", subsequent_indent="      ")
        if "keys" in entry.metadata:
            yield from _lines_of_fields(entry.metadata["keys"], {}, f"{key}.")


def field_docs(schema: Any) -> dict[str, str]:
    """Return the string written under each field of a dataclass, inherited fields included."""
    docs: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if dataclasses.is_dataclass(base):
            docs |= _docs_of_body(base)
    return docs


def _docs_of_body(schema: Any) -> dict[str, str]:
    """Return `field_docs` of what the class itself says."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(schema))).body
    assert isinstance(tree, ast.ClassDef)
    docs: dict[str, str] = {}
    for statement, following in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs
