"""Whoever started a training sees it learn: on a terminal and in a log."""

import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipeline.config.training import BatchSplit
from pipeline.core.progress import Bar
from pipeline.training.best import Validated
from pipeline.training.narrator import Narrator
from pipeline.training.plan import StepPlan

STEP_SECONDS = 0.5
PLAN = StepPlan(100, BatchSplit(10, 10, 1), 1440, 10, 0, 0)
STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  first: "


def row(step: int, **more: float) -> dict[str, float]:
    learnt = {"train/loss": 1 / step, "train/top1": 0.25}
    return {"epoch": step / 10, "lr": 0.0125, "perf/images_per_second": 1234.5, **learnt, **more}


def validated(step: int, top1: float) -> dict[str, float]:
    return row(step, **{"val/loss": 0.75, "val/top1": top1, "val/top5": 0.9})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Seconds since the first step, in its one item."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0 + now[0])
    yield now


def in_a_log(start_step: int = 0, best: Validated | None = None) -> Narrator:
    bar = cast(Bar, SimpleNamespace(update=lambda *_: None, describe=lambda _: None, num_columns=80))
    return Narrator("first", PLAN, start_step, best=best, bar=bar, has_lines=True)


def test_a_log_of_twelve_minutes_has_few_lines_that_say_how_it_goes(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    told = in_a_log()
    at = []
    for step in range(1, PLAN.num_steps + 1):
        clock[0] = (step - 1) * STEP_SECONDS
        told.tell(step, row(step))
        if lines := capsys.readouterr().out.splitlines():
            at += [(clock[0], line) for line in lines]
    assert [seconds for seconds, _ in at] == [10, 60, 120, 300, 600]
    assert all(re.match(STAMP, line) for _, line in at)
    assert at[1][1].endswith(
        "step 121 of 1,440, epoch 12.10 of 144.00: loss 0.011, top-1 25.0%, lr 0.0125, 1,234 pictures/s,"
        " 10 min 54 s left"
    )


def test_a_long_step_brings_one_line_and_not_those_it_missed(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    told = in_a_log()
    for step, seconds in ((1, 0), (2, 290), (3, 291), (4, 1201), (5, 1202), (6, 1799), (7, 1801)):
        clock[0] = seconds
        told.tell(step, row(step))
    steps = re.findall(r"step (\d+) of", capsys.readouterr().out)
    assert steps == ["2", "4", "7"]


def test_each_validation_is_a_line_and_the_best_one_is_known_over_attempts(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    told = in_a_log(start_step=20, best=Validated(0.5, 1.0, 20))
    assert told.outcome() == "best 50.0% at step 20."
    for step, top1 in ((30, 0.4), (40, 0.625), (50, 0.6)):
        told.tell(step, validated(step, top1))
    told.tell(60, validated(60, 0.9), may_be_best=False)
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(STAMP, "", line) for line in lines] == [
        "step 30 of 1,440: validation loss 0.750, top-1 40.0%, top-5 90.0%; best 50.0% at step 20",
        "step 40 of 1,440: validation loss 0.750, top-1 62.5%, top-5 90.0%; the best so far",
        "step 50 of 1,440: validation loss 0.750, top-1 60.0%, top-5 90.0%; best 62.5% at step 40",
        "step 60 of 1,440: validation loss 0.750, top-1 90.0%, top-5 90.0%; no candidate for the best before the"
        " density is reached",
    ]
    learnt = "training loss 0.024, top-1 25.0%; validation loss 0.750, top-1 90.0%"
    assert told.outcome() == f"{learnt}; best 62.5% at step 40."


def test_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    told = Narrator("first", PLAN, 0, best=None, bar=None, has_lines=False)
    told.tell(1, validated(1, 0.5))
    told.validating(3)
    assert capsys.readouterr() == ("", "")


ON_A_TERMINAL = """
import sys, time
from pipeline.training.narrator import narrating
from tests.unit.training.test_narrator import PLAN, row, validated
with narrating("first", PLAN, 0, best=None, is_teller=True) as told:
    for step in range(1, 1201):
        told.tell(step, row(step) if step != 600 else validated(step, 0.5))
    time.sleep(0.5)
    told.validating(7)
    time.sleep(0.5)
    print("done")
"""


@pytest.mark.not_quick
@pytest.mark.parametrize("columns", [80, 120])
def test_on_a_terminal_there_is_one_bar_that_fits_and_validations_stay(columns: int) -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm"}
    root = Path(__file__).resolve().parents[3]
    with subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL], cwd=root, env=environment, stdout=theirs, stderr=theirs
    ):
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # Linux says so at the end
            os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    assert all(len(line) <= columns and "…" not in line for line in lines)
    told = "validation loss 0.750, top-1 50.0%, top-5 90.0%; the best so far"  # on two lines where one is too short
    assert told in " ".join(lines)
    bars = [line for line in lines if line.endswith(tuple("0123456789")) and "1200/1440" in line]
    wide = "  lr 0.0125  1,234 pictures/s" if columns >= 100 else ""
    assert any(line.startswith(f"epoch 120.0/144.0  loss 0.001  top-1 25.0%{wide} ━") for line in bars), bars
    assert any(line.startswith("validating, batch 7 ━") for line in bars), bars
    assert "done" in lines


def test_it_needs_no_accuracy(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """As a loss that was not measured."""
    told = in_a_log()
    nothing: dict[str, Any] = row(1) | {"train/loss": None, "train/top1": None}
    told.tell(1, nothing)
    clock[0] = 11
    told.tell(2, nothing | {"epoch": 0.2})
    assert "epoch 0.20 of 144.00: lr 0.0125" in capsys.readouterr().out
