"""Plain values between ranks, as JSON in tensors: what torch's object collectives would send as pickles.

A pickle is a program. Whoever slips into the process group, or into one connection of it, would run it on every rank
that reads it; of JSON it can make a wrong value at most.
"""

import json
from typing import Any

import torch
import torch.distributed as dist

from pipeline.core.errors import PeerLost

MOST_BYTES = 16 * 2**20
"""Longest text that is sent, or that a rank makes room for."""


def gather_values(value: Any, device: torch.device) -> list[Any]:
    """Return the values of all ranks, in their order. Collective over the default process group.

    Args:
        value: What JSON can say; tuples arrive as lists.
        device: Where this rank's tensors are.

    Returns:
        A value per rank.

    Raises:
        PeerLost: What arrived is no rank's word.
        ValueError: The value's JSON is longer than MOST_BYTES.
    """
    text = _encode(value)
    world_size = dist.get_world_size()
    lengths = list(torch.zeros(world_size, 1, dtype=torch.int64, device=device).unbind())
    dist.all_gather(lengths, torch.tensor([len(text)], device=device))
    num_bytes = [_require_length(int(length)) for length in lengths]
    padded = torch.zeros(max(num_bytes), dtype=torch.uint8)
    padded[: len(text)] = text
    texts = list(torch.zeros(world_size, max(num_bytes), dtype=torch.uint8, device=device).unbind())
    dist.all_gather(texts, padded.to(device))
    return [_decode(text[:length]) for text, length in zip(texts, num_bytes, strict=True)]


def broadcast_value(value: Any, source: int, device: torch.device) -> Any:
    """Return the value of one rank on every rank. Collective over the default process group.

    Args:
        value: On `source` what JSON can say; on others it is not looked at.
        source: Rank that gives the value.
        device: Where this rank's tensors are.

    Returns:
        The value as JSON brings it, on `source` too.

    Raises:
        PeerLost: What arrived is no rank's word.
        ValueError: The value's JSON is longer than MOST_BYTES.
    """
    is_source = dist.get_rank() == source
    text = _encode(value) if is_source else torch.zeros(0, dtype=torch.uint8)
    length = torch.tensor([len(text)], device=device)
    dist.broadcast(length, source)
    num_bytes = _require_length(int(length))
    text = text.to(device) if is_source else torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    dist.broadcast(text, source)
    return _decode(text)


def _encode(value: Any) -> torch.Tensor:
    text = bytearray(json.dumps(value).encode())
    if len(text) > MOST_BYTES:
        raise ValueError(f"a value of {len(text)} bytes is to be sent to the other ranks, and {MOST_BYTES} is the most")
    return torch.frombuffer(text, dtype=torch.uint8)


def _require_length(num_bytes: int) -> int:
    if not 0 < num_bytes <= MOST_BYTES:
        raise PeerLost(
            f"Another rank announces a value of {num_bytes} bytes, which no rank sends: is it one of this run?"
        )
    return num_bytes


def _decode(text: torch.Tensor) -> Any:
    try:
        return json.loads(text.cpu().numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise PeerLost("Another rank sent what is no JSON, and no rank's word: is it one of this run?") from error
