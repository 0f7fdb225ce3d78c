"""One attempt at a run: what happens when a step is done, when a validation is done, and when the attempt ends.

An `Attempt` owns the accounts (ledger, timeline, clock), the record (metrics.jsonl and its mirror) and the saving.
Lightning calls it as a callback; the hooks at the end of the class say when, the methods before them what happens.
"""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pytorch_lightning as pl

from pipeline.comm.ledger.document import Conditions
from pipeline.comm.ledger.ledger import Ledger
from pipeline.comm.powersgd import PowerSGD
from pipeline.core.errors import CheckpointError, DriftError, NonFiniteError, Preempted
from pipeline.core.files import write_json_atomic
from pipeline.core.trees import plain
from pipeline.models.plateau import DeadNetworkDetector, PlateauDetector
from pipeline.run import checkpoint as checkpoints
from pipeline.run.record.tracking import Tracker
from pipeline.training import drift, rank_states, resume, same_run
from pipeline.training.best import Validated
from pipeline.training.learner import Learner
from pipeline.training.lightning import validate_now
from pipeline.training.narrator import Narrator
from pipeline.training.reporter import Reporter
from pipeline.training.setup import Setup
from pipeline.training.step_result import StepResult
from pipeline.training.timing import StepClock, TimedLoader, speed_sentence
from pipeline.training.watchdog import StepWatchdog

LEDGER_EVERY_SECONDS = 30.0
NO_STEP_TIMED, NO_BUCKETS = "No step of this attempt has been timed.", "No step of this attempt exchanged gradients."
STOP_EVERY_BATCHES = 8  # micro-batches of a validation between two looks at whether to stop
Row = dict[str, float | int | None]


class Attempt(pl.Callback):
    """Accounts for every step, records it once, saves when due, and leaves when asked to.

    A kill at any moment leaves no checkpoint that knows of a step which the files beside it lack: the record and the
    ledger are written before every checkpoint.

    Args:
        setup: what was settled before the first step.
        learner: the model in training.
        ledger: prices each step, and compares the ranks' counts.
        powersgd: the compression whose state is saved; None without one.
        tracker: takes one row per step, in order.
        loader: the timed training loader.
        watchdog: is patient while a checkpoint is written.
        narrator: tells each row.
        reporter: shows a validation's pictures, and has the report made after a checkpoint.
    """

    def __init__(
        self,
        setup: Setup,
        learner: Learner,
        *,
        ledger: Ledger,
        powersgd: PowerSGD | None,
        tracker: Tracker,
        loader: TimedLoader,
        watchdog: StepWatchdog,
        narrator: Narrator,
        reporter: Reporter,
    ) -> None:
        self._setup, self.config, self.world = setup, setup.config, setup.world
        self.plan, self.directory = setup.plan, setup.run
        self.learner, self.ledger, self.powersgd = learner, ledger, powersgd
        self.tracker, self.loader, self.watchdog, self.narrator = tracker, loader, watchdog, narrator
        self.reporter = reporter
        self.io = checkpoints.AtomicCheckpointIO(keep=self.config.trainer.keep_checkpoints, raises=False)
        self.clock = StepClock()
        self.plateau = PlateauDetector(
            setup.shards.num_classes, after_steps=max(200, 2 * self.config.recipe.warmup_steps)
        )
        self.dead = DeadNetworkDetector()
        self.shards_hash = setup.shards.training.index_hash
        self.classes = setup.shards.training.classes
        section = setup.start.section
        self.best = Validated.of_section(section)
        """Best validation of the run, earlier attempts included."""
        self.owed_row: Row | None = None
        """For the checkpoint: the row of its step, where validation was due and did not take place."""
        owed = None if section is None else section.get("owed_row")
        # The row of a step whose validation is due but not done; at first, of one that an earlier attempt broke off.
        self._pending: tuple[int, Row] | None = None if owed is None else (setup.start.step, dict(owed))
        self._saved_step = setup.start.step
        self._ledger_written = time.monotonic()

    # --- the life of a step ---

    def step_done(self, result: StepResult) -> None:
        """A step was committed, on all ranks alike: account for it, record it, save it, leave if asked to.

        Raises:
            DriftError: the ranks' weights are not the same.
            NonFiniteError: the gradient stays 0.
            Preempted: asked to leave.
        """
        if result.drifted:
            self._refuse_drift()
        step = result.step
        if result.stop or self.plan.validation_due(step) or self.plan.checkpoint_due(step):
            self.learner.averaging.settle()  # what a step has sent, the kernel must count before the step's end
        row = self._row(result)
        self._pending = (step, row)
        if result.loss is not None and result.grad_norm is not None:  # else the ranks kept the step to themselves
            if warning := self.plateau.update(step, result.loss):
                print(f"warning: {warning}", file=sys.stderr)
            if verdict := self.dead.update(step, result.loss, result.grad_norm):
                raise NonFiniteError(verdict)
        if not self.plan.validation_due(step):  # else the row waits for its results, and the save for the score
            self._write_pending()
            self._save_if_due(step, None)
        self._write_ledger(ended=False, only_if_old=True)
        if result.stop:
            self.leave(step)

    def validated(self, results: Mapping[str, float | int]) -> None:
        """The weights of the last step were validated: complete its row, and save with the score."""
        if self._pending is not None:
            self._pending[1].update({f"val/{key}": results[key] for key in ("loss", "top1", "top5")})
        self.reporter.validated(self.learner.committed_steps, self.learner.last_outcomes)
        self._save_if_due(self.learner.committed_steps, Validated.of_results(results, self.learner.committed_steps))
        self._write_pending()
        self._resume_time()

    def leave(self, step: int) -> None:
        """Save the state after `step` steps, if it is not saved, and end the attempt; after the last step, do nothing.

        Where the step is to be validated, its row goes into the checkpoint instead of the record: the next attempt
        validates first. All ranks alike.

        Raises:
            Preempted: always, but after the last step.
        """
        if step == self.plan.num_steps:
            return
        if not self.plan.checkpoint_every_steps:
            told = f"Asked to stop after step {step}. Nothing is saved: trainer.checkpoint_every_steps=0."
            raise Preempted(told, by_all_ranks=True)
        if self.plan.validation_due(step) and self._pending is not None:
            self.owed_row, self._pending = self._pending[1], None
        self._write_pending()
        if self._saved_step != step:
            self._save(step, None)
        told = f"Asked to stop: step {step} of {self.plan.num_steps} is saved. The same command goes on."
        raise Preempted(told, by_all_ranks=True)

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """However the block ends, the last row and the ledger are written. What ended it is not hidden by a full disk.

        Nothing is written any more where another process has taken the run over.

        Raises:
            LedgerError: after the last step, on every rank: bytes that nobody can explain.
            DriftError: the same, of weights that differ.
        """
        try:
            yield
            if self._saved_step != self.learner.committed_steps:
                self._refuse_drift()
            verdict = self.ledger.compare()
        except BaseException:
            with contextlib.suppress(OSError, CheckpointError):
                self.directory.check_owned()
                self._write_pending()
                self._write_ledger(ended=True)
            raise
        self._write_pending()
        self._write_ledger(ended=True)
        verdict.refuse()

    # --- its parts ---

    def _row(self, result: StepResult) -> Row:
        """Time and price the step."""
        waited = self.loader.take()
        seconds = self.clock.lap(waited)
        traffic, times = self.ledger.commit_step(), self.world.timeline.take_step()
        global_size = self.plan.batch.global_size
        learnt = {name: getattr(result, name) for name in ("loss", "top1", "grad_norm", "density")}
        return {
            "samples": result.step * global_size,
            "epoch": result.step / self.plan.steps_per_epoch,
            "lr": result.lr,
            **{f"train/{name}": value for name, value in learnt.items() if value is not None},
            "perf/images_per_second": global_size / seconds,
            "perf/step_seconds": seconds,
            "perf/data_wait_seconds": waited,
            "perf/data_wait_share": min(1.0, waited / seconds),
            **traffic.metrics(),
            **({} if times is None else times.metrics(seconds)),
        }

    def _write_pending(self) -> None:
        if self._pending is not None:
            self.tracker.log(*self._pending)
            self.narrator.tell(*self._pending, may_be_best=self.learner.may_be_best)
            self._pending = None

    def _resume_time(self) -> None:
        """A pause is over: what happened in it belongs to no step."""
        self.clock.restart()
        self.world.timeline.restart()

    def _save_if_due(self, step: int, found: Validated | None) -> None:
        is_best = found is not None and found.beats(self.best) and self.learner.may_be_best
        if is_best:
            self.best = found
        if self.plan.checkpoint_due(step) or (is_best and self.plan.checkpoint_every_steps):
            self._write_pending()
            self._save(step, found.top1 if found is not None and is_best else None)
            self._resume_time()

    def _save(self, step: int, best_score: float | None) -> None:
        """The state after `step` steps, by all ranks alike; kept as best too where `best_score` is given.

        Raises:
            CheckpointError: on every rank, when rank 0 could not save, or another process has taken the run over.
            DriftError: on every rank, before anything is saved: their weights differ.
            LedgerError: on every rank, once all is saved: bytes that nobody can explain.
        """
        path = checkpoints.checkpoint_path(self.directory.checkpoints, step)
        with self.watchdog.pause():
            self._refuse_drift()
            verdict = self.ledger.compare()
            self._agree(self._sync_record)
            # All ranks meet in there after rank 0 has written, so that a failure is kept for the next line.
            self.learner.trainer.save_checkpoint(path)
            self._agree(lambda: self._settle(path, best_score))
            verdict.refuse()  # now that nothing can be lost
        self._saved_step = step
        self.reporter.saved()

    def _refuse_drift(self) -> None:
        """Compare the ranks' weights to the last one. Collective.

        Raises:
            DriftError: they differ.
        """
        if self.learner.compare_every_steps and self.world.size > 1 and self.learner.is_comparable:
            step = self.learner.committed_steps
            if found := self.world.differences(drift.checksums(self.learner.weights())):
                raise DriftError(drift.refusal(step, same_run.sentence(found)))

    def _agree(self, work: Callable[[], None]) -> None:
        with self.world.meter.phase("checkpoint"), self.world.exchanging("other"):
            self.world.agree(work)

    def _sync_record(self) -> None:
        self.directory.check_owned()
        with self.directory.writing():
            self.tracker.sync()
            self._write_ledger(ended=False)

    def _settle(self, path: Path, best_score: float | None) -> None:
        self.io.raise_failure()
        if best_score is not None and self.world.is_rank_zero:
            self.io.keep_as_best(path, best_score, "val/top1")

    def to_checkpoint(self, checkpoint: dict[str, Any]) -> checkpoints.SectionJson:
        """What neither the weights nor the optimiser in `checkpoint` hold, in plain types. Collective."""
        states = rank_states.gather_all(self.world.meter, self.learner, self.powersgd, checkpoint)
        return {
            "step": self.learner.committed_steps,
            "world_size": self.world.size,
            "model": self.config.model.name,
            "num_parameters": sum(parameter.numel() for parameter in self.learner.model.parameters()),
            "num_classes": self.learner.num_classes,
            "classes": None if self.classes is None else list(self.classes),
            "metaparameters": self.config.model.metaparameters,
            "input": plain(dataclasses.asdict(self.config.input)),
            "must_match": resume.must_match(self.config, self.shards_hash),
            "free_fields": resume.free_fields(self.config),
            "best_score": self.best and self.best.top1,
            "best_loss": self.best and self.best.known_loss,
            "best_step": self.best and self.best.step,
            "owed_row": self.owed_row,
            "ledger": self.ledger.state_dict(),
            "learner": self.learner.extra_state(),
            "powersgd": states["powersgd"],
            "rank_states": states["rank_states"],
            "outer": states["outer"],
        }

    def _write_ledger(self, *, ended: bool, only_if_old: bool = False) -> None:
        """`ledger.json`, by rank 0. A killed attempt can only report what it wrote."""
        now = time.monotonic()
        if not self.world.is_rank_zero or (only_if_old and now - self._ledger_written < LEDGER_EVERY_SECONDS):
            return
        self._ledger_written = now
        p50, p90 = self.clock.percentiles() or (None, None)
        conditions = Conditions(
            run=self.config.name,
            model=self.config.model.name,
            hook=self.config.comm.hook,
            global_batch=self.config.batch.global_size,
            step_seconds_p50=p50,
            step_seconds_p90=p90,
            data_wait_seconds=self.clock.mean_wait_seconds(),
            # Of most steps of a round there is nothing to time, and so of the median one.
            communication=self.world.timeline.medians(median if self.plan.rounds is None else fmean),
            why_untimed=self.world.timeline.why_off or (NO_STEP_TIMED if self.plan.rounds is None else NO_BUCKETS),
        )
        write_json_atomic(self.directory.ledger, self.ledger.to_json(conditions, ended=ended))

    # --- when it is over ---

    def summary(self) -> dict[str, float | int | str | None]:
        """Results worth a line beside the run."""
        percentiles = self.clock.percentiles()
        return {
            "best_val_top1": self.best and self.best.top1,
            "step_seconds_p50": percentiles[0] if percentiles else None,
            "data_wait_share": self.clock.mean_wait_share(),
        }

    def sentence(self) -> str:
        """Where the time went, and what to do where it went into waiting for data, in words."""
        percentiles, share = self.clock.percentiles(), self.clock.mean_wait_share()
        if percentiles is None or share is None:
            return ""
        return speed_sentence(
            self.plan.batch.global_size / (percentiles[0] if self.plan.rounds is None else self.clock.mean_seconds()),
            share,
            num_workers=self.loader.num_workers,
            num_cores=len(os.sched_getaffinity(0)) // self.world.ranks.local_world_size,
        )

    # --- when Lightning calls ---

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Time starts after the warm-up of the buckets, before which DDP gave all ranks the same weights."""
        del pl_module
        rank_states.take_own(self._setup, self.learner, trainer.optimizers[0])
        self.loader.take()
        self._resume_time()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on there is something to save. A validation that a signal broke off comes first."""
        del pl_module
        self.world.stop.begin_training()
        if self._pending is not None:
            validate_now(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A micro-batch is done, and with the last one the step."""
        del trainer, pl_module, outputs, batch, batch_idx
        result = self.learner.end_micro_batch(stop_asked=self.world.stop.asked)
        if result is not None:
            self.step_done(result)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A validation may be long, and a signal cannot wait for its end. Ranks have equally many micro-batches."""
        del trainer, pl_module, outputs, batch, dataloader_idx
        self.narrator.validating(batch_idx + 1)
        if (batch_idx + 1) % STOP_EVERY_BATCHES == 0 and self.learner.some_rank_says(self.world.stop.asked):
            self.leave(self.learner.committed_steps)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All pictures are scored, over all ranks."""
        del trainer, pl_module
        self.validated(self.learner.last_validation)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add our facts to what Lightning saves; its own counts are of this attempt, the run's are absolute."""
        del trainer, pl_module
        step = self.learner.committed_steps
        checkpoint["global_step"] = step
        checkpoint["epoch"] = step // self.plan.steps_per_epoch
        checkpoint[checkpoints.SECTION] = self.to_checkpoint(checkpoint)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing is left to be broken off."""
        del trainer, pl_module
        self.world.stop.end_training()
