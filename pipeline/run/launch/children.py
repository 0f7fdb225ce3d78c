"""The ranks of one machine as child processes: started, signalled, collected, and heard when they say why they end."""

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.core.errors import ConfigError, ExitCode
from pipeline.core.exits import PIPE_VARIABLE, Causes, causes_of, name_of_pipe
from pipeline.run.launch.ends import Ended

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
MOST_SAID_BYTES = 65_536  # what a pipe holds


@dataclass(frozen=True)
class RankCommand:
    """How one rank is started."""

    argv: Sequence[str]
    environment: Mapping[str, str]
    """All of it: nothing is inherited."""


class Children:
    """The ranks as processes: start them, pass signals on, collect their ends in order."""

    def __init__(self) -> None:
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.ended: list[Ended] = []
        self.told_to_stop = False
        self._ear, self._mouth = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def start(self, command: RankCommand, mask: set[signal.Signals]) -> None:
        """Start the next rank.

        Args:
            command: Program and environment of the rank.
            mask: Signals that are blocked in the rank.

        Raises:
            ConfigError: The program cannot be executed.
        """
        try:
            child = subprocess.Popen(
                command.argv,
                env={**command.environment, PIPE_VARIABLE: name_of_pipe(self._mouth)},
                stdin=subprocess.DEVNULL,
                process_group=0,
                pass_fds=(self._mouth,),
                preexec_fn=die_with_parent(mask),
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise ConfigError(f"Cannot start a rank as {command.argv[0]!r}: {error}.") from error
        self.running[len(self.running) + len(self.ended)] = child

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the rank processes, not to their workers, which end with them."""
        for child in self.running.values():
            child.send_signal(number)

    def reap(self) -> None:
        """Collect the ranks that have ended, and kill what is left of their process groups."""
        for rank, child in list(self.running.items()):
            # Looked at, not yet collected: as long as the dead leader is there, its group number is nobody else's.
            if os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                _kill_group(child)
                self.ended.append(Ended(rank, child.wait(), self.told_to_stop))
                del self.running[rank]

    def kill(self) -> None:
        """SIGKILL to every rank that still runs, and to its workers."""
        for child in self.running.values():
            _kill_group(child)

    def wait(self) -> None:
        """Wait until no rank runs; nothing can be asked any more."""
        for child in self.running.values():
            child.wait()
        os.close(self._ear)
        os.close(self._mouth)

    def causes(self) -> Causes:
        """Return why ranks have ended, by their own words."""
        with contextlib.suppress(BlockingIOError):
            return causes_of(os.read(self._ear, MOST_SAID_BYTES).decode().split("\n"))
        return Causes()


def _kill_group(child: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def die_with_parent(mask: set[signal.Signals]) -> Callable[[], None]:
    """Make what a child runs between fork and exec: ask for SIGKILL at the parent's death, restore the signal mask.

    Everything it needs exists before the fork. Should the parent have died before the request was made, the child's
    parent is already another process, and the child ends itself. A parent outside of the child's PID namespace is seen
    as process 0; once it has died, the namespace's first process, number 1, stands in its place.
    """
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parents = (os.getpid(), 0)

    def prepare() -> None:
        if prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0 or os.getppid() not in parents:
            os._exit(int(ExitCode.INTERNAL))
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    return prepare
