"""The recorder: each step one row, validated and saved when due, and time that leaves the pauses out."""

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning import Trainer

from pipeline.comm.collectives import CollectiveMeter
from pipeline.comm.ledger.ledger import Ledger
from pipeline.comm.ledger.traffic import Placement
from pipeline.comm.timeline import Timeline
from pipeline.config.training import BatchConfig, InputConfig, RecipeConfig, TrainerConfig
from pipeline.models.plateau import PlateauDetector
from pipeline.training.attempt import NUM_TIMED_STEPS, Recorder, StepClock, TimedLoader
from pipeline.training.learner import Learner, StepResult
from pipeline.training.plan import make_plan

Row = dict[str, float | int | None]


class Training:
    """The order in which a training calls its recorder, with everything real but the network."""

    def __init__(self, *, num_steps: int, validate: int, save: int, best: float | None = None, start: int = 0) -> None:
        trainer = TrainerConfig(max_steps=num_steps, validate_every_steps=validate, checkpoint_every_steps=save)
        self.plan = make_plan(trainer, BatchConfig(global_size=4), 20, 1, validate=True)
        self.rows: list[tuple[int, Row]] = []
        self.saved: list[tuple[int, float | None, int]] = []
        """(step, score, rows written before)."""
        self.learner = Learner(
            torch.nn.Linear(1, 2), recipe=RecipeConfig(), input_config=InputConfig(), num_classes=2, seed=0, num_steps=9
        )
        meter = CollectiveMeter()
        self.recorder = Recorder(
            self.plan,
            Ledger(meter, {"weight": 8}, placement=Placement.assumed(1), attempt=1, rank=0, reconciler=None),
            Timeline(meter),
            TimedLoader([]),
            log=lambda step, row: self.rows.append((step, dict(row))),
            save=lambda step, score: self.saved.append((step, score, len(self.rows))),
            plateau=PlateauDetector(2, after_steps=1000),
            best_score=best,
        )
        self.start = start

    def run(self, scores: Iterator[float], until: int | None = None) -> "Training":
        trainer = cast(Trainer, None)  # the recorder has no use for it
        self.recorder.on_train_start(trainer, self.learner)
        for step in range(self.start + 1, (until or self.plan.num_steps) + 1):
            self.learner.committed_steps = step
            self.recorder.on_step(StepResult(step, loss=1 / step, top1=0.5, lr=0.1, grad_norm=2.0))
            if self.plan.validation_due(step):
                results: dict[str, Any] = {"loss": 0.3, "top1": next(scores), "top5": 1.0, "num_samples": 5}
                self.learner.last_validation = results
                self.recorder.on_validation_end(trainer, self.learner)
        self.recorder.flush()
        return self


@given(st.integers(1, 25), st.integers(0, 7), st.integers(0, 7), st.lists(st.floats(0, 1), min_size=25, max_size=25))
def test_each_step_is_written_once_and_before_it_is_saved(
    num_steps: int, validate: int, save: int, scores: list[float]
) -> None:
    training = Training(num_steps=num_steps, validate=validate, save=save).run(iter(scores))
    assert [step for step, _ in training.rows] == list(range(1, num_steps + 1))
    plan = training.plan
    validated = [step for step, row in training.rows if "val/top1" in row]
    assert validated == [step for step in range(1, num_steps + 1) if plan.validation_due(step)]
    for step, _, num_rows in training.saved:
        assert num_rows == step  # the record is never behind the state
    saved = [step for step, _, _ in training.saved]
    assert saved == sorted(set(saved))
    assert {step for step in range(1, num_steps + 1) if plan.checkpoint_due(step)} <= set(saved)
    best = [score for _, score, _ in training.saved if score is not None]
    assert best == sorted(set(best))
    if save:
        assert (best[-1] if best else None) == (max(scores[: len(validated)]) if validated else None)
    else:
        assert not saved


def test_a_row_holds_what_the_names_promise() -> None:
    rows = Training(num_steps=2, validate=2, save=0).run(iter([0.75])).rows
    (_, first), (_, second) = rows
    assert first["samples"] == 4 and first["epoch"] == pytest.approx(0.2) and first["lr"] == 0.1
    assert {"train/loss", "train/top1", "train/grad_norm"} <= first.keys()
    for name in ("images_per_second", "step_seconds", "data_wait_seconds", "data_wait_share"):
        assert first[f"perf/{name}"] is not None
    assert first["comm/gradient_bytes"] is not None
    assert (second["val/loss"], second["val/top1"], second["val/top5"]) == (0.3, 0.75, 1.0)


def test_the_best_of_earlier_attempts_must_be_beaten() -> None:
    training = Training(num_steps=4, validate=1, save=4, best=0.6).run(iter([0.5, 0.6, 0.7, 0.1]))
    assert [(step, score) for step, score, _ in training.saved] == [(3, 0.7), (4, None)]
    assert training.recorder.summary()["best_val_top1"] == 0.7


def test_a_step_waiting_for_validation_is_not_lost_when_the_attempt_ends() -> None:
    training = Training(num_steps=5, validate=0, save=0)
    training.run(iter([]), until=3)
    training.recorder.flush()
    assert [step for step, _ in training.rows] == [1, 2, 3]


def test_what_the_attempt_was_like_is_said_in_words() -> None:
    recorder = Training(num_steps=3, validate=0, save=0).recorder
    assert recorder.sentence() == ""
    for _ in range(4):
        recorder.clock.step_seconds.append(2.0)
        recorder.clock.wait_seconds.append(1.0)
    said = recorder.sentence()
    assert said.startswith("2 pictures/s, 50.0% ") and "data.num_workers=" in said and "short_side=256" in said
    recorder.clock.wait_seconds.clear()
    recorder.clock.wait_seconds.append(0.0)
    assert "keeps up" in recorder.sentence()


# --- time ---


def test_a_timed_loader_yields_what_it_wraps_and_counts_from_take_to_take() -> None:
    loader = TimedLoader(["a", "b", "c"])
    assert len(loader) == 3 and list(loader) == ["a", "b", "c"]
    waited = loader.take()
    assert waited > 0 and loader.take() == 0.0
    assert list(loader) == ["a", "b", "c"]


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=50))
def test_percentiles_are_of_the_steps_after_the_first(seconds: list[float]) -> None:
    clock = StepClock()
    assert clock.percentiles() is None and clock.mean_wait_share() is None and clock.mean_wait_seconds() is None
    clock.step_seconds.extend(seconds)
    found = clock.percentiles()
    assert found is not None
    steady = sorted(seconds[1:] or seconds)
    assert steady[0] <= found[0] <= found[1] * (1 + 1e-9) and found[1] <= steady[-1] * (1 + 1e-9)
    assert sum(value <= found[0] * (1 + 1e-9) for value in steady) * 2 >= len(steady)


def test_a_pause_is_in_no_step() -> None:
    clock = StepClock()
    now = [100.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.training.attempt.time.perf_counter", lambda: now[0])
        clock.restart()
        now[0] += 2
        assert clock.lap(0.5) == 2
        now[0] += 1000  # validation and a checkpoint
        clock.restart()
        now[0] += 3
        assert clock.lap(1.5) == 3
    assert list(clock.step_seconds) == [2, 3]
    assert clock.mean_wait_seconds() == 1.0 and clock.mean_wait_share() == pytest.approx(2 / 5)


def test_a_long_run_is_remembered_in_bounded_memory() -> None:
    clock = StepClock()
    for _ in range(NUM_TIMED_STEPS + 10):
        clock.lap(0.0)
    assert len(clock.step_seconds) == len(clock.wait_seconds) == NUM_TIMED_STEPS
