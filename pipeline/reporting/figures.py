"""Figures from plain rows, readable in print and by the colour-blind.

Colours are those of Okabe and Ito; every bar carries its number, so that a print without colour loses nothing. A figure
is drawn once: `to_svg` swaps its few colours for CSS variables, so that the drawing on the page follows the reader's
light or dark setting; `save` writes plain files for papers and slides.
"""

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.core.files import write_bytes_atomic
from pipeline.core.schemas.comparison import ModelRowJson
from pipeline.core.schemas.ledger import LayerJson
from pipeline.core.units import format_bytes, format_percent, format_times
from pipeline.reporting.comparison_tables import is_baseline, row_label
from pipeline.reporting.runs import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#1b1d20", "#5d636b", "#d9dce0", "#fefefe"
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#9aa3ad"
NARROW_INCHES = 4.6
"""Width of a figure that a phone shows in readable letters, and a page two of side by side."""
# In the page these become CSS variables, so that the dark page can choose lighter ones.
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--rule",
    PAPER: "--paper",
    BLUE: "--blue",
    ORANGE: "--orange",
    GREEN: "--green",
    GREY: "--grey",
}
LARGEST_SCALE = 1.6
NUM_SPANS = 1000
"""A curve of more than twice as many values is drawn by the least and the largest of each of so many spans."""
_STYLE: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: it can be selected, searched and read aloud
    "svg.hashsalt": "squeezewire",
    "savefig.transparent": True,
}


def _new_figure(width: float, height: float, num_panels: int = 1) -> "tuple[Figure, list[Axes]]":
    """Return an Agg figure of `width` x `height` inches that needs no display and no pyplot state."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, num_panels, squeeze=False)[0]
    return figure, list(axes)


def draw(width: float, height: float, paint: Callable[..., None], num_panels: int = 1) -> "Figure":
    """Return a figure whose axes `paint` fills, laid out once for every file that is made of it.

    Args:
        width: Width in inches.
        height: Height in inches.
        paint: Takes the axes of every panel.
        num_panels: Panels side by side.
    """
    from matplotlib import rc_context

    with rc_context(_STYLE):
        figure, axes = _new_figure(width, height, num_panels)
        paint(*axes)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # it would measure every text again for each file
    return figure


def byte_tick(value: float, _: float) -> str:
    """Return a byte count as it stands on an axis: `10 MB`."""
    return format_bytes(value).replace(".00", "") if value else "0"


def label_bar(axes: "Axes", label: str, value: float, position: float) -> None:
    """Write a bar's number to its right, on paper, so that no grid line runs through it.

    Args:
        axes: Axes of the bar.
        label: The number in words.
        value: Where the bar ends.
        position: Which bar, on the y-axis.
    """
    box = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.5}
    axes.annotate(label, (value, position), (6, 0), textcoords="offset points", va="center", bbox=box)


def model_bytes_figure(rows: Sequence[ModelRowJson], baseline: str) -> "Figure":
    """Draw gradient bytes per step of each row on a log axis, smallest on top, with its multiple of the baseline.

    Rows without gradient_bytes are left out. Compressed ones show what was carried.
    """
    bars = [(row.get("payload_bytes_per_step") or owed, row) for row in rows if (owed := row["gradient_bytes"])]
    bars.sort(key=lambda bar: -bar[0])
    assert bars, "a figure needs at least one measured model"

    def paint(axes: "Axes") -> None:
        sizes = [size for size, _ in bars]
        colours = [ORANGE if is_baseline(row, baseline) else BLUE for _, row in bars]
        left = 10 ** (len(str(int(min(sizes)))) - 1) / 2
        axes.barh(range(len(bars)), [size - left for size in sizes], left=left, color=colours, height=0.62)
        for position, (size, row) in enumerate(bars):
            times = row["times_baseline"]
            label = format_bytes(size)
            if is_baseline(row, baseline):
                label += " · baseline"
            elif times is not None:
                label += f" · {format_times(times)}"
            label_bar(axes, label, size, position)
        axes.set_xscale("log")
        axes.set_xlim(left, max(sizes) * (max(sizes) / left) ** 0.28)
        axes.set_yticks(range(len(bars)), [row_label(row) for _, row in bars])
        axes.set_xlabel("gradient bytes per optimiser step (log scale)")
        axes.xaxis.set_major_formatter(byte_tick)
        axes.xaxis.grid(True)

    return draw(9.2, 0.9 + 0.42 * len(bars), paint)


def layer_bytes_figure(layers: Sequence[LayerJson], num_shown: int = 12) -> "Figure":
    """Draw gradient bytes of the largest layers of one model, largest on top; the others are summed in the last bar."""
    ordered = sorted(layers, key=lambda layer: -layer["bytes"])
    shown, rest = ordered[:num_shown], ordered[num_shown:]
    bars = [(layer["name"], layer["bytes"], layer["share"]) for layer in shown]
    if rest:
        rest_bytes, rest_share = sum(layer["bytes"] for layer in rest), sum(layer["share"] for layer in rest)
        bars.append((f"{len(rest)} smaller layers", rest_bytes, rest_share))
    bars.reverse()

    def paint(axes: "Axes") -> None:
        sizes = [size for _, size, _ in bars]
        colours = [GREY if rest and i == 0 else BLUE for i in range(len(bars))]
        axes.barh(range(len(bars)), sizes, color=colours, height=0.62)
        for position, (_, size, share) in enumerate(bars):
            label_bar(axes, f"{format_bytes(size)} · {format_percent(share)}", size, position)
        axes.set_xlim(0, max(sizes) * 1.6)
        axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
        axes.xaxis.set_major_formatter(byte_tick)
        axes.set_xlabel("gradient bytes per optimiser step")
        axes.locator_params(axis="x", nbins=4)
        axes.xaxis.grid(True)

    return draw(1.2 * NARROW_INCHES, 0.8 + 0.34 * len(bars), paint)


def learning_figures(run: RunRecord) -> "dict[str, Figure]":
    """Draw loss and top-1 over steps: training faint, its running mean strong, validation as marks.

    Each is a figure of its own, narrow enough for a phone. Empty without recorded steps.
    """
    steps, _ = run.series("train/loss")
    if not steps:
        return {}

    def panel(axes: "Axes", key: str, title: str, scale: float) -> None:
        x, y = run.series(f"train/{key}")
        y = [value * scale for value in y]
        num_values = len(x)
        axes.plot(*thinned(x, y), color=GREY, linewidth=0.7, alpha=0.55)
        axes.plot(*thinned(x, _running_mean(y, max(1, len(y) // 40))), color=BLUE, label="training")
        x, y = run.series(f"val/{key}")
        if x:
            y = [value * scale for value in y]
            axes.plot(
                *thinned(x, y),
                color=ORANGE,
                marker="o",
                markersize=4,
                linewidth=1.2,
                linestyle=(0, (3, 2)),
                label="validation",
            )
            axes.annotate(f"{y[-1]:.3g}", (x[-1], y[-1]), (0, 6), textcoords="offset points", ha="right", va="bottom")
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.set_xlabel(_step_label(num_values))
        axes.set_xlim(left=0)
        axes.yaxis.grid(True)

    def paint_loss(axes: "Axes") -> None:
        panel(axes, "loss", "Loss (cross-entropy, nats)", 1)
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper right", fontsize=9, labelcolor=INK)

    def paint_top1(axes: "Axes") -> None:
        panel(axes, "top1", "Top-1 accuracy (%)", 100)
        axes.set_ylim(0, 103)

    return {"loss": draw(NARROW_INCHES, 3.0, paint_loss), "top1": draw(NARROW_INCHES, 3.0, paint_top1)}


def thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Return what of a curve is drawn: all of it, or of each of NUM_SPANS spans of as many values the extremes.

    No peak is lost, and the first and the last value stay.
    """
    num_values = len(values)
    if num_values <= 2 * NUM_SPANS:
        return list(steps), list(values)
    found, kept = np.asarray(values), {0, num_values - 1}
    for span in range(NUM_SPANS):
        begin, end = span * num_values // NUM_SPANS, (span + 1) * num_values // NUM_SPANS
        kept |= {begin + int(found[begin:end].argmin()), begin + int(found[begin:end].argmax())}
    return [steps[position] for position in sorted(kept)], [values[position] for position in sorted(kept)]


def _step_label(num_values: int) -> str:
    is_thinned = num_values > 2 * NUM_SPANS
    return f"step (drawn: least and largest of every {num_values // NUM_SPANS:,})" if is_thinned else "step"


def _running_mean(values: Sequence[float], radius: int) -> list[float]:
    """Return the mean over up to `radius` neighbours on each side, for each value."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    positions = np.arange(len(values))
    begins, ends = np.maximum(positions - radius, 0), np.minimum(positions + radius + 1, len(values))
    return ((sums[ends] - sums[begins]) / (ends - begins)).tolist()


def traffic_figure(run: RunRecord) -> "Figure | None":
    """Draw gigabytes sent between servers since the start, over steps; None where nothing was sent."""
    steps, gigabytes = run.series("comm/total_gigabytes")
    if not steps or not gigabytes[-1]:
        return None

    def paint(axes: "Axes") -> None:
        unit, scale = ("GB", 1.0) if gigabytes[-1] >= 1 else ("MB", 1e3)
        y = [value * scale for value in gigabytes]
        x, thin = thinned(steps, y)
        axes.fill_between(x, thin, color=BLUE, alpha=0.14, linewidth=0)
        axes.plot(x, thin, color=BLUE)
        total = format_bytes(gigabytes[-1] * 1e9)
        axes.annotate(total, (steps[-1], y[-1]), (-6, 2), textcoords="offset points", ha="right", va="bottom")
        axes.set_xlim(0, steps[-1])
        axes.set_ylim(0, y[-1] * 1.15)
        axes.set_xlabel(_step_label(len(steps)))
        axes.set_ylabel(f"{unit} sent, all servers")
        axes.yaxis.grid(True)

    return draw(NARROW_INCHES, 3.0, paint)


def save(figure: "Figure", path: Path) -> None:
    """Write `path`.png (160 dots per inch, white) and `path`.svg (transparent)."""
    from matplotlib import rc_context

    with rc_context(_STYLE):
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=160, transparent=False, facecolor="white")
        figure.savefig(svg, format="svg", metadata={"Date": None})
    write_bytes_atomic(path.with_suffix(".png"), png.getvalue())
    write_bytes_atomic(path.with_suffix(".svg"), svg.getvalue())


def to_svg(figure: "Figure", name: str) -> str:
    """Return the figure as an `<svg>` element: CSS variables for colours, ids that start with `name`, no metadata."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # The style element would apply to the whole page; the page's own sheet says the same for figures.
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'(?<=[\s])id="', f'id="{name}-', svg)
    svg = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{name}-", svg)
    # A drawing may grow, but not until its letters look like headings.
    widest = round(figure.get_figwidth() * 72 * LARGEST_SCALE)
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', rf'\1 style="max-width: {widest}px"', svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"'DejaVu Sans'(, [\w'-]+)*", "inherit", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable}, {colour})")
    return svg.replace("<svg", '<svg role="img"', 1)
