"""Run directories read back."""

import json
from pathlib import Path

import pytest

from pipeline.core.errors import DataError
from pipeline.reporting.runs import read_run
from pipeline.reporting.sections import run_sentence
from tests.making.runs import MakeRun


def test_a_run_is_read_whole(make_run: MakeRun) -> None:
    run = read_run(make_run("first", num_steps=6))
    assert run.step_seconds == 0.25
    assert run.wire_gradient_bytes == run.ledger["gradient_bytes"] == 4_993_696
    assert run.egress_bytes_per_step == 4_993_696 + 1152 + 104
    assert run.series("train/loss")[0] == [1, 2, 3, 4, 5, 6]


def test_startup_traffic_and_lost_work_are_not_counted_as_steps(make_run: MakeRun) -> None:
    directory = make_run("resumed", num_steps=6)
    ledger = json.loads((directory / "ledger.json").read_text())
    lost = {**ledger["collectives"][2], "attempt": 2, "num_calls": 4, "committed": False}
    ledger["collectives"].append(lost)
    (directory / "ledger.json").write_text(json.dumps(ledger))
    assert read_run(directory).wire_gradient_bytes == 4_993_696


def test_a_step_of_ranks_that_train_by_themselves_is_the_mean(make_run: MakeRun) -> None:
    """The last step ends a round: it is as little like all as the median one, which exchanges nothing."""
    directory = make_run("local", num_steps=3)
    config = (directory / "config.yaml").read_text()
    (directory / "config.yaml").write_text(config.replace("hook: none", "hook: none\n  period: 2"))
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for line, seconds in zip(lines, (9.0, 0.2, 0.8), strict=True):
        line["perf/step_seconds"] = seconds
    (directory / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    ledger = json.loads((directory / "ledger.json").read_text())
    ledger["servers"]["predicted_egress_bytes"] = [100, 201]
    (directory / "ledger.json").write_text(json.dumps(ledger))
    run = read_run(directory)
    assert (run.egress_bytes_per_step, run.step_seconds) == (67, pytest.approx(0.5))
    assert "at the end of each round" in run_sentence(run)


def test_a_world_of_one_carried_nothing(make_run: MakeRun) -> None:
    directory = make_run("alone")
    ledger = json.loads((directory / "ledger.json").read_text())
    ledger["collectives"] = []
    (directory / "ledger.json").write_text(json.dumps(ledger))
    assert read_run(directory).wire_gradient_bytes is None


def test_step_time_comes_from_the_rows_where_the_ledger_has_none(make_run: MakeRun) -> None:
    directory = make_run("untimed", num_steps=3, seconds=0.5)
    ledger = json.loads((directory / "ledger.json").read_text())
    ledger["time"]["step_seconds"] = {"p50": None, "p90": None}
    (directory / "ledger.json").write_text(json.dumps(ledger))
    assert read_run(directory).step_seconds == 0.5


def test_the_best_of_a_run_that_prunes_is_of_its_sparsest_weights(make_run: MakeRun) -> None:
    directory = make_run("first", num_steps=4)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for row, top1, density in zip(rows, (0.9, 0.4, 0.6, 0.5), (1.0, 0.33, 0.33, 0.33), strict=True):
        row |= {"val/top1": top1, "train/density": density}
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_run(directory).best_validation == (0.6, 3)
    for row in rows:
        del row["train/density"]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_run(directory).best_validation == (0.9, 1)


def test_of_equal_validations_that_of_the_lowest_loss_is_the_best(make_run: MakeRun) -> None:
    directory = make_run("first", num_steps=4)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for row, top1, loss in zip(rows, (0.5, 0.5, 0.5, 0.4), (0.9, 0.4, 0.6, 0.1), strict=True):
        row |= {"val/top1": top1, "val/loss": loss}
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_run(directory).best_validation == (0.5, 2)


def test_a_row_cut_short_by_a_kill_is_left_out(make_run: MakeRun) -> None:
    directory = make_run("killed", num_steps=3)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"trainer/step": 4, "train/lo')
    assert read_run(directory).num_rows == 3


def test_a_damaged_row_in_the_middle_is_refused(make_run: MakeRun) -> None:
    directory = make_run("damaged", num_steps=3)
    rows = (directory / "metrics.jsonl").read_text()
    (directory / "metrics.jsonl").write_text("{oops\n" + rows)
    with pytest.raises(DataError, match="line 1 is not JSON"):
        read_run(directory)


@pytest.mark.parametrize(
    ("content", "said"), [("[1]", "JSON object"), ("{", "not readable"), ('{"schema": 9}', "schema 9")]
)
def test_a_damaged_ledger_is_named(make_run: MakeRun, content: str, said: str) -> None:
    directory = make_run("damaged")
    (directory / "ledger.json").write_text(content)
    with pytest.raises(DataError, match=said):
        read_run(directory)


def test_a_directory_without_a_ledger_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no ledger\.json"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"model: x", "model='x' must be a group of keys"),
        (b"- 1", "holds a list"),
        (b"{", "not what `train` wrote"),
        (b"name: \xe5", "not what `train` wrote"),
        (b"[" * 5000, "not what `train` wrote"),
        (b"data: {size: 18446744073709551616}", "data.size has more digits"),
        (b"batch: {max_per_rank: many}", "batch.max_per_rank='many' must be of type int"),
    ],
)
def test_a_damaged_configuration_is_named(make_run: MakeRun, content: bytes, said: str) -> None:
    directory = make_run("damaged")
    (directory / "config.yaml").write_bytes(content)
    with pytest.raises(DataError, match=r"config\.yaml") as raised:
        read_run(directory)
    assert said in str(raised.value)


def test_a_configuration_of_another_version_is_read(make_run: MakeRun) -> None:
    """A key that is not known any more or not yet, one that is missing, and one that had no value."""
    directory = make_run("older")
    (directory / "config.yaml").write_text("gone: {a: 1}\ndata: {size: null, other: x}\n")
    assert read_run(directory).setting("data.other") == "x"
