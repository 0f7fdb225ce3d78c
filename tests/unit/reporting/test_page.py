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
from tests.browser import browser
from tests.making.runs import MakeRun, handmade_comparison, handmade_row, handmade_validation

EMBEDDED = r"data:image/jpeg;base64,[A-Za-z0-9+/]+={0,2}"
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
        assert size is not None
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
    directory = make_run("first", num_steps=30)
    (directory / "validation.json").write_text(json.dumps(handmade_validation()))
    path = write_run_report(directory)
    checker = check(path)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", re.sub(EMBEDDED, "", path.read_text()))
    assert not {tag for tag, _, _ in checker.attributes} & {"link", "iframe", "object", "embed"}
    for tag, key, value in checker.attributes:
        if (tag, key) == ("img", "src"):
            assert re.fullmatch(EMBEDDED, value or "")
        else:
            assert key not in ("src", "srcset", "data"), (tag, key, value)
        assert key != "href" or (value or "").startswith("#")


ATTEMPTS = (
    {"attempt": 1, "started": "2026-11-30T12:00:00+00:00", "host": "node1", "world_size": 2, "start_step": 0,
     "changed": []},
    {"attempt": 2, "started": "2026-11-30T13:00:00+00:00", "host": "node2", "world_size": 3, "start_step": 20,
     "changed": ["recipe.lr was 0.04 and is 0.01", "the number of ranks was 2 and is 3"]},
)  # fmt: skip


def run_with_everything(make_run: MakeRun, num_classes: int = 10) -> Path:
    """A run of two attempts, validated."""
    directory = make_run("first", num_steps=60, validated=True)
    (directory / "attempts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ATTEMPTS))
    (directory / "validation.json").write_text(json.dumps(handmade_validation(num_classes)))
    return directory


def test_every_attempt_is_shown_with_what_changed(make_run: MakeRun) -> None:
    directory = run_with_everything(make_run)
    with (directory / "attempts.jsonl").open("a") as file:
        file.write('{"attempt": 3, "sta')  # cut short by a crash: a start too
    rows = [[text.strip() for _, text in row] for row in check(write_run_report(directory)).rows]
    first, second, third = (next(row for row in rows if row[0] == number) for number in "123")
    assert first == ["1", "2026-11-30 12:00:00", "node1", "2", "0 to 20", "the first"]
    assert second[3:] == ["3", "–", "recipe.lr was 0.04 and is 0.01; the number of ranks was 2 and is 3"]
    assert third[-1] == "nothing"


def test_what_jumps_from_step_to_step_is_shown_as_a_mean(make_run: MakeRun) -> None:
    directory = make_run("first", num_steps=60)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"train/loss": 2.0, "perf/data_wait_seconds": 0.05}
    rows[-1] |= {"train/loss": 52.0, "perf/data_wait_seconds": 0.25}
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_run_report(directory).read_text()
    assert "<dt>training loss, mean of the last 50 steps</dt><dd>3</dd>" in page
    assert "<dt>waited for data, mean</dt><dd>21.4 %</dd>" in page  # (58 x 0.05 + 0.25) / (59 x 0.25)


@pytest.mark.parametrize(("num_classes", "num_cells"), [(10, 20), (40, 80), (1000, 0)])
def test_a_matrix_of_up_to_40_classes_and_a_bounded_table_of_any_number(
    make_run: MakeRun, num_classes: int, num_cells: int
) -> None:
    path = write_run_report(run_with_everything(make_run, num_classes))
    page = path.read_text()
    assert len(re.findall(r'<rect class="(?:right|wrong)"', page)) == num_cells
    pairs = [row for row in check(path).rows if row and row[0][1].startswith("kind ")]
    assert len(pairs) == min(20, num_classes)
    assert page.count("<img ") == min(12, num_classes)
    assert "1 of 3 pictures of kind 3: kind 4" in page or num_classes == 1000
    assert len(page) < 300_000


def test_a_validation_that_was_tampered_with_shows_nothing_of_elsewhere(make_run: MakeRun) -> None:
    directory = make_run("first")
    validation = handmade_validation(2, ["<script>alert(1)</script>", "b"])
    validation["worst"][0]["jpeg_base64"] = '"><script>alert(2)</script>'
    (directory / "validation.json").write_text(json.dumps(validation))
    page = write_run_report(directory).read_text()
    assert page.count("<script>") == 1 and page.count("<img ") == 1
    (directory / "validation.json").write_text(json.dumps({"schema": 1, "step": 3}))
    with pytest.raises(DataError, match=r"validation\.json is not what `train` wrote"):
        write_run_report(directory)


CUT_OFF = """[...document.querySelectorAll('body *')].filter(element => {
    const box = element.getBoundingClientRect();
    const isCut = element.scrollWidth > element.clientWidth + 1 && getComputedStyle(element).overflowX !== 'visible';
    return box.width > 0 && (box.right > innerWidth + 1 || box.left < -1 || isCut);
}).map(element => element.outerHTML.slice(0, 200))"""
OBEYED = r"""[...document.querySelectorAll('*')].flatMap(element => [...element.childNodes, ...element.attributes])
    .filter(node => node.nodeType === 2 || node.nodeType === 3).map(node => node.nodeValue)
    .filter(text => /[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069]/.test(text))"""
LEFT_EDGES = "new Set([...document.querySelectorAll('section')].map(e => e.getBoundingClientRect().left)).size"


@pytest.mark.not_quick
def test_on_a_phone_nothing_is_cut_off_in_light_and_in_dark(make_run: MakeRun) -> None:
    """Nor does anything that people name turn, hide or break what is beside it."""
    models = {name: make_run(name, model=name) for name in ("squeezenet1_0", "resnet18")}
    directory = run_with_everything(make_run, 40)
    named = handmade_validation(2, ["cat\u202egpj.exe\x1b[31m", "dog\u2067\x9b"])
    evil = make_run("evil\u202e\x07")
    (evil / "validation.json").write_text(json.dumps(named))
    evil = write_run_report(evil)
    alone = write_run_report(directory).rename(directory / "alone.html")
    (directory / "comparison.json").write_text(json.dumps(comparison_of(models)))
    papers = set()
    with browser() as page:
        for path in (alone, write_run_report(directory)):
            for width in (390, 1280):
                for dark in (False, True):
                    page.show(path, width=width, dark=dark)
                    assert page.ask("document.documentElement.scrollWidth") <= width
                    assert page.ask(LEFT_EDGES) == 1
                    assert width > 390 or page.ask(CUT_OFF) == []
                    assert page.ask("[...document.images].every(image => image.naturalWidth === 96)")
                    papers.add((dark, page.ask("getComputedStyle(document.body).backgroundColor")))
        page.show(evil, width=1280, dark=False)
        assert page.ask(OBEYED) == []
        page.ask("document.body.append('\u202e')")
        assert page.ask(OBEYED) == ["\u202e"]  # so that it looks where it should
        text = page.ask("document.documentElement.textContent")
        assert all(name in text for name in (r"cat\u202egpj.exe\x1b[31m", r"dog\u2067\x9b", r"evil\u202e\x07"))
    assert len(papers) == 2  # a colour for light, another for dark


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
