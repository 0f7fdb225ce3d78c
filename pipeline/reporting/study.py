"""The tables of a study, its CSV and its page."""

import csv
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.core.files import write_json_atomic, write_text_atomic
from pipeline.core.schemas.study import (
    AverageJson,
    EnvelopePointJson,
    PublishedJson,
    ReachJson,
    StudyJson,
    StudyRowJson,
)
from pipeline.core.units import (
    MISSING,
    format_accuracy,
    format_bytes,
    format_count,
    format_seconds,
)
from pipeline.reporting import figures, study_figures
from pipeline.reporting.page import Page, render
from pipeline.reporting.sections import Fact, StudyPart, not_measured, svg_figure
from pipeline.reporting.study_rows import is_complete, labelled, meanings, reason_of
from pipeline.reporting.tables import Column, Row, Table, make_table

BYTES_PER_GIGABYTE = 1e9


def _gigabytes(value: float | None) -> str:
    return format_bytes(None if value is None else value * BYTES_PER_GIGABYTE)


def _average(value: AverageJson | None) -> str:
    if value is None:
        return MISSING
    spread = f" ({value['lowest'] * 100:.2f} to {value['highest'] * 100:.2f})"
    return format_accuracy(value["mean"]) + (spread if value["lowest"] < value["highest"] else "")


def _whole(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f}"


def _ledger(closed: bool | None) -> str:
    return {True: "closed", False: "does not close", None: MISSING}[closed]


_NAME = Column("name", "variant")
_MODEL = (
    Column("num_parameters", "parameters", format_count),
    Column("num_parameters_of_1000_classes", "of 1000 classes", format_count, "parameters with ImageNet’s classifier"),
    Column("gradient_bytes", "gradients", format_bytes, "what one step sums over all ranks, before compression"),
    Column("macs", "multiply-adds", format_count, "of one picture’s forward pass"),
    Column("inference_peak_activation_bytes", "activations, peak", format_bytes, "alive at once for one picture, fp32"),
    Column("training_activation_bytes", "activations, kept", format_bytes, "of a rank’s batch for the backward pass"),
)
_RUNS = (
    Column("num_steps", "steps", format_count),
    Column("step_seconds", "step", format_seconds, "median; mean of the seeds"),
    Column("exposed_seconds", "exposed", format_seconds, "a step’s wait for communication that no computation hides"),
    Column(
        "server_egress_bytes_per_step",
        "out of a server per step",
        format_bytes,
        "predicted of the collectives issued; the busiest, mean of all steps",
    ),
    Column("server_egress_bytes_per_epoch", "per epoch", format_bytes, "predicted"),
    Column("gigabytes", "in all", _gigabytes, "out of all servers together, in a whole run"),
    Column("seconds", "steps took", format_seconds, "without validations and checkpoints"),
    Column("ledger_closed", "ledger", _ledger, "whether what was sent is what the collectives must send, to the byte"),
)
_ACCURACY = (
    Column("top1", "validation top-1", _average, "of the last validation: mean of the seeds, lowest to highest"),
    Column("seeds", "seeds", None, "in the mean, of those asked for"),
    Column("published_top1", "published top-1", format_accuracy, "on ImageNet; not measured here"),
    Column("published_top5", "published top-5", format_accuracy, "on ImageNet; not measured here"),
    Column(
        "published_megabytes",
        "published MB",
        lambda value: MISSING if value is None else f"{value:g}",
        "as printed there",
    ),
    Column("published_source", "published in"),
    Column("bytes_of_1000_classes", "counted", format_bytes, "weights in fp32 with 1000 classes"),
)
_TERMINAL = (
    _NAME,
    Column("num_parameters", "parameters", format_count),
    Column("step_seconds", "step", format_seconds),
    Column("gigabytes", "in all", _gigabytes),
    Column("top1", "validation top-1", _average),
)


def terminal_table(study: StudyJson) -> Table:
    """Return what fits into 80 columns. A name ends with a mark where the row's ledger is not closed."""
    made = make_table("", _TERMINAL, map(_named, study["rows"]))
    return Table("", made.columns, made.rows, meanings(study["rows"]))


def _named(row: StudyRowJson) -> dict[str, Any]:
    """Return a row as tables take it."""
    return {**row, "name": labelled(row["name"], row), "reason": reason_of(row)}


def study_sentence(study: StudyJson) -> str:
    """Return the most accurate variant, and the cheapest one to the highest target that any reaches.

    Only of variants of which every seed is there and every ledger closes; the others are named.
    """
    complete = [row for row in study["rows"] if is_complete(row)]
    rated = [(row["top1"]["mean"], row) for row in complete if row["top1"] is not None]
    others = [labelled(row["name"], row) + (" (failed)" if reason_of(row) else "") for row in study["rows"]
              if not is_complete(row)]  # fmt: skip
    left_out = ""
    if others:
        left_out = f" Not ranked, for want of a seed or of a closed ledger: {', '.join(others)}."
    if not rated:
        return f"No variant has all its seeds and a ledger that closes; the reasons are in the report.{left_out}"
    top1, best = max(rated, key=lambda found: found[0])
    of = f"{best['num_seeds']} seeds" if best["num_seeds"] > 1 else "one seed"
    ranked = f"{len(rated)} of {len(study['rows'])}" if others else f"{len(rated)}"
    said = (
        f"{best['name']} is the most accurate of {ranked} variants: {format_accuracy(top1)}, {of},"
        f" for {_gigabytes(best['gigabytes'])} out of all servers."
    )
    for target in sorted(_targets(study), reverse=True):
        at = [(one["gigabytes"], row["name"]) for row, one in _reached(study, target) if one["gigabytes"] is not None]
        if at:
            gigabytes, name = min(at)
            return f"{said} To {target:.0%} {name} needs fewest: {_gigabytes(gigabytes)}.{left_out}"
    return said + left_out


def _reached(study: StudyJson, target: float) -> Iterator[tuple[StudyRowJson, ReachJson]]:
    """Yield the complete variants of which every seed reaches a target."""
    for row in filter(is_complete, study["rows"]):
        for one in row["reach"]:
            if one["target"] == target and 0 < one["num_runs"] == one["num_reached"]:
                yield row, one


# --- files ---


def write_study(study: StudyJson, directory: Path) -> Path:
    """Write study.json and .csv, every picture as .png and .svg, and report.html. Returns the last."""
    write_json_atomic(directory / "study.json", study)
    write_text_atomic(directory / "study.csv", study_csv(study))
    drawings = study_figures.draw_all(study)
    for name, drawing in drawings.items():
        figures.save(drawing.figure, directory / name)
    report = directory / "report.html"
    write_text_atomic(report, render(_page(study, drawings)))
    return report


def study_csv(study: StudyJson) -> str:
    """Return a line for each variant, exact and unformatted; an empty field was not measured."""
    lines: list[dict[str, Any]] = []
    for row in study["rows"]:
        line = {key: value for key, value in row.items() if not isinstance(value, dict | list)}
        top1 = row["top1"] or {}
        line |= {f"top1_{key}": top1.get(key) for key in ("mean", "lowest", "highest")}
        for one in row["reach"]:
            to = f"to_{one['target']:g}"
            line |= {f"{to}_reached": one["num_reached"], f"{to}_runs": one["num_runs"]}
            line |= {f"{to}_{key}": one[key] for key in ("gigabytes", "seconds")}
        line |= {f"published_{key}": (row["published"] or {}).get(key) for key in PublishedJson.__annotations__}
        lines.append({**line, "reason": reason_of(row)})
    keys = [key for key in dict.fromkeys(key for line in lines for key in line) if key not in ("top1", "published")]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, keys, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows({key: {True: "true", False: "false"}.get(value, value) if isinstance(value, bool) else value
                      for key, value in line.items()} for line in lines)  # fmt: skip
    return buffer.getvalue()


def _page(study: StudyJson, drawings: Mapping[str, study_figures.Drawing]) -> Page:
    def shown(prefix: str) -> list[Any]:
        return [
            svg_figure(drawing.figure, name, drawing.caption)
            for name, drawing in drawings.items()
            if name.startswith(prefix)
        ]

    budget = study["budget"]
    own = {
        path: reason
        for path, reason in study["null_reasons"].items()
        if path.count(".") == 2 and not path.endswith(".published")
    }
    return Page(
        title=study["study"],
        kicker=f"{len(study['rows'])} variants studied",
        headline=" ".join(filter(None, (study["question"], study_sentence(study)))),
        figures_of_merit=[],
        conditions=[
            Fact("each run", f"{budget['amount']:g} {budget['kind']}"),
            Fact("seeds", ", ".join(map(str, study["seeds"]))),
            *(Fact(key, value) for key, value in study["conditions"].items()),
        ],
        command=study["command"],
        study=[
            part
            for part in (
                StudyPart("One thing at a time", "", shown("study-of-"), []),
                StudyPart("Accuracy and what was spent", _CURVES_LEAD, shown("study-against-"), envelope_tables(study)),
                StudyPart("To a target", _reach_lead(study), [], _reach_tables(study)),
                StudyPart("All variants", "", [], _tables(study)),
            )
            if part.lead or part.figures or part.tables
        ],
        not_measured=not_measured(own),
    )


_CURVES_LEAD = (
    "Validations of runs whose ledger closes, mean of the seeds. The thick line is the envelope: the most accurate"
    " variant for what was spent so far."
)


def _tables(study: StudyJson) -> list[Table]:
    rows = [
        {
            **_named(row),
            "seeds": f"{row['num_seeds']} of {len(row['runs'])}",
            "bytes_of_1000_classes": row["num_parameters_of_1000_classes"] * 4,
            **{f"published_{key}": value for key, value in (row["published"] or {}).items()},
        }
        for row in study["rows"]
    ]
    models = [{**row, "reason": ""} for row in rows]
    seeds = [{**run, "name": f"{row['name']}, seed {run['seed']}"} for row in study["rows"] for run in row["runs"]]
    marks = meanings(study["rows"])
    by_seed = (
        Column("top1", "validation top-1", format_accuracy),
        Column("gigabytes", "in all", _gigabytes),
        Column("seconds", "steps took", format_seconds),
        Column("ledger_closed", "ledger", _ledger),
    )
    return [
        _table("Model", _MODEL, models, marks),
        _table("Accuracy", _ACCURACY, rows, marks),
        _table("Bytes and time", _RUNS, rows, marks),
        _table("Every run", by_seed, seeds),
    ]


def _table(title: str, columns: Sequence[Column], rows: Sequence[Row], marks: str = "") -> Table:
    """Return a table of the columns in which any row has a value.

    Args:
        title: Words above it.
        columns: After the name.
        rows: Rows from the top.
        marks: What marks after the names mean.
    """
    shown = [column for column in columns if any(row.get(column.key) is not None for row in rows)]

    def mark(row: Row) -> str:
        return "failed" if row.get("reason") else "open" if row.get("ledger_closed") is False else ""

    return make_table(title, (replace(_NAME, note=marks), *shown), rows, mark)


def _reach_lead(study: StudyJson) -> str:
    """Return which targets nobody reaches, and what a forecast is."""
    missed = [f"{target:.0%}" for target in _targets(study) if not _any_reach(study, target)]
    return (f"No variant reaches {', '.join(missed)}. " if missed else "") + (
        "Times on other links are forecast from the measured run, not measured."
    )


def _targets(study: StudyJson) -> list[float]:
    return [one["target"] for one in study["rows"][0]["reach"]]


def _any_reach(study: StudyJson, target: float) -> bool:
    return any(one["num_reached"] for row in study["rows"] for one in row["reach"] if one["target"] == target)


def _reach_tables(study: StudyJson) -> list[Table]:
    """Return a table for each target that any seed reaches."""
    made = []
    for position, target in enumerate(_targets(study)):
        if not _any_reach(study, target):
            continue
        found = [(row, row["reach"][position]) for row in study["rows"]]
        bandwidths = [forecast["bandwidth"] for forecast in found[0][1]["forecasts"]]
        columns = (
            Column("reached", "seeds that get there"),
            Column("gigabytes", "moved", _gigabytes, "out of all servers together"),
            Column("seconds", "steps took", format_seconds),
            Column("images", "pictures", _whole),
            *(Column(rate, f"forecast at {rate}", format_seconds) for rate in bandwidths),
        )
        rows = [
            {
                **one,
                "name": labelled(row["name"], row),
                "ledger_closed": row["ledger_closed"],
                "reached": f"{one['num_reached']} of {one['num_runs']}" if one["num_reached"] else "never",
                **{forecast["bandwidth"]: forecast["seconds"] for forecast in one["forecasts"]},
            }
            for row, one in found
        ]
        made.append(_table(f"To {target:.0%}", columns, rows, meanings(study["rows"])))
    return made


def envelope_tables(study: StudyJson) -> list[Table]:
    """Return for each thing that is spent which variant is the best from where to where."""
    shows = {
        "gigabytes": ("gigabytes", _gigabytes),
        "seconds": ("seconds", format_seconds),
        "images": ("pictures", _whole),
    }
    made = []
    for axis, (title, show) in shows.items():
        points: list[EnvelopePointJson] = study["envelope"][axis]
        stretches = [list(stretch) for _, stretch in itertools.groupby(points, lambda point: point["name"])]
        begins = [stretch[0]["spent"] for stretch in stretches]
        rows = [
            {**stretch[-1], "begin": begin, "end": end}
            for stretch, begin, end in itertools.zip_longest(stretches, begins, begins[1:])
        ]
        if rows:
            columns = (
                Column("begin", "best from", show),
                Column("end", "best to", show, "where the next one is better; the last has no end here"),
                Column("top1", "validation top-1", format_accuracy, "the best of the stretch"),
            )
            made.append(make_table(f"The best for its {title}", (_NAME, *columns), rows))
    return made
