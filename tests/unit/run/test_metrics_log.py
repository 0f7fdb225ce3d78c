"""metrics.jsonl: each step once, whatever was cut short and resumed."""

import json
import math
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.run.record import metrics_log
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


@pytest.mark.parametrize(("step", "left", "damaged"), [(None, 3, 0), (3, 3, 0), (2, 1, 1), (1, 1, 1), (0, 0, 0)])
def test_a_damaged_line_is_left_where_a_row_before_it_is(
    step: int | None, left: int, damaged: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said where it is met on the way from the end."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"trainer/step": 1}\n{"st\0p": \n{"trainer/step": 3}\n')
    log = MetricsLog(path)
    assert log.truncate_to(step) == {3: 0, 1: 1, 0: 3}[left]
    log.close()
    assert (log.last_step, steps_in(path)) == (left or -1, [step for step in (1, 3) if step <= left])
    assert capsys.readouterr().err.count("is left as it is") == damaged


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 90), max_size=12),
    cut=st.integers(0, 60),
    block=st.integers(1, 70),
    step=st.one_of(st.none(), st.integers(0, 13)),
)
def test_the_end_is_found_whatever_the_blocks_hold(
    sizes: list[int], cut: int, block: int, step: int | None, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"trainer/step": {number}, "x": "{"x" * size}"}}\n'.encode() for number, size in enumerate(sizes, 1)]
    content = b"".join(lines)
    content = content[: max(0, len(content) - cut)]
    path.write_bytes(content)
    whole = [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
    left = whole if step is None else whole[:step]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_log, "BLOCK_BYTES", block)
        log = MetricsLog(path)
        assert log.truncate_to(step) == len(whole) - len(left)
        log.close()
    assert path.read_bytes() == b"".join(left) and log.last_step == (len(left) or -1)


def _bytes_read() -> int:
    """By this process since its start, as the kernel counts them."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])  # type: ignore[index]


def test_a_long_record_is_cut_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = '{{"trainer/step": {}, "train/loss": 0.5, "filler": "' + "x" * 450 + '"}}\n'
    path.write_text("".join(map(line.format, range(1, 40_001))))
    before = _bytes_read()
    tracemalloc.start()
    log = MetricsLog(path)
    assert log.truncate_to(39_900) == 100
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert _bytes_read() - before < 1_000_000 < path.stat().st_size / 10
    assert most_bytes < 2_000_000
    log.append(39_901, {})
    log.close()
