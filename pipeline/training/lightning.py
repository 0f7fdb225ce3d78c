"""Everything that is held against Lightning: the one file to read when Lightning is upgraded. Written for 2.6.6.

Private names that are touched, and why:

- `Strategy._setup_model`, `_ddp_kwargs`, `_register_ddp_hooks` (MeteredDDPStrategy): DDP must be MeteredDDP, which
  registers its communication hook itself. Lightning registers one on CUDA devices only, and says nothing otherwise.
- `epoch_loop._broadcast_sigterm_tensor` (MeteredDDPStrategy): a collective before every micro-batch that bypasses the
  strategy; it is counted as Lightning's. What it says, that a signal came, never comes here (below), so in local SGD,
  where a step exchanges nothing, it is left out.
- `trainer._checkpoint_connector` (_NoPickUp): inside a Slurm job it would resume from any `hpc_ckpt_N.ckpt` it finds.
- `trainer._signal_connector.register_signal_handlers` (make_trainer): its handler would broadcast from inside the
  signal, and one rank alone would wait for the others for ever.
- `epoch_loop._should_check_val_fx` (make_trainer): Lightning's own interval counts the micro-batches of this attempt,
  so that a resumed run would validate after other steps.
- `epoch_loop.val_loop.run`, with `trainer.validating` set by hand (validate_now): a validation before the first step.

Relied upon without being private: a callback's `on_train_batch_end` comes after the optimiser step and before
`_should_check_val_fx`; callbacks are called in the order of their list; `val_loop` calls `on_validation_end` of
callbacks inside the strategy's validation phase.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.trainer.connectors.checkpoint_connector import _CheckpointConnector

from pipeline.comm.collectives import CollectiveMeter
from pipeline.comm.ddp import MeteredDDP, rebuild_buckets
from pipeline.comm.plain_values import broadcast_value
from pipeline.comm.powersgd import PowerSGD
from pipeline.comm.timeline import Timeline
from pipeline.data.batches import LoadedBatch
from pipeline.run import checkpoint as checkpoints
from pipeline.run.launch.environment import RankEnvironment
from pipeline.training.learner import NAME_PREFIX, Learner
from pipeline.training.setup import Setup
from pipeline.training.world import World

# --- the trainer ---


def make_trainer(
    setup: Setup,
    learner: Learner,
    *,
    callbacks: Sequence[pl.Callback],
    io: checkpoints.AtomicCheckpointIO,
    powersgd: PowerSGD | None,
) -> pl.Trainer:
    """Lightning's trainer for the steps that remain. It saves, logs and requeues nothing by itself.

    Args:
        setup: what was settled before the first step.
        learner: what will be trained; it says whether a step is complete, so that validation may begin.
        callbacks: in the order in which they are called.
        io: writes the checkpoints.
        powersgd: the compression; None: `comm.hook` says how gradients travel.
    """
    config, world, plan = setup.config, setup.world, setup.plan
    quieten()
    strategy = MeteredDDPStrategy(
        meter=world.meter,
        timeline=world.timeline,
        hook=powersgd or config.comm.hook,
        bucket_megabytes=config.comm.bucket_megabytes,
        find_unused_parameters=config.comm.find_unused_parameters,
        name_prefix=NAME_PREFIX,
        cluster_environment=RankEnvironment(world.ranks),
        process_group_backend=world.compute.backend,
        timeout=timedelta(seconds=config.cluster.timeout_seconds),
    )
    trainer = pl.Trainer(
        accelerator=world.compute.accelerator,
        devices=world.ranks.local_world_size,
        num_nodes=world.ranks.num_nodes,
        strategy=strategy,
        precision=cast(Any, world.compute.lightning_precision),
        max_steps=plan.num_steps - setup.start.step,
        max_epochs=1,  # one stream of steps: epochs are ours to count
        accumulate_grad_batches=plan.batch.num_micro_batches,
        callbacks=list(callbacks),
        plugins=[io],
        limit_val_batches=1.0 if plan.validate_every_steps else 0,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=config.run_root,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )

    def validation_due(_: Any) -> bool:
        return learner.between_steps and plan.validation_due(learner.committed_steps)

    trainer._checkpoint_connector.__class__ = _NoPickUp
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._should_check_val_fx = validation_due  # type: ignore[method-assign]
    return trainer


class _NoPickUp(_CheckpointConnector):
    """A run resumes from its own checkpoint, and from no other."""

    @property
    def _hpc_resume_path(self) -> str | None:
        return None


def validate_now(trainer: pl.Trainer) -> None:
    """Validate inside `fit`, where Lightning would not."""
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True


def quieten() -> None:
    """Silence what Lightning 2.6 says of itself; errors and our own lines stay."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*`srun` command is available.*",  # ranks are started by us, or by srun
        ".*LeafSpec.*",  # Lightning 2.6.6 against torch 2.14, 2026-11
        ".*does not have many workers.*",  # chosen from the cores
        ".*defined a `validation_step` but have no.*",  # trainer.validate_every_steps=0 asks for just that
        ".*You defined a `validation_step` but have no `val_dataloader`.*",  # trainer.validate_every_steps=0
    ):
        warnings.filterwarnings("ignore", message)


class BucketWarmUp(pl.Callback):
    """Two throw-away passes before the first real step, so that every step, a resumed one too, has the same buckets."""

    def __init__(self, world: World, image_size: int) -> None:
        self.world, self.image_size = world, image_size

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """On two grey pictures; nothing of it stays."""
        ddp = trainer.strategy.model
        assert isinstance(pl_module, Learner) and isinstance(ddp, MeteredDDP)
        device = pl_module.device
        shape = (2, 3, self.image_size, self.image_size)
        batch = LoadedBatch(
            images_BCHW=torch.full(shape, 128, dtype=torch.uint8, device=device),
            labels_B=torch.zeros(2, dtype=torch.int64, device=device),
            sample_ids_B=torch.zeros(2, dtype=torch.int64, device=device),
        )
        pl_module.warming_up = True
        rebuild_buckets(ddp, lambda: cast(torch.Tensor, trainer.strategy.training_step(batch, 0)), self.world.meter)
        pl_module.warming_up = False


# --- the strategy ---


class MeteredDDPStrategy(DDPStrategy):
    """Lightning's DDPStrategy with MeteredDDP inside, the phases of the run told to the meter, and its steps timed.

    Phases: `train` while Lightning trains, `validation` inside validation, `checkpoint` inside `save_checkpoint`,
    `startup` before and after all that. What Lightning issues through the strategy counts as `lightning` unless an
    origin is set around it; what nobody claims is `other`.

    Args:
        meter: of the process group.
        timeline: observes `meter`; None: nothing is timed.
        hook: a key of HOOKS, or a PowerSGD.
        bucket_megabytes: DDP's bucket_cap_mb (MiB), the first bucket included; None: torch's default.
        find_unused_parameters: DDP's.
        name_prefix: removed from the front of parameter names, e.g. "model.".
        **kwargs: DDPStrategy's: cluster_environment, process_group_backend, timeout, parallel_devices, ...
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
        self.timeline = timeline or Timeline(1, enabled=False)
        self._hook = hook
        self._name_prefix = name_prefix
        self._phase_before_validation = "startup"

    # --- set-up ---

    def setup_environment(self) -> None:
        """Attach the meter as soon as the process group exists."""
        super().setup_environment()
        self.meter.attach()

    def setup(self, trainer: pl.Trainer) -> None:
        """Count the distribution of the parameters, and claim Lightning's broadcast before every micro-batch."""
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
        module = trainer.lightning_module
        is_left_out = isinstance(module, Learner) and module.rounds is not None

        def claimed() -> None:
            if is_left_out:
                return
            with self.meter.origin("lightning"), self.timeline.waiting():
                inner(loop)

        loop._broadcast_sigterm_tensor = claimed

    # --- Lightning's own collectives ---

    @contextmanager
    def _lightnings_own(self) -> Iterator[None]:
        with self.meter.origin("lightning", only_if_unknown=True), self.timeline.waiting():
            yield

    def barrier(self, name: Any = None, *args: Any, **kwargs: Any) -> None:
        """Count Lightning's own barrier as such."""
        # Lightning waits for all ranks after a checkpoint, outside `save_checkpoint`; the name tells.
        phase = "checkpoint" if name == "Trainer.save_checkpoint" else self.meter.phase_name
        with self.meter.phase(phase), self._lightnings_own():
            super().barrier(name, *args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Count Lightning's own broadcast of a plain value as such; as JSON, where Lightning would send a pickle."""
        with self._lightnings_own():
            return broadcast_value(obj, src, self.root_device)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Count Lightning's own reduction as such."""
        with self._lightnings_own():
            return super().reduce(tensor, group, reduce_op)

    def all_gather(self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False) -> torch.Tensor:
        """Count Lightning's own gathering as such."""
        with self._lightnings_own():
            return super().all_gather(tensor, group, sync_grads)

    # --- the step ---

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Time the forward pass. Within a round neither its gradients travel nor, before it, buffers."""
        module = self.lightning_module
        if isinstance(module, Learner) and not (module.exchanges_gradients or module.warming_up):
            assert isinstance(self.model, MeteredDDP)
            self.model.require_backward_grad_sync = self.model.require_forward_param_sync = False
        with self.timeline.forward():
            return super().training_step(*args, **kwargs)

    def backward(self, closure_loss: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Time the backward pass."""
        with self.timeline.backward():
            return super().backward(closure_loss, *args, **kwargs)

    # --- phases ---

    def on_train_start(self) -> None:
        """Begin the phase `train`."""
        super().on_train_start()
        self.meter.set_phase("train")

    def on_train_end(self) -> None:
        """End the phase `train`."""
        self.meter.set_phase("startup")
        super().on_train_end()

    def on_validation_start(self) -> None:
        """Begin the phase `validation`."""
        self._phase_before_validation = self.meter.set_phase("validation")
        super().on_validation_start()

    def on_validation_end(self) -> None:
        """Return to the phase before, with the buffers to be synchronised again."""
        super().on_validation_end()
        self.meter.set_phase(self._phase_before_validation)
        if isinstance(self.model, MeteredDDP):
            # A forward without gradients makes DDP skip the next buffer sync. Asking for it again keeps every training
            # step's traffic the same, wherever validation falls, so that a resumed run moves what an unbroken one does.
            self.model.require_forward_param_sync = True

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save in the phase `checkpoint`."""
        with self.meter.phase("checkpoint"):
            super().save_checkpoint(*args, **kwargs)
