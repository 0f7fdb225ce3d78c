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


def conclude(settings: Settings, code: int, joined: Sequence[int]) -> None:
    """Say what a command exchanged, and write its report where rank 0 ran here.

    Args:
        settings: What was metered.
        code: Exit code of the command.
        joined: Ranks of its processes that were metered.
    """
    if not joined:
        say(NONE_JOINED)
        return
    if 0 not in joined:
        return
    directory = Path(settings.run_root) / settings.name
    try:
        run = read_run(directory)
    except DataError:
        say(f"the command ended (exit code {code}) before its first step, and left no ledger.")
        return
    report = report_quietly(settings)
    for line in sentences(run):
        say(line)
    say(f"{report or directory}")


def sentences(run: RunRecord) -> list[str]:
    """Return what a run exchanged, in words."""
    ledger = run.ledger
    owed, carried = ledger["gradient_bytes"], run.wire_gradient_bytes
    told = [f"{ledger['num_steps']:,} optimiser steps on {ledger['world_size']} ranks ({ledger['backend']})."]
    if owed is not None:
        moved = "" if carried is None else f", and {format_bytes(carried)} were carried"
        told.append(f"A step owes {format_bytes(owed)} of gradients{moved}.")
    closed = ledger["closed"]
    if closed:
        steps, num_bytes = _compared(run)
        told.append(f"The ledger closes: in {steps:,} steps the ranks sent {num_bytes:,} bytes, all of them explained.")
    elif closed is None:
        told.append(f"Not compared: {ledger['null_reasons'].get('closed', 'no reason is on record')}")
    else:
        told.append(
            f"The ledger does not close: residual {ledger['transport']['residual_bytes_per_rank']} bytes by rank."
        )
    return told


def _compared(run: RunRecord) -> tuple[int, int]:
    """Return after how many steps the ranks last compared their counts, and the bytes that they had sent in them."""
    measured = run.ledger["attempts"][-1]["measured"]
    assert measured is not None  # else nothing is closed
    rows = [row for row in measured["rows"] if row["phase"] == "train" and row["committed"]]
    return measured["num_steps"], sum(sum(row["measured_bytes_per_rank"]) for row in rows)
