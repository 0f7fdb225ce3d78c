"""Tables: the same rows for the terminal and for CSV."""

import csv
import io

from rich.console import Console

from pipeline.report.tables import collectives_table, comparison_csv, comparison_table

ROW = {
    "model": "squeezenet1_0",
    "num_parameters": 1_248_424,
    "gradient_bytes": 4_993_696,
    "server_egress_bytes_per_step": 4_994_952,
    "times_baseline": 1.0,
    "step_seconds": 0.2104,
    "exposed_seconds": None,
    "images_per_second": 76.04,
    "scaling_efficiency": None,
    "published_top1": 0.58092,
}
LARGE = ROW | {"model": "squeezenet1_1", "gradient_bytes": 553_430_176, "server_egress_bytes_per_step": 553_507_632}
LARGE |= {"times_baseline": 110.8257, "step_seconds": 10.23, "images_per_second": 0.392}
FAILED = dict.fromkeys(ROW) | {"model": "[red]odd[/red]", "reason": "It failed."}
COMPARISON = {"baseline": "squeezenet1_0", "models": [ROW, LARGE, FAILED]}


def test_lost_work_stands_apart_from_the_steps_that_count():
    row = {
        "op": "all_reduce",
        "origin": "gradients",
        "phase": "train",
        "attempt": 1,
        "num_calls": 4,
        "payload_bytes": 80,
    }
    lost = row | {"committed": False, "num_calls": 2, "payload_bytes": 40}
    table = collectives_table(
        {"collectives": [lost, row | {"committed": True}, row | {"attempt": 2, "committed": True}]}
    )
    assert [[cell.value for cell in shown.cells[:2]] for shown in table.rows] == [
        [1, "train"],
        [1, "train, lost"],
        [2, "train"],
    ]


def printed(width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(comparison_table(COMPARISON).to_rich())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_eighty_columns_are_enough():
    text = printed(80)
    for value in ("squeezenet1_0", "553.43 MB", "1.00×", "210 ms", "76.0", "0.392", "58.09 %"):
        assert value in text
    assert "…" not in text


def test_markup_in_names_is_text():
    assert "[red]odd[/red]" in printed(200)


def test_a_column_that_nobody_measured_is_left_out():
    assert "exposed" not in printed(200)


def test_csv_is_exact_and_empty_where_nothing_was_measured():
    first, _, failed = csv.DictReader(io.StringIO(comparison_csv(COMPARISON)))
    assert int(first["gradient_bytes"]) == 4_993_696
    assert float(first["step_seconds"]) == 0.2104
    assert first["exposed_seconds"] == ""
    assert failed["reason"] == "It failed."
