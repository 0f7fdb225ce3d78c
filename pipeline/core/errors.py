"""Errors a user can act on, and the exit code each of them ends with."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every command."""

    DONE = 0
    INTERNAL = 1  # our fault
    CONFIG = 2
    DATA = 3
    CHECKPOINT = 4
    NON_FINITE = 5
    LEDGER = 6
    DRIFT = 7
    PREEMPTED = 75  # EX_TEMPFAIL: run the same command again


class UserError(ValueError):
    """Something the user can mend. The message names the value, the rule and the remedy; no traceback is shown."""

    exit_code = ExitCode.CONFIG


class ConfigError(UserError):
    """The configuration asks for something impossible."""


class DataError(UserError):
    """Shards, images or labels are not what they must be."""

    exit_code = ExitCode.DATA


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or belongs to another model."""

    exit_code = ExitCode.CHECKPOINT


class NonFiniteError(UserError):
    """A loss or a gradient is NaN or infinite; or the gradient stays exactly 0, and nothing is learnt any more."""

    exit_code = ExitCode.NON_FINITE


class LedgerError(UserError):
    """The bytes predicted and the bytes measured disagree."""

    exit_code = ExitCode.LEDGER


class DriftError(UserError):
    """The ranks' weights, which must be the same bit for bit, are not."""

    exit_code = ExitCode.DRIFT


class PeerLost(UserError):
    """Another rank ended, fell silent or never came.

    Its exit code says why. That of this rank says nothing where somebody collects the causes of all (1); elsewhere this
    rank ends with `cause_code` (`core.exits.code_of`).
    """

    exit_code = ExitCode.INTERNAL
    cause_code: int = ExitCode.INTERNAL
    """Exit code of the rank that is the cause; 75 where it was lost without a word. Ranks that never met may be set up
    wrong, and would not meet the next time either: 1."""


class Preempted(UserError):
    """The cluster wants the machine back; the state is saved and the same command resumes."""

    exit_code = ExitCode.PREEMPTED

    def __init__(self, message: str, *, by_all_ranks: bool = False) -> None:
        super().__init__(message)
        self.by_all_ranks = by_all_ranks
        """Whether all ranks end alike, so that one of them says it."""
