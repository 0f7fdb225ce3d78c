"""What became of one model of a comparison, and whether its run carried what the model owes."""

from dataclasses import dataclass

from pipeline.config.hooks import COMPRESSIONS
from pipeline.core.errors import ConfigError, ExitCode, LedgerError
from pipeline.models.facts import ModelFacts
from pipeline.reporting.runs import RunRecord


@dataclass(frozen=True)
class Outcome:
    """What became of one model with one compression: a run, or the reason why there is none."""

    model: str
    facts: ModelFacts
    hook: str = "none"
    label: str = ""
    """Name of the row; empty: the model's."""
    run: RunRecord | None = None
    reason: str = ""
    """Why there is no run, as a sentence; empty where there is one."""
    exit_code: int = ExitCode.DONE
    command: str = ""
    """Command line of the comparison."""
    alone: RunRecord | None = None
    """Run of the same model on one rank."""
    why_not_alone: str = "No run on a single rank was made under these conditions, against which to measure scaling."

    @property
    def name(self) -> str:
        """Name of the row."""
        return self.label or self.model


def metered_gradient_bytes(run: RunRecord, parameter_bytes: int) -> int:
    """Return the gradient bytes of a step as the run's collectives carried them, compression undone.

    Where the compression has no fixed share, what DDP handed over in each step, which must be no less than was carried.

    Raises:
        ConfigError: the run exchanged nothing in most of its steps.
        LedgerError: nothing was carried, or not what the model's parameters owe.
    """
    if run.is_local:
        raise ConfigError(f"{run.rounds_sentence}: a comparison is of runs that exchanged gradients in every step.")
    wire_bytes = run.wire_gradient_bytes
    compression = COMPRESSIONS.get(run.ledger["hook"])
    share = compression and compression.share
    if wire_bytes is None:
        raise LedgerError(
            f"{run.directory} recorded no gradient collective: a comparison needs at least 2 ranks and comm.meter=true."
        )
    handed_over = {wire_bytes / share} if share else set(run.series("comm/gradient_bytes")[1])
    is_closed = handed_over == {parameter_bytes} and run.ledger["gradient_bytes"] == parameter_bytes
    if not is_closed or wire_bytes > parameter_bytes:
        carried = " and ".join(f"{num_bytes:,.10g}" for num_bytes in sorted(handed_over)) or "an unknown number of"
        raise LedgerError(
            f"{run.directory} carried {carried} bytes of gradients per step and its ledger owes "
            f"{run.ledger['gradient_bytes']:,}, but the parameters of {run.ledger['model']} are {parameter_bytes:,}"
            " bytes; the run was made by another version of the model or its ledger was changed: repeat it."
        )
    return parameter_bytes
