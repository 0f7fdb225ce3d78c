"""Signals as a wish: this process is asked to stop soon, and decides when that is safe.

1. The signals are blocked in every thread and taken by one thread of ours, which waits for them. No handler interrupts
   a collective or a save, and a wish is heard while the main thread is stuck inside one. What this process starts (data
   loader workers, W&B's helper) inherits the blocked signals: Slurm sends them to every process of a step.
2. Before training there is nothing to save: the process leaves at once, with the code that means `run me again`.
3. While training a wish is a flag, which all ranks look at together between two steps. Further signals change nothing.
4. If no such moment comes within `grace_seconds` (a collective is stuck), the process leaves with the same code and
   the stacks of its threads on stderr. The checkpoints saved before are untouched.
5. Once training is over, a wish is too late to matter.
6. SIGCONT is no wish. It says that this process may have been suspended: what waited in vain is then no fault of
   anybody's, and the patience of 4 begins anew.

Nothing here imports torch: signals are blocked before it is loaded.
"""

import faulthandler
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pipeline.core.errors import ExitCode
from pipeline.core.exits import rank
from pipeline.run.launch.ranks import SPAWNED_MARK

# Sent by Slurm: SIGTERM (requeue, preemption, time limit), what `--signal` says. SIGHUP: by a terminal that goes away.
# SIGINT comes from a keyboard.
EARLY_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SIGNALS = (*EARLY_SIGNALS, signal.SIGINT)
JUST_RESUMED_SECONDS = 30.0
# For the thread that waits for signals to hear of SIGCONT, when all threads run again at the same moment.
HEARING_SECONDS = 0.2


def block_early() -> None:
    """Let signals wait until `StopRequest.listening` takes them. The first thing a command does, before slow imports.

    SIGINT is not among them: while a command only reads its command line, Ctrl-C ends it as any other.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, EARLY_SIGNALS)


class StopRequest:
    """Whether this process is asked to stop.

    Args:
        grace_seconds: Time from the first signal while training until the process leaves by itself.
    """

    def __init__(self, grace_seconds: float = 120.0) -> None:
        self.grace_seconds = grace_seconds
        self.signal: signal.Signals | None = None
        """The first signal that came while training."""
        self._phase = "idle"
        self._heard_at = self._resumed_at = -math.inf
        self._lock = threading.RLock()  # a signal that a library unblocked may come while this thread holds it
        self._timer: threading.Timer | None = None

    @property
    def asked(self) -> bool:
        """Whether to stop at the next step boundary."""
        return self.signal is not None

    @property
    def name(self) -> str:
        """Name of the signal, for sentences; `a signal` where another rank got it."""
        return "a signal" if self.signal is None else self.signal.name

    def was_just_resumed(self) -> bool:
        """Whether this process was suspended until a moment ago, as far as signals tell. Takes a moment itself."""
        time.sleep(HEARING_SECONDS)
        return time.monotonic() - self._resumed_at < JUST_RESUMED_SECONDS

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Hear signals inside the block. They stay blocked after it, and wait for the next one who takes them.

        Call in the main thread, before any other thread exists.
        """
        # What was ignored at start (SIGINT of a background job, SIGHUP under nohup) stays so.
        heard = {number for number in (*SIGNALS, signal.SIGCONT) if signal.getsignal(number) != signal.SIG_IGN}
        if not heard:
            yield self
            return
        signal.pthread_sigmask(signal.SIG_BLOCK, heard)
        for number in heard:
            # Should a library unblock one, it is not fatal: Python's own resource tracker does.
            signal.signal(number, lambda number, _: self.hear(signal.Signals(number)))
        self._phase = "starting"
        thread = threading.Thread(target=self._listen, args=(heard,), name="signals", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._set_phase("closed")
            assert thread.ident is not None
            signal.pthread_kill(thread.ident, next(iter(heard)))  # wakes it alone
            thread.join()
            for number in heard:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def begin_training(self) -> None:
        """Enter training: from here on a signal is a flag."""
        self._set_phase("training")

    def end_training(self) -> None:
        """Leave training: signals change nothing any more."""
        self._set_phase("over")
        if self._timer is not None:
            self._timer.cancel()

    def hear(self, number: signal.Signals, *, from_launcher: bool = False) -> None:
        """React to a signal.

        Args:
            number: The signal.
            from_launcher: Whether the parent that started all ranks sent it, which sends it to each of them: rank 0
                alone then says what comes of it.
        """
        with self._lock:
            if number == signal.SIGCONT:
                self._resumed_at = time.monotonic()
                return
            if self._phase == "starting":
                told = f"{number.name} before the first step: nothing is lost. The same command goes on."
                self._leave("" if from_launcher and (rank() or "0") != "0" else told)
            if self._phase != "training" or self.signal is not None:
                return
            self.signal = number
            self._await_step()

    def _await_step(self) -> None:
        self._heard_at = time.monotonic()
        self._timer = threading.Timer(self.grace_seconds, self._leave_late)
        self._timer.daemon = True
        self._timer.start()

    def _set_phase(self, phase: str) -> None:
        with self._lock:
            self._phase = phase

    def _listen(self, heard: set[signal.Signals]) -> None:
        while True:
            received = signal.sigwaitinfo(heard)
            if self._phase == "closed":
                return
            from_launcher = SPAWNED_MARK in os.environ and received.si_pid == os.getppid()
            self.hear(signal.Signals(received.si_signo), from_launcher=from_launcher)

    def _leave_late(self) -> None:
        time.sleep(HEARING_SECONDS)
        with self._lock:
            if self._phase == "training" and self._resumed_at > self._heard_at:
                self._await_step()
            elif self._phase == "training":
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                self._leave(
                    f"{self.name} came {self.grace_seconds:g} s ago, and ranks have not agreed on a step since:"
                    " this rank leaves without saving. The same command goes on from the last checkpoint."
                )

    def _leave(self, text: str) -> None:
        """End the process, whatever its other threads do."""
        with suppress(OSError):  # a full disk, a pipe that nobody reads
            os.write(sys.stderr.fileno(), f"preempted: [rank {rank() or '0'}] {text}\n".encode() if text else b"")
        os._exit(int(ExitCode.PREEMPTED))
