"""The parts of the page: sentences, facts and figures drawn from runs and comparisons."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.core.schemas.comparison import ComparisonJson
from pipeline.core.schemas.ledger import LayerJson
from pipeline.core.trees import flat
from pipeline.core.units import (
    MISSING,
    format_accuracy,
    format_bytes,
    format_count,
    format_rate,
    format_seconds,
    format_times,
)
from pipeline.reporting import figures
from pipeline.reporting.repetitions import repetition_sentences
from pipeline.reporting.runs import RunRecord
from pipeline.reporting.tables import Table, buckets_table, cards_table, collectives_table, reconciliation_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


NUM_STEPS_AVERAGED = 50
"""As in the lines that a training prints: what a single step says jumps about."""


@dataclass(frozen=True)
class Fact:
    """A labelled value."""

    label: str
    text: str


@dataclass(frozen=True)
class PageFigure:
    """A drawing (safe markup of our own making) and its caption."""

    svg: str
    caption: str


@dataclass(frozen=True)
class LedgerView:
    """The ledger of a run, unfolded."""

    title: str
    summary: str
    facts: list[Fact]
    collectives: Table
    reconciliation: Table | None
    cards: Table | None
    buckets: Table | None
    layers: PageFigure | None


@dataclass(frozen=True)
class LearningView:
    """The curves of a training run."""

    title: str
    sentence: str
    facts: list[Fact]
    figures: list[PageFigure]


@dataclass(frozen=True)
class ForecastView:
    """What a measured run would take elsewhere."""

    figures: list[PageFigure]
    tables: list[Table]
    assumptions: list[str]


@dataclass(frozen=True)
class StudyPart:
    """Figures and tables of a study that belong together."""

    title: str
    lead: str
    figures: list[PageFigure]
    tables: list[Table]


@dataclass(frozen=True)
class ShippingView:
    """The files that a network was exported to."""

    figures: list[PageFigure]
    tables: list[Table]


def comparison_sentence(comparison: ComparisonJson) -> str:
    """Return the biggest saving, in one sentence, and what repeated runs say of step times, in one for each pair."""
    return " ".join([_saving(comparison), *repetition_sentences(comparison)])


def _saving(comparison: ComparisonJson) -> str:
    measured = [(num_bytes, row["model"]) for row in comparison["models"] if (num_bytes := row["gradient_bytes"])]
    if not measured:
        return "No model could be measured; the reasons are in the table."
    small = min(measured, key=lambda found: found[0])
    large = max(measured, key=lambda found: found[0])
    if small is large:
        return f"{small[1]} exchanges {format_bytes(small[0])} of gradients in every step."
    return (
        f"{small[1]} exchanges {format_bytes(small[0])} of gradients in every step; "
        f"{large[1]} exchanges {format_bytes(large[0])}, {format_times(large[0] / small[0])} as much."
    )


def run_sentence(run: RunRecord) -> str:
    """Return what was trained and what it cost on the wire, in one or two sentences."""
    ledger = run.ledger
    size = ledger["global_batch"]
    steps = f"{ledger['num_steps']:,} steps" + ("" if size is None else f" of {size:,} pictures")
    if ledger["world_size"] == 1:
        return f"{ledger['model']} took {steps} on one rank, so nothing crossed a network."
    total = run.last("comm/total_gigabytes")
    moved = f", {format_bytes(total * 1e9)} in all" if total is not None else ""
    kind = "measured" if ledger["servers"]["measured_egress_bytes"] is not None else "predicted"
    egress = run.egress_bytes_per_step
    sent = (
        f" Each of {ledger['num_servers']} servers sends up to {format_bytes(egress)} per step ({kind}){moved}."
        if egress
        else ""
    )
    when = "of weights at the end of each round" if run.is_local else "of gradients in each"
    return (
        f"{ledger['model']} took {steps} on {ledger['world_size']} ranks and exchanged "
        f"{format_bytes(ledger['gradient_bytes'])} {when}.{sent}"
    )


def merit(run: RunRecord) -> list[Fact]:
    """Return the few numbers of a run that stand large at the top."""
    val_top1, total = run.last("val/top1"), run.last("comm/total_gigabytes")
    facts = [
        Fact("validation top-1", format_accuracy(val_top1)) if val_top1 is not None else None,
        Fact("sent between servers", format_bytes(total * 1e9)) if total else None,
        Fact("gradients per step", format_bytes(run.ledger["gradient_bytes"])),
        Fact(f"{run.typical} step", format_seconds(run.step_seconds)) if run.step_seconds else None,
    ]
    return [fact for fact in facts if fact is not None]


def run_conditions(run: RunRecord) -> list[Fact]:
    """Return what a reader must know before believing a number."""
    ledger, size = run.ledger, run.crop
    facts = {
        "model": ledger["model"],
        "pictures per step": None if ledger["global_batch"] is None else format_count(ledger["global_batch"]),
        "crop": f"{size} × {size} pixels" if size else None,
        "ranks": format_count(ledger["world_size"]),
        "servers": f"{ledger['num_servers']} ({ledger['placement']})",
        "link of a server": run.link,
        "backend": " ".join(filter(None, (ledger["backend"], ledger["algorithm"]))),
        "gradient compression": ledger["hook"],
        "arithmetic": run.arithmetic,
        "steps": format_count(ledger["num_steps"]),
        "shards": run.setting("data.root"),
        "seed": run.setting("seed"),
    }
    return [Fact(label, plain(value)) for label, value in facts.items() if value is not None]


def command_of(run: RunRecord) -> str:
    """Return the command that made the run, if its environment tells."""
    command = run.recorded("command") or run.recorded("argv") or ""
    return command if isinstance(command, str) else shlex.join(str(word) for word in command)


def learning_view(run: RunRecord, sentence: str = "") -> LearningView | None:
    """Return curves and their last values below `sentence`; None for a run without recorded steps."""
    curves = figures.learning_figures(run)
    if not curves:
        return None
    captions = {
        "loss": "Training is the mean over each step’s pictures (faint) and its running mean.",
        "top1": "Validation counts every picture once.",
    }
    drawings = [svg_figure(curve, f"learning-{name}", captions[name]) for name, curve in curves.items()]
    traffic = figures.traffic_figure(run)
    if traffic is not None:
        drawings.append(
            svg_figure(
                traffic,
                "traffic",
                "Bytes that left a server for another one, added up over all servers since the first step.",
            )
        )
    loss, train_top1 = (run.mean_of_latest(f"train/{key}", NUM_STEPS_AVERAGED) for key in ("loss", "top1"))
    wait, top5, best = run.data_wait_share, run.last("val/top5"), run.best_validation
    num_averaged = min(NUM_STEPS_AVERAGED, len(run.series("train/loss")[1]))
    of_latest = f"mean of the last {num_averaged} {'rounds' if run.is_local else 'steps'}"
    facts = [
        Fact("validation top-1", format_accuracy(run.last("val/top1"))),
        Fact(
            "best validation top-1",
            format_accuracy(None) if best is None else f"{format_accuracy(best[0])} at step {best[1]:,}",
        ),
        Fact("validation top-5", format_accuracy(top5)) if top5 is not None else None,
        Fact("validation loss", _number(run.last("val/loss"))),
        Fact(f"training loss, {of_latest}", _number(loss)),
        Fact(f"training top-1, {of_latest}", format_accuracy(train_top1)),
        Fact(f"pictures per second, {run.typical} step", format_rate(run.images_per_second)),
        Fact(f"{run.typical} step", format_seconds(run.step_seconds)),
        Fact("waited for data, mean", f"{wait * 100:.1f} %") if wait is not None else None,
        Fact("learning rate at the end", _number(run.last("lr"))),
    ]
    title = f"Learning: {run.ledger['model']}, {run.ledger['num_steps']:,} steps"
    return LearningView(title, sentence, [fact for fact in facts if fact and fact.text != MISSING], drawings)


def ledger_view(run: RunRecord, title: str, name: str) -> LedgerView:
    """Return the ledger of a run, unfolded.

    Args:
        run: The run.
        title: Words above the ledger.
        name: Start of the ids of its figure, unique on the page.
    """
    ledger = run.ledger
    transport = ledger["transport"]
    kind, per_rank = "measured", transport["measured_bytes_per_rank"]
    if per_rank is None:
        kind, per_rank = "predicted", transport["predicted_bytes_per_rank"]
    closed = {True: "yes", False: "no", None: "not measured"}[ledger["closed"]]
    per_step = "of the last step" if run.is_local else "per step"
    facts = {
        "steps": format_count(ledger["num_steps"]),
        "gradients per step": _bytes_exact(ledger["gradient_bytes"]),
        f"payload {per_step}": _bytes_exact(ledger["per_step"]["payload_bytes"]),
        f"transport {per_step}, by rank": _per_rank(ledger["per_step"]["transport_bytes_per_rank"]),
        f"transport in all, by rank ({kind})": _per_rank(per_rank),
        f"out of each server {per_step}": _per_rank(ledger["per_step"]["server_egress_bytes"]),
        "ledger closed": closed,
    }
    buckets = buckets_table(ledger)
    reconciliation, cards = reconciliation_table(ledger), cards_table(ledger)
    num_buckets = len(buckets.rows) or "unknown"
    return LedgerView(
        title=title,
        summary=f"{format_bytes(ledger['gradient_bytes'])} per step, buckets: {num_buckets}",
        facts=[Fact(label, text) for label, text in facts.items()],
        collectives=collectives_table(ledger),
        reconciliation=reconciliation if reconciliation.rows else None,
        cards=cards if cards.rows else None,
        buckets=buckets if buckets.rows else None,
        layers=_layers(ledger["layers"], f"layers-{name}") if ledger["layers"] else None,
    )


def _layers(layers: Sequence[LayerJson], name: str) -> PageFigure:
    largest = max(layers, key=lambda layer: layer["bytes"])
    caption = f"{largest['name']} alone is {largest['share'] * 100:.1f} % of every step’s gradients."
    return svg_figure(figures.layer_bytes_figure(layers), name, caption)


# --- small things ---


def environment_facts(environment: Mapping[str, Any]) -> list[Fact]:
    """Return everything recorded but the command, which stands at the top, and the names of the classes."""
    unsaid = ("command", "argv", "schema", "shards.classes")
    return [Fact(key, plain(value)) for key, value in flat(environment).items() if key not in unsaid]


def not_measured(reasons: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return (values, reason): the same reason is given once, and a value missing of every model is named once."""
    by_reason: dict[str, dict[str, None]] = {}
    for path, reason in reasons.items():
        by_reason.setdefault(reason, {})[re.sub(r"^(models|rows)\.\d+\.", "", path)] = None
    return [(", ".join(paths), reason) for reason, paths in by_reason.items()]


def plain(value: object) -> str:
    """Return any plain value in words."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(plain(item) for item in value) or MISSING
    return str(value)


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4g}"


def _bytes_exact(value: int | None) -> str:
    return MISSING if value is None else f"{value:,} bytes"


def _per_rank(values: Sequence[int] | None) -> str:
    """Return exact bytes; equal ones are said once."""
    if not values:
        return MISSING
    if len(set(values)) == 1:
        return (f"{len(values)} × " if len(values) > 1 else "") + f"{values[0]:,} bytes"
    shown = [f"{value:,}" for value in values[:8]]
    return ", ".join(shown) + (f", … ({len(values)} in all)" if len(values) > 8 else "") + " bytes"


def svg_figure(figure: "Figure", name: str, caption: str) -> PageFigure:
    """Return a figure for the page. What `to_svg` returns is ours and escaped by matplotlib.

    Args:
        figure: The drawing.
        name: Start of its ids, unique on the page.
        caption: Words below it.
    """
    from markupsafe import Markup

    return PageFigure(Markup(figures.to_svg(figure, name)), caption)
