"""The one gate to a configuration: what may reach Hydra, from a command line and from any file.

Hydra would call what `_target_` names below its own keys, and `${oc.env:...}` would copy any variable of the
environment into `config.yaml`. Models, hooks and recipes come from registries; nothing here instantiates what a string
names. Flags are read by Hydra's own parser, so that an abbreviation is what it is to Hydra, and files where Hydra loads
them, so that no directory, link or `..` leads around.
"""

import functools
import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

from pipeline.core.errors import ConfigError
from pipeline.core.files import read_regular
from pipeline.core.overrides import split_override
from pipeline.core.secrets import refuse_key, refuse_secret

CALLS = "_target_"
FROM_ENVIRONMENT = "oc.env"
MOST_FILE_BYTES = 2**20
MOST_VALUES = 100_000
"""Keys, values and lists of one file or configuration, aliases of YAML written out."""

_NAMES_A_CALL = re.compile(rf"(?<!\w){CALLS}(?!\w)")
_READS_ENVIRONMENT = re.compile(rf"\$\{{[\s\S]*(?<!\w){re.escape(FROM_ENVIRONMENT)}(?!\w)")
# What evaluates a text that is made only then: `${oc.decode:...}`, `${oc.${...}:...}`, `${${...}}`.
_IS_MADE_LATER = re.compile(r"\$\{(?:[^:}]*\$\{|[\s\S]*(?<!\w)oc\.(?:decode|create)(?!\w))")
_ESCAPED = re.compile(r"(?<!\\)((?:\\\\)*)\\\$\{")


def refuse_argument(argument: str) -> None:
    """Raise `ConfigError` for an argument of a command line that no configuration may hold.

    Nothing has repeated it yet. Backslashes are passed over: Hydra takes some away before it reads on.
    """
    key, value = split_override(argument)
    refuse_secret(key, value)
    shown = _shown(key)
    refuse_key("An argument" if value == "" else shown, argument, os.environ)
    _refuse_text(shown, argument.replace("\\", ""))
    if key.strip() == "hydra.searchpath":
        raise ConfigError(f"{shown} is not taken: give the directory as --config-dir=DIRECTORY.")


def refuse_flags(arguments: Sequence[str]) -> None:
    """Raise `ConfigError` for flags of Hydra's that put something else in the place of the command's configuration.

    Args:
        arguments: As Hydra will get them.
    """
    from hydra._internal.utils import get_args_parser  # which flag an abbreviation is, only this parser knows

    try:
        told = get_args_parser().parse_args(list(arguments))
    except SystemExit as ended:
        if not ended.code:  # --version
            raise
        raise ConfigError("These flags cannot be read (above): `--hydra-help` lists them.") from None
    for flag, value in (("--config-path", told.config_path), ("--config-name", told.config_name)):
        if value is not None:
            raise ConfigError(
                f"{flag} would take the place of the command's own configuration: put what differs into"
                " DIRECTORY/experiment/NAME.yaml and give --config-dir=DIRECTORY experiment=NAME."
            )
    if told.experimental_rerun is not None:
        raise ConfigError(
            "--experimental-rerun would unpickle a file, and what is in it would run: give the command of the run again"
            " (its report and environment.json hold it)."
        )


def refuse_values(container: Any, *, is_resolved: bool = False) -> None:
    """Raise `ConfigError` for a composed configuration that holds what none may.

    Args:
        container: In plain containers.
        is_resolved: Interpolations have been put together: what they say together may be a secret, too.
    """
    for key, text in _texts(container, "The configuration"):
        refuse_key(key, text, os.environ)
        if not is_resolved:
            _refuse_text(key, text)


@functools.cache
def watch_files() -> None:
    """From now on each file that Hydra loads in this process is read here first, and may be refused."""
    from hydra._internal.sources_registry import SourcesRegistry
    from hydra.core.plugins import Plugins

    Plugins.instance()  # registers a class of its own, which is not the one that an import gives
    source: Any = SourcesRegistry.instance().resolve("file")
    load = source.load_config

    def load_config(self: Any, config_path: str) -> Any:
        # As Hydra does, which passes over a folder that is not there.
        path = Path(os.path.realpath(f"{self.path}/{self._normalize_file_name(config_path)}"))
        if path.exists():  # else Hydra says where it looked
            _refuse_file(path)
        return load(self, config_path)

    source.load_config = load_config


def _refuse_file(path: Path) -> None:
    import yaml

    try:
        values = yaml.safe_load(read_regular(path, MOST_FILE_BYTES).decode())
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        first = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path} is no plain YAML and is not read ({first}).") from error
    for _, text in _texts(values, str(path)):
        refuse_key(str(path), text, os.environ)
        _refuse_text(str(path), text)


def _refuse_text(key: str, text: str) -> None:
    """Raise `ConfigError` for a text that names something to call, or reads what no check can see."""
    if _NAMES_A_CALL.search(text):
        raise ConfigError(f"{key} names something to call ({CALLS}), and a configuration is data: leave it out.")
    if _READS_ENVIRONMENT.search(text):
        raise ConfigError(
            f"{key} reads the environment ({FROM_ENVIRONMENT}), of which a copy would stay in config.yaml: write the"
            " value, or let the shell do it ($NAME)."
        )
    if _IS_MADE_LATER.search(_ESCAPED.sub(r"\1", text)):
        raise ConfigError(
            f"{key} makes up while it is read what it reads (a ${{ within a ${{...}}, oc.decode, oc.create), so that"
            " nobody can say what: write the name of the key out, ${key}, or the value."
        )


def _texts(tree: Any, whole: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text) for every key and every string.

    Raises:
        ConfigError: `tree`, which messages call `whole`, is larger than any configuration.
    """
    nodes = _nodes(tree, "")
    yield from ((key, text) for key, text in islice(nodes, MOST_VALUES) if text is not None)
    if next(nodes, None) is not None:
        raise ConfigError(f"{whole} holds more than {MOST_VALUES:,} keys and values, as no configuration does.")


def _nodes(value: Any, key: str) -> Iterator[tuple[str, str | None]]:
    if isinstance(value, dict):
        for name, inner in cast(dict[Any, Any], value).items():
            yield f"{key}{name}", str(name)
            yield from _nodes(inner, f"{key}{name}.")
    elif isinstance(value, list | tuple):
        for inner in cast(list[Any], value):
            yield from _nodes(inner, key)
    yield key.rstrip("."), value if isinstance(value, str) else None


def _shown(key: str) -> str:
    """Return the key of an argument; "An argument" where it does not look like a key."""
    is_key = len(key) < 60 and all(part.isidentifier() for part in key.split("."))
    return key if is_key else "An argument"
