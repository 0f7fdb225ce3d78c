"""DDP communication hooks: how a bucket of gradients becomes their mean over the ranks."""

# No `from __future__ import annotations`: DDP compares a hook's annotations with the classes themselves.
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

GradientFuture = torch.futures.Future[torch.Tensor]
Hook = Callable[[Any, GradBucket], GradientFuture]


def average(state: object, bucket: GradBucket) -> GradientFuture:
    """Mean over ranks, bit for bit what DDP does without a hook: multiply by 1/n, then sum.

    torch's `allreduce_hook` divides by n instead, which rounds differently when n is not a power of two.
    """
    del state
    buffer = bucket.buffer()
    buffer.mul_(1.0 / dist.get_world_size())
    work = dist.all_reduce(buffer, async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


def keep(state: object, bucket: GradBucket) -> GradientFuture:
    """Mean over one rank: what it has, at once and uncompressed."""
    del state
    buffer = bucket.buffer()
    future: GradientFuture = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else [])
    future.set_result(buffer)
    return future


HOOKS: dict[str, Hook] = {
    "none": average,
    "fp16": default_hooks.fp16_compress_hook,
    "bf16": default_hooks.bf16_compress_hook,
}
