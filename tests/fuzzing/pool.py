"""Cases in forked processes: each within a deadline, under a limit of memory, its peak measured."""

import multiprocessing
import os
import resource
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random

from pipeline.core.errors import UserError

LONGEST_MESSAGE = 20_000
"""Characters; what nobody reads is no message."""


class WrongResultError(Exception):
    """A command went on with something that is not what the files say."""


@dataclass(frozen=True)
class Target:
    """Something that is read, and how."""

    name: str
    damage: Callable[[Random, Path], Callable[[], object]]
    """(generator, empty directory of the case) -> what reads the damaged thing and checks what it got.

    Reading ends in a project's error, in WrongResultError, or well.
    """
    exit_codes: frozenset[int]
    """Of the errors that may come."""
    peak_bytes: int | None = None
    """Resident beyond what the process held before it, at most; None: as the limits of all cases say."""


@dataclass(frozen=True)
class Case:
    """One damage, told by its target and seed alone."""

    target: str
    seed: int

    def __str__(self) -> str:
        return f"{self.target}:{self.seed}"


@dataclass(frozen=True)
class Limits:
    """What a case may take."""

    seconds: float = 30.0
    peak_bytes: int = 512 * 2**20
    """Resident beyond what the process held before it."""
    data_bytes: int = 2 * 2**30
    """Beyond what the process held before it; more ends in MemoryError."""


@dataclass(frozen=True)
class Result:
    """What came of a case."""

    case: Case
    is_refused: bool = False
    said: str = ""
    """The refusal's sentence, or what was wrong."""
    is_failure: bool = False
    seconds: float = 0.0
    peak_bytes: int = 0


def run_case(target: Target, case: Case, limits: Limits, under: Path) -> Result:
    """Run one case in this process."""
    with tempfile.TemporaryDirectory(dir=under) as directory:
        use = target.damage(Random(str(case)), Path(directory))
        before, start = _reset_peak(), time.monotonic()
        refused, said, wrong = False, "", ""
        try:
            use()
        except UserError as error:
            refused, said = True, str(error)
            if int(error.exit_code) not in target.exit_codes:
                wrong = f"exit code {int(error.exit_code)}: {error}"
            elif len(said) > LONGEST_MESSAGE:
                wrong = f"a message of {len(said)} characters: {said[:200]}"
        except BaseException:
            wrong = traceback.format_exc()
        seconds, peak = time.monotonic() - start, max(0, _kilobytes("VmHWM") - before) * 1024
        if not wrong and peak > (target.peak_bytes or limits.peak_bytes):
            wrong = f"{peak / 2**20:.0f} MiB of memory more than before"
        return Result(case, refused, wrong or said, bool(wrong), seconds, peak)


def _kilobytes(field: str) -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if field in line)


def _reset_peak() -> int:
    """Let the peak begin anew; returns the kilobytes that are resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _kilobytes("VmRSS")


def _serve(connection: Connection, targets: dict[str, Target], limits: Limits, under: Path) -> None:
    most = _kilobytes("VmData") * 1024 + limits.data_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for stream in (1, 2):  # thousands of warnings
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    while (case := connection.recv()) is not None:
        connection.send(run_case(targets[case.target], case, limits, under))


class _Worker:
    """A process that runs one case after the other."""

    def __init__(self, targets: dict[str, Target], limits: Limits, under: Path) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, targets, limits, under), daemon=True)
        self._process.start()
        theirs.close()
        self.case: Case | None = None
        self.since = 0.0

    def give(self, case: Case) -> None:
        self.case, self.since = case, time.monotonic()
        self.connection.send(case)

    def end(self) -> int | None:
        """Kill the process; returns its exit code, negative for a signal, None if it was alive."""
        self._process.join(0.5 if self.connection.poll() else 0)
        code = self._process.exitcode
        self._process.kill()
        self._process.join()
        self.connection.close()
        return code


def run_cases(
    targets: dict[str, Target], cases: Iterator[Case], limits: Limits, *, num_workers: int, under: Path
) -> Iterator[Result]:
    """Results as they come, until there are no more cases.

    Args:
        targets: By their names.
        cases: What to run.
        limits: Of each case.
        num_workers: Processes beside one another.
        under: Where the cases' directories are made.
    """
    workers = [_Worker(targets, limits, under) for _ in range(num_workers)]
    try:
        for worker in workers:
            if (case := next(cases, None)) is not None:
                worker.give(case)
        while busy := [worker for worker in workers if worker.case is not None]:
            earliest = min(worker.since for worker in busy) + limits.seconds
            ready = wait([worker.connection for worker in busy], max(0.0, earliest - time.monotonic()))
            for worker in busy:
                assert worker.case is not None
                if worker.connection in ready:
                    try:
                        result = worker.connection.recv()
                    except EOFError:
                        result = Result(worker.case, said=f"the process died ({worker.end()})", is_failure=True)
                elif time.monotonic() - worker.since > limits.seconds:
                    worker.end()
                    result = Result(worker.case, said=f"still at it after {limits.seconds} s", is_failure=True)
                else:
                    continue
                yield result
                if worker.connection.closed:
                    workers[workers.index(worker)] = worker = _Worker(targets, limits, under)
                worker.case = None
                if (case := next(cases, None)) is not None:
                    worker.give(case)
    finally:
        for worker in workers:
            if not worker.connection.closed:
                worker.end()
