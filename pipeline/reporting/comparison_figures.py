"""The figures of a comparison: bytes, time, layers, and accuracy against bytes. Each says by itself what it shows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.core.schemas.comparison import ComparisonJson, ModelLayerJson, ModelRowJson
from pipeline.core.units import format_bytes, format_percent, format_rate, format_seconds
from pipeline.reporting.comparison_tables import row_label
from pipeline.reporting.figures import (
    BLUE,
    GREY,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    byte_tick,
    draw,
    label_bar,
    model_bytes_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NOT_SPLIT = "not split: communication was not timed"
_HATCHES = {"convolution": "", "fully connected": "////", "other": ""}
_COLOURS = {"convolution": BLUE, "fully connected": ORANGE, "other": GREY}


@dataclass(frozen=True)
class Drawing:
    """A figure and its caption."""

    figure: "Figure"
    caption: str


def draw_all(comparison: ComparisonJson) -> dict[str, Drawing | None]:
    """Draw every figure, by the name of its file: None where no row has what the figure shows."""
    rows = [row for row in comparison["models"] if row["gradient_bytes"]]
    timed, layered, rated = _timed(rows), _layered(rows), _rated(rows)
    baseline = comparison["baseline"]
    return {
        "comparison": Drawing(model_bytes_figure(rows, baseline), _bytes_caption(rows, baseline)) if rows else None,
        "comparison-time": Drawing(step_time_figure(timed), _TIME_CAPTION) if timed else None,
        "comparison-layers": Drawing(layer_shares_figure(layered), _LAYERS_CAPTION) if layered else None,
        "comparison-accuracy": Drawing(accuracy_figure(rated), _ACCURACY_CAPTION) if rated else None,
    }


@dataclass(frozen=True)
class Timed:
    """The time of a row's step."""

    label: str
    step_seconds: float
    exposed_seconds: float | None
    """None: communication was not timed."""
    images_per_second: float | None


@dataclass(frozen=True)
class Layered:
    """The layers of a model."""

    model: str
    layers: Sequence[ModelLayerJson]


@dataclass(frozen=True)
class Rated:
    """The published accuracy of a model, and what its training sends."""

    num_bytes: float
    """Bytes out of the busiest server to the end of the published recipe."""
    top1: float
    """Top-1, a fraction."""
    model: str


def _timed(rows: Sequence[ModelRowJson]) -> list[Timed]:
    return [
        Timed(row_label(row), seconds, row["exposed_seconds"], row["images_per_second"])
        for row in rows
        if (seconds := row["step_seconds"])
    ]


def _layered(rows: Sequence[ModelRowJson]) -> list[Layered]:
    """Return the layers of the first row of each model: they know no compression."""
    by_model: dict[str, Layered] = {}
    for row in rows:
        if layers := row.get("layers"):
            by_model.setdefault(row["model"], Layered(row["model"], layers))
    return list(by_model.values())


def _rated(rows: Sequence[ModelRowJson]) -> list[Rated]:
    """Return what is published of the models without compression."""
    rated = []
    for row in rows:
        num_bytes, top1 = row.get("server_egress_bytes_per_training"), row.get("published_top1")
        if row.get("hook") in (None, "none") and num_bytes is not None and top1 is not None:
            rated.append(Rated(num_bytes, top1, row["model"]))
    return rated


def _bytes_caption(rows: Sequence[ModelRowJson], baseline: str) -> str:
    compressed = any(row.get("hook") not in (None, "none") for row in rows)
    return (
        f"What one optimiser step sums over the ranks, {'as carried' if compressed else 'as metered'}, and its multiple"
        f" of {baseline}. The axis is logarithmic: each line to the right is ten times as much."
    )


_TIME_CAPTION = (
    "A median step of each model: what the ranks compute, and (hatched) what they wait for communication that no "
    "computation hides. The label has the whole step, the pictures per second of all ranks, and the exposed share."
)
_LAYERS_CAPTION = (
    "Where each model’s gradient bytes come from: its layers from the first (left) to the last, as shares of all. "
    "Fully connected layers are hatched. Beside each bar: the largest layer, and all fully connected ones together."
)
_ACCURACY_CAPTION = (
    "Published top-1 on ImageNet against what the busiest server would send to the end of the published recipe, at "
    "this comparison’s batch and number of servers, without compression. Further up and further left is better; a "
    "filled point has no other that is at least as accurate for fewer bytes. Accuracies were not measured here."
)


def step_time_figure(rows: Sequence[Timed]) -> "Figure":
    """Draw seconds of a median step, computing and exposed communication stacked; fastest on top.

    Where communication was not timed the bar is whole and grey.
    """
    rows = sorted(rows, key=lambda row: -row.step_seconds)

    def paint(axes: "Axes") -> None:
        for position, row in enumerate(rows):
            step, exposed = row.step_seconds, row.exposed_seconds
            waits = min(exposed or 0.0, step)
            name, colour = ("computing", BLUE) if exposed is not None else (_NOT_SPLIT, GREY)
            axes.barh(position, step - waits, color=colour, height=0.62, label=name)
            if exposed is not None:
                style: dict[str, Any] = {"color": ORANGE, "hatch": "////", "edgecolor": PAPER, "linewidth": 0}
                axes.barh(position, waits, left=step - waits, height=0.62, label="exposed communication", **style)
            parts = [format_seconds(step), f"{format_rate(row.images_per_second)} pictures/s"]
            if exposed is not None:
                parts.append(f"{format_percent(waits / step)} exposed")
            label_bar(axes, " · ".join(parts), step, position)
        axes.set_xlim(0, rows[0].step_seconds * 1.7)
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.set_xlabel("seconds per optimiser step")
        axes.xaxis.grid(True)
        _legend(axes)

    return draw(9.2, 1.3 + 0.42 * len(rows), paint)


def layer_shares_figure(rows: Sequence[Layered]) -> "Figure":
    """Draw one bar of 100 % per model, its layers as segments in the model's order."""
    rows = list(reversed(rows))

    def paint(axes: "Axes") -> None:
        for position, row in enumerate(rows):
            total, left = sum(layer["bytes"] for layer in row.layers), 0.0
            for layer in row.layers:
                share = layer["bytes"] / total
                axes.barh(position, share, left=left, height=0.62, **_segment(layer["kind"]))
                left += share
            label_bar(axes, layers_label(row.layers), 1.0, position)
        axes.set_xlim(0, 1.75)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
        axes.set_yticks(range(len(rows)), [row.model for row in rows])
        axes.set_xlabel("share of the gradient bytes, from the first layer to the last")
        axes.xaxis.label.set_horizontalalignment("left")
        axes.xaxis.label.set_x(0.0)
        _legend(axes)

    return draw(9.2, 1.3 + 0.42 * len(rows), paint)


def _segment(kind: str) -> dict[str, Any]:
    name = "normalisation and other" if kind == "other" else f"{kind} layers"
    style = {"color": _COLOURS[kind], "edgecolor": PAPER, "linewidth": 0.4, "label": name}
    return {**style, "hatch": _HATCHES[kind]} if _HATCHES[kind] else style


def layers_label(layers: Sequence[ModelLayerJson]) -> str:
    """Return `classifier.1 41.2 %` of the largest layer, and the share of the fully connected ones if there are any."""
    total = sum(layer["bytes"] for layer in layers)
    largest = max(layers, key=lambda layer: layer["bytes"])
    label = f"{largest['name']} {format_percent(largest['bytes'] / total)}"
    connected = sum(layer["bytes"] for layer in layers if layer["kind"] == "fully connected")
    return label + (f" · fully connected {format_percent(connected / total)}" if connected else "")


def accuracy_figure(rows: Sequence[Rated]) -> "Figure":
    """Draw published top-1 over egress per training, each model a labelled point."""
    points = sorted((row.num_bytes, row.top1 * 100, row.model) for row in rows)
    best = best_models(rows)

    def paint(axes: "Axes") -> None:
        for num_bytes, top1, model in points:
            is_best = model in best
            colour = ORANGE if is_best else BLUE
            axes.plot(num_bytes, top1, "o", color=colour, fillstyle="full" if is_best else "none", markersize=7)
        for (num_bytes, top1, model), rise in zip(points, _label_rises(points), strict=True):
            text = f"{model} · {format_bytes(num_bytes)}"
            style: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 8.5, "color": INK}
            box = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.0}
            axes.annotate(text, (num_bytes, top1), (9, rise), bbox=box, **style)
        axes.set_xscale("log")
        smallest, largest = points[0][0], points[-1][0]
        axes.set_xlim(smallest / 1.6, largest * max(6.0, (largest / smallest) ** 0.45))
        accuracies = [top1 for _, top1, _ in points]
        axes.set_ylim(min(accuracies) - 2.5, max(accuracies) + 2.5)
        axes.set_xlabel("out of the busiest server for a whole training (log scale)")
        axes.set_ylabel("published top-1 (%)")
        axes.xaxis.set_major_formatter(byte_tick)
        axes.tick_params(axis="y", labelcolor=MUTED)
        axes.grid(True)

    return draw(9.2, 4.4, paint)


def _label_rises(points: Sequence[tuple[float, float, str]]) -> list[float]:
    """Return the rise of each label in points of print: down, where another is as high and near to the left."""
    rises = []
    for index, (num_bytes, top1, _) in enumerate(points):
        near = [other for other in points[:index] if abs(other[1] - top1) < 1.2 and num_bytes / other[0] < 10]
        rises.append(-11.0 if len(near) % 2 else 0.0)
    return rises


def best_models(rows: Sequence[Rated]) -> set[str]:
    """Return those for which no other model is at least as accurate for fewer bytes."""
    best, highest = set(), -1.0
    for row in sorted(rows, key=lambda row: (row.num_bytes, -row.top1)):
        if row.top1 > highest:
            best.add(row.model)
            highest = row.top1
    return best


def _legend(axes: "Axes") -> None:
    """Explain each kind of bar once, above the plot."""
    handles, labels = axes.get_legend_handles_labels()
    first = dict(zip(labels, handles, strict=True))
    axes.legend(
        list(first.values()),
        list(first),
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=3,
        fontsize=9,
        labelcolor=INK,
        borderaxespad=0.3,
        handlelength=2.2,
    )
