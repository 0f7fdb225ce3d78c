"""Saving the dashboards to W&B's server: bounded in time, and whatever goes wrong is one sentence."""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from pipeline.core.errors import ConfigError
from pipeline.core.files import write_json_atomic
from pipeline.core.secrets import redacted
from pipeline.run.record.wandb_mirror import why_not_online

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2.interface import Report
    from wandb_workspaces.workspaces import Workspace

SCHEMA = 1
PUBLISH_SECONDS = 60.0
TEARDOWN_SECONDS = 10.0
LONGEST_REASON = 200  # characters of what the server or the library said


class _PageJson(TypedDict):
    """A workspace on the server."""

    name: str
    id: str
    url: str


class _ReportJson(TypedDict):
    """A report on the server."""

    id: str
    url: str


class _RecordJson(TypedDict):
    """What was made on the server."""

    schema: int
    project: str
    entity: str
    workspace: _PageJson
    report: _ReportJson


class TimeIsOver(BaseException):
    """No `Exception`, which the library would take for an answer of the server and wrap or retry."""


def publish(workspace: "Workspace", report: "Report", record: Path) -> dict[str, str]:
    """Save both pages on the server.

    Args:
        workspace: The dashboards.
        report: The report.
        record: File that remembers what was made on the server. Pages it knows are changed, others are made.

    Returns:
        Addresses of `workspace` and `report`.

    Raises:
        ConfigError: There is no login, no answer within PUBLISH_SECONDS, or the server refuses. The files stay.
    """
    os.environ.setdefault("WANDB_SILENT", "true")  # its retries and addresses would stand between our own lines
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    reason = why_not_online()
    if reason:
        raise ConfigError(f"Nothing was published: {reason}. Both specifications are in {record.parent}.")
    try:
        with _deadline(PUBLISH_SECONDS):
            return _save(workspace, report, record)
    except (Exception, TimeIsOver) as error:  # whatever the library or the server makes of it
        _stop_wandb()
        said = " ".join(redacted(str(error)).split())[:LONGEST_REASON]
        raise ConfigError(
            f"W&B did not take the dashboards ({type(error).__name__}: {said}). Check the login, entity= and project=,"
            f" then run the command again; if a page was deleted on the server, delete {record} too."
        ) from error


def _save(workspace: "Workspace", report: "Report", record: Path) -> dict[str, str]:
    import wandb

    entity = workspace.entity or wandb.Api().default_entity or ""
    workspace.entity = report.entity = entity
    known = _read(record)
    if known is not None and (known.get("project"), known.get("entity")) == (workspace.project, entity):
        workspace._internal_name, workspace._internal_id = known["workspace"]["name"], known["workspace"]["id"]
        report.id = known["report"]["id"]

    report.save()  # first: it makes the project where there is none
    workspace.save()
    made: _RecordJson = {
        "schema": SCHEMA,
        "project": workspace.project,
        "entity": entity,
        "workspace": {"name": workspace._internal_name, "id": workspace._internal_id, "url": workspace.url},
        "report": {"id": report.id, "url": report.url},
    }
    write_json_atomic(record, made)
    return {"workspace": made["workspace"]["url"], "report": made["report"]["url"]}


def _read(record: Path) -> _RecordJson | None:
    if not record.is_file():
        return None
    try:
        return json.loads(record.read_text())
    except ValueError as error:
        raise ConfigError(f"{record} is not readable JSON ({error}): delete it to publish anew.") from error


def _stop_wandb() -> None:
    """End W&B's helper process, or leaving would wait for the server again."""
    with contextlib.suppress(Exception, TimeIsOver), _deadline(TEARDOWN_SECONDS):
        import wandb

        wandb.teardown(exit_code=1)


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise TimeIsOver in the block when its time is over. Main thread only: it is a signal that interrupts it."""

    def expire(*_: object) -> None:
        raise TimeIsOver(f"no answer within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
