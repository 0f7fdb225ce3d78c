"""Tables: the same rows for the terminal and for CSV."""

import csv
import io
from typing import cast

from rich.console import Console

from pipeline.core.schemas.comparison import ModelRowJson
from pipeline.core.schemas.ledger import LedgerJson
from pipeline.reporting.comparison_tables import comparison_csv, comparison_tables, terminal_table
from pipeline.reporting.tables import collectives_table
from tests.making.runs import handmade_comparison, handmade_row, handmade_run

ROW = handmade_row(
    num_parameters=1_248_424,
    gradient_bytes=4_993_696,
    payload_bytes_per_step=4_993_696,
    server_egress_bytes_per_step=4_994_952,
    times_baseline=1.0,
    step_seconds=0.2104,
    images_per_second=76.04,
    published_top1=0.58092,
    ledger_closed=True,
)
LARGE: ModelRowJson = {
    **ROW,
    "model": "vgg16",
    "label": "shufflenet_v2_x0_5 + powersgd",
    "server_egress_bytes_per_step": 553_507_632,
    "payload_bytes_per_step": 553_430_176,
    "gradient_bytes": 553_430_176,
    "ledger_closed": False,
    "times_baseline": 110.8257,
    "step_seconds": 10.23,
    "images_per_second": 0.392,
    "scaling_efficiency": 0.914,
    "exposed_seconds": 8.75,
}
FAILED = handmade_row("[red]odd[/red]", reason="It failed.")
UNMEASURED: ModelRowJson = {**ROW, "model": "alexnet", "label": "alexnet", "ledger_closed": None}
COMPARISON = handmade_comparison(ROW, LARGE, FAILED, UNMEASURED)


def test_lost_work_stands_apart_from_the_steps_that_count() -> None:
    ledger = handmade_run().ledger
    row = ledger["collectives"][2]
    lost = row | {"committed": False, "num_calls": 2, "payload_bytes": 40}
    ledger["collectives"] = [lost, row, row | {"attempt": 2}]
    table = collectives_table(cast(LedgerJson, ledger))
    assert [[cell.value for cell in shown.cells[:2]] for shown in table.rows] == [
        [1, "train"],
        [1, "train, lost"],
        [2, "train"],
    ]


def printed(width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(terminal_table(COMPARISON).to_rich())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_eighty_columns_are_enough() -> None:
    text = printed(80)
    for value in ("squeezenet1_0", "553.43 MB", "1.00×", "110.83×", "210 ms", "8.75 s", "58.09 %"):
        assert value in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_ledger_that_is_not_closed_marks_its_row() -> None:
    text = printed(120)
    assert "shufflenet_v2_x0_5 + powersgd *" in text and "* the ledger does not close" in text
    assert "alexnet ?" in text and "? the bytes sent were not measured" in text
    assert "squeezenet1_0 *" not in text and "squeezenet1_0 ?" not in text
    marks = {row.cells[0].text: row.mark for row in comparison_tables(COMPARISON)[0].rows}
    assert marks["shufflenet_v2_x0_5 + powersgd"] == "open" and marks["squeezenet1_0"] == "baseline"
    closed = [row["ledger_closed"] for row in csv.DictReader(io.StringIO(comparison_csv(COMPARISON)))]
    assert closed == ["true", "false", "", ""]


def test_markup_in_names_is_text() -> None:
    assert "[red]odd[/red]" in printed(200)


def test_a_column_that_nobody_measured_is_left_out() -> None:
    titles = [column.title for table in comparison_tables(COMPARISON) for column in table.columns]
    assert "exposed" in titles and "communication" not in titles and "per epoch" not in titles


def test_the_page_has_a_table_for_each_subject() -> None:
    tables = comparison_tables(COMPARISON)
    assert [table.title for table in tables] == ["Bytes", "Time", "Model"]
    assert all(len(table.columns) <= 9 for table in tables)


def test_csv_is_exact_and_empty_where_nothing_was_measured() -> None:
    first, _, failed, _ = csv.DictReader(io.StringIO(comparison_csv(COMPARISON)))
    assert int(first["gradient_bytes"]) == 4_993_696
    assert float(first["step_seconds"]) == 0.2104
    assert first["exposed_seconds"] == ""
    assert failed["reason"] == "It failed."
