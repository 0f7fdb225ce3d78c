"""Start the ranks of one machine as child processes, and answer for them with one exit code.

1. The parent imports no torch and has one thread. It blocks the signals it cares about and takes them one at a time
   with `sigtimedwait`, so there is no handler and no moment at which a signal is lost. It may be suspended and resumed.
2. Each child is a command line with torchrun-style variables, in a process group of its own (Ctrl-C reaches it once,
   through the parent), with stdin closed. The kernel kills it should the parent die, however the parent dies.
3. Signals to the parent are passed on to every rank that still runs.
4. When a rank fails, its peers get a moment to end by themselves, then SIGTERM, then SIGKILL. When a rank ends, what is
   left of its process group (data loader workers) goes with it.
5. The answer is the code of the rank that is the cause: see `exit_code_of`. Where all have only lost one another, as
   when the network between servers is gone, the same command may do better: 75.
"""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.config.training import ClusterConfig
from pipeline.core.errors import ConfigError, ExitCode
from pipeline.core.processes import our_module
from pipeline.run.launch.children import Children, RankCommand
from pipeline.run.launch.ends import ENDING_SIGNALS, LOST_ONE_ANOTHER, exit_code_of, have_only_lost_one_another
from pipeline.run.launch.limits import check_processes
from pipeline.run.launch.network import check_loopback, interfaces
from pipeline.run.launch.ports import is_free, reserved_port
from pipeline.run.launch.ranks import SPAWNED_MARK, RankInfo, find_ranks
from pipeline.run.launch.secret import SECRET_VARIABLE, new_secret
from pipeline.run.launch.variables import check_variables, start_torch

FORWARDED_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
# Ends are looked for at least so often: where the parent has other threads, one of them may take a SIGCHLD that
# arrives while this one is not waiting, and the kernel then drops it.
LONGEST_WAIT_SECONDS = 1.0
POLL_SECONDS = 0.05
# A wait that ends so much later than it should: the process was suspended (Ctrl-Z, `kill -STOP`, `scontrol suspend`).
SUSPENDED_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Grace:
    """How long the supervisor waits before it presses harder."""

    peer_seconds: float = 2.0
    """After a rank failed: for its peers to end by themselves, with their own message."""
    kill_seconds: float = 15.0
    """From SIGTERM to SIGKILL."""
    signal_seconds: float = 60.0
    """For ranks to obey an ending signal that was passed on, or to follow one that was preempted. A second ending
    signal shortens it to `kill_seconds`."""


def as_ranks(
    command: str,
    cluster: ClusterConfig,
    work: Callable[[RankInfo], int],
    *,
    num_workers: int | None = None,
    check: Callable[[], None] = lambda: None,
    listening: contextlib.AbstractContextManager[object] | None = None,
) -> int:
    """Do `work` as one of the ranks; or be their parent, which starts them with this process's arguments.

    Args:
        command: Name of the command, such as `train`.
        cluster: How many ranks to start where no launcher did.
        work: What a rank does; returns its exit code.
        num_workers: Loader processes that each rank is asked to start; None: it chooses.
        check: Raises what would be wrong on every rank alike; called once, before any rank that is started here.
        listening: Entered while this process may be a rank; None: signals are not looked after. A parent takes them
            itself.

    Returns:
        The exit code of the rank, or of all of them.
    """
    with listening or contextlib.nullcontext():
        check_variables(os.environ)
        ranks = find_ranks(cluster.devices)
        check_processes(cluster, num_workers, ranks)
        if ranks is None or ranks.source == "single":
            check_loopback(ranks, interfaces())
            check()
        if ranks is not None:
            start_torch(is_torchrun=ranks.source == "torchrun")
            return work(ranks)
    argv = [*our_module(f"pipeline.{command}"), *sys.argv[1:]]
    return supervise(argv, cluster.devices, num_threads=cluster.num_threads)


def supervise(
    argv: Sequence[str],
    devices: int,
    *,
    num_threads: int | None = None,
    grace: Grace | None = None,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run the ranks of one command on this machine until all have ended.

    Args:
        argv: The whole command, usually `[*our_module("pipeline.train"), *sys.argv[1:]]`.
        devices: Ranks to start.
        num_threads: Compute threads per rank (OMP_NUM_THREADS). None: what the environment says, else the cores of
            this process divided by the ranks.
        grace: How long to wait for ranks that are to end; None: the defaults.
        environment: Variables of the ranks; None: those of this process.

    Returns:
        The exit code of the ranks, as `exit_code_of` has it.

    Raises:
        ConfigError: This is not Linux, the command cannot be started, or no port is free.
    """
    assert devices >= 1, devices
    if sys.platform != "linux":
        raise ConfigError(
            f"cluster.devices={devices} needs Linux: set cluster.devices=1, or start the ranks with torchrun."
        )
    environment = {**(os.environ if environment is None else environment), SECRET_VARIABLE: new_secret()}
    with _port(environment) as port:
        places = (_environment_of(rank, devices, port, num_threads, environment) for rank in range(devices))
        return supervise_commands([RankCommand(argv, place) for place in places], grace=grace)


def supervise_commands(commands: Sequence[RankCommand], *, grace: Grace | None = None) -> int:
    """Run one command per rank until all have ended.

    Must be called in the main thread: the kernel ties the children to the thread that started them.

    Args:
        commands: Command of each rank, in the order of the ranks.
        grace: How long to wait for ranks that are to end; None: the defaults.

    Returns:
        The exit code of the ranks, as `exit_code_of` has it.

    Raises:
        ConfigError: A command cannot be started.
    """
    assert threading.current_thread() is threading.main_thread()
    with _signals_blocked() as (signals, mask):
        children = Children()
        supervision = _Supervision(children, grace or Grace())
        try:
            for command in commands:
                if supervision.is_told_to_end(signals):
                    break
                children.start(command, mask)
            code = supervision.run(signals)
            if not have_only_lost_one_another(children.ended, children.causes()):
                return code
            _say(LOST_ONE_ANOTHER)
            return int(ExitCode.PREEMPTED)
        finally:
            children.kill()
            children.wait()


@contextlib.contextmanager
def _port(environment: Mapping[str, str]) -> Iterator[int]:
    """Yield the port the ranks meet at: MASTER_PORT if it is set, else a free one, held while the ranks run."""
    chosen = environment.get("MASTER_PORT")
    if chosen is None:
        with reserved_port() as port:
            yield port
        return
    if not chosen.isdigit() or not is_free(int(chosen)):
        raise ConfigError(f"MASTER_PORT={chosen} is not a free port: unset it, and a free one is chosen.")
    yield int(chosen)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[tuple[set[signal.Signals], set[signal.Signals]]]:
    """Block SIGCHLD and the signals to forward. Yields (those signals, the mask of before, for the children)."""
    # What was ignored at start (SIGHUP under nohup, SIGINT of a background job) stays so.
    signals = {number for number in FORWARDED_SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    signals.add(signal.SIGCHLD)
    old_handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # SIG_IGN would make the kernel discard exit codes
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield signals, {signal.Signals(number) for number in old_mask} - signals
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
        signal.signal(signal.SIGCHLD, old_handler)


def _environment_of(
    rank: int, devices: int, port: int, num_threads: int | None, environment: Mapping[str, str]
) -> dict[str, str]:
    """Return the variables of one rank. A value the user set for the interface stands."""
    own = {
        "RANK": str(rank),
        "WORLD_SIZE": str(devices),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(devices),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": threads_of_a_rank(devices, num_threads, environment),
        SPAWNED_MARK: "1",
    }
    return {"GLOO_SOCKET_IFNAME": "lo", **environment, **own}


def threads_of_a_rank(num_ranks: int, num_threads: int | None, environment: Mapping[str, str]) -> str:
    """Return OMP_NUM_THREADS: as asked, else as the environment says, else the cores divided by the ranks."""
    if num_threads is not None:
        return str(num_threads)
    return environment.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // num_ranks))


class _Supervision:
    """Waits for signals, ends and deadlines, one at a time."""

    def __init__(self, children: Children, grace: Grace) -> None:
        self._children = children
        self._grace = grace
        self._forwarded: list[int] = []
        self._num_seen = 0
        # When the next, harder step is due: SIGTERM to the peers of a failed rank, then SIGKILL.
        self._deadline = math.inf
        self._sigterm_is_next = False

    def run(self, signals: set[signal.Signals]) -> int:
        """Wait until every rank has ended. Returns the exit code."""
        children = self._children
        while children.running:
            received = self._wait(signals)
            if received is not None and received != signal.SIGCHLD:
                self._pass_on(received)
            children.reap()
            self._look_at_ends()
            if children.running and time.monotonic() >= self._deadline:
                self._press_harder()
        return exit_code_of(children.ended, self._forwarded)

    def _wait(self, signals: set[signal.Signals]) -> signal.Signals | None:
        """Return the next signal; None where none came for a while.

        Time in which this process was suspended counts for nobody: its ranks may have been suspended with it.
        """
        began = time.monotonic()
        seconds = min(max(0.0, self._deadline - began), LONGEST_WAIT_SECONDS)
        received = _next_signal(signals, seconds)
        late_seconds = time.monotonic() - began - seconds - POLL_SECONDS
        self._deadline += late_seconds if late_seconds > SUSPENDED_SECONDS else 0.0
        return received

    def is_told_to_end(self, signals: set[signal.Signals]) -> bool:
        """Pass on what has come while ranks are being started; returns whether no more are wanted."""
        while (received := _next_signal(signals - {signal.SIGCHLD}, 0)) is not None:
            self._pass_on(received)
        return not ENDING_SIGNALS.isdisjoint(self._forwarded)

    def _pass_on(self, number: signal.Signals) -> None:
        self._children.send(number)
        if number in ENDING_SIGNALS:
            again = not ENDING_SIGNALS.isdisjoint(self._forwarded)
            self._expect_end_within(self._grace.kill_seconds if again else self._grace.signal_seconds)
        self._forwarded.append(number)

    def _look_at_ends(self) -> None:
        for end in self._children.ended[self._num_seen :]:
            self._num_seen += 1
            if end.returncode != 0 and not self._children.told_to_stop:
                self._sigterm_is_next = True
                self._expect_end_within(self._grace.peer_seconds)
            if end.returncode < 0 and -end.returncode not in self._forwarded and not end.told_to_stop:
                cause = " (out of memory?)" if end.returncode == -signal.SIGKILL else ""
                _say(f"rank {end.rank} was killed by {signal.Signals(-end.returncode).name}{cause}")

    def _expect_end_within(self, seconds: float) -> None:
        self._deadline = min(self._deadline, time.monotonic() + seconds)

    def _press_harder(self) -> None:
        if self._sigterm_is_next:
            self._sigterm_is_next = False
            self._children.told_to_stop = True
            self._children.send(signal.SIGTERM)
            preempted = all(end.returncode in (0, ExitCode.PREEMPTED) for end in self._children.ended)
            self._deadline = time.monotonic() + (self._grace.signal_seconds if preempted else self._grace.kill_seconds)
        else:
            late = ", ".join(str(rank) for rank in self._children.running)
            _say(f"rank {late} did not end in time and is killed")
            self._children.told_to_stop = True
            self._children.kill()
            self._deadline = math.inf


def _next_signal(signals: set[signal.Signals], seconds: float) -> signal.Signals | None:
    """Wait for one of `signals`; None: none came in time.

    Looked for now and then: Python 3.11's `sigtimedwait`, suspended for longer than its timeout, returns a signal made
    of what happens to lie on the stack.
    """
    deadline = time.monotonic() + seconds
    while (received := signal.sigtimedwait(signals, 0)) is None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return None if received is None else signal.Signals(received.si_signo)


def _say(text: str) -> None:
    print(f"launcher: {text}", file=sys.stderr, flush=True)
