"""What a run leaves behind while it trains: one row per step, checkpoints, validation results, warnings.

Lightning calls a callback's hooks before the module's own; so the learner reports committed steps itself, through
`Recorder.on_step`.
"""

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytorch_lightning as pl

from pipeline.comm.ledger.ledger import Ledger
from pipeline.comm.timeline import Timeline
from pipeline.core.errors import Preempted
from pipeline.models.plateau import PlateauDetector
from pipeline.training.learner import Learner, StepResult
from pipeline.training.plan import StepPlan

LARGEST_SHARE_OF_WAITING = 0.1  # above it, faster loading would make training faster by as much
NUM_TIMED_STEPS = 2000  # percentiles are of this many latest steps
Row = dict[str, float | int | None]


class TimedLoader:
    """A loader that knows how long its consumer waited for it.

    Timed around `next` rather than between Lightning's hooks, between which Lightning also waits for other ranks.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.waited_seconds = 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while True:
            started = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited_seconds += time.perf_counter() - started
            yield batch

    def take(self) -> float:
        """Seconds waited since the last `take`."""
        waited, self.waited_seconds = self.waited_seconds, 0.0
        return waited


class StepClock:
    """Seconds per step, validation and checkpoints left out. Monotonic, so a clock set back does no harm."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.step_seconds: deque[float] = deque(maxlen=NUM_TIMED_STEPS)
        self.wait_seconds: deque[float] = deque(maxlen=NUM_TIMED_STEPS)

    def restart(self) -> None:
        """A step begins now."""
        self._started = time.perf_counter()

    def lap(self, waited_seconds: float) -> float:
        """End the step; returns its seconds."""
        now = time.perf_counter()
        seconds, self._started = now - self._started, now
        self.step_seconds.append(seconds)
        self.wait_seconds.append(waited_seconds)
        return seconds

    def percentiles(self) -> tuple[float, float] | None:
        """(p50, p90) of the step, or None before the first. The first step of an attempt is left out where possible."""
        steady = list(self.step_seconds)[1:] or list(self.step_seconds)
        if not steady:
            return None
        if len(steady) == 1:
            return steady[0], steady[0]
        return statistics.median(steady), statistics.quantiles(steady, n=10, method="inclusive")[8]

    def mean_wait_seconds(self) -> float | None:
        """Mean wait for data per step."""
        return statistics.fmean(self.wait_seconds) if self.wait_seconds else None

    def mean_wait_share(self) -> float | None:
        """Share of the time of the steps that was waiting for data."""
        total = sum(self.step_seconds)
        return sum(self.wait_seconds) / total if total else None


class Recorder(pl.Callback):
    """Writes a row per step, and saves at the plan's steps.

    Args:
        plan: which steps are validated and saved.
        ledger: prices each step.
        timeline: times each step's communication.
        loader: the timed training loader.
        log: takes (step, row); rows come once per step, in order.
        save: takes (step, score or None) and makes a checkpoint; called on all ranks alike.
        plateau: watches the training loss.
        best_score: of earlier attempts.
        start_step: steps committed by earlier attempts.
        owed_row: of `start_step`, where its validation was broken off: validated and written first.
    """

    def __init__(
        self,
        plan: StepPlan,
        ledger: Ledger,
        timeline: Timeline,
        loader: TimedLoader,
        *,
        log: Callable[[int, Row], None],
        save: Callable[[int, float | None], None],
        plateau: PlateauDetector,
        best_score: float | None = None,
        start_step: int = 0,
        owed_row: Row | None = None,
    ) -> None:
        self.plan, self.ledger, self.timeline, self.loader = plan, ledger, timeline, loader
        self.write_row, self.save_state = log, save
        self.plateau = plateau
        self.best_score = best_score
        self.clock = StepClock()
        self.owed_row: Row | None = None
        """For the checkpoint: the row of its step, where validation was due and did not take place."""
        self._pending: tuple[int, Row] | None = None if owed_row is None else (start_step, dict(owed_row))
        self._saved_step = start_step

    @property
    def validation_is_owed(self) -> bool:
        """Whether a row waits for its validation."""
        return self._pending is not None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Time starts after the warm-up of the buckets."""
        del trainer, pl_module
        self.loader.take()
        self._resume_time()

    def on_step(self, result: StepResult) -> None:
        """A step was committed: price it, write its row, save if due and no validation comes first."""
        waited = self.loader.take()
        seconds = self.clock.lap(waited)
        self.flush()
        self._pending = (result.step, self._row(result, seconds, waited))
        warning = self.plateau.update(result.step, result.loss)
        if warning:
            print(f"warning: {warning}", file=sys.stderr)
        if not self.plan.validation_due(result.step):
            self._save_if_due(result.step, None)
        if result.stop:
            self.leave(result.step)

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
            raise Preempted(f"Asked to stop after step {step}. Nothing is saved: trainer.checkpoint_every_steps=0.")
        if self.plan.validation_due(step) and self._pending is not None:
            self.owed_row, self._pending = self._pending[1], None
        self.flush()
        if self._saved_step != step:
            self._save(step, None)
        raise Preempted(f"Asked to stop: step {step} of {self.plan.num_steps} is saved. The same command goes on.")

    def _row(self, result: StepResult, seconds: float, waited: float) -> Row:
        traffic, times = self.ledger.commit_step(), self.timeline.take_step()
        return {
            "samples": result.step * self.plan.batch.global_size,
            "epoch": result.step / self.plan.steps_per_epoch,
            "train/loss": result.loss,
            "train/top1": result.top1,
            "lr": result.lr,
            "train/grad_norm": result.grad_norm,
            "perf/images_per_second": self.plan.batch.global_size / seconds,
            "perf/step_seconds": seconds,
            "perf/data_wait_seconds": waited,
            "perf/data_wait_share": min(1.0, waited / seconds),
            **traffic.metrics(),
            **({} if times is None else times.metrics(seconds)),
        }

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the results to the step's row; save with the score."""
        del trainer
        assert isinstance(pl_module, Learner)
        results = pl_module.last_validation
        assert results is not None
        step = pl_module.committed_steps
        if self._pending is not None:
            self._pending[1].update({f"val/{key}": results[key] for key in ("loss", "top1", "top5")})
        score = float(results["top1"])
        self._save_if_due(step, score)
        self.flush()
        self._resume_time()

    def _save_if_due(self, step: int, score: float | None) -> None:
        is_best = score is not None and (self.best_score is None or score > self.best_score)
        if is_best:
            self.best_score = score
        if self.plan.checkpoint_due(step) or (is_best and self.plan.checkpoint_every_steps):
            self.flush()
            self._save(step, score if is_best else None)
            self._resume_time()

    def _save(self, step: int, score: float | None) -> None:
        self.save_state(step, score)
        self._saved_step = step

    def _resume_time(self) -> None:
        """A pause is over: what happened in it belongs to no step."""
        self.clock.restart()
        self.timeline.restart()

    def flush(self) -> None:
        """Write the row that waited for its validation results."""
        if self._pending is not None:
            self.write_row(*self._pending)
            self._pending = None

    def summary(self) -> dict[str, float | int | str | None]:
        """Results worth a line beside the run."""
        percentiles = self.clock.percentiles()
        return {
            "best_val_top1": self.best_score,
            "step_seconds_p50": percentiles[0] if percentiles else None,
            "data_wait_share": self.clock.mean_wait_share(),
        }

    def sentence(self) -> str:
        """Where the time went, and what to do where it went into waiting for data, in words."""
        percentiles, share = self.clock.percentiles(), self.clock.mean_wait_share()
        if percentiles is None or share is None:
            return ""
        rate = self.plan.batch.global_size / percentiles[0]
        told = f"{rate:,.0f} pictures/s, {share:.1%} of the time waiting for data: "
        if share <= LARGEST_SHARE_OF_WAITING:
            return told + "the loader keeps up."
        workers = getattr(self.loader.loader, "num_workers", 0)
        return told + (
            f"the loader holds training back. Where cores are idle, raise data.num_workers= ({workers} per rank now);"
            " large pictures decode about twice as fast from shards prepared with short_side=256."
        )
