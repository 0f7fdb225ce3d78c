"""metrics.jsonl: each step once, whatever was cut short and resumed."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.run.record.metrics_log import MetricsLog, read_rows


def write(path: Path, *steps: int) -> None:
    log = MetricsLog(path)
    for step in steps:
        log.append(step, {"train/loss": step / 2})
    log.close()


def steps_in(path: Path) -> list[int]:
    return [row["trainer/step"] for row in read_rows(path)]


def test_rows_are_flat_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append(1, {"train/loss": 0.5, "comm/payload_bytes": 4_943_136, "comm/seconds": None})
    log.append(2, {"train/loss": torch.tensor(0.25).item(), "lr": np.float32(0.5).item()})
    assert path.read_text().splitlines() == [
        '{"trainer/step": 1, "train/loss": 0.5, "comm/payload_bytes": 4943136, "comm/seconds": null}',
        '{"trainer/step": 2, "train/loss": 0.25, "lr": 0.5}',
    ]
    log.close()


def test_a_row_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(1, {"train/loss": 0.5})
    assert steps_in(log.path) == [1]
    log.close()


def test_what_is_not_finite_is_null_and_counted(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.append(1, {"a": math.nan, "b": math.inf, "c": 1}) == {"a": None, "b": None, "c": 1}
    log.append(2, {"a": -math.inf})
    log.close()
    assert log.num_not_finite == {"a": 2, "b": 1}
    assert [json.loads(line) for line in log.path.read_text().splitlines()][1] == {"trainer/step": 2, "a": None}


def test_no_step_is_written_twice(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", 1, 2)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(AssertionError):
        log.append(2, {})
    log.append(3, {})
    log.close()
    assert steps_in(log.path) == [1, 2, 3]


@pytest.mark.parametrize(("step", "left"), [(0, []), (3, [1, 3]), (4, [1, 3]), (9, [1, 3, 5])])
def test_truncation_keeps_what_is_committed(step: int, left: list[int], tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", 1, 3, 5)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.truncate_to(step) == 3 - len(left)
    log.append(step + 1, {})
    log.close()
    assert steps_in(log.path) == [*left, step + 1]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(1, 400), step=st.integers(0, 12))
def test_a_record_cut_anywhere_goes_on(cut: int, step: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.unlink(missing_ok=True)
    write(path, *range(1, 11))
    path.write_bytes(path.read_bytes()[:-cut])
    whole = len(path.read_bytes().splitlines()) - (not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0)
    log = MetricsLog(path)
    assert log.last_step == (whole or -1)
    log.truncate_to(step)
    log.append(20, {})
    log.close()
    assert steps_in(path) == [*range(1, min(whole, step) + 1), 20]


def test_a_damaged_line_in_the_middle_is_left_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"trainer/step": 1}\n{"st\0p": \n{"trainer/step": 3}\n')
    log = MetricsLog(path)
    log.close()
    assert "damaged" in capsys.readouterr().err
    assert steps_in(path) == [1, 3]
