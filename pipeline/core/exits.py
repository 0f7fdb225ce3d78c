"""How a command leaves the process, and why the ranks of a Slurm job ended.

slurm/train.sh reads the causes to decide whether the job goes back into the queue. srun alone would not tell it: it
reports the highest exit code of all ranks, and a rank that was waiting for one with an error, and was killed for it at
last, hides the error behind its 137. So each rank that ends in any other way than well leaves a file, in a directory
that the script names, which says with what code, and whether it merely lost the others.
"""

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pipeline.core.errors import ExitCode, PeerLost, UserError
from pipeline.core.files import write_text_atomic

VARIABLE = "SQUEEZEWIRE_CAUSES"
PIPE_VARIABLE = "SQUEEZEWIRE_CAUSES_PIPE"
"""Where ranks that a launcher of ours started say the same to it: a descriptor, and which pipe that must be."""
_LOST = "lost the others"
LONGEST_END_SECONDS = 60.0
"""Time that a finished rank has for its end: its result is durable by then, so that nothing is worth more waiting."""


@dataclass(frozen=True)
class Causes:
    """What the ranks of a job said when they ended.

    Attributes:
        errors: Exit codes of ranks that ended for a reason of their own, which would come again.
        num_lost: Number of ranks that only lost the others.
    """

    errors: tuple[int, ...] = ()
    num_lost: int = 0

    @property
    def error(self) -> int | None:
        """The most telling of `errors`: 1 says the least."""
        return max(self.errors, default=None)


def rank() -> str | None:
    """Return the rank that this process was started as, by whatever started it; None: as no rank."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID"))


def are_causes_collected() -> bool:
    """Tell whether a launcher of ours, or slurm/train.sh, is told why each rank ends, and answers for them all."""
    return bool(os.environ.get(VARIABLE)) or _causes_pipe() is not None


def code_of(error: BaseException) -> int:
    """Return the exit code of a command that ends with `error`."""
    if isinstance(error, PeerLost) and not are_causes_collected():
        return int(error.cause_code)
    if isinstance(error, UserError):
        return int(error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return 130  # the shell's code for SIGINT
    if isinstance(error, SystemExit):  # of a library, which knows nothing of our codes
        return int(ExitCode.INTERNAL if error.code else ExitCode.DONE)
    return int(ExitCode.INTERNAL)


def leave(code: int) -> NoReturn:
    """Exit. A rank goes without the interpreter's teardown, which for a failed one waits for ranks that wait for it.

    A finished rank does first what is left for the end (threads, files, W&B), in bounded time. In a teardown after that
    a thread of gloo that drops a future's callback aborts the process, once in some hundred runs: 134 instead of 0, and
    a requeue.
    """
    if rank() is None:
        sys.exit(code)
    if code == ExitCode.DONE:
        patience = threading.Timer(LONGEST_END_SECONDS, os._exit, [code])
        patience.daemon = True
        patience.start()
        with contextlib.suppress(Exception):  # what a library does at its end does not make a finished run fail
            threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
            atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more
            stream.flush()
    os._exit(code)


def leave_cause(code: int, *, has_lost_others: bool) -> None:
    """Leave the cause of a rank that ends with `code`. Never fails: a rank that cannot write has its log."""
    if code in (ExitCode.DONE, ExitCode.PREEMPTED):
        return
    cause = _LOST if has_lost_others else str(code)
    if (descriptor := _causes_pipe()) is not None:
        with contextlib.suppress(OSError):
            os.write(descriptor, f"{cause}\n".encode())
    if directory := os.environ.get(VARIABLE):
        with contextlib.suppress(OSError):
            Path(directory).mkdir(parents=True, exist_ok=True)
            write_text_atomic(Path(directory) / f"rank{rank() or '0'}", cause)


def _causes_pipe() -> int | None:
    """Return the descriptor that PIPE_VARIABLE names; None: it is another file's, for the launcher is further up."""
    pipe = os.environ.get(PIPE_VARIABLE, "")
    with contextlib.suppress(OSError, ValueError):
        descriptor = int(pipe.partition(":")[0])
        return descriptor if name_of_pipe(descriptor) == pipe else None
    return None


def name_of_pipe(descriptor: int) -> str:
    """Return the value of PIPE_VARIABLE for the writing end of a pipe."""
    return f"{descriptor}:{os.fstat(descriptor).st_ino}"


def read_causes(directory: str | None) -> Causes:
    """Return what `leave_cause` left in the directory; nothing if there is no such directory."""
    return causes_of(list(_words(Path(directory).glob("rank*"))) if directory else [])


def causes_of(words: Sequence[str]) -> Causes:
    """Return what these words of `leave_cause` say."""
    return Causes(tuple(int(word) for word in words if word.isdigit()), words.count(_LOST))


def ended_ranks(directory: str | None) -> list[int]:
    """Return the ranks of this job that have ended: by their own word, or by that of slurm/ended.sh."""
    if not directory:
        return []
    names = [path.name for pattern in ("rank*", "ended*") for path in Path(directory).glob(pattern)]
    numbers = {name.removeprefix("rank").removeprefix("ended") for name in names}
    return sorted(int(number) for number in numbers if number.isdigit())


def _words(paths: Iterable[Path]) -> Iterable[str]:
    for path in sorted(paths):
        with contextlib.suppress(OSError):
            yield path.read_text()
