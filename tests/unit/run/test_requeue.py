"""A job goes back into the queue where that helps, and not for ever."""

import json
from pathlib import Path

import pytest

from pipeline.run.launch.requeue import decide, last_step


def save(run: Path, step: int) -> None:
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "checkpoints" / f"step={step:09d}.ckpt").touch()


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 6, 127, 128])
def test_an_error_of_its_own_would_come_again(code: int, tmp_path: Path) -> None:
    decision = decide(tmp_path / "run", code, job="7", limit=3)
    assert not decision.requeue and f"Exit code {code}" in decision.reason
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("code", [75, 134, 137, 143])
def test_who_was_asked_to_stop_or_killed_comes_back(code: int, tmp_path: Path) -> None:
    save(tmp_path, 12)
    decision = decide(tmp_path, code, job="7", limit=3)
    assert decision.requeue and "on from step 12" in decision.reason
    (line,) = (tmp_path / "requeues.jsonl").read_text().splitlines()
    assert {"job": "7", "exit_code": code, "step": 12, "in_vain": 0}.items() <= json.loads(line).items()


def test_an_error_is_not_hidden_by_who_was_killed_for_waiting(tmp_path: Path) -> None:
    for code in (75, 134, 137):
        decision = decide(tmp_path / "run", code, job="7", limit=3, rank_error=3, num_lost=1)
        assert not decision.requeue and "A rank ended by itself with exit code 3" in decision.reason
    assert not (tmp_path / "run").exists()


def test_ranks_that_only_lost_one_another_come_back(tmp_path: Path) -> None:
    answers = [decide(tmp_path, 1, job="7", limit=2, num_lost=2) for _ in range(4)]
    assert [answer.requeue for answer in answers] == [True, True, False, False]
    assert "lost one another" in answers[0].reason


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_a_run_that_never_starts_ends(limit: int, tmp_path: Path) -> None:
    run = tmp_path / "not" / "there"
    answers = [decide(run, 137, job="7", limit=limit) for _ in range(limit + 2)]
    assert [answer.requeue for answer in answers] == [True] * limit + [False] * 2
    assert f"{limit} times in a row without a new checkpoint (still at step 0)" in answers[-1].reason
    assert decide(run, 137, job="8", limit=1).requeue  # submitted anew, by somebody who looked at it


def test_progress_begins_the_count_anew(tmp_path: Path) -> None:
    answers = []
    for step in (3, 3, 3, 6, 6, 6, 9, 12, 12, 12, 12):
        save(tmp_path, step)
        answers.append(decide(tmp_path, 75, job="7", limit=2).requeue)
    assert answers == [True] * 10 + [False]


def test_a_line_cut_short_is_passed_over(tmp_path: Path) -> None:
    assert decide(tmp_path, 75, job="7", limit=1).requeue
    with (tmp_path / "requeues.jsonl").open("a") as file:
        file.write('{"job": "7", "st')
    assert not decide(tmp_path, 75, job="7", limit=1).requeue


def test_a_place_that_cannot_be_written_is_no_place_to_come_back_to(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file in the way")
    decision = decide(tmp_path / "run", 75, job="7", limit=3)
    assert not decision.requeue and "cannot be written" in decision.reason


def test_the_last_step_is_the_highest(tmp_path: Path) -> None:
    assert last_step(tmp_path) == 0
    for step in (8, 100, 30):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "best.ckpt").touch()
    assert last_step(tmp_path) == 100
