"""DDP with every byte attributed: the gradient hook, buffer sync, Lightning's own collectives.

Lightning 2.6 registers a DDP communication hook only on CUDA devices (strategies/ddp.py, `_register_ddp_hooks`) and
says nothing otherwise; here the hook is registered on every device.
"""

# No `from __future__ import annotations`: DDP compares the hook's annotations with the classes themselves.
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.parallel import DistributedDataParallel

from pipeline.comm.collectives import CollectiveMeter
from pipeline.comm.hooks import HOOKS, Hook
from pipeline.comm.powersgd import PowerSGD
from pipeline.comm.timeline import Timeline


class MeteredDDP(DistributedDataParallel):
    """DistributedDataParallel whose traffic the meter can attribute; also usable without Lightning.

    meter: attached to the default process group, or a detached one, then this is plain DDP with `hook`.
    timeline: of `meter`; None: nothing is timed.
    hook: a key of HOOKS, or a PowerSGD. name_prefix: removed from the front of parameter names, e.g. "model.".
    Further keywords are DistributedDataParallel's.
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
        self._meter, self._timeline = meter, timeline or Timeline(meter, enabled=False)
        self.powersgd = hook if isinstance(hook, PowerSGD) else None
        inner = HOOKS[hook] if isinstance(hook, str) else hook.reduce
        if dist.get_world_size() == 1:
            return
        if self.powersgd is not None:
            meter.callback_origin = "gradients"  # from there it issues its second and third all-reduce
        if meter.enabled:
            names = _names_by_id(module, name_prefix)
            self.register_comm_hook(None, _metered(inner, meter, self._timeline, names))
        elif hook != "none":
            self.register_comm_hook(None, inner)

    def _sync_buffers(self) -> None:
        with self._meter.origin("buffers"), self._timeline.waiting():
            super()._sync_buffers()


def _metered(inner: Hook, meter: CollectiveMeter, timeline: Timeline, name_of: dict[int, str]) -> Hook:
    """`inner`, recorded and timed. DDP insists that the second parameter is called `bucket`."""

    def hook(state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        meter.record_bucket(
            bucket.index(), bucket.buffer().nbytes, lambda: [name_of[id(p)] for p in bucket.parameters()]
        )
        with meter.origin("gradients"):
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


class MeteredDDPStrategy(DDPStrategy):
    """Lightning's DDPStrategy with MeteredDDP inside, the phases of the run told to the meter, and its steps timed.

    Phases: `train` while Lightning trains, `validation` inside validation, `checkpoint` inside `save_checkpoint`,
    `startup` before and after all that. What Lightning issues through the strategy counts as `lightning` unless an
    origin is set around it; what nobody claims is `other`.

    bucket_megabytes: DDP's bucket_cap_mb (MiB), the first bucket included; None: torch's default. Further keywords are
    DDPStrategy's: cluster_environment, process_group_backend, timeout, accelerator, parallel_devices, ...
    """

    def __init__(
        self,
        *,
        meter: CollectiveMeter,
        timeline: Timeline | None = None,
        hook: str | PowerSGD = "none",
        bucket_megabytes: float | None = None,
        find_unused_parameters: bool = False,
        name_prefix: str = "",
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("gradient_as_bucket_view", True)
        super().__init__(bucket_cap_mb=bucket_megabytes, find_unused_parameters=find_unused_parameters, **kwargs)
        self.meter = meter
        self.timeline = timeline or Timeline(meter, enabled=False)
        self._hook = hook
        self._name_prefix = name_prefix
        self._phase_before_validation = "startup"

    # --- set-up ---

    def setup_environment(self) -> None:
        super().setup_environment()
        self.meter.attach()

    def setup(self, trainer: pl.Trainer) -> None:
        # Outside fitting, Lightning broadcasts the module's state here; inside, DDP's constructor does.
        with self.meter.origin("parameters"):
            super().setup(trainer)
        self._claim_sigterm_broadcast(trainer)

    def _setup_model(self, model: torch.nn.Module) -> MeteredDDP:
        return MeteredDDP(
            model,
            meter=self.meter,
            timeline=self.timeline,
            hook=self._hook,
            name_prefix=self._name_prefix,
            device_ids=self.determine_ddp_device_ids(),
            **self._ddp_kwargs,
        )

    def _register_ddp_hooks(self) -> None:
        """MeteredDDP has registered its hook itself, on every device."""

    def _claim_sigterm_broadcast(self, trainer: pl.Trainer) -> None:
        """Lightning broadcasts one int64 before every micro-batch, past the strategy; make it Lightning's."""
        loop = trainer.fit_loop.epoch_loop
        inner = type(loop)._broadcast_sigterm_tensor

        def claimed() -> None:
            with self.meter.origin("lightning"), self.timeline.waiting():
                inner(loop)

        loop._broadcast_sigterm_tensor = claimed

    # --- Lightning's own collectives ---

    @contextmanager
    def _lightnings_own(self) -> Iterator[None]:
        with self.meter.origin("lightning", only_if_unknown=True), self.timeline.waiting():
            yield

    def barrier(self, name: Any = None, *args: Any, **kwargs: Any) -> None:
        # Lightning waits for all ranks after a checkpoint, outside `save_checkpoint`; the name tells.
        phase = "checkpoint" if name == "Trainer.save_checkpoint" else self.meter.phase_name
        with self.meter.phase(phase), self._lightnings_own():
            super().barrier(name, *args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        with self._lightnings_own():
            return super().broadcast(obj, src)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        with self._lightnings_own():
            return super().reduce(tensor, group, reduce_op)

    def all_gather(self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False) -> torch.Tensor:
        with self._lightnings_own():
            return super().all_gather(tensor, group, sync_grads)

    # --- the step ---

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.timeline.forward():
            return super().training_step(*args, **kwargs)

    def backward(self, closure_loss: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self.timeline.backward():
            return super().backward(closure_loss, *args, **kwargs)

    # --- phases ---

    def on_train_start(self) -> None:
        super().on_train_start()
        self.meter.set_phase("train")

    def on_train_end(self) -> None:
        self.meter.set_phase("startup")
        super().on_train_end()

    def on_validation_start(self) -> None:
        self._phase_before_validation = self.meter.set_phase("validation")
        super().on_validation_start()

    def on_validation_end(self) -> None:
        super().on_validation_end()
        self.meter.set_phase(self._phase_before_validation)
        if isinstance(self.model, MeteredDDP):
            # A forward without gradients makes DDP skip the next buffer sync. Asking for it again keeps every training
            # step's traffic the same, wherever validation falls, so that a resumed run moves what an unbroken one does.
            self.model.require_forward_param_sync = True

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.meter.phase("checkpoint"):
            super().save_checkpoint(*args, **kwargs)


def rebuild_buckets(
    ddp: DistributedDataParallel, make_loss: Callable[[], torch.Tensor], meter: CollectiveMeter, num_passes: int = 2
) -> None:
    """Let DDP settle its gradient buckets before the first real step.

    DDP starts with one layout and changes it after the first backward pass, in the order gradients became ready. A sum
    over more than two ranks depends on the layout, so a resumed run would differ from an unbroken one in its first
    step. After this call every step uses the final layout.

    make_loss: forward through `ddp` and a scalar loss, on any batch; called `num_passes` times, on all ranks alike.
    Buffers and random states are restored, gradients end as None, neither the optimiser nor the state of a compression
    is involved. The traffic counts as phase `startup`.
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
