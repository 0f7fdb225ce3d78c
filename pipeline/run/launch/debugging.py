"""Variables with which torch is debugged, and with which it does not start, or not for long."""

import os
from collections.abc import Mapping

from pipeline.core.errors import ConfigError

LEVEL = "TORCH_DISTRIBUTED_DEBUG"
READ_BY_TORCH = ("TORCH_", "TORCHELASTIC_", "PYTORCH_")


def check_debugging(environment: Mapping[str, str]) -> None:
    """Refuse the debug level of torch.distributed under which its process groups and DDP's hooks do not go together.

    torch 2.14 wraps each group then, and ends with SIGSEGV in the first backward pass; the collectives that the wrapper
    adds would be in no account anyway.

    Raises:
        ConfigError: it is set.
    """
    level = environment.get(LEVEL, "")
    if level.upper() == "DETAIL":
        raise ConfigError(
            f"{LEVEL}={level} wraps every process group and adds collectives that no ledger knows of; torch crashes"
            f" under it. Set {LEVEL}=INFO, or unset it."
        )


def start_torch() -> None:
    """Import torch, which reads variables while it is imported.

    Raises:
        ConfigError: it does not take one of them.
    """
    try:
        import torch.distributed  # noqa: F401
    except (ValueError, RuntimeError) as error:
        found = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(READ_BY_TORCH)]
        if not found:
            raise
        first = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"torch does not start ({first}). Of what it reads, unset what is wrong: {', '.join(found)}."
        ) from error
