"""What a metered command leaves, told when it has ended."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.core.errors import DataError
from pipeline.core.units import format_bytes
from pipeline.metering.record import report_quietly, say
from pipeline.metering.settings import Settings
from pipeline.reporting.runs import RunRecord, read_run

NONE_JOINED = (
    "no process of the command made a process group that could be metered, so there is nothing to report. It must call"
    " torch.distributed.init_process_group in a Python that reads PYTHONPATH (not python -I or -E)."
)


def ledger_stamp(settings: Settings) -> int | None:
    """Return what tells one writing of the run's ledger from another; None where there is none."""
    path = Path(settings.run_root) / settings.name / "ledger.json"
    return path.stat().st_ino if path.is_file() else None


def conclude(settings: Settings, code: int, joined: Sequence[int], *, stamp: int | None) -> None:
    """Say what a command exchanged, and write its report where rank 0 ran here, or left its ledger on a shared disk.

    Args:
        settings: What was metered.
        code: Exit code of the command.
        joined: Ranks of its processes that were metered on this machine.
        stamp: `ledger_stamp` from before the command.
    """
    if 0 not in joined and ledger_stamp(settings) in (None, stamp):
        if not joined:
            say(NONE_JOINED)
        return
    directory = Path(settings.run_root) / settings.name
    try:
        run = read_run(directory)
    except DataError:
        say(f"the command ended (exit code {code}) before its first step, and left no ledger.")
        return
    report = report_quietly(settings)
    for line in sentences(run, code):
        say(line)
    say(f"{report or directory}")


def sentences(run: RunRecord, code: int) -> list[str]:
    """Return what a run exchanged, in words.

    Args:
        run: What it left.
        code: Exit code of the command.
    """
    ledger = run.ledger
    known = ledger["num_steps"]
    num_steps = max(known, int(run.last("trainer/step") or 0))
    owed, carried = ledger["gradient_bytes"], run.wire_gradient_bytes
    told = [f"{num_steps:,} optimiser steps on {ledger['world_size']} ranks ({ledger['backend']})."]
    if code or num_steps > known:
        told.append(f"It ended early (exit code {code}): the ledger is known up to step {known:,} of {num_steps:,}.")
    if owed is not None:
        moved = "" if carried is None else f", and {format_bytes(carried)} were carried"
        told.append(f"A step owes {format_bytes(owed)} of gradients{moved}.")
    closed = ledger["closed"]
    if closed is None:
        told.append(f"Not compared: {ledger['null_reasons'].get('closed', 'no reason is on record')}")
    elif not closed:
        told.append(f"The ledger does not close: residual of {_residuals(run)}.")
    elif known:
        steps, num_bytes = _compared(run)
        told.append(f"The ledger closes: in {steps:,} steps the ranks sent {num_bytes:,} bytes, all of them explained.")
    else:
        told.append("No optimiser of torch has stepped; what was exchanged before is explained.")
    return told


def _residuals(run: RunRecord) -> str:
    """Return the phases whose bytes are not explained, each with what is left by rank."""
    measured = run.ledger["attempts"][-1]["measured"]
    rows = [] if measured is None else measured["rows"]
    return "; ".join(
        f"{row['phase']}{'' if row['committed'] else ' without a step'} {row['residual_bytes_per_rank']} bytes by rank"
        for row in rows
        if any(row["residual_bytes_per_rank"] or ())
    )


def _compared(run: RunRecord) -> tuple[int, int]:
    """Return after how many steps the ranks last compared their counts, and the bytes that they had sent in them."""
    measured = run.ledger["attempts"][-1]["measured"]
    assert measured is not None  # else nothing is closed
    rows = [row for row in measured["rows"] if row["phase"] == "train" and row["committed"]]
    return measured["num_steps"], sum(sum(row["measured_bytes_per_rank"]) for row in rows)
