"""Secrets: how they are known, in what a configuration holds and in what is printed."""

import os
import re
from collections.abc import Mapping

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
# As their makers document them. 40 hexadecimal digits alone are a revision of git's as often as a W&B key of old, and
# 40 of base64 a hash as often as a secret of AWS's: those are known by a variable that holds them.
_SHAPES_OF_SECRETS = {
    name: re.compile(f"(?<![0-9A-Za-z])(?:{shape})")
    for name, shape in {
        "a W&B key": r"local-[0-9a-f]{40}(?![0-9A-Za-z])|wandb_v1_\w{8}",
        "an AWS key": r"(?:AKIA|ASIA)[0-9A-Z]{16}(?![0-9A-Za-z])",
        "a GitHub token": r"(?:gh[pousr]_|github_pat_)\w{20}",
        "a GitLab token": r"gl(?:pat|ptt|dt|rt|cbt|ft|soat|agent|oas|imt)-[\w-]{16}",
        "a Google key": r"AIza[\w-]{35}|ya29\.[\w-]{20}|GOCSPX-[\w-]{20}",
        "a Hugging Face token": r"(?:hf|api_org)_[0-9A-Za-z]{20}",
        "an API key": r"sk-[0-9A-Za-z_-]{20}|[sr]k_live_\w{16}|npm_[0-9A-Za-z]{36}|pypi-[\w-]{32}",
        "a Slack token": r"xox[abeoprs]-\w{8}|xapp-\d-\w{8}|hooks\.slack\.com/services/\w",
        "a JSON web token": r"eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*",
        "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
        # A short number is none (`max_token=128`), nor what a part of a path begins with (`sweep/token=word`).
        "a password": r"(?i:(?<!/)(?:\w*_)?(?:passw(?:or)?d|secret|token|api_?key|secret_?access_?key))"
        r"['\"]?\s*[=:]\s*(?!\d{1,6}(?![\w.-]))[^\s=:]",
    }.items()
}


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
        if value in text and _is_credential(name, value):
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
