"""How long ranks wait for one another, and what is said when one of them does not come.

Before the first step, in a pause (validation, a checkpoint) and after the last step a collective may wait for
`cluster.timeout_seconds`; between steps for `cluster.step_timeout_seconds`, because a rank that is late there is one
that hangs. A rank that gets nowhere for most of that time says in which step it is and where each of its threads
stands, so that the one that hangs speaks before its peers give up and it is ended with them.
"""

import contextlib
import faulthandler
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytorch_lightning as pl

from pipeline.training.learner import Learner
from pipeline.training.world import World

# Of the patience that holds. The rest is for a rank to write its stacks before its peers end.
SHARE_BEFORE_STACKS = 0.8


class Watch:
    """A thread that calls `on_silence` once, when nothing was heard for as long as was expected last."""

    def __init__(self, on_silence: Callable[[float], None]) -> None:
        self._on_silence = on_silence
        self._condition = threading.Condition()
        self._expected = self._deadline = self._wakes_at = math.inf
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def expect(self, seconds: float) -> None:
        """Something was heard now; the next is to come within `seconds`."""
        self._expected, self._deadline = seconds, time.monotonic() + seconds
        if self._deadline < self._wakes_at:  # else the thread finds the new deadline when it wakes for the old one
            with self._condition:
                self._condition.notify()

    def stop(self) -> None:
        """Nothing more is expected. Harmless twice."""
        with self._condition:
            self._stopped = True
            self._condition.notify()
        self._thread.join()

    def _run(self) -> None:
        with self._condition:
            while not self._stopped:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    self._deadline = math.inf
                    self._on_silence(self._expected)
                    continue
                self._wakes_at = self._deadline
                self._condition.wait(None if left == math.inf else left)


class StepWatchdog(pl.Callback):
    """Keeps the group's timeout and the watch in step with where the training is.

    Args:
        world: its `timeout_seconds` hold outside of steps.
        learner: says which step is under way.
        step_timeout_seconds: holds between steps.
    """

    def __init__(self, world: World, learner: Learner, step_timeout_seconds: float) -> None:
        self.world, self.learner, self.step_timeout_seconds = world, learner, step_timeout_seconds
        self._watch: Watch | None = None
        self._has_begun = self._in_steps = False
        self._round_began: float | None = None
        self._is_warned = world.size == 1 or not world.is_rank_zero

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside may take long on one rank, and the others wait for it."""
        was_in_steps = self._in_steps
        self._hold(in_steps=False)
        yield
        self._hold(in_steps=was_in_steps)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first step may take long."""
        del trainer, pl_module
        self._has_begun = True
        self._watch = Watch(self._say_where)
        self._hold(in_steps=False)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A micro-batch is done, so the next will not take long either."""
        del trainer, pl_module, outputs, batch, batch_idx
        self._hold(in_steps=True)
        self._warn_of_long_rounds()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """With the first micro-batch after the ranks have met, a round begins."""
        del trainer, pl_module, batch, batch_idx
        rounds, learner = self.learner.rounds, self.learner
        if rounds is not None and learner.between_steps and rounds.meets(learner.committed_steps):
            self._round_began = time.monotonic()

    def _warn_of_long_rounds(self) -> None:
        """Say once that ranks do not agree on a signal in the time that it leaves them."""
        rounds, grace_seconds = self.learner.rounds, self.world.stop.grace_seconds
        if rounds is None or self._is_warned or self._round_began is None:
            return
        took = time.monotonic() - self._round_began
        if took > grace_seconds and rounds.ends_round(self.learner.committed_steps + 1):
            self._is_warned = True
            print(
                f"warning: a round takes {took:.3g} s. Ranks agree to stop at its end, so that after SIGTERM they may"
                f" leave after cluster.preempt_grace_seconds={grace_seconds:g}, unsaved: lower comm.period, raise"
                " cluster.preempt_grace_seconds as far as the scheduler waits, or save more often.",
                file=sys.stderr,
                flush=True,
            )

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A pause: workers start, and the parts of the ranks differ."""
        del trainer, pl_module
        self._hold(in_steps=False)

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        """The validation advances."""
        self._hold(in_steps=False)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Steps again."""
        del trainer, pl_module
        self._hold(in_steps=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The rest is rank 0's."""
        del trainer, pl_module
        self._hold(in_steps=False)
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let the report say where this rank was."""
        del trainer, pl_module
        exception.add_note(self._where())
        self._stop()

    def _hold(self, *, in_steps: bool) -> None:
        seconds = self.step_timeout_seconds if in_steps else self.world.timeout_seconds
        if in_steps != self._in_steps:
            self._in_steps = in_steps
            self.world.wait_at_most(seconds)
        if self._watch is not None:
            self._watch.expect(SHARE_BEFORE_STACKS * seconds)

    def _where(self) -> str:
        if not self._has_begun:
            return "before the first step"
        pausing = "" if self._in_steps else ", or in a pause before it"
        return f"in step {self.learner.committed_steps + 1}{pausing}"

    def _say_where(self, seconds: float) -> None:
        print(
            f"warning: rank {self.world.rank} got nowhere for {seconds:g} s {self._where()}; its threads stand at:",
            file=sys.stderr,
            flush=True,
        )
        for address in [] if self.world.counter is None else self.world.counter.unanswered():
            print(f"The network: what rank {self.world.rank} sent to {address} does not arrive, though sent again.",
                  file=sys.stderr, flush=True)  # fmt: skip
        faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)

    def _stop(self) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
