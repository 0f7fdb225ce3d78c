"""Why the ranks of a Slurm job ended, for slurm/train.sh, which decides whether the job goes back into the queue.

srun reports the highest exit code of all ranks: a rank that was waiting for one with an error, and was killed for it at
last, hides the error behind its 137. So each rank that ends in any other way than well leaves a file, in a directory
that the script names, which says with what code, and whether it merely lost the others.
"""

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import ExitCode
from pipeline.core.files import write_text_atomic

VARIABLE = "SQUEEZEWIRE_CAUSES"
_LOST = "lost the others"


@dataclass(frozen=True)
class Causes:
    """What the ranks of a job said when they ended.

    Args:
        errors: exit codes of ranks that ended for a reason of their own, which would come again.
        num_lost: ranks that only lost the others.
    """

    errors: tuple[int, ...] = ()
    num_lost: int = 0

    @property
    def error(self) -> int | None:
        """The most telling of `errors`: 1 says the least."""
        return max(self.errors, default=None)


def leave_cause(code: int, *, has_lost_others: bool) -> None:
    """As a rank that ends with `code`. Never fails: who cannot write has said it in its log."""
    directory = os.environ.get(VARIABLE)
    if not directory or code in (ExitCode.DONE, ExitCode.PREEMPTED):
        return
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    with contextlib.suppress(OSError):
        Path(directory).mkdir(parents=True, exist_ok=True)
        write_text_atomic(Path(directory) / f"rank{rank}", _LOST if has_lost_others else str(code))


def read_causes(directory: str | None) -> Causes:
    """What `leave_cause` left there; nothing if there is no such directory."""
    words = list(_words(Path(directory).glob("rank*"))) if directory else []
    return Causes(tuple(int(word) for word in words if word.isdigit()), words.count(_LOST))


def _words(paths: Iterable[Path]) -> Iterable[str]:
    for path in sorted(paths):
        with contextlib.suppress(OSError):
            yield path.read_text()
