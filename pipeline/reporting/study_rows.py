"""What must be said beside a variant's name wherever it stands: of its ledger, of seeds that are missing."""

from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.core.schemas.study import StudyRowJson

OPEN, UNMEASURED = "*", "?"
"""After the name of a row whose ledger does not close, or was not measured."""
MEANINGS = {OPEN: "the ledger does not close", UNMEASURED: "the bytes sent were not measured"}


def reason_of(row: StudyRowJson | Mapping[str, Any]) -> str:
    """Return why a variant has no run at all; empty where one ended well."""
    reasons = [run.get("reason", "") for run in row["runs"]]
    return "; ".join(dict.fromkeys(reasons)) if reasons and all(reasons) else ""


def _mark(row: StudyRowJson) -> str:
    return {True: "", False: OPEN, None: "" if reason_of(row) else UNMEASURED}[row["ledger_closed"]]


def labelled(text: str, row: StudyRowJson) -> str:
    """Return the name of a row, or its label in a picture, with a mark and the seeds, unless all are in its means."""
    num_seeds, num_runs = row["num_seeds"], len(row["runs"])
    seeds = "" if reason_of(row) or num_seeds == num_runs else f"({num_seeds} of {num_runs} seeds)"
    return " ".join(filter(None, (text, _mark(row), seeds)))


def meanings(rows: Iterable[StudyRowJson]) -> str:
    """Return what the marks of some rows mean; empty where none is marked."""
    marks = dict.fromkeys(map(_mark, rows))
    return " · ".join(f"{mark} {MEANINGS[mark]}" for mark in marks if mark)


def is_complete(row: StudyRowJson | Mapping[str, Any]) -> bool:
    """Return whether all seeds of a row were trained and validated, and all their ledgers close."""
    return row["ledger_closed"] is True and row["num_seeds"] == len(row["runs"])
