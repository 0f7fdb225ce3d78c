"""Can a network that others wrote be trained here? Tried on two pictures, before any rank starts.

    python -m pipeline.models.trial JSON        in a process of its own: the parent of the ranks imports no torch

What is wrong is printed as a sentence, on the stdout that this process was given; what the network prints goes to
stderr.
"""

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config.model import ModelConfig
from pipeline.core.errors import ConfigError, UserError
from pipeline.core.processes import our_module
from pipeline.core.typed import build, require
from pipeline.models import external, zoo

if TYPE_CHECKING:
    from torch import nn

NUM_PICTURES = 2
NUM_CLASSES = 10
"""Outputs where the number of classes is not known yet."""
LONGEST_SECONDS = 600


@dataclass(frozen=True)
class Trial:
    """What is tried."""

    model: ModelConfig
    num_classes: int
    side: int
    """Of a picture, in pixels."""
    per_rank: int
    """Pictures that a rank trains on at once."""


def try_apart(model: ModelConfig, num_classes: int | None, *, side: int, per_rank: int) -> None:
    """Try a network that others wrote in a process of its own; of ours nothing needs to be tried.

    Args:
        model: Name and metaparameters of the model.
        num_classes: Outputs of the classifier; None: not known yet.
        side: Side of a picture in pixels.
        per_rank: Pictures that a rank trains on at once.

    Raises:
        ConfigError: As `try_out`, and as `zoo.build`.
    """
    if not external.is_external(model.name):
        return
    trial = Trial(model, num_classes or model.num_classes or NUM_CLASSES, side, per_rank)
    command = [*our_module("pipeline.models.trial"), json.dumps(dataclasses.asdict(trial))]
    try:
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=LONGEST_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{model.name} was not built and tried within {LONGEST_SECONDS} s: does it wait?") from error
    if ended.stdout:
        raise ConfigError(ended.stdout)
    require(ended.returncode == 0, f"Trying {model.name} ended with exit code {ended.returncode}: see above.")


def try_out(model: "nn.Module", name: str, *, num_classes: int, side: int, per_rank: int) -> None:
    """Let a copy of a network on the CPU make a step with two pictures. No random number of torch's is used up.

    Args:
        model: The network.
        name: Of it, for messages.
        num_classes: Outputs that it must have.
        side: Side of a picture in pixels.
        per_rank: Pictures that a rank trains on at once.

    Raises:
        ConfigError: It raises, its output is not (pictures, classes), or a parameter gets no gradient.
    """
    import torch

    num_pictures = min(NUM_PICTURES, per_rank)
    lazy = [key for key, value in model.named_parameters() if torch.nn.parameter.is_lazy(value)]
    require(not lazy, f"{name}: {', '.join(lazy[:3])} has no shape before the first picture (Lazy...): give its sizes.")
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            tried = copy.deepcopy(model).cpu().train()
            logits_BK = tried(torch.rand(num_pictures, 3, side, side))
        except Exception as error:
            said = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"{name} cannot train on {num_pictures} pictures of {side} x {side} pixels: {type(error).__name__}"
                f" ({said}). Set data.size to what it takes, or correct the network."
            ) from error
        wanted = (num_pictures, num_classes)
        if not isinstance(logits_BK, torch.Tensor):
            raise ConfigError(
                f"{name} returns {type(logits_BK).__name__} in training, not one tensor (pictures, classes) of logits:"
                " switch further outputs off, as `aux_logits: false` among model.metaparameters does."
            )
        require(
            tuple(logits_BK.shape) == wanted and logits_BK.is_floating_point(),
            f"{name} gives {logits_BK.dtype} of shape {tuple(logits_BK.shape)} for {num_pictures} pictures, not logits"
            f" of shape {wanted}: a network maps (B, 3, H, W) pictures to (B, num_classes) logits.",
        )
        require(logits_BK.requires_grad, f"{name} has no parameter to train.")
        logits_BK.float().logsumexp(1).sum().backward()
    idle = [key for key, value in tried.named_parameters() if value.requires_grad and value.grad is None]
    require(
        not idle,
        f"{name}: {len(idle)} of its parameters get no gradient, such as {', '.join(idle[:3])}, and data parallelism"
        " would wait for them: use them in forward, remove them, or set requires_grad to False.",
    )


def main(text: str) -> int:
    """Do what `try_apart` asks for; returns the exit code."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})  # blocked by the parent of the ranks
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    values: dict[str, Any] = json.loads(text)
    trial = Trial(**{**values, "model": build(ModelConfig, values["model"])})
    told = trial.model
    try:
        model = zoo.build(told.name, trial.num_classes, allow_code=told.allow_code, **told.metaparameters)
        try_out(model, told.name, num_classes=trial.num_classes, side=trial.side, per_rank=trial.per_rank)
    except UserError as error:
        answer.write(str(error))
        answer.flush()
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
