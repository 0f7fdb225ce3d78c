"""W&B's specifications of the dashboards: a workspace and a report page, built offline with wandb-workspaces.

Building needs no login: the library's pages are plain data until they are saved, provided that the entity is given and
no run set names its project, which it would look up on the server.
"""

import json
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipeline.reporting import dashboards
from pipeline.reporting.dashboards import Bars, Lines, Panel, Points, Section

with warnings.catch_warnings():
    # 2026-11: wandb-workspaces 0.4 declares its models with validators that pydantic calls deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    import wandb_workspaces.reports.v2.interface as wr
    import wandb_workspaces.workspaces as ws

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2.interface import PanelTypes

SCHEMA = 1
TITLE = "squeezewire"
WIDE = 24
"""The columns of a report's panel grid."""


def build_workspace(project: str, entity: str | None) -> "ws.Workspace":
    """Return the workspace: a section per part of the dashboards, runs grouped by model."""
    sections = [
        ws.Section(
            name=section.title,
            panels=_panels(section),
            is_open=True,
            panel_settings=ws.SectionPanelSettings(x_axis=dashboards.STEP),
        )
        for section in dashboards.SECTIONS
    ]
    sections[-1].panels = [*sections[-1].panels, *_comparison_panels()]
    return ws.Workspace(
        entity=entity or "",
        project=project,
        name=TITLE,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis=dashboards.STEP, max_runs=50),
        runset_settings=ws.RunsetSettings(
            groupby=[ws.Metric("Group")],
            pinned_columns=["summary:best_val_top1", "summary:comm/total_gigabytes", "summary:step_seconds_p50"],
        ),
    )


def build_report(project: str, entity: str | None) -> "wr.Report":
    """Return the same panels on a page, with words on how to read them."""
    trainings = _runset("Trainings, by model", "train", [dashboards.MODEL_GROUP])
    blocks: list[Any] = [
        wr.MarkdownBlock(text=dashboards.REPORT_INTRODUCTION),
        wr.TableOfContents(),
        wr.H1(text="How to read the ledger"),
        wr.MarkdownBlock(text=dashboards.REPORT_LEDGER),
    ]
    for section in dashboards.SECTIONS:
        blocks += [wr.H1(text=section.title), wr.MarkdownBlock(text=section.text)]
        blocks.append(wr.PanelGrid(runsets=[trainings], panels=_panels(section)))
    comparisons = _runset("Comparisons", "compare", [])
    blocks.append(wr.PanelGrid(runsets=[comparisons], panels=list(_comparison_panels())))
    return wr.Report(
        project=project,
        entity=entity or "",
        title=f"{TITLE}: what each model costs on the wire",
        description="Learning, speed and communication of the trainings of this project, by model.",
        blocks=blocks,
        width="fluid",
    )


def specification(page: "ws.Workspace | wr.Report") -> dict[str, Any]:
    """Return plain JSON values: where the page belongs, and its `spec` in the words in which W&B's server stores it."""
    model = page._to_model()
    kind = "workspace" if isinstance(page, ws.Workspace) else "report"
    return {
        "schema": SCHEMA,
        "kind": kind,
        "title": model.display_name,
        "project": page.project,
        "entity": page.entity or None,
        "spec": json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True)),
    }


def _runset(name: str, job_type: str, groupby: list[str]) -> "wr.Runset":
    runset = wr.Runset(name=name, filters=f"Metric('JobType') = '{job_type}'", groupby=groupby)
    runset._id = _identifier(name)
    return runset


def _identifier(title: str) -> str:
    """Return an identifier; the library draws a random one, with which no two specifications are the same."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _panels(section: Section) -> "list[PanelTypes]":
    made = [_panel(panel) for panel in section.panels]
    for panel in made:
        panel._id = _identifier(f"{section.title} {panel.title}")
    return list(made)


def _panel(panel: Panel) -> "wr.LinePlot | wr.BarPlot | wr.ScatterPlot":
    match panel:
        case Lines():
            return wr.LinePlot(
                title=panel.title,
                x=panel.x,
                y=list(panel.metrics),
                title_x=panel.x,
                title_y=panel.unit or None,
                log_x=panel.log_x,
                log_y=panel.log_y,
                smoothing_type="exponentialTimeWeighted" if panel.smoothing else "none",
                smoothing_factor=panel.smoothing,
                smoothing_show_original=bool(panel.smoothing),
            )
        case Bars():
            return wr.BarPlot(title=panel.title, metrics=[panel.metric], title_x=panel.unit or None)
        case Points():
            return wr.ScatterPlot(
                title=panel.title, x=wr.SummaryMetric(panel.x), y=wr.SummaryMetric(panel.y), log_x=panel.log_x
            )


def _comparison_panels() -> Iterator["PanelTypes"]:
    """Yield the panels of the comparison's own runs: their table, their bars and their picture."""
    table = wr.WeavePanelSummaryTable(table_name=dashboards.COMPARISON_TABLE, layout=wr.Layout(w=WIDE, h=8))
    table._id = _identifier(dashboards.COMPARISON_TABLE)
    yield table
    for key, (column, title) in dashboards.COMPARISON_BARS.items():
        bars = wr.CustomChart(
            query={"summaryTable": {"tableKey": f"{key}_table"}},  # under this name W&B stores what wandb.plot.bar drew
            chart_name="wandb/bar/v0",
            chart_fields={"label": "model", "value": column},
            chart_strings={"title": title},
        )
        bars._id = _identifier(key)
        yield bars
    picture = wr.MediaBrowser(title="The comparison's picture", media_keys=[dashboards.COMPARISON_PICTURE])
    picture._id = _identifier(dashboards.COMPARISON_PICTURE)
    yield picture
