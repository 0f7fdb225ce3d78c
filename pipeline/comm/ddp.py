"""DDP with every byte attributed: the gradient hook and the buffer sync, in plain torch."""

# No `from __future__ import annotations`: DDP compares the hook's annotations with the classes themselves.
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.parallel import DistributedDataParallel

from pipeline.comm.collectives import CollectiveMeter
from pipeline.comm.hooks import HOOKS, Hook, keep
from pipeline.comm.powersgd import PowerSGD
from pipeline.comm.timeline import Timeline


class MeteredDDP(DistributedDataParallel):
    """DistributedDataParallel whose traffic the meter can attribute; also usable without Lightning.

    Args:
        module: the model.
        meter: attached to the default process group, or a detached one, then this is plain DDP with `hook`.
        timeline: observes `meter`; None: nothing is timed.
        hook: a key of HOOKS, or a PowerSGD; one rank alone compresses nothing.
        name_prefix: removed from the front of parameter names, e.g. "model.".
        **ddp_kwargs: DistributedDataParallel's.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        meter: CollectiveMeter,
        timeline: Timeline | None = None,
        hook: str | PowerSGD = "none",
        name_prefix: str = "",
        **ddp_kwargs: Any,
    ) -> None:
        with meter.origin("parameters"):
            super().__init__(module, **ddp_kwargs)
        self._meter, self._timeline = meter, timeline or Timeline(dist.get_world_size(), enabled=False)
        self.powersgd = hook if isinstance(hook, PowerSGD) else None
        inner = HOOKS[hook] if isinstance(hook, str) else hook.reduce
        if dist.get_world_size() == 1:  # nothing travels, but when buckets are ready is worth knowing
            inner, hook = keep, "none"
        if meter.enabled:
            # PowerSGD issues its second and third all-reduce from callbacks of its first.
            origin = partial(meter.origin, "gradients", claims_callbacks=self.powersgd is not None)
            names = _names_by_id(module, name_prefix)
            self.register_comm_hook(None, _metered(inner, meter, origin, self._timeline, names))
        elif hook != "none":
            self.register_comm_hook(None, inner)

    def _sync_buffers(self) -> None:
        with self._meter.origin("buffers"), self._timeline.waiting():
            super()._sync_buffers()


def _metered(
    inner: Hook,
    meter: CollectiveMeter,
    origin: Callable[[], AbstractContextManager[None]],
    timeline: Timeline,
    name_of: dict[int, str],
) -> Hook:
    """`inner`, recorded and timed. DDP insists that the second parameter is called `bucket`."""

    def hook(state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        meter.record_bucket(
            bucket.index(), bucket.buffer().nbytes, lambda: [name_of[id(p)] for p in bucket.parameters()]
        )
        with origin():
            return timeline.hand_over(bucket.index(), lambda: inner(state, bucket))

    return hook


def _names_by_id(module: torch.nn.Module, name_prefix: str) -> dict[int, str]:
    return {id(parameter): name.removeprefix(name_prefix) for name, parameter in module.named_parameters()}


def gradient_bytes_by_parameter(module: torch.nn.Module, name_prefix: str = "") -> dict[str, int]:
    """Bytes each trainable parameter owes the wire per optimiser step, in the module's order."""
    return {
        name.removeprefix(name_prefix): parameter.nbytes
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def rebuild_buckets(
    ddp: DistributedDataParallel, make_loss: Callable[[], torch.Tensor], meter: CollectiveMeter, num_passes: int = 2
) -> None:
    """Let DDP settle its gradient buckets before the first real step.

    DDP starts with one layout and changes it after the first backward pass, in the order gradients became ready. A sum
    over more than two ranks depends on the layout, so a resumed run would differ from an unbroken one in its first
    step. After this call every step uses the final layout.

    Buffers and random states are restored, gradients end as None, neither the optimiser nor the state of a compression
    is involved. The traffic counts as phase `startup`.

    Args:
        ddp: the model, before its first backward pass.
        make_loss: forward through `ddp` and a scalar loss, on any batch; called on all ranks alike.
        meter: of the process group.
        num_passes: how often `make_loss` is called.
    """
    assert all(p.grad is None for p in ddp.parameters()), "rebuild_buckets() comes before the first backward pass"
    buffers = [(buffer, buffer.clone()) for buffer in ddp.buffers()]
    devices: Sequence[int] = [ddp.device.index] if ddp.device.type == "cuda" else []
    powersgd = ddp.powersgd if isinstance(ddp, MeteredDDP) else None
    resting = powersgd.resting() if powersgd is not None else nullcontext()
    with meter.phase("startup"), torch.random.fork_rng(devices=devices), resting:
        for _ in range(num_passes):
            make_loss().backward()
            for parameter in ddp.parameters():
                parameter.grad = None
    with torch.no_grad():
        for buffer, saved in buffers:
            buffer.copy_(saved)
