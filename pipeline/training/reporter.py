"""What is shown of a training while it goes on: validation.json and report.html. Never delays a step, never fails one.

The report is made by a process of its own at the lowest priority, a few seconds of one core beside the training, which
goes on; at most one at a time.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.core.errors import Preempted
from pipeline.core.files import write_json_atomic
from pipeline.core.overrides import literal
from pipeline.core.processes import our_module
from pipeline.data.index import ShardIndex
from pipeline.reporting.page import write_run_report
from pipeline.run.directory import RunDirectory
from pipeline.run.launch.ranks import without_ranks
from pipeline.run.provenance import CODE_ROOT
from pipeline.training.confusions import MOST_PICTURES, OutcomeRecord, Outcomes, to_json
from pipeline.training.setup import Setup

PATIENCE_SECONDS = 10.0
"""How long the end of an attempt waits for a report that is being made."""
LOWEST_PRIORITY = 19


class Reporter:
    """Keeps the report of a run while it trains. On every rank but the first it does nothing.

    Args:
        run: Directory of the run.
        validation: The split that is validated on; None: none is.
        num_classes: Outputs of the model.
        every_seconds: A report is made after a checkpoint where the last one was begun so long ago; None: never.
        is_writer: Whether this rank writes.
    """

    def __init__(
        self,
        run: RunDirectory,
        validation: ShardIndex | None,
        *,
        num_classes: int,
        every_seconds: float | None,
        is_writer: bool,
    ) -> None:
        self.run, self.validation, self.num_classes = run, validation, num_classes
        self.every_seconds = every_seconds if is_writer else None
        self.is_writer = is_writer
        self._begun = time.monotonic()
        self._child: subprocess.Popen[bytes] | None = None

    def validated(self, step: int, outcomes: Outcomes | None) -> None:
        """Write validation.json.

        Args:
            step: Steps committed before the validation.
            outcomes: What it said of each picture; None: not recorded.
        """
        if not self.is_writer or outcomes is None or self.validation is None:
            return
        content = to_json(outcomes, self.validation, step=step, num_classes=self.num_classes)
        try:
            write_json_atomic(self.run.validation, content)
        except OSError as error:
            _warn(self.run.validation, error.strerror or str(error))

    def saved(self) -> None:
        """A checkpoint is there: have a report made, if the last one is old enough and done."""
        if self.every_seconds is None or time.monotonic() - self._begun < self.every_seconds:
            return
        if self._child is not None and self._child.poll() is None:
            return
        self._end()
        self._begun = time.monotonic()
        try:
            self._child = subprocess.Popen(
                [*our_module("pipeline.report"), f"run={literal(str(self.run.path.absolute()))}"],
                cwd=CODE_ROOT,
                env=without_ranks(os.environ),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,  # a sentence, or a traceback: less than a pipe holds
            )
            os.setpriority(os.PRIO_PROCESS, self._child.pid, LOWEST_PRIORITY)
        except OSError as error:
            _warn(self.run.report, error.strerror or str(error))

    def finish(self) -> str:
        """Write the report of a run that is over. Returns where it lies, or that there is none."""
        if not self.is_writer:
            return ""
        self.close()  # an older one must not come after this
        try:
            return str(write_run_report(self.run.path))
        except Exception as error:  # whatever it is: the training is done, and its numbers are safe
            _warn(self.run.report, str(error) or type(error).__name__)
            return "not written, see the warning"

    def close(self) -> None:
        """Wait for a report that is being made, but not long."""
        if self._child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(PATIENCE_SECONDS)
        self._end()

    def _end(self) -> None:
        """Say what became of the last one."""
        if self._child is None:
            return
        if self._child.poll() is None:
            self._child.kill()
        _, said = self._child.communicate()
        if code := self._child.returncode:
            lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
            _warn(self.run.report, lines[-1].removeprefix("error: ") if lines else f"its process ended with {code}")
        self._child = None


def outcome_record(validation: ShardIndex | None) -> OutcomeRecord | None:
    """Return what records a validation on this split; None: there is none, or it is too large."""
    if validation is None or validation.num_samples > MOST_PICTURES:
        return None
    return OutcomeRecord(validation.num_samples)


@contextlib.contextmanager
def reporting(setup: Setup) -> Iterator[Reporter]:
    """Keep the report of a training while the block runs; one that was asked to stop leaves a last one."""
    reporter = Reporter(
        setup.run,
        setup.shards.validation,
        num_classes=setup.shards.num_classes,
        every_seconds=setup.config.trainer.report_every_seconds,
        is_writer=setup.world.is_rank_zero,
    )
    with contextlib.closing(reporter):
        try:
            yield reporter
        except Preempted as stopped:
            if stopped.by_all_ranks and reporter.every_seconds is not None:
                reporter.finish()
            raise


def _warn(path: Path, reason: str) -> None:
    print(
        f"warning: {path} is not written ({' '.join(reason.split())}); the training is not touched by it. For the"
        f" report at any time: python -m pipeline.report run={path.parent}",
        file=sys.stderr,
        flush=True,
    )
