"""The tables of a comparison: one by subject for the page, a short one for the terminal, and the CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import replace

from pipeline.core.schemas.comparison import ComparisonJson, ModelRowJson
from pipeline.core.units import (
    MISSING,
    format_accuracy,
    format_bandwidth,
    format_bytes,
    format_count,
    format_percent,
    format_rate,
    format_seconds,
    format_times,
)
from pipeline.reporting.repetitions import repetitions_table
from pipeline.reporting.tables import Column, Table, make_table

OPEN, UNMEASURED = "*", "?"
"""After the name of a row whose ledger does not close, or was not measured."""


def _ledger(closed: bool | None) -> str:
    return {True: "closed", False: "does not close", None: MISSING}[closed]


def _epochs(epochs: float | None) -> str:
    return MISSING if epochs is None else f"{epochs:,.4g}"


_LABEL = Column("label", "model")
_BYTES = (
    Column("gradient_bytes", "gradients", format_bytes, "what one optimiser step sums over all ranks, as metered"),
    Column(
        "payload_bytes_per_step", "carried", format_bytes, "those gradients as the collectives carried them, compressed"
    ),
    Column("times_baseline", "× baseline", format_times, "carried bytes over the baseline’s"),
    Column(
        "server_egress_bytes_per_step",
        "out of a server per step",
        format_bytes,
        "bytes the busiest server sends: gradients, buffers, metrics and message preambles",
    ),
    Column("server_egress_bytes_per_image", "per picture", format_bytes, "the same over the pictures of a step"),
    Column(
        "server_egress_bytes_per_epoch",
        "per epoch",
        format_bytes,
        "the same for ImageNet’s 1,281,167 training pictures",
    ),
    Column(
        "server_egress_bytes_per_training",
        "per training",
        format_bytes,
        "the same to the end of the published recipe, at this global batch",
    ),
    Column("ledger_closed", "ledger", _ledger, "whether what was sent is what the collectives must send, to the byte"),
    Column("measured_top1", "measured top-1", format_accuracy, "the run’s last validation; published ones stand below"),
)
_TIME = (
    Column("step_seconds", "step", format_seconds, "median wall time of a step in this run"),
    Column("communication_seconds", "communication", format_seconds, "time of a step in which bytes are exchanged"),
    Column(
        "exposed_seconds", "exposed", format_seconds, "time a step waits for communication that no computation hides"
    ),
    Column("images_per_second", "pictures/s", format_rate, "over all ranks"),
    Column(
        "scaling_efficiency",
        "scaling",
        format_percent,
        "pictures per second and rank against one rank alone, same batch",
    ),
    Column(
        "break_even_bandwidth_bits_per_second",
        "break-even link",
        format_bandwidth,
        "below this bandwidth of every server the lighter of the model and the baseline trains faster per picture,"
        " above it the other; forecast from both runs, beyond 100 Mbit/s to 2 Gbit/s without proof. Empty: one of them"
        " is faster on every link",
    ),
)
_MODEL = (
    Column("num_parameters", "parameters", format_count),
    Column("export_bytes", "to ship", format_bytes, "the state dict’s tensors, as they are"),
    Column(
        "inference_memory_bytes",
        "to run",
        format_bytes,
        "memory for one picture: weights, buffers and most activations alive",
    ),
    Column(
        "training_memory_bytes",
        "to train",
        format_bytes,
        "memory of a rank in fp32: weights, gradients, momentum and kept activations",
    ),
    Column("published_top1", "published top-1", format_accuracy, "on ImageNet, as published; not measured here"),
    Column("published_epochs", "published epochs", _epochs, "how long the training took that is said to lead there"),
)
_TERMINAL = (
    Column("label", "model"),
    Column("payload_bytes_per_step", "carried", format_bytes),
    Column("times_baseline", "× base", format_times),
    Column("server_egress_bytes_per_step", "egress", format_bytes),
    Column("step_seconds", "step", format_seconds),
    Column("exposed_seconds", "exposed", format_seconds),
    Column("published_top1", "top-1", format_accuracy),
)
_CSV_KEYS = (
    "model",
    "hook",
    *(column.key for columns in (_BYTES, _TIME, _MODEL) for column in columns),
    "published_top1_source",
    "published_epochs_source",
    "reason",
)


def comparison_tables(comparison: ComparisonJson) -> list[Table]:
    """Return the tables by subject: bytes, time, model. A column without any value is left out (the page says why)."""
    rows = comparison["models"]
    by_model = list({row["model"]: row for row in reversed(rows)}.values())[::-1]  # a model's facts know no compression
    models: list[ModelRowJson] = [
        {**row, "label": row["model"], "reason": "", "ledger_closed": None} for row in by_model
    ]
    tables = [
        _table("Bytes", _BYTES, rows, comparison["baseline"]),
        _table("Time", _TIME, rows, comparison["baseline"]),
        _table("Model", _MODEL, models, comparison["baseline"]),
    ]
    repeated = repetitions_table(comparison)
    return tables if repeated is None else [*tables, repeated]


def terminal_table(comparison: ComparisonJson) -> Table:
    """Return what fits into 80 columns. A name ends with a mark where the row's ledger is not closed."""
    rows: list[ModelRowJson] = [{**row, "label": row_label(row) + _mark_of(row)} for row in comparison["models"]]
    marks = {_mark_of(row).strip() for row in comparison["models"]}
    meanings = {OPEN: "the ledger does not close", UNMEASURED: "the bytes sent were not measured"}
    caption = " · ".join(f"{mark} {meaning}" for mark, meaning in meanings.items() if mark in marks)
    table = _table("", _TERMINAL[1:], rows, comparison["baseline"])
    return replace(table, caption=caption)


def row_label(row: ModelRowJson) -> str:
    """Return the name of a row: the model, and its compression where those are compared."""
    return row.get("label") or row["model"]


def is_baseline(row: ModelRowJson, baseline: str) -> bool:
    """Return whether the others are multiples of this row: the baseline's, and of its compressions the first or none.

    Args:
        row: A row of the comparison.
        baseline: Name of the baseline's model.
    """
    return row["model"] == baseline and row.get("times_baseline") == 1


def _mark_of(row: ModelRowJson) -> str:
    if row.get("ledger_closed") is False:
        return f" {OPEN}"
    return f" {UNMEASURED}" if row.get("ledger_closed") is None and not row.get("reason") else ""


def _table(title: str, columns: Sequence[Column], rows: Sequence[ModelRowJson], baseline: str) -> Table:
    shown = [column for column in columns if any(row.get(column.key) is not None for row in rows)]

    def mark(row: ModelRowJson) -> str:
        if row.get("reason"):
            return "failed"
        if row.get("ledger_closed") is False:
            return "open"
        return "baseline" if is_baseline(row, baseline) else ""

    labelled: list[ModelRowJson] = [{**row, "label": row_label(row)} for row in rows]
    return make_table(title, (_LABEL, *shown), labelled, mark)


def sources(comparison: ComparisonJson) -> list[tuple[str, str]]:
    """Return (what of which models, source) of everything published, each source once."""
    found: dict[str, dict[str, None]] = {}
    for name, key in (("top-1", "published_top1_source"), ("epochs", "published_epochs_source")):
        for row in comparison["models"]:
            if source := row.get(key):
                found.setdefault(f"{name}: {source}", {})[row["model"]] = None
    return [(", ".join(models), source) for source, models in found.items()]


def comparison_csv(comparison: ComparisonJson) -> str:
    """Return the same rows, exact and unformatted; an empty field was not measured."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, _CSV_KEYS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _exact(row.get(key)) for key in _CSV_KEYS} for row in comparison["models"])
    return buffer.getvalue()


def _exact(value: object) -> object:
    """Return the value as in JSON."""
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else value
