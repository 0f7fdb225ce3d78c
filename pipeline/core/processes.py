"""Other processes of this program: the same code, whatever lies in the working directory."""

import sys
from pathlib import Path

CODE_ROOT = Path(__file__).resolve().parents[2]


def our_module(name: str) -> list[str]:
    """Return the command that runs a module of ours, such as `pipeline.train`; its arguments follow.

    Python looks first in the working directory, where a `pipeline.py` would stand in for all of this (-P: it does not).
    In a checkout that is not installed, that is where the code is.
    """
    try:
        is_in_checkout = Path.cwd() == CODE_ROOT
    except FileNotFoundError:  # the directory was removed
        is_in_checkout = False
    return [sys.executable, *(() if is_in_checkout else ("-P",)), "-m", name]
