"""What whoever started a training sees of it while it goes on: a bar on a terminal, lines with the time in a log."""

import contextlib
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from typing import NamedTuple

from pipeline.core.progress import Bar, progress_bar
from pipeline.core.units import format_seconds
from pipeline.training.best import Validated
from pipeline.training.plan import StepPlan

LINES_AFTER_SECONDS = (10.0, 60.0, 120.0, 300.0, 600.0)
"""A log gets a line so long after the first step, and then one every SECONDS_BETWEEN_LINES."""
SECONDS_BETWEEN_LINES = 600.0
NUM_STEPS_AVERAGED = 50
BAR_COLUMNS = 12
NARROW_COLUMNS = 100
"""A narrower terminal is not told learning rate and speed: words would be cut off."""

Row = Mapping[str, float | int | None]


class Means(NamedTuple):
    """Of the last steps: what one step says jumps about."""

    loss: float
    top1: float


class Narrator:
    """Tells the rows of a training as they are recorded. One rank tells; on the others nothing is shown.

    Args:
        name: Of the run.
        plan: How long it is.
        start_step: Steps that earlier attempts made.
        best: Their best validation; None: there is none.
        bar: Shown on a terminal; None: this rank tells nothing.
        has_lines: Whether stdout is a log, which gets lines at intervals.
        also: Told each line, too.
    """

    def __init__(
        self,
        name: str,
        plan: StepPlan,
        start_step: int,
        *,
        best: Validated | None,
        bar: Bar | None,
        has_lines: bool,
        also: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._also = also
        self.name, self.plan, self.start_step = name, plan, start_step
        self.bar, self.has_lines = bar, has_lines
        self.best = best
        self.validation: Row | None = None
        """The last row with results of a validation."""
        self._latest: deque[Means] = deque(maxlen=NUM_STEPS_AVERAGED)
        self._begun: float | None = None
        self._num_lines = 0

    def tell(self, step: int, row: Row, *, may_be_best: bool = True) -> None:
        """Tell one step.

        Args:
            step: Steps committed.
            row: Its row of the record.
            may_be_best: Whether its validation, if it has one, can be the best; not before a pruning has ended.
        """
        now = time.monotonic()
        if self._begun is None:
            self._begun = now
        loss, top1 = row.get("train/loss"), row.get("train/top1")
        if loss is not None and top1 is not None:
            self._latest.append(Means(loss, top1))
        if "val/top1" in row:
            self.validation = row
        if self.bar is None:
            return
        self.bar.update(step - self.start_step, self._words(row))
        if "val/top1" in row:
            self._say(self._of_validation(step, row, may_be_best))
        elif self.has_lines and now - self._begun >= self._next_line_seconds():
            while now - self._begun >= self._next_line_seconds():
                self._num_lines += 1
            self._say(self._of_step(step, row, now - self._begun))

    def validating(self, num_batches: int) -> None:
        """Tell that so many batches of a validation are done."""
        if self.bar is not None:
            self.bar.describe(f"validating, batch {num_batches}")

    def outcome(self) -> str:
        """Return in a sentence what was learnt; empty before the first step."""
        told: list[str] = []
        if means := self._means():
            told.append(f"training loss {means.loss:.3f}, top-1 {means.top1:.1%}")
        if self.validation is not None:
            told.append(f"validation loss {self.validation['val/loss']:.3f}, top-1 {self.validation['val/top1']:.1%}")
        if self.best is not None:
            told.append(f"best {self.best.in_words}")
        return f"{'; '.join(told)}." if told else ""

    def _means(self) -> Means | None:
        if not self._latest:
            return None
        losses, top1s = zip(*self._latest, strict=True)
        return Means(statistics.fmean(losses), statistics.fmean(top1s))

    def _next_line_seconds(self) -> float:
        beyond = self._num_lines - len(LINES_AFTER_SECONDS)
        if beyond < 0:
            return LINES_AFTER_SECONDS[self._num_lines]
        return LINES_AFTER_SECONDS[-1] + (beyond + 1) * SECONDS_BETWEEN_LINES

    def _say(self, line: str) -> None:
        said = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {self.name}: {line}"
        print(said, flush=True)
        self._also(said)

    def _words(self, row: Row) -> str:
        """For the bar."""
        means = self._means()
        learnt = "" if means is None else f"  loss {means.loss:.3f}  top-1 {means.top1:.1%}"
        words = f"epoch {row['epoch']:.1f}/{self._num_epochs:.1f}{learnt}"
        if self.bar is not None and self.bar.num_columns < NARROW_COLUMNS:
            return words
        return f"{words}  lr {row['lr']:.3g}  {row['perf/images_per_second']:,.0f} pictures/s"

    def _of_step(self, step: int, row: Row, seconds: float) -> str:
        means = self._means()
        learnt = "" if means is None else f" loss {means.loss:.3f}, top-1 {means.top1:.1%},"
        left = seconds / max(1, step - self.start_step) * (self.plan.num_steps - step)
        return (
            f"step {step:,} of {self.plan.num_steps:,}, epoch {row['epoch']:.2f} of {self._num_epochs:.2f}:{learnt}"
            f" lr {row['lr']:.3g}, {row['perf/images_per_second']:,.0f} pictures/s, {format_seconds(left)} left"
        )

    def _of_validation(self, step: int, row: Row, may_be_best: bool) -> str:
        found = Validated(float(row["val/top1"] or 0.0), float(row["val/loss"] or 0.0), step)
        is_best = may_be_best and found.beats(self.best)
        self.best = found if is_best else self.best
        best = "the best so far" if is_best or self.best is None else f"best {self.best.in_words}"
        if not may_be_best:
            best = "no candidate for the best before the density is reached"
        return (
            f"step {step:,} of {self.plan.num_steps:,}: validation loss {found.loss:.3f}, top-1 {found.top1:.1%},"
            f" top-5 {row['val/top5']:.1%}; {best}"
        )

    @property
    def _num_epochs(self) -> float:
        return self.plan.num_steps / self.plan.steps_per_epoch


@contextlib.contextmanager
def narrating(
    name: str,
    plan: StepPlan,
    start_step: int,
    *,
    best: Validated | None,
    is_teller: bool,
    also: Callable[[str], None] = lambda _: None,
) -> Generator[Narrator]:
    """Show the bar while the block runs, where this rank tells and there is a terminal.

    Args:
        name: Of the run.
        plan: How long it is.
        start_step: Steps that earlier attempts made.
        best: Their best validation; None: there is none.
        is_teller: Whether this rank tells.
        also: Told each line that stays, too.
    """
    with contextlib.ExitStack() as stack:
        bar = None
        if is_teller:
            bar = stack.enter_context(progress_bar("training", plan.num_steps - start_step, bar_columns=BAR_COLUMNS))
        has_lines = is_teller and not sys.stdout.isatty()
        yield Narrator(name, plan, start_step, best=best, bar=bar, has_lines=has_lines, also=also)
