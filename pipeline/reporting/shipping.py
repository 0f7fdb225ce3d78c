"""The page of what `export` wrote: files, what each costs in accuracy and over the air, and what memory it takes."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.files import write_text_atomic
from pipeline.core.schemas.artefacts import ArtefactJson, ArtefactsJson, PeaksJson
from pipeline.core.units import format_bytes, format_count, format_percent, format_seconds, format_times
from pipeline.reporting.figures import BLUE, NARROW_INCHES, ORANGE, byte_tick, draw, label_bar
from pipeline.reporting.page import Page, render
from pipeline.reporting.sections import Fact, ShippingView, not_measured, svg_figure
from pipeline.reporting.tables import Column, Row, Table, make_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLANS = {"copied": "Concats copy", "in_place": "Concats in place", "streamed": "first pooling by rows"}
YARDSTICK = "AlexNet, fp32"


FILES = (
    Column("file", "file"),
    Column("num_bytes", "bytes", format_count),
    Column("times_smaller_than_fp32", "under fp32", format_times),
    Column("times_smaller_than_alexnet_fp32", "under AlexNet", format_times, note="AlexNet's weights in fp32"),
    Column("seconds_at_1_mbit", "at 1 Mbit/s", format_seconds, note="bytes x 8 / rate: calculated, not measured"),
    Column("seconds_at_60_kbit", "at 60 kbit/s", format_seconds),
    Column("top1", "top-1", note="pictures right, and how many more or fewer than before"),
    Column("agreement", "same answer", format_percent),
    Column("loss", "change of the loss", note="mean cross-entropy in nats, and the paired differences' standard error"),
    Column("mcnemar_p", "p", lambda value: "" if value is None else f"{value:.2f}", note="of McNemar's exact test"),
)
RUNS = (
    Column("file", "file"),
    Column("activation_peak_bytes", "activations", format_bytes, note="what operators had asked for at once, at most"),
    Column("process_peak_bytes", "process", format_bytes, note="grew by: weights, packed copies, workspaces too"),
    Column("p50_seconds", "latency, median", format_seconds, note="of one picture on one thread"),
    Column("p90_seconds", "90th percentile", format_seconds),
)
FITS = (
    Column("hardware", "hardware"),
    Column("number_format", "format"),
    Column("weights_bytes", "weights", format_bytes),
    Column("where", "weights lie in"),
    Column("plan", "fits"),
)


def write_artefacts_report(content: ArtefactsJson, path: Path, *, title: str) -> None:
    """Write the page of artefacts.json."""
    write_text_atomic(path, render(_page(title, content)))


def _page(name: str, content: ArtefactsJson) -> Page:
    whole = [row for row in content["artefacts"] if row["artefact"] != "delta"]  # of use without another file
    smallest = min(whole, key=lambda row: row["num_bytes"])
    under_fp32, under_alexnet = smallest["times_smaller_than_fp32"], smallest["times_smaller_than_alexnet_fp32"]
    judged = next((row["judged"] for row in content["artefacts"] if row["judged"]), None)
    on = "no pictures" if judged is None else f"{judged['num_images']} pictures"
    if content["judged_on_calibration"]:
        on += ", those of the calibration, which flatters"
    return Page(
        title=name,
        kicker=f"{content['model']} to ship",
        headline=f"{smallest['file']} has {smallest['num_bytes']:,} bytes: {under_fp32:.1f} times fewer than the"
        f" weights in fp32, {under_alexnet:,.0f} times fewer than AlexNet's.",
        figures_of_merit=[],
        conditions=[
            Fact("weights", content["checkpoint"]),
            Fact("parameters", f"{content['num_parameters']:,}, of which {content['num_zeros']:,} are 0"),
            Fact("judged on", on),
            Fact("processor", f"{content['cpu_model']} ({', '.join(content['cpu_flags'])})"),
        ],
        command="",
        shipping=ShippingView(
            figures=[
                svg_figure(_bytes_figure(content), f"{name}-bytes", "Bytes of each file, on a log scale."),
                svg_figure(
                    _memory_figure(content),
                    f"{name}-memory",
                    "The most activations of one picture in int8, by where they lie. In fp32: four times as much.",
                ),
            ],
            tables=_tables(content),
        ),
        not_measured=not_measured(content["null_reasons"]),
    )


def _tables(content: ArtefactsJson) -> list[Table]:
    rows = content["artefacts"]
    parts = [
        {"file": row["file"], "part": part, "num_bytes": count, "share": count / row["num_bytes"]}
        for row in rows
        for part, count in row["bytes_by_part"].items()
    ]
    by_part = (
        Column("file", "file"),
        Column("part", "part"),
        Column("num_bytes", "bytes", format_count),
        Column("share", "of the file", format_percent),
    )
    runs = [{"file": row["file"], **row["onnx_run"]} for row in rows if row["onnx_run"] is not None]
    fits: list[Row] = [
        {
            **row,
            "where": "the same memory" if row["are_weights_in_it"] else "flash",
            "plan": "no" if row["plan"] is None else f"yes: {PLANS[row['plan']]}",
        }
        for row in content["memory"]["fits"]
    ]
    made = [make_table("Files", FILES, [_file_row(row) for row in rows]), make_table("Fits (calculated)", FITS, fits)]
    made += [make_table("In ONNX Runtime, measured", RUNS, runs)] if runs else []
    return [*made, make_table("Where the bytes are", by_part, parts)]


def _file_row(row: ArtefactJson) -> dict[str, Any]:
    judged: Mapping[str, Any] = row["judged"] or {}
    if row["judged"] is None:
        return {**row}
    change = judged["num_correct_top1"] - judged["reference_num_correct_top1"]
    error = judged["loss_change_standard_error"]
    top1 = f"{judged['num_correct_top1']} of {judged['num_images']} ({change:+d})"
    loss = f"{judged['loss_change']:+.4f}" + ("" if error is None else f" ± {error:.4f}")
    return {**row, **judged, "top1": top1, "loss": loss}


def _bytes_figure(content: ArtefactsJson) -> "Figure":
    rows = content["artefacts"]
    alexnet_bytes = rows[0]["num_bytes"] * rows[0]["times_smaller_than_alexnet_fp32"]
    bars = sorted([(row["num_bytes"], row["file"]) for row in rows] + [(round(alexnet_bytes), YARDSTICK)], reverse=True)

    def paint(axes: "Axes") -> None:
        left = bars[-1][0] / 3
        colours = [ORANGE if label == YARDSTICK else BLUE for _, label in bars]
        axes.barh(range(len(bars)), [size - left for size, _ in bars], left=left, color=colours, height=0.62)
        for position, (size, _) in enumerate(bars):
            label_bar(axes, format_bytes(size), size, position)
        axes.set_xscale("log")
        axes.set_xlim(left, bars[0][0] * 12)
        axes.set_yticks(range(len(bars)), [label for _, label in bars])
        axes.xaxis.set_major_formatter(byte_tick)
        axes.xaxis.grid(True)

    return draw(NARROW_INCHES, 0.7 + 0.36 * len(bars), paint)


def _memory_figure(content: ArtefactsJson) -> "Figure":
    def bars_of(name: str, peaks: PeaksJson, colour: str) -> list[tuple[int, str, str]]:
        found = ((peaks["copied"], "copied"), (peaks["in_place"], "in_place"), (peaks["streamed"], "streamed"))
        return [(peak["num_elements"], f"{name}: {PLANS[plan]}", colour) for peak, plan in found if peak is not None]

    memory = content["memory"]
    bars = bars_of(content["model"], memory["activations"], BLUE)
    bars += bars_of("AlexNet", memory["alexnet_activations"], ORANGE)
    bars.reverse()

    def paint(axes: "Axes") -> None:
        sizes = [size for size, _, _ in bars]
        axes.barh(range(len(bars)), sizes, color=[colour for _, _, colour in bars], height=0.62)
        for position, size in enumerate(sizes):
            label_bar(axes, format_bytes(size), size, position)
        axes.set_xlim(0, max(sizes) * 1.3)
        axes.set_yticks(range(len(bars)), [label for _, label, _ in bars])
        axes.xaxis.set_major_formatter(byte_tick)
        axes.xaxis.grid(True)

    return draw(NARROW_INCHES, 0.7 + 0.36 * len(bars), paint)
