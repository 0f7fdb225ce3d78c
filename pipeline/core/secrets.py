"""What a configuration must not hold: secrets, a way to read them, and names of things to call.

Hydra would call what `_target_` names below its own keys, from a command line and from any YAML that it is pointed to;
`${oc.env:...}` would copy any variable of the environment into `config.yaml`. Models, hooks and recipes come from
registries; nothing here instantiates what a string names.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from pipeline.core.errors import ConfigError

# In a URL: what stands before the last `@`, and the query, where signed URLs carry their signature. A password that
# was not percent-encoded may hold nearly anything, so that too much is hidden rather than too little.
_URL_USER = re.compile(r"(?<=://)[^\s'\"]*@")
_URL_QUERY = re.compile(r"(\w://[^\s'\"?#]*)[?#][^\s'\"]*")

SHORTEST_SECRET = 8
# What the name of a variable ends with when it holds a credential; KEYBOARD_LAYOUT, MONKEY and PWD hold none.
_NAME_OF_A_CREDENTIAL = re.compile(
    r"(?i)(?:^|_)(?:\w*token|\w*secret|\w*passw(?:or)?d|\w*passphrase|\w*credentials?|sshpass)$|_pwd$"
)
_NAME_OF_A_KEY = re.compile(r"(?i)(?:^|_)\w*?(?:^|_|api|access|secret|auth|private)keys?$")
# As their makers document them. 40 hexadecimal digits alone are a revision of git's as often as a W&B key of old.
_SHAPES_OF_SECRETS = {
    "a W&B key": re.compile(r"(?<![0-9A-Za-z])local-[0-9a-f]{40}(?![0-9A-Za-z])|wandb_v1_\w{8}"),
    "an AWS key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_|github_pat_)\w{20}"),
    "a Hugging Face token": re.compile(r"\bhf_[0-9A-Za-z]{20}"),
    "an API key": re.compile(r"\bsk-[0-9A-Za-z_-]{20}|\bxox[abeprs]-\w{8}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"),
    # A short number is none (`max_token=128`), nor what a part of a path begins with (`sweep/token=word`).
    "a password": re.compile(
        r"(?i)(?<!/)(?:passw(?:or)?d|secret|token|api_?key)['\"]?\s*[=:]\s*(?!\d{1,6}(?![\w.-]))[^\s=:]"
    ),
}

CALLS = "_target_"
FROM_ENVIRONMENT = "oc.env"
_NAMES_A_CALL = re.compile(rf"(?<!\w){CALLS}(?!\w)")
_READS_ENVIRONMENT = re.compile(rf"\$\{{[\s\S]*(?<!\w){re.escape(FROM_ENVIRONMENT)}(?!\w)")
# Hydra's flags that name a directory of more configuration.
CONFIG_FLAGS = ("--config-dir", "-cd", "--config-path", "-cp")
# The flag's value may stand in the next argument, so an argument that is a directory is looked through too.
YAML_SUFFIXES = {".yaml", ".yml"}


def redacted(text: str) -> str:
    """Return `text` without what URLs in it may hold of secrets: `https://***@host/path?***`."""
    return _URL_QUERY.sub(r"\1?***", _URL_USER.sub("***@", text))


def refuse_secret(key: str, value: str | None) -> None:
    """Raise `ConfigError`, which does not show it, if the URL `value` may hold a secret.

    A password in a configuration would be copied into config.yaml, the record of the command, W&B and every log.
    """
    if value is not None and "://" in value and any(mark in value for mark in "@?#"):
        raise ConfigError(
            f"{key}={redacted(value)} must hold no user, password or query: give credentials through the environment,"
            " ~/.aws or ~/.netrc, and write an @, ? or # that belongs to the path as %40, %3F or %23."
        )


def refuse_key(key: str, text: str, environment: Mapping[str, str]) -> None:
    """Raise `ConfigError`, which does not show it, if `text` looks like a key or password, or holds one of ours.

    Args:
        key: Where the text stands, for the message.
        text: The key or value of a configuration.
        environment: Variables; the values of those that hold credentials are refused too.
    """
    what = next((name for name, shape in _SHAPES_OF_SECRETS.items() if shape.search(text)), None)
    remedy = "If it is none, write it another way."
    for name, value in environment.items():
        if _is_credential(name, value) and value in text:
            what = f"the value of {name}"
            remedy = f"If that is none, run the command with `env -u {name}` before it."
    if what is not None:
        raise ConfigError(
            f"{key} must hold no secret, and this looks like {what}: it would be copied into config.yaml, the record of"
            " the command and every log. Give it through the environment (WANDB_API_KEY, AWS's variables) or ~/.netrc."
            f" {remedy}"
        )


def _is_credential(name: str, value: str) -> bool:
    """Return whether a variable holds a credential: by its name, and a value that is no path or plain word."""
    if len(value) < SHORTEST_SECRET or os.path.exists(value):  # noqa: PTH110  Path.exists() raises for what is too long
        return False
    is_mixed = any(map(str.isdigit, value)) and any(map(str.isalpha, value))
    return bool(_NAME_OF_A_CREDENTIAL.search(name) or (_NAME_OF_A_KEY.search(name) and is_mixed))


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
    if _NAMES_A_CALL.search(text):
        raise ConfigError(f"{key} names something to call ({CALLS}), and a configuration is data: leave it out.")
    if _READS_ENVIRONMENT.search(text):
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
    """Yield (dotted key, text) for every key and every string."""
    if isinstance(value, dict):
        for name, inner in cast(dict[Any, Any], value).items():
            yield f"{key}{name}", str(name)
            yield from _texts(inner, f"{key}{name}.")
    elif isinstance(value, list | tuple):
        for inner in cast(list[Any], value):
            yield from _texts(inner, key)
    elif isinstance(value, str):
        yield key.rstrip("."), value


def _shown(key: str) -> str:
    """Return the key of an argument; "An argument" where it does not look like a key."""
    name = key.lstrip("+~")
    return name if len(name) < 60 and all(part.isidentifier() for part in name.split(".")) else "An argument"
