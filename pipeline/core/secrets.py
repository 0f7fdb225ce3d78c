"""What a configuration must not hold: secrets, a way to read them, and names of things to call.

Hydra would call what `_target_` names below its own keys, from a command line and from any YAML that it is pointed to;
`${oc.env:...}` would copy any variable of the environment into `config.yaml`. Models, hooks and recipes come from
registries; nothing here instantiates what a string names.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.core.errors import ConfigError, refuse_key

CALLS = "_target_"
FROM_ENVIRONMENT = "oc.env"
# Hydra's flags that name a directory of more configuration.
CONFIG_FLAGS = ("--config-dir", "-cd", "--config-path", "-cp")
# The flag's value may stand in the next argument, so an argument that is a directory is looked through too.
YAML_SUFFIXES = {".yaml", ".yml"}


def refuse_argument(argument: str) -> None:
    """Raise `ConfigError` for an argument of a command line that no configuration may hold.

    Also for one that names a directory of YAML files in which one may not be read.
    """
    key, _, value = argument.partition("=")
    refuse_key("An argument" if value == "" else _shown(key), argument, os.environ)
    _refuse_text(_shown(key), argument)
    is_flag = key in CONFIG_FLAGS
    if (is_flag and value) or "=" not in argument:
        directory = Path(value if is_flag else argument)
        if directory.is_dir():
            _refuse_files(directory)


def refuse_values(container: Any) -> None:
    """Raise `ConfigError` for a composed configuration, before its interpolations are resolved."""
    for key, text in _texts(container, ""):
        refuse_key(key, text, os.environ)
        _refuse_text(key, text)


def _refuse_text(key: str, text: str) -> None:
    if CALLS in text:
        raise ConfigError(f"{key} names something to call ({CALLS}), and a configuration is data: leave it out.")
    if FROM_ENVIRONMENT in text:
        raise ConfigError(
            f"{key} reads the environment ({FROM_ENVIRONMENT}), of which a copy would stay in config.yaml: write the"
            " value, or let the shell do it ($NAME)."
        )


def _refuse_files(directory: Path) -> None:
    import yaml

    for path in sorted(path for path in directory.rglob("*") if path.suffix in YAML_SUFFIXES):
        try:
            text = path.read_text()
            yaml.safe_load(text)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            first = " ".join(str(error).split())[:200]
            raise ConfigError(f"{path} is no plain YAML and is not read ({first}).") from error
        _refuse_text(str(path), text)


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every key and every string."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield f"{key}{name}", str(name)
            yield from _texts(inner, f"{key}{name}.")
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner, key)
    elif isinstance(value, str):
        yield key.rstrip("."), value


def _shown(key: str) -> str:
    """The key of an argument, as far as it is one."""
    name = key.lstrip("+~")
    return name if len(name) < 60 and all(part.isidentifier() for part in name.split(".")) else "An argument"
