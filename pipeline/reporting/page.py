"""One self-contained HTML file for whatever a directory holds: a training run, a comparison, or both."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from pipeline.core.errors import DataError
from pipeline.core.files import write_text_atomic
from pipeline.core.schemas.comparison import ComparisonJson
from pipeline.core.text import printable
from pipeline.reporting import comparison_figures
from pipeline.reporting.attempts import attempts_table
from pipeline.reporting.comparison_tables import comparison_tables, sources
from pipeline.reporting.mistakes import MistakesView, mistakes_view
from pipeline.reporting.runs import RunRecord, is_run, read_run
from pipeline.reporting.sections import (
    Fact,
    ForecastView,
    LearningView,
    LedgerView,
    PageFigure,
    ShippingView,
    StudyPart,
    command_of,
    comparison_sentence,
    environment_facts,
    learning_view,
    ledger_view,
    merit,
    not_measured,
    plain,
    run_conditions,
    run_sentence,
    svg_figure,
)
from pipeline.reporting.tables import Table

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Page:
    """Everything the template sets."""

    title: str
    kicker: str
    headline: str
    figures_of_merit: list[Fact]
    conditions: list[Fact]
    command: str
    comparison: list[Table] = field(default_factory=list)
    sources: list[tuple[str, str]] = field(default_factory=list)
    comparison_figures: list[PageFigure] = field(default_factory=list)
    attempts: Table | None = None
    learning: LearningView | None = None
    mistakes: MistakesView | None = None
    forecast: ForecastView | None = None
    shipping: ShippingView | None = None
    study: list[StudyPart] = field(default_factory=list)
    ledgers: list[LedgerView] = field(default_factory=list)
    not_measured: list[tuple[str, str]] = field(default_factory=list)
    environment: list[Fact] = field(default_factory=list)


# --- the entries ---


def write_report(directory: Path) -> Path:
    """Write `report.html` into the directory of a run, or of a comparison, or of both.

    Raises:
        DataError: it holds neither, or something that is damaged.
    """
    if not is_run(directory) and (found := read_comparison(directory)) is not None:
        return write_comparison_report(directory, *found)
    return write_run_report(directory)


def write_run_report(run_directory: Path) -> Path:
    """Write `report.html` into a run directory; a comparison made in the same directory is shown with it.

    Raises:
        DataError: the directory holds no run, or a damaged one.
    """
    run = read_run(run_directory)
    found = read_comparison(run_directory)
    if found is None:
        return _write(run_directory, _run_page(run))
    return write_comparison_report(run_directory, *found, training_run=run)


def write_comparison_report(
    directory: Path,
    comparison: ComparisonJson,
    runs: Mapping[str, RunRecord],
    training_run: RunRecord | None = None,
) -> Path:
    """Write `report.html` into `directory`.

    Args:
        directory: Directory of the comparison.
        comparison: Content of comparison.json.
        runs: The run behind each of its rows, by label; failed rows have none.
        training_run: A training whose curves are shown too; None: the run in `directory` itself, if there is one.
    """
    if training_run is None and is_run(directory):
        training_run = read_run(directory)
    return _write(directory, _comparison_page(directory.name, comparison, runs, training_run))


def read_comparison(directory: Path) -> tuple[ComparisonJson, dict[str, RunRecord]] | None:
    """Return the comparison in `directory` and the runs behind it, as far as they still exist; None: there is none."""
    path = directory / "comparison.json"
    if not path.is_file():
        return None
    try:
        comparison = json.loads(path.read_text())
        located = {label: directory / where for label, where in comparison["runs"].items()}
    except (ValueError, KeyError) as error:
        raise DataError(
            f"{path} is not a comparison of this program ({error!r}): repeat `pipeline.compare`."
        ) from error
    return cast(ComparisonJson, comparison), {label: read_run(run) for label, run in located.items() if is_run(run)}


def _write(directory: Path, page: Page) -> Path:
    path = directory / "report.html"
    write_text_atomic(path, render(page))
    return path


def render(page: Page) -> str:
    """Return the page as HTML. Everything but our own figures, style and script is escaped.

    What a browser obeys and does not show (controls, marks that turn the direction of writing) is in view, everywhere.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        finalize=lambda value: type(value)(printable(value)) if isinstance(value, str) else value,
    )
    return environment.get_template("report.html.j2").render(
        page=page,
        style=Markup((TEMPLATES / "style.css").read_text().strip()),
        script=Markup((TEMPLATES / "sort.js").read_text().strip()),
    )


# --- a comparison ---


def _comparison_page(
    name: str, comparison: ComparisonJson, runs: Mapping[str, RunRecord], training_run: RunRecord | None
) -> Page:
    conditions = dict(comparison["conditions"])
    command = conditions.pop("command", "")
    drawings = [
        svg_figure(drawing.figure, name, drawing.caption)
        for name, drawing in comparison_figures.draw_all(comparison).items()
        if drawing is not None
    ]
    reasons = dict(comparison.get("null_reasons", {}))
    for run in runs.values():
        for path, reason in run.ledger["null_reasons"].items():
            reasons.setdefault(path, reason)
    first = next(iter(runs.values()), None)
    source = training_run or first
    ledgers = [ledger_view(run, label, f"m{i}") for i, (label, run) in enumerate(runs.items())]
    return Page(
        title=name,
        kicker=f"{len({row['model'] for row in comparison['models']})} models compared",
        headline=comparison_sentence(comparison),
        figures_of_merit=[],
        conditions=[Fact(key, plain(value)) for key, value in conditions.items()],
        command=str(command),
        comparison=comparison_tables(comparison),
        sources=sources(comparison),
        comparison_figures=drawings,
        attempts=attempts_table(training_run) if training_run else None,
        learning=learning_view(training_run, run_sentence(training_run)) if training_run else None,
        mistakes=_mistakes(training_run) if training_run else None,
        ledgers=ledgers
        + ([ledger_view(training_run, f"training run {training_run.ledger['run']}", "t")] if training_run else []),
        not_measured=not_measured(reasons),
        environment=environment_facts(source.environment) if source else [],
    )


# --- a run ---


def _mistakes(run: RunRecord) -> MistakesView | None:
    if run.validation is None:
        return None
    try:
        return mistakes_view(run.validation)
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise DataError(
            f"{run.directory / 'validation.json'} is not what `train` wrote ({error!r}): remove it, and the report is"
            " made without it."
        ) from error


def _run_page(run: RunRecord) -> Page:
    ledger = run.ledger
    return Page(
        title=ledger["run"],
        kicker=f"training {ledger['model']}",
        headline=run_sentence(run),
        figures_of_merit=merit(run),
        conditions=run_conditions(run),
        command=command_of(run),
        attempts=attempts_table(run),
        learning=learning_view(run),
        mistakes=_mistakes(run),
        ledgers=[ledger_view(run, ledger["model"], "run")],
        not_measured=not_measured(ledger["null_reasons"]),
        environment=environment_facts(run.environment),
    )
