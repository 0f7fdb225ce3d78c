"""One attempt at a run: the trainer, what it records, and what it leaves when it ends."""

import contextlib
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, RichProgressBar
from pytorch_lightning.trainer.connectors.checkpoint_connector import _CheckpointConnector

from pipeline.comm.ledger.document import Conditions
from pipeline.comm.ledger.ledger import Ledger
from pipeline.comm.ledger.reconcile import Reconciler
from pipeline.comm.powersgd import PowerSGD
from pipeline.comm.strategy import MeteredDDP, MeteredDDPStrategy, rebuild_buckets
from pipeline.config.training import TrainConfig
from pipeline.core.errors import CheckpointError, DataError
from pipeline.core.files import write_json_atomic
from pipeline.core.schemas.ledger import LedgerJson
from pipeline.data.batches import LoadedBatch
from pipeline.data.index import ShardIndex
from pipeline.data.quarantine import Quarantine
from pipeline.run import checkpoint as checkpoints
from pipeline.run.directory import RunDirectory
from pipeline.run.launch.environment import RankEnvironment
from pipeline.run.record.tracking import Tracker
from pipeline.training import resume
from pipeline.training.attempt import Recorder
from pipeline.training.learner import NAME_PREFIX, Learner, StepResult
from pipeline.training.patience import Patience
from pipeline.training.plan import StepPlan
from pipeline.training.world import World

LEDGER_EVERY_SECONDS = 30.0
NO_STEP_TIMED = "No step of this attempt has been timed."


class BucketWarmUp(Callback):
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


class Persistence(Callback):
    """Puts our facts into every checkpoint, and keeps `ledger.json` fresh.

    A killed attempt can only report what it wrote: the ledger is written before every checkpoint, and between them when
    it is older than LEDGER_EVERY_SECONDS.
    """

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        directory: RunDirectory,
        ledger: Ledger,
        plan: StepPlan,
        powersgd: PowerSGD | None,
        shards_hash: str,
    ) -> None:
        self.shards_hash = shards_hash
        self.config, self.world, self.directory, self.ledger, self.plan = config, world, directory, ledger, plan
        self.powersgd = powersgd
        self.recorder: Recorder | None = None
        self._written = time.monotonic()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Absolute step, and everything that neither the weights nor the optimiser hold. Plain types only."""
        del trainer
        assert isinstance(pl_module, Learner) and self.recorder is not None
        step = pl_module.committed_steps
        compression = self._compression_state()  # before the ledger's: gathering it is traffic
        checkpoint["global_step"] = step
        checkpoint["epoch"] = step // self.plan.steps_per_epoch
        checkpoint[checkpoints.SECTION] = {
            "step": step,
            "world_size": self.world.size,
            "model": self.config.model.name,
            "num_parameters": sum(parameter.numel() for parameter in pl_module.model.parameters()),
            "num_classes": pl_module.num_classes,
            "metaparameters": self.config.model.metaparameters,
            "must_match": resume.must_match(self.config, self.shards_hash),
            "free_fields": resume.free_fields(self.config),
            "best_score": self.recorder.best_score,
            "owed_row": self.recorder.owed_row,
            "ledger": self.ledger.state_dict(),
            "learner": pl_module.extra_state(),
            "powersgd": compression,
        }

    def _compression_state(self) -> dict[str, Any] | None:
        """Of PowerSGD, where the run has it. Collective."""
        if self.powersgd is None:
            return None
        with self.world.meter.phase("checkpoint"), self.world.meter.origin("gradients"):
            return self.powersgd.state_dict()

    def write_ledger(self, *, ended: bool, only_if_old: bool = False) -> None:
        """`ledger.json`, by rank 0."""
        assert self.recorder is not None
        now = time.monotonic()
        if not self.world.is_first or (only_if_old and now - self._written < LEDGER_EVERY_SECONDS):
            return
        self._written = now
        p50, p90 = self.recorder.clock.percentiles() or (None, None)
        conditions = Conditions(
            run=self.config.name,
            model=self.config.model.name,
            hook=self.config.comm.hook,
            global_batch=self.config.batch.global_size,
            step_seconds_p50=p50,
            step_seconds_p90=p90,
            data_wait_seconds=self.recorder.clock.mean_wait_seconds(),
            communication=self.world.timeline.medians(),
            why_untimed=self.world.timeline.why_off or NO_STEP_TIMED,
        )
        write_json_atomic(self.directory.ledger, self.ledger.to_json(conditions, ended=ended))


class Saver:
    """Saves checkpoints: the record and the ledger first, then the state, then the best one kept beside the last.

    In this order a kill at any moment leaves no checkpoint that knows of a step which the files beside it lack.
    """

    def __init__(
        self, run: RunDirectory, keep: int, tracker: Tracker, persistence: Persistence, world: World, patience: Patience
    ) -> None:
        self.run, self.tracker, self.persistence, self.world, self.patience = run, tracker, persistence, world, patience
        self.io = checkpoints.AtomicCheckpointIO(keep=keep, raises=False)
        self.trainer: pl.Trainer | None = None

    def save(self, step: int, best_score: float | None) -> None:
        """The state after `step` steps, by all ranks alike; kept as best too where `best_score` is given.

        Raises:
            CheckpointError: on every rank, when rank 0 could not save, or another process has taken the run over.
        """
        with self.patience.pause():
            self._save(step, best_score)

    def _save(self, step: int, best_score: float | None) -> None:
        assert self.trainer is not None
        path = checkpoints.checkpoint_path(self.run.checkpoints, step)
        verdict = self.persistence.ledger.compare()

        def write_record() -> None:
            self.run.check_owned()
            with self.run.writing():
                self.tracker.sync()
                self.persistence.write_ledger(ended=False)

        self._agree(write_record)
        # All ranks meet in there after rank 0 has written, so that a failure is kept for the next line.
        self.trainer.save_checkpoint(path)
        self._agree(lambda: self._settle(path, best_score))
        verdict.refuse()  # now that nothing can be lost

    def _agree(self, work: Callable[[], None]) -> None:
        with self.world.meter.phase("checkpoint"), self.world.exchanging("other"):
            self.world.agree(work)

    def _settle(self, path: Path, best_score: float | None) -> None:
        self.io.raise_failure()
        if best_score is not None and self.world.is_first:
            self.io.keep_as_best(path, best_score, "val/top1")


@contextlib.contextmanager
def left_behind(recorder: Recorder, persistence: Persistence) -> Iterator[None]:
    """However the block ends, the last row and the ledger are written. What ended it is not hidden by a full disk.

    Nothing is written any more where another process has taken the run over.
    """
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError, CheckpointError):
            persistence.directory.check_owned()
            recorder.flush()
            persistence.write_ledger(ended=True)
        raise
    recorder.flush()
    persistence.write_ledger(ended=True)


class Stopping(Callback):
    """Lets a signal end the attempt where all ranks agree, and makes up for a validation that one broke off."""

    def __init__(self, world: World, recorder: Recorder) -> None:
        self.world, self.recorder = world, recorder

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on there is something to save."""
        assert isinstance(pl_module, Learner)
        learner = pl_module
        learner.stop_asked = lambda: self.world.stop.asked
        learner.on_stop_in_validation = lambda: self.recorder.leave(learner.committed_steps)
        self.world.stop.begin_training()
        if self.recorder.validation_is_owed:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing is left to be broken off."""
        del trainer, pl_module
        self.world.stop.end_training()


class BadSamples(Callback):
    """Names pictures that do not decode, once each over all ranks, and stops the run beyond the budget."""

    def __init__(self, index: ShardIndex, max_bad_fraction: float, path: Path) -> None:
        self.quarantine = Quarantine(index, max_bad_fraction, path)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Raises DataError beyond the budget; the other ranks end with this one."""
        del trainer, pl_module, batch_idx
        for sample in self.quarantine.add(batch.bad):
            print(f"warning: another picture takes the place of {sample.reason}", file=sys.stderr, flush=True)

    def sentence(self) -> str:
        """How many pictures were replaced in this run, and where they are named; empty if none were."""
        quarantine = self.quarantine
        if not (number := quarantine.refresh()):
            return ""
        return f"  quarantine  {number} of {quarantine.index.num_samples:,} pictures were replaced: {quarantine.path}\n"

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A validation result that leaves pictures out is refused: it would not be this split's."""
        del trainer, pl_module, outputs, batch_idx, dataloader_idx
        if batch.bad:
            raise DataError(
                f"Validation cannot use {'; '.join(sample.reason for sample in batch.bad[:5])}: a result without it"
                " would be another split's. Prepare the split again without it."
            )


def make_reconciler(config: TrainConfig, world: World) -> Reconciler | None:
    """Ready to compare the ranks' counts; None where the kernel counts nothing. Collective."""
    if world.counter is None:
        return None
    strict = world.compute.backend == "gloo" if config.comm.strict is None else config.comm.strict
    reconciler = Reconciler(world.counter, world.rank, world.placement, strict=strict)
    reconciler.start()
    return reconciler


def previous_ledger(directory: RunDirectory) -> LedgerJson | None:
    """The ledger.json an earlier attempt left, if it left one that can be read."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(directory.ledger.read_text())


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


def make_trainer(
    config: TrainConfig,
    world: World,
    plan: StepPlan,
    start_step: int,
    callbacks: list[Callback],
    io: checkpoints.AtomicCheckpointIO,
    powersgd: PowerSGD | None = None,
) -> pl.Trainer:
    """Lightning's trainer for the steps that remain. It saves, logs and requeues nothing by itself."""
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
        max_steps=plan.num_steps - start_step,
        max_epochs=1,  # one stream of steps: epochs are ours to count
        accumulate_grad_batches=plan.batch.num_micro_batches,
        callbacks=callbacks,
        plugins=[io],
        limit_val_batches=1.0 if plan.validate_every_steps else 0,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=config.run_root,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=any(isinstance(callback, RichProgressBar) for callback in callbacks),
    )
    trainer._checkpoint_connector.__class__ = _NoPickUp
    return trainer


class _NoPickUp(_CheckpointConnector):
    """Lightning, inside a Slurm job, would resume from any `hpc_ckpt_N.ckpt` it finds; a run resumes from its own."""

    @property
    def _hpc_resume_path(self) -> str | None:
        return None


def validate_by_plan(trainer: pl.Trainer, learner: Learner, plan: StepPlan) -> None:
    """Let Lightning validate after the steps the plan says.

    Its own interval counts the micro-batches of this attempt, so a resumed run would validate at other steps.
    """

    def due(_: Any) -> bool:
        return learner.between_steps and plan.validation_due(learner.committed_steps)

    trainer.fit_loop.epoch_loop._should_check_val_fx = due  # type: ignore[method-assign]


def progress_bar() -> RichProgressBar | None:
    """A bar on a terminal, nothing elsewhere: log files are not terminals."""
    return RichProgressBar(leave=True) if sys.stdout.isatty() else None


def connect(
    trainer: pl.Trainer, learner: Learner, plan: StepPlan, recorder: Recorder, persistence: Persistence, saver: Saver
) -> None:
    """Introduce to one another what could not be made in one go."""
    saver.trainer = trainer
    # Lightning's handler would broadcast from inside the signal: one rank alone would wait for the others for ever.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    persistence.recorder = recorder
    validate_by_plan(trainer, learner, plan)

    def on_step(result: StepResult) -> None:
        recorder.on_step(result)
        persistence.write_ledger(ended=False, only_if_old=True)

    learner.on_step = on_step
