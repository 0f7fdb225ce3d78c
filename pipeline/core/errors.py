"""Errors a user can act on, and the exit code each of them ends with. What they print holds no password."""

import re
from collections.abc import Mapping
from enum import IntEnum

# In a URL: what stands before the last `@`, and the query, where signed URLs carry their signature. A password that
# was not percent-encoded may hold nearly anything, so that too much is hidden rather than too little.
_URL_USER = re.compile(r"(?<=://)[^\s'\"]*@")
_URL_QUERY = re.compile(r"(\w://[^\s'\"?#]*)[?#][^\s'\"]*")

SHORTEST_SECRET = 8
_NAME_OF_A_SECRET = re.compile(r"(?i)(key|token|secret|passw|credential)")
# As their makers document them; a W&B key of old is 40 hexadecimal digits.
_SHAPES_OF_SECRETS = {
    "a W&B key": re.compile(r"(?<![0-9A-Za-z])[0-9a-f]{40}(?![0-9A-Za-z])|wandb_v1_\w{8}"),
    "an AWS key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_|github_pat_)\w{20}"),
    "a Hugging Face token": re.compile(r"\bhf_[0-9A-Za-z]{20}"),
    "an API key": re.compile(r"\bsk-[0-9A-Za-z_-]{20}|\bxox[abeprs]-\w{8}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"),
    "a password": re.compile(r"(?i)(?:passw(?:or)?d|secret|token|api_?key)['\"]?\s*[=:]\s*[^\s=:]"),
}


def redacted(text: str) -> str:
    """`text` without what URLs in it may hold of secrets: `https://***@host/path?***`."""
    return _URL_QUERY.sub(r"\1?***", _URL_USER.sub("***@", text))


class ExitCode(IntEnum):
    """Exit codes of every command."""

    DONE = 0
    INTERNAL = 1  # our fault
    CONFIG = 2
    DATA = 3
    CHECKPOINT = 4
    NON_FINITE = 5
    LEDGER = 6
    PREEMPTED = 75  # EX_TEMPFAIL: run the same command again


class UserError(ValueError):
    """Something the user can mend. The message names the value, the rule and the remedy; no traceback is shown."""

    exit_code = ExitCode.CONFIG


class ConfigError(UserError):
    """The configuration asks for something impossible."""


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

    `environment`: its variables that are named like secrets are what nobody may repeat in a configuration.
    """
    what = next((name for name, shape in _SHAPES_OF_SECRETS.items() if shape.search(text)), None)
    for name, value in environment.items():
        if _NAME_OF_A_SECRET.search(name) and len(value) >= SHORTEST_SECRET and value in text:
            what = f"the value of {name}"
    if what is not None:
        raise ConfigError(
            f"{key} must hold no secret, and this looks like {what}: it would be copied into config.yaml, the record of"
            " the command and every log. Give it through the environment (WANDB_API_KEY, AWS's variables) or ~/.netrc."
        )


class DataError(UserError):
    """Shards, images or labels are not what they must be."""

    exit_code = ExitCode.DATA


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or belongs to another model."""

    exit_code = ExitCode.CHECKPOINT


class NonFiniteError(UserError):
    """A loss or a gradient is NaN or infinite."""

    exit_code = ExitCode.NON_FINITE


class LedgerError(UserError):
    """The bytes predicted and the bytes measured disagree."""

    exit_code = ExitCode.LEDGER


class PeerLost(UserError):
    """Another rank ended or fell silent. Its exit code tells why, so that of this one must not be a telling one."""

    exit_code = ExitCode.INTERNAL


class Preempted(UserError):
    """The cluster wants the machine back; the state is saved and the same command goes on."""

    exit_code = ExitCode.PREEMPTED
