"""How the ranks of a machine ended, and the one exit code that stands for all of them."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.core.errors import ExitCode
from pipeline.core.exits import Causes

ENDING_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
# Codes a rank only ends with on purpose, knowing the cause. 1 is what a peer's broken connection looks like.
TELLING_CODES = {int(code) for code in ExitCode} - {ExitCode.DONE, ExitCode.INTERNAL}

LOST_ONE_ANOTHER = (
    "the ranks lost one another, and none of them says why (the network?): the same command goes on from the last"
    " checkpoint"
)


@dataclass(frozen=True)
class Ended:
    """How a rank ended."""

    rank: int
    returncode: int
    """As subprocess gives it: -n for death by signal n."""
    told_to_stop: bool = False
    """The supervisor had told it to stop, because a peer had failed: its end is a consequence."""


def exit_code_of(ended: Sequence[Ended], forwarded: Sequence[int] = ()) -> int:
    """Return the one exit code of ranks that ended in this order, after the signals `forwarded` had been passed on.

    0 if all ended with 0. Otherwise the first there is of:
    1. a code a rank ends with on purpose: 2 to 7, 75 (but a 75 that answers our own SIGTERM is no cause);
    2. 128 + n, as a shell has it, where a rank died of signal n that had been passed on, or had to be killed for not
       obeying it;
    3. any other code, in which death by a signal nobody passed on counts as 1, our fault.
    """
    ending = [number for number in forwarded if number in ENDING_SIGNALS]
    telling, interrupted, other = [], [], []
    for end in ended:
        number = ending[0] if end.returncode == -signal.SIGKILL and ending else -end.returncode
        if end.returncode in TELLING_CODES:
            if not (end.told_to_stop and end.returncode == ExitCode.PREEMPTED):
                telling.append(end.returncode)
        elif end.returncode < 0 and number in forwarded:
            interrupted.append(128 + number)
        elif end.returncode - 128 in forwarded:
            interrupted.append(end.returncode)
        elif end.returncode != 0:
            other.append(end.returncode if end.returncode > 0 else int(ExitCode.INTERNAL))
    before_the_first = [128 + number for number in ending if not ended]
    return (telling or interrupted or other or before_the_first or [int(ExitCode.DONE)])[0]


def have_only_lost_one_another(ended: Sequence[Ended], causes: Causes) -> bool:
    """Tell whether no rank ended for a reason of its own: each lost the others, or obeyed when one of them had."""
    obeyed = [end for end in ended if end.told_to_stop and end.returncode == ExitCode.PREEMPTED]
    return causes.num_lost > 0 and not causes.errors and causes.num_lost + len(obeyed) == len(ended)
