"""Variables that torch and Lightning read: with which they do not start, hang, or do something else than keys say."""

import contextlib
import gc
import os
from collections.abc import Iterator, Mapping

from pipeline.core.errors import ConfigError

LEVEL = "TORCH_DISTRIBUTED_DEBUG"
OF_LIGHTNINGS_TRAINER = "PL_TRAINER_"
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
READ_BY_TORCH = ("TORCH_", "TORCHELASTIC_", "PYTORCH_")


def check_variables(environment: Mapping[str, str]) -> None:
    """Refuse variables under which a run cannot go well.

    Under the debug level DETAIL torch 2.14 wraps each process group, and ends with SIGSEGV in the first backward pass;
    the collectives that the wrapper adds would be in no account anyway. Lightning 2.6 takes each argument of its
    Trainer from PL_TRAINER_... where it is not given: a run that was told to train for 3 steps did 1.

    Raises:
        ConfigError: One of them is set.
    """
    level = environment.get(LEVEL, "")
    if level.upper() == "DETAIL":
        raise ConfigError(
            f"{LEVEL}={level} wraps every process group and adds collectives that no ledger knows of; torch crashes"
            f" under it. Set {LEVEL}=INFO, or unset it."
        )
    found = sorted(name for name in environment if name.startswith(OF_LIGHTNINGS_TRAINER))
    if found:
        raise ConfigError(
            f"{', '.join(found)}: Lightning would obey it in place of what keys say (trainer.*, cluster.*): unset it,"
            " and set the key."
        )


def start_torch(*, is_torchrun: bool) -> None:
    """Import torch, which reads variables while it is imported.

    Args:
        is_torchrun: Whether torchrun may have started this rank, whose agent then is where ranks meet. What an earlier
            one left in the environment would have every rank wait for an agent that is not there.

    Raises:
        ConfigError: torch does not take one of its variables.
    """
    if not is_torchrun:
        os.environ.pop(AGENT_STORE, None)
    try:
        with _without_collections():
            import torch.distributed  # noqa: F401
            import torchmetrics  # noqa: F401  (with torchvision and torch's compiler: as long again as torch)
    except (ValueError, RuntimeError) as error:
        found = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(READ_BY_TORCH)]
        if not found:
            raise
        first = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"torch does not start ({first}). Of what it reads, unset what is wrong: {', '.join(found)}."
        ) from error


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Import without Python's garbage collector, and keep what was imported out of its sight for good.

    Half a million objects that live as long as the process: to search them while they come costs an eighth of the
    import, and each full collection of a training 0.3 s in the middle of a step (an EPYC core, Python 3.11).
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
