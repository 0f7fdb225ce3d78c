"""What an optimiser keeps of each parameter: its momenta, as checkpoints hold them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pipeline.run.checkpoint_checks import unusable

MOMENTA = {"momentum_buffer": "momentum", "exp_avg": "mean gradient", "exp_avg_sq": "mean squared gradient"}
"""What SGD and AdamW keep of each parameter, in its shape; AdamW also counts its steps."""


def check_momenta(optimizer_state: Mapping[str, Any], parameters: Sequence[nn.Parameter]) -> None:
    """Raise ValueError unless each momentum that was saved is one of a parameter; torch would take it as it is."""
    state = optimizer_state["state"]
    if any(group.get("momentum", True) for group in optimizer_state["param_groups"]) and not state:
        raise ValueError("the momenta are missing")
    for number, kept in state.items():
        if number not in range(len(parameters)):
            raise ValueError(f"the momentum of parameter {number} is of none of the {len(parameters)} there are")
        expected = {key: parameters[number].float() for key in MOMENTA} | {"step": torch.zeros(())}
        for key, value in kept.items():
            if key not in expected or value is None:
                continue
            name = f"the {MOMENTA.get(key, 'count of steps')} of parameter {number}"
            if wrong := unusable(name, value, expected[key]):
                raise ValueError(wrong)
            if (value.shape, value.dtype) != (expected[key].shape, torch.float32):
                raise ValueError(f"{name} is {tuple(value.shape)} of {value.dtype}")
