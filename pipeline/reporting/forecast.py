"""A forecast shown: forecast.json, its table, its pictures and its page."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.core.files import write_json_atomic, write_text_atomic
from pipeline.core.schemas.forecast import ForecastJson, MethodJson, PointJson
from pipeline.core.units import (
    MISSING,
    format_bandwidth,
    format_bytes,
    format_count,
    format_percent,
    format_rate,
    format_seconds,
)
from pipeline.reporting import figures
from pipeline.reporting.page import Page, render
from pipeline.reporting.sections import Fact, ForecastView, not_measured, svg_figure
from pipeline.reporting.tables import Column, Row, Table, make_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN_LINES = 12
# Okabe and Ito's colours and a mark for each algorithm, dashes for each link: told apart in print as well.
COLOURS = {
    "ring": (figures.BLUE, "o"),
    "tree": (figures.ORANGE, "s"),
    "parameter server": (figures.GREEN, "^"),
    "hierarchical": (figures.GREY, "D"),
    "halving doubling": (figures.INK, "v"),
}
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1, 2)))


def _hours(seconds: float | None) -> str:
    return MISSING if seconds is None else f"{seconds / 3600:,.1f} h"


def _money(cost: float | None) -> str:
    return MISSING if cost is None else f"{cost:,.2f}"


COLUMNS = (
    Column("model", "model"),
    Column("num_servers", "servers", format_count),
    Column("ranks_per_server", "ranks each", format_count, short=""),
    Column("link", "link"),
    Column("algorithm", "algorithm", note="how gradients are summed; `ring` is gloo's, byte for byte"),
    Column("hook", "compression", short=""),
    Column("global_batch", "pictures per step", format_count, short=""),
    Column(
        "server_egress_bytes_per_step",
        "out of a server",
        format_bytes,
        "per step, of the server that sends most",
        "egress",
    ),
    Column("step_seconds", "step", format_seconds, "without the wait for data"),
    Column("exposed_seconds", "exposed", format_seconds, "of it, waiting for other ranks", ""),
    Column("scaling_efficiency", "scaling", format_percent, "the step of a rank alone over this one"),
    Column("images_per_second", "images/s", format_rate, "of all ranks", ""),
    Column(
        "sufficient_bandwidth_bits_per_second",
        "bandwidth that hides it",
        lambda rate: MISSING if rate is None else format_bandwidth(float(f"{rate:.2g}")),
        "of a server's link, beyond which communication shows for at most the chosen share of a step",
        "",
    ),
    Column("training_seconds", "time to train", _hours, short=""),
    Column("training_cost", "cost to train", _money, short=""),
    Column("standing", "validated", note="`yes`: inside what was compared with measurements", short=""),
)


SAID_IN_TITLE = {
    "model": "{}",
    "algorithm": "{}",
    "link": "{}",
    "ranks_per_server": "ranks per server: {}",
    "hook": "compression: {}",
    "global_batch": "{} pictures per step",
}


def _algorithm(row: PointJson) -> str:
    """Return the algorithm in words."""
    return row["algorithm"].replace("_", " ")


def _link(row: PointJson | MethodJson) -> str:
    """Return a server's link in words."""
    rate, latency = row["bandwidth_bits_per_second"], row["latency_seconds"]
    more = f" + {format_seconds(latency)}" if latency else ""
    return ("as measured" if rate is None else format_bandwidth(rate)) + more


def forecast_table(result: ForecastJson) -> Table:
    """Show every point; what is the same of all is said in the title, and columns that say nothing are left out."""
    standing = {True: "yes", False: "outside", None: ""}
    rows: list[Row] = [
        {**row, "algorithm": _algorithm(row), "link": _link(row), "standing": standing[row["validated"]]}
        for row in result["points"]
    ]
    same = {key: word for key, word in SAID_IN_TITLE.items() if len({row[key] for row in rows}) == 1}
    title = ", ".join(word.format(rows[0][key]) for key, word in same.items())
    always = {"num_servers", "step_seconds"}
    shown = [
        column
        for column in COLUMNS
        if column.key in always or (column.key not in same and any(row.get(column.key) is not None for row in rows))
    ]
    return make_table(title or "Every cluster", shown, rows)


def methods_table(result: ForecastJson) -> Table | None:
    """Show how long rounds of local steps must be on each cluster; None: nobody asked."""
    if not result["methods"]:
        return None
    clusters: dict[tuple[object, ...], dict[str, object]] = {}
    for row in result["methods"]:
        asked: dict[str, object] = {
            key: row[key] for key in ("model", "num_servers", "ranks_per_server", "global_batch")
        }
        asked["link"] = _link(row)
        clusters.setdefault(tuple(asked.values()), asked)[row["method"]] = row["period"]
    rows = list(clusters.values())
    methods = dict.fromkeys(row["method"] for row in result["methods"])
    told = [column for column in COLUMNS if column.key in ("model", "num_servers", "ranks_per_server", "link")]
    shown = [column for column in told if column.key == "num_servers" or len({row[column.key] for row in rows}) > 1]
    periods = [
        Column(method, method.replace("_", " "), format_count, "the fewest steps of a round (comm.period)")
        for method in methods
    ]
    share = format_percent(result["settings"]["exposed_share"])
    return make_table(f"Rounds of which at most {share} is spent in the exchange", [*shown, *periods], rows)


def forecast_csv(result: ForecastJson) -> str:
    """Return the points, exact and unformatted."""
    keys = list(dict.fromkeys(key for row in result["points"] for key in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(result["points"])
    return buffer.getvalue()


def _largest(points: Sequence[PointJson]) -> str | None:
    """Return what is left of each model's scaling on the largest cluster, under the first algorithm and link."""
    possible = [row for row in points if "reason" not in row]
    if not possible:
        return None
    most = max(row["num_servers"] for row in possible)
    by_model: dict[str, PointJson] = {}
    for row in possible:
        if row["num_servers"] == most:
            by_model.setdefault(row["model"], row)
    first = next(iter(by_model.values()))
    shares = [f"{model} {format_percent(row['scaling_efficiency'])}" for model, row in by_model.items()]
    return (
        f"On {most:,} servers ({_algorithm(first)}, {_link(first)}) the share of a step that is not spent waiting for"
        f" other ranks is: {', '.join(shares)}."
    )


_UNMEASURED = {
    "alone": "{} ran on one rank alone: no network was measured, only the ranks' own work.",
    "estimated": "An ESTIMATE: {} was not run; when its gradients are ready is worked out from its multiply-adds.",
}


def forecast_sentences(result: ForecastJson) -> list[str]:
    """Return what the table does not say by itself."""
    points, settings = result["points"], result["settings"]
    sentences = [sentence for sentence in (_largest(points),) if sentence is not None]
    outside = sum(row["validated"] is False for row in points)
    low, high = result["validation"]["bandwidth_bits_per_second"]
    fewest, most = result["validation"]["num_servers"]
    if outside:
        sentences.append(
            f"{outside} of {len(points)} points lie outside what was compared with measurements (gloo's ring, {fewest}"
            f" to {most} servers, {format_bandwidth(low)} to {format_bandwidth(high)}): they are extrapolated."
        )
    sentences.extend(
        _UNMEASURED[source["readiness"]].format(source["model"])
        for source in result["sources"]
        if source["readiness"] in _UNMEASURED
    )
    impossible = sorted({row["reason"] for row in points if "reason" in row})
    sentences.extend(f"Left out: {reason}" for reason in impossible)
    sentences.extend(_rounds_sentences(result))
    best = result["best_for_budget"]
    if best is not None:
        sentences.append(
            f"Soonest within a budget of {settings['budget']:,g}: {best['num_servers']:,} servers,"
            f" {_hours(best['training_seconds'])}, at a cost of {_money(best['training_cost'])}."
        )
    elif settings["budget"] is not None:
        sentences.append(f"No cluster of the table trains within a budget of {settings['budget']:,g}.")
    return sentences


def _rounds_sentences(result: ForecastJson) -> Iterator[str]:
    """Say for each model, link and number of ranks what to choose on most servers, if rounds were asked about."""
    most = max((row["num_servers"] for row in result["methods"]), default=0)
    chosen: dict[tuple[str, int, int, str], list[str]] = {}
    for row in result["methods"]:
        if row["num_servers"] == most:
            cluster = (row["model"], row["ranks_per_server"], row["global_batch"], _link(row))
            chosen.setdefault(cluster, []).append(f"{row['method']} {row['period']:,}")
    for (model, num_ranks, num_pictures, link), words in chosen.items():
        ranks = "" if num_ranks == 1 else f" of {num_ranks} ranks"
        yield (
            f"{model} on {most:,} servers{ranks}, {num_pictures:,} pictures per step, {link}: the fewest steps of a"
            f" round (comm.period) whose exchange does not show are {', '.join(words)}."
        )


# --- pictures ---


def _line_name(row: PointJson) -> str:
    """Return what a line of a picture stands for, beside its model."""
    hook = "" if row["hook"] == "none" else f", {row['hook']}"
    return f"{_algorithm(row)}, {_link(row)}{hook}"


def _lines(points: Sequence[PointJson], model: str) -> dict[str, list[PointJson]]:
    """Return the model's possible points by line, in order of servers; of several ranks per server the first."""
    lines: dict[str, list[PointJson]] = {}
    for row in points:
        if row["model"] == model and "reason" not in row:
            lines.setdefault(_line_name(row), []).append(row)
    first = {name: rows[0]["ranks_per_server"] for name, rows in lines.items()}
    return {
        name: sorted(
            (row for row in rows if row["ranks_per_server"] == first[name]), key=lambda row: row["num_servers"]
        )
        for name, rows in list(lines.items())[:SHOWN_LINES]
    }


@dataclass(frozen=True)
class _Curves:
    """A picture: one value of the points over the number of servers."""

    key: Literal["scaling_efficiency", "step_seconds", "communication_seconds"]
    title: str
    caption: str
    is_share: bool = False
    """A fraction, shown in percent; else seconds on a log axis."""

    def of(self, row: PointJson) -> float:
        """Return the value as drawn; the point is a possible one."""
        return (row[self.key] or 0.0) * (100 if self.is_share else 1)


def _draw_curves(points: Sequence[PointJson], curves: _Curves) -> "Figure | None":
    """Draw one panel per model; filled marks were validated. None for a single number of servers."""
    if len({row["num_servers"] for row in points if "reason" not in row}) < 2:
        return None
    models = list(dict.fromkeys(row["model"] for row in points))[:3]
    links = list(dict.fromkeys(_link(row) for row in points))

    def paint(*panels: "Axes") -> None:
        for axes, model in zip(panels, models, strict=True):
            for name, rows in _lines(points, model).items():
                colour, marker = COLOURS[_algorithm(rows[0])]
                dash = DASHES[links.index(_link(rows[0])) % len(DASHES)]
                x, y = [row["num_servers"] for row in rows], [curves.of(row) for row in rows]
                axes.plot(x, y, color=colour, linestyle=dash, label=name)
                for row, across, up in zip(rows, x, y, strict=True):
                    face = colour if row["validated"] else figures.PAPER
                    axes.plot([across], [up], color=colour, marker=marker, markersize=4.5, markerfacecolor=face)
            axes.set_title(model, loc="left", fontsize=10, color=figures.INK)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axes.set_xlabel("servers")
            axes.yaxis.grid(True)
            if curves.is_share:
                axes.set_ylim(0, 105)
            else:
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g} s")
                axes.tick_params(axis="y", which="minor", length=0)
        panels[0].set_ylabel(curves.title)
        handles, labels = panels[0].get_legend_handles_labels()
        panels[0].figure.legend(
            handles, labels, loc="outside lower center", ncols=3, fontsize=8, labelcolor=figures.INK
        )  # fmt: skip

    return figures.draw(9.2, 3.6, paint, num_panels=len(models))


_MARKS = "Filled marks lie inside what was compared with measurements; hollow ones are extrapolated."
_PICTURES = {
    "scaling": _Curves(
        "scaling_efficiency",
        "scaling efficiency (%)",
        f"How much of its work a rank still does when it has to wait for the others. {_MARKS}",
        is_share=True,
    ),
    "step": _Curves("step_seconds", "step", f"One optimiser step, without the wait for data (log scale). {_MARKS}"),
    "communication": _Curves(
        "communication_seconds",
        "communication per step",
        "Time in which a server's card carries gradients, hidden behind the backward pass or not (log scale). A"
        " lone parameter server carries every rank's payload in and out; a tree carries it once per level; a ring"
        " hardly more than twice, however many ranks there are.",
    ),
}


def pictures(result: ForecastJson) -> dict[str, tuple["Figure", str]]:
    """Return (figure, caption) by the name it is saved under."""
    drawn = {}
    for name, curves in _PICTURES.items():
        # One rank alone exchanges nothing, and zero has no place on a log axis.
        points = [row for row in result["points"] if name != "communication" or row.get("communication_seconds")]
        figure = _draw_curves(points, curves)
        if figure is not None:
            drawn[name] = (figure, curves.caption)
    return drawn


# --- files ---


def write_forecast(result: ForecastJson, directory: Path) -> Path:
    """Write forecast.json, .csv, the pictures, and report.html, whose path is returned."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json_atomic(directory / "forecast.json", result)
    write_text_atomic(directory / "forecast.csv", forecast_csv(result))
    drawn = pictures(result)
    for name, (figure, _) in drawn.items():
        figures.save(figure, directory / f"forecast-{name}")
    path = directory / "report.html"
    write_text_atomic(path, render(_page(directory.name, result, drawn)))
    return path


def _page(name: str, result: ForecastJson, drawn: Mapping[str, tuple["Figure", str]]) -> Page:
    sources, errors = result["sources"], result["validation"]["error"]
    conditions = []
    for source in sources:
        rate = source["bandwidth_bits_per_second"]
        link = "no limit on the link" if rate is None else format_bandwidth(rate)
        pictures = f"{source['batch_per_rank']} pictures each"
        told = {
            "measured": f"run {source['run']}, {source['num_ranks']} ranks, {pictures}, {link}",
            "alone": f"run {source['run']}, one rank alone, {pictures}, no link",
            "estimated": f"not run, {source['batch_per_rank']} pictures of a rank in"
            f" {format_seconds(source['forward_seconds'] + source['backward_seconds'])}",
        }
        kind = "estimated" if source["readiness"] == "estimated" else "measured"
        conditions.append(Fact(f"{kind}: {source['model']}", told[source["readiness"]]))
    was_compared = any(source["readiness"] == "measured" for source in sources)
    kinds = (("bandwidths", errors["bandwidth"]), ("numbers of servers", errors["servers"]))
    for others, error in kinds if was_compared else ():
        conditions.append(Fact(f"error over other {others}", f"{format_percent(error)} of the step, on average"))
    return Page(
        title=name,
        kicker=f"forecast for {', '.join(source['model'] for source in sources)}",
        headline=" ".join(forecast_sentences(result)),
        figures_of_merit=[],
        conditions=conditions,
        command="",
        forecast=ForecastView(
            [svg_figure(figure, f"forecast-{name}", caption) for name, (figure, caption) in drawn.items()],
            [table for table in (forecast_table(result), methods_table(result)) if table is not None],
            result["assumptions"],
        ),
        not_measured=not_measured({path.split(".", 2)[-1]: reason for path, reason in result["null_reasons"].items()}),
    )
