"""The pictures of a study: one thing changed at a time, and accuracy against what was spent."""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.core.schemas.study import EnvelopePointJson, StudyJson, StudyRowJson
from pipeline.core.units import format_accuracy, format_bytes, format_seconds
from pipeline.reporting.comparison_figures import Drawing
from pipeline.reporting.figures import BLUE, GREEN, GREY, INK, MUTED, ORANGE, PAPER, byte_tick, draw, label_bar
from pipeline.reporting.study_rows import labelled, meanings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (BLUE, ORANGE, GREEN, GREY)
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
AXES: dict[str, tuple[str, Callable[[float], str]]] = {
    "gigabytes": ("sent by all servers together", lambda value: format_bytes(value * 1e9).replace(".00", "")),
    "seconds": ("time of training steps", lambda value: format_seconds(value).replace(" 00 s", "")),
    "images": ("training pictures", lambda value: f"{value:,.0f}"),
}
"""What is spent: in words, and how its ticks are written."""
_SWEEP_CAPTION = (
    "{picture}: everything else is the same. Points are seeds, the bar is the mean of those whose ledger closes."
)
_CURVE_CAPTION = (
    "Validation top-1 against {axis}. Each mark is a validation; the thick line is the best for what was spent so far,"
    " of variants whose seeds are all there."
)


def draw_all(study: StudyJson) -> dict[str, Drawing]:
    """Draw every picture, by the name of its file."""
    made: dict[str, Drawing] = {}
    for picture in dict.fromkeys(picture for row in study["rows"] for picture in row["shows"]):
        rows = sorted_rows([row for row in study["rows"] if picture in row["shows"]], picture)
        name = f"study-of-{re.sub(r'[^a-z0-9]+', '-', picture.lower()).strip('-')}"
        made[name] = Drawing(sweep_figure(rows, picture), _sweep_caption(rows, picture))
    curved = [row for row in study["rows"] if row["curve"]]
    for axis, (words, _) in AXES.items():
        if curved:
            figure = curves_figure(curved, study["envelope"][axis], axis)
            made[f"study-against-{axis}"] = Drawing(figure, _with_marks(_CURVE_CAPTION.format(axis=words), curved))
    return made


def _sweep_caption(rows: Sequence[StudyRowJson], picture: str) -> str:
    said = _SWEEP_CAPTION.format(picture=picture)
    if _has_published(rows):
        sources = dict.fromkeys(row["published"]["source"] for row in rows if row["published"] is not None)
        said += f" Published values are of ImageNet ({'; '.join(sources)}), and were not measured here."
    return _with_marks(said, rows)


def _with_marks(caption: str, rows: Sequence[StudyRowJson]) -> str:
    marks = meanings(rows)
    return f"{caption} {marks}." if marks else caption


def sorted_rows(rows: Sequence[StudyRowJson], picture: str) -> list[StudyRowJson]:
    """Return the rows of a picture by the number that is their label; in their own order where one has none."""
    try:
        return sorted(rows, key=lambda row: float(row["shows"][picture]))
    except ValueError:
        return list(rows)


def sweep_figure(rows: Sequence[StudyRowJson], picture: str) -> "Figure":
    """Draw accuracy, gradient bytes and step time of variants side by side, a line each; published values if any.

    Args:
        rows: The variants, the first on top.
        picture: Under which of their labels.
    """
    rows = rows[::-1]
    labels = [labelled(row["shows"][picture], row) for row in rows]
    panels: list[Callable[[Axes], None]] = [
        lambda axes: _accuracy(axes, rows),
        lambda axes: _bars(axes, [row["gradient_bytes"] for row in rows], "gradients per step", format_bytes),
        lambda axes: _step_time(axes, rows),
    ]
    if _has_published(rows):
        panels.append(lambda axes: _published_panel(axes, rows))

    def paint(*all_axes: "Axes") -> None:
        for axes, panel in zip(all_axes, panels, strict=True):
            panel(axes)
            axes.set_ylim(-0.6, len(rows) - 0.4)
            axes.set_yticks(range(len(rows)), labels if axes is all_axes[0] else [])
        all_axes[0].set_title(picture, loc="left", fontsize=10, color=INK)

    return draw(9.2, 1.1 + 0.42 * len(rows), paint, len(panels))


def _accuracy(axes: "Axes", rows: Sequence[StudyRowJson]) -> None:
    lowest = min((run["top1"] for row in rows for run in row["runs"] if run["top1"] is not None), default=0.0)
    highest = max((run["top1"] for row in rows for run in row["runs"] if run["top1"] is not None), default=1.0)
    left, width = lowest * 100 - 4, max(1.0, (highest - lowest) * 100)
    for position, row in enumerate(rows):
        for run in row["runs"]:
            if run["top1"] is not None:
                axes.plot(run["top1"] * 100, position, "o", color=BLUE, markersize=4, alpha=0.6)
        if row["top1"] is not None:
            mean = row["top1"]["mean"] * 100
            axes.plot([mean, mean], [position - 0.3, position + 0.3], color=ORANGE, linewidth=2.5)
            label_bar(axes, format_accuracy(row["top1"]["mean"]), max(mean, row["top1"]["highest"] * 100), position)
    axes.set_xlim(left, highest * 100 + max(3.0, width * 0.9))
    axes.set_xlabel("validation top-1 (%)")
    axes.xaxis.grid(True)
    axes.locator_params(axis="x", nbins=4)


def _bars(axes: "Axes", values: Sequence[float], label: str, show: Callable[[float | None], str]) -> None:
    axes.barh(range(len(values)), values, color=BLUE, height=0.55)
    for position, value in enumerate(values):
        label_bar(axes, show(value), value, position)
    axes.set_xlim(0, max(values) * 1.75)
    axes.set_xlabel(label)
    axes.xaxis.set_major_formatter(byte_tick)
    axes.locator_params(axis="x", nbins=3)


def _step_time(axes: "Axes", rows: Sequence[StudyRowJson]) -> None:
    longest = 0.0
    for position, row in enumerate(rows):
        step = row["step_seconds"]
        if step is None:
            continue
        longest, waits = max(longest, step), min(row["exposed_seconds"] or 0.0, step)
        axes.barh(position, step - waits, color=BLUE, height=0.55)
        axes.barh(
            position, waits, left=step - waits, color=ORANGE, hatch="////", edgecolor=PAPER, linewidth=0, height=0.55
        )
        label_bar(axes, format_seconds(step), step, position)
    axes.set_xlim(0, (longest or 1.0) * 1.7)
    axes.set_xlabel("step, exposed part hatched (s)")
    axes.locator_params(axis="x", nbins=3)


def _published(row: StudyRowJson) -> float | None:
    point = row["published"]
    return None if point is None else point["top5"]


def _has_published(rows: Sequence[StudyRowJson]) -> bool:
    """Return whether publications say something of the sweep: a single point compares nothing."""
    return sum(_published(row) is not None for row in rows) >= 2


def _published_panel(axes: "Axes", rows: Sequence[StudyRowJson]) -> None:
    found = [(value * 100, position) for position, row in enumerate(rows) if (value := _published(row)) is not None]
    for value, position in found:
        axes.plot(value, position, "D", color=GREY, markersize=6)
        label_bar(axes, f"{value:.1f} %", value, position)
    values = [value for value, _ in found]
    axes.set_xlim(min(values) - 2, max(values) + 6)
    axes.set_xlabel("published top-5, ImageNet (%)")
    axes.xaxis.grid(True)
    axes.locator_params(axis="x", nbins=3)


def curves_figure(rows: Sequence[StudyRowJson], best: Sequence[EnvelopePointJson], axis: str) -> "Figure":
    """Draw validations of each variant against what was spent, and the envelope.

    Args:
        rows: Variants with a curve.
        best: Points of the envelope.
        axis: What is spent.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    words, tick = AXES[axis]

    def paint(axes: "Axes") -> None:
        end = max(point[axis] for row in rows for point in row["curve"])
        spent = [point["spent"] for point in best] + [end]
        tops = [point["top1"] * 100 for point in best]
        if tops:
            axes.step(spent, [*tops, tops[-1]], where="post", color=INK, linewidth=3.2, alpha=0.35)
        for position, row in enumerate(rows):
            x = [point[axis] for point in row["curve"]]
            y = [point["top1"] * 100 for point in row["curve"]]
            dash: Any = DASHES[position // len(COLOURS) % len(DASHES)]
            axes.plot(
                x,
                y,
                marker="o",
                markersize=3,
                color=COLOURS[position % len(COLOURS)],
                linestyle=dash,
                label=labelled(row["name"], row),
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(f"{words} (log scale)")
        axes.set_ylabel("validation top-1 (%)")
        axes.tick_params(axis="y", labelcolor=MUTED)
        axes.grid(True)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8.5, labelcolor=INK, borderaxespad=0)

    return draw(9.2, max(4.4, 0.6 + 0.2 * len(rows)), paint)
