"""The page: self-contained, escaped, and with the same numbers as the files beside it."""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline.core.errors import DataError
from pipeline.core.schemas.comparison import ComparisonJson
from pipeline.reporting.page import write_comparison_report, write_run_report
from pipeline.reporting.runs import read_run
from tests.making.runs import MakeRun, handmade_comparison, handmade_row

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Checker(HTMLParser):
    """Collects tags, ids and table cells, and that every tag is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.rows: list[list[tuple[str | None, str]]] = []
        self.cell: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value) for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append((dict(attrs).get("data-value"), ""))
            self.cell = tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value) for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == self.cell:
            self.cell = None

    def handle_data(self, data: str) -> None:
        if self.cell:
            value, text = self.rows[-1][-1]
            self.rows[-1][-1] = (value, text + data)


def check(path: Path) -> Checker:
    checker = Checker()
    checker.feed(path.read_text())
    checker.close()
    assert checker.open == []
    return checker


def comparison_of(models: dict[str, Path]) -> ComparisonJson:
    rows = []
    for model, directory in models.items():
        size = read_run(directory).ledger["gradient_bytes"]
        measured = {
            "num_parameters": size // 4,
            "gradient_bytes": size,
            "server_egress_bytes_per_step": size + 1256,
            "times_baseline": size / 4_993_696,
            "step_seconds": 0.25,
            "images_per_second": 64.0,
            "published_top1": 0.58092,
        }
        rows.append(handmade_row(model, **measured))
    comparison = handmade_comparison(*rows)
    comparison["conditions"] = {"pictures per step": 16, "command": "python -m pipeline.compare name=c"}
    comparison["runs"] = {model: f"../{directory.name}" for model, directory in models.items()}
    comparison["null_reasons"] = {
        f"models.{i}.exposed_seconds": "Communication was not timed." for i in range(len(rows))
    }
    return comparison


def test_a_run_report_holds_curves_ledger_and_reasons(make_run: MakeRun) -> None:
    directory = make_run("first", num_steps=60, validated=True)
    path = write_run_report(directory)
    assert path == directory / "report.html"
    page = path.read_text()
    for part in ("Conditions", "Learning", "Ledger", "Not measured, and why", "Environment"):
        assert f">{part}" in page
    assert "Communication was not timed in this run." in page
    assert "4,993,696 bytes" in page
    check(path)


def test_nothing_is_loaded_from_anywhere(make_run: MakeRun) -> None:
    path = write_run_report(make_run("first", num_steps=30))
    checker = check(path)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", path.read_text())
    assert not {tag for tag, _, _ in checker.attributes} & {"link", "img", "iframe", "object", "embed"}
    for tag, key, value in checker.attributes:
        assert key not in ("src", "srcset", "data"), (tag, key, value)
        assert key != "href" or (value or "").startswith("#")


def test_ids_are_unique(make_run: MakeRun) -> None:
    models = {name: make_run(name, model=name) for name in ("squeezenet1_0", "squeezenet1_1")}
    target = make_run("c", num_steps=30)
    path = write_comparison_report(target, comparison_of(models), {m: read_run(d) for m, d in models.items()})
    ids = [value for _, key, value in check(path).attributes if key == "id"]
    assert len(ids) == len(set(ids))


def test_the_table_says_what_the_json_says(make_run: MakeRun, tmp_path: Path) -> None:
    models = {name: make_run(name, model=name) for name in ("squeezenet1_0", "resnet18")}
    comparison = comparison_of(models)
    (tmp_path / "c").mkdir()
    path = write_comparison_report(tmp_path / "c", comparison, {m: read_run(d) for m, d in models.items()})
    cells: dict[str, list[tuple[str | None, str]]] = {}
    for row in check(path).rows:
        if row and row[0][0] in models:  # a model has a row in the table of each subject
            cells.setdefault(row[0][1].strip(), []).extend(row[1:])
    for row in comparison["models"]:
        shown = [value for value, _ in cells[row["model"]]]
        exact = [value for value in row.values() if isinstance(value, int | float)]
        assert sorted(float(value) for value in shown if value) == sorted(map(float, exact))
    assert [text for _, text in cells["resnet18"]][:2] == ["46.76 MB", "9.36×"]


def test_a_failed_model_is_a_row_with_its_reason(make_run: MakeRun, tmp_path: Path) -> None:
    models = {"squeezenet1_0": make_run("squeezenet1_0")}
    comparison = comparison_of(models)
    comparison["models"].append(handmade_row("vgg16", reason="The run was killed <by> SIGKILL."))
    (tmp_path / "c").mkdir()
    path = write_comparison_report(tmp_path / "c", comparison, {m: read_run(d) for m, d in models.items()})
    assert any("The run was killed <by> SIGKILL." in text for row in check(path).rows for _, text in row)


def test_what_users_name_is_escaped(make_run: MakeRun) -> None:
    directory = make_run("first")
    attack = "<script>alert('x')</script>"
    ledger = json.loads((directory / "ledger.json").read_text())
    ledger["run"] = attack
    ledger["model"] = attack
    ledger["layers"][0]["name"] = attack
    ledger["null_reasons"]["closed"] = attack
    (directory / "ledger.json").write_text(json.dumps(ledger))
    (directory / "environment.json").write_text(json.dumps({"hosts": [attack], "command": ["python", attack]}))
    page = write_run_report(directory).read_text()
    assert attack not in page
    assert page.count("<script>") == 1
    assert html.escape(attack).replace("&#x27;", "&#39;") in page


def test_a_comparison_beside_a_run_is_shown_with_its_curves(make_run: MakeRun) -> None:
    models = {name: make_run(name, model=name) for name in ("squeezenet1_0", "alexnet")}
    directory = make_run("demo", num_steps=50, validated=True)
    (directory / "comparison.json").write_text(json.dumps(comparison_of(models)))
    page = write_run_report(directory).read_text()
    assert "Models side by side" in page
    assert "Learning: squeezenet1_0, 50 steps" in page
    assert "alexnet exchanges 244.40 MB, 48.94× as much" in page


def test_a_comparison_outlives_its_runs(make_run: MakeRun, tmp_path: Path) -> None:
    models = {"squeezenet1_0": make_run("squeezenet1_0")}
    directory = make_run("demo")
    comparison = comparison_of(models) | {"runs": {"squeezenet1_0": "gone"}}
    (directory / "comparison.json").write_text(json.dumps(comparison))
    assert "Models side by side" in write_run_report(directory).read_text()


def test_a_foreign_comparison_is_refused(make_run: MakeRun) -> None:
    directory = make_run("demo")
    (directory / "comparison.json").write_text("{}")
    with pytest.raises(DataError, match="not a comparison of this program"):
        write_run_report(directory)


def test_a_run_on_one_rank_says_that_nothing_crossed(make_run: MakeRun) -> None:
    directory = make_run("alone")
    ledger = json.loads((directory / "ledger.json").read_text())
    ledger |= {"world_size": 1, "num_servers": 1, "server_of_rank": [0], "collectives": [], "buckets": []}
    ledger["transport"]["predicted_bytes_per_rank"] = [0]
    ledger["per_step"] = {"payload_bytes": 0, "transport_bytes_per_rank": [0], "server_egress_bytes": [0]}
    (directory / "ledger.json").write_text(json.dumps(ledger))
    assert "nothing crossed a network" in write_run_report(directory).read_text()
