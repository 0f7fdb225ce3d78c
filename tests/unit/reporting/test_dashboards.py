"""The W&B dashboards: what is on them, and the command that writes and publishes them."""

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.reporting import dashboards, wandb_pages

# design.md, "Names of metrics".
METRICS = (
    *("train/loss", "train/top1", "val/loss", "val/top1", "val/top5", "lr"),
    *(f"perf/{name}" for name in ("images_per_second", "step_seconds", "data_wait_seconds", "data_wait_share")),
    *(f"comm/{name}_bytes" for name in ("gradient", "payload", "transport", "server_egress")),
    *("comm/total_gigabytes", "comm/seconds", "comm/exposed_seconds", "comm/exposed_share", "comm/bus_bandwidth"),
)
pytestmark = pytest.mark.not_quick

API_KEY = "0123456789abcdef" * 2 + "01234567"
DEADLINE_SECONDS = 300.0  # of a command that should take seconds


def strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from strings(list(value.values()))
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


def panels(value: Any) -> Iterator[dict[str, Any]]:
    """Every panel in a specification."""
    if isinstance(value, dict):
        if "viewType" in value:
            yield value
        for inner in value.values():
            yield from panels(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from panels(inner)


def test_every_metric_of_the_design_is_on_the_dashboards() -> None:
    assert set(METRICS) <= dashboards.metric_names()


@pytest.fixture(scope="module")
def workspace() -> dict[str, Any]:
    return wandb_pages.specification(wandb_pages.build_workspace("mine", "team"))


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return wandb_pages.specification(wandb_pages.build_report("mine", None))


def test_the_workspace_has_its_sections_and_every_metric(workspace: dict[str, Any]) -> None:
    section = workspace["spec"]["section"]
    names = [part["name"] for part in section["panelBankConfig"]["sections"]]
    assert names == ["Learning", "Speed", "Communication", "Comparison between models"]
    assert section["runSets"][0]["grouping"] == [{"section": "run", "name": "group"}]
    shown = {name.removeprefix("summary:") for name in strings(section["panelBankConfig"])}
    assert dashboards.metric_names() <= shown
    assert (workspace["project"], workspace["entity"]) == ("mine", "team")


def test_the_report_shows_the_same_panels_and_explains_the_ledger(
    workspace: dict[str, Any], report: dict[str, Any]
) -> None:
    assert [panel["config"] for panel in panels(report)] == [panel["config"] for panel in panels(workspace)]
    text = "\n".join(strings(report))
    for name in METRICS:
        if name.startswith("comm/"):
            assert f"`{name}`" in text, f"{name} is not explained"


def test_accuracy_per_gigabyte_is_a_panel(workspace: dict[str, Any]) -> None:
    axes = {
        (panel["config"].get("xAxis"), *panel["config"].get("metrics", []))
        for panel in panels(workspace)
        if panel["config"].get("xLogScale")
    }
    assert ("comm/total_gigabytes", "val/top1") in axes


def test_bytes_that_span_decades_have_a_logarithmic_axis(workspace: dict[str, Any]) -> None:
    lines = [panel["config"] for panel in panels(workspace) if panel["viewType"] == "Run History Line Plot"]
    logarithmic = {name for config in lines if config["yLogScale"] for name in config["metrics"]}
    assert {name for name in METRICS if name.startswith("comm/") and name.endswith("_bytes")} <= logarithmic
    assert "comm/residual_bytes" not in logarithmic  # which is 0


def test_every_panel_has_an_identifier_of_its_own(workspace: dict[str, Any]) -> None:
    identifiers = [panel["__id__"] for panel in panels(workspace)]
    assert len(identifiers) == len(set(identifiers))


# --- the command ---


def run(*arguments: str, environment: dict[str, str], expect: int = 0) -> str:
    """`python -m pipeline.dashboard`, with no key, no settings and no server of whoever runs the tests."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pipeline.dashboard", *arguments],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )
    said = ended.stdout + ended.stderr
    assert ended.returncode == expect, said
    assert "Traceback" not in said
    return said


@pytest.fixture
def nobody(tmp_path: Path) -> dict[str, str]:
    """The environment of somebody who never logged in."""
    return {"NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path / "config"), "HOME": str(tmp_path)}


def test_without_publishing_both_are_files_and_the_same_every_time(tmp_path: Path, nobody: dict[str, str]) -> None:
    said = run(f"run_root={tmp_path}", "project=mine", environment=nobody)
    assert "publish=true" in said and "wandb login" in said
    directory = tmp_path / "dashboard"
    assert sorted(path.name for path in directory.iterdir()) == ["report.json", "workspace.json"]
    first = {path.name: path.read_bytes() for path in directory.iterdir()}
    run(f"run_root={tmp_path}", "project=mine", environment=nobody)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == first


def test_publishing_without_a_login_names_the_remedy_and_leaves_the_files(
    tmp_path: Path, nobody: dict[str, str]
) -> None:
    said = run(f"run_root={tmp_path}", "name=pages", "publish=true", expect=2, environment=nobody)
    assert said.count("error: ") == 1 and "`wandb login`, or WANDB_API_KEY" in said
    assert json.loads((tmp_path / "pages" / "workspace.json").read_text())["kind"] == "workspace"
    assert json.loads((tmp_path / "pages" / "report.json").read_text())["kind"] == "report"


def test_an_unreachable_server_is_one_sentence(tmp_path: Path, nobody: dict[str, str]) -> None:
    account = nobody | {"WANDB_API_KEY": API_KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    said = run(f"run_root={tmp_path}", "publish=true", expect=2, environment=account)
    assert said.count("error: ") == 1 and "does not answer" in said
    assert (tmp_path / "dashboard" / "report.json").is_file()


class Server(http.server.BaseHTTPRequestHandler):
    """Stands in for W&B's: refuses, or answers the few queries of a publication and remembers what it was sent."""

    refuses = True
    saved: list[dict[str, Any]]

    def do_GET(self) -> None:
        self.answer(200, {})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        if self.refuses:
            self.answer(401, {"errors": [{"message": "user is not logged in"}]})
        else:
            self.answer(200, {"data": self.data(asked.get("query", ""), asked.get("variables") or {})})

    def data(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """What the query asks for."""
        if "upsertView" in query:
            self.saved.append(variables)
            view = {key: variables[key] for key in ("name", "displayName", "type", "description", "spec")}
            view |= {"id": variables.get("id") or f"view{len(self.saved)}", "updatedAt": None}
            view["project"] = {"id": "p", "name": variables["projectName"], "entityName": variables["entityName"]}
            return {"upsertView": {"view": view, "inserted": True}}
        if "query GetProjects" in query:
            page = {"__typename": "PageInfo", "hasNextPage": False, "endCursor": None}
            return {"models": {"edges": [], "pageInfo": page}}
        if "mutation CreateProject" in query:
            return {"result": {"project": None, "model": None, "inserted": True}}
        viewer = {"id": "u", "username": "me", "entity": "me", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer, "serverInfo": {"features": []}}

    def answer(self, status: int, value: Any) -> None:
        """Send JSON."""
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Quietly."""
        del format, args


@pytest.fixture
def server() -> Iterator[tuple[type[Server], str]]:
    handler = type("OneServer", (Server,), {"saved": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield handler, f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def test_a_server_that_refuses_the_key_is_one_sentence(
    server: tuple[type[Server], str], tmp_path: Path, nobody: dict[str, str]
) -> None:
    started = time.monotonic()
    account = nobody | {"WANDB_API_KEY": API_KEY, "WANDB_BASE_URL": server[1]}
    said = run(f"run_root={tmp_path}", "entity=me", "publish=true", expect=2, environment=account)
    assert said.count("error: ") == 1 and "W&B did not take the dashboards" in said
    assert API_KEY not in said
    assert time.monotonic() - started < DEADLINE_SECONDS - 30


def test_publishing_again_changes_the_same_pages(
    server: tuple[type[Server], str], tmp_path: Path, nobody: dict[str, str]
) -> None:
    handler, url = server
    handler.refuses = False
    account = nobody | {"WANDB_API_KEY": API_KEY, "WANDB_BASE_URL": url}
    said = ""
    for _ in range(2):
        said = run(f"run_root={tmp_path}", "project=mine", "publish=true", environment=account)
    assert "Published workspace: " in said and "Published report: " in said
    assert [(sent["type"], sent.get("id")) for sent in handler.saved] == [
        ("runs", None),
        ("project-view", None),
        ("runs", "view1"),
        ("project-view", "view2"),
    ]
    written = json.loads((tmp_path / "dashboard" / "workspace.json").read_text())["spec"]
    assert json.loads(handler.saved[1]["spec"]) == written
    assert {sent["entityName"] for sent in handler.saved} == {"me"}
