"""An attempt: each step one row, validated and saved when due, and left when asked to."""

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comm.collectives import CollectiveMeter
from pipeline.comm.ledger.ledger import Ledger
from pipeline.comm.ledger.traffic import Placement
from pipeline.comm.timeline import Timeline
from pipeline.config.training import TrainConfig, TrainerConfig
from pipeline.core.cli import compose
from pipeline.core.compute import choose_compute
from pipeline.core.errors import NonFiniteError, Preempted
from pipeline.models.plateau import NUM_DEAD_STEPS
from pipeline.run import checkpoint as checkpoints
from pipeline.run.launch.ranks import find_ranks
from pipeline.training.attempt import Attempt
from pipeline.training.best import Validated
from pipeline.training.learner import Learner
from pipeline.training.narrator import Narrator
from pipeline.training.plan import make_plan
from pipeline.training.reporter import Reporter
from pipeline.training.setup import Setup, Start
from pipeline.training.step_result import StepResult
from pipeline.training.timing import TimedLoader
from pipeline.training.watchdog import StepWatchdog
from pipeline.training.world import World

Row = dict[str, float | int | None]
CONFIG = compose("train", TrainConfig, ["name=a", "data.root=none", "batch.global_size=4", "trainer.max_steps=1"])


class Training:
    """The order in which a training calls its attempt; the disk, the trainer and the network are stand-ins."""

    def __init__(
        self,
        *,
        num_steps: int,
        validate: int,
        save: int,
        best: float | None = None,
        owed: tuple[int, Row] | None = None,
    ) -> None:
        trainer = TrainerConfig(max_steps=num_steps, validate_every_steps=validate, checkpoint_every_steps=save)
        config = dataclasses.replace(CONFIG, trainer=trainer)
        ranks = find_ranks(1, {})
        assert ranks is not None
        timeline = Timeline(1)
        meter = CollectiveMeter(observers=[timeline])
        compute = choose_compute(accelerator="cpu", precision="fp32")
        world = World(ranks, compute, meter, timeline, Placement.assumed(1), num_threads=1)
        self.plan = make_plan(config.trainer, config.batch, 20, 1, validate=True)
        self.rows: list[tuple[int, Row]] = []
        self.saved: list[tuple[int, int]] = []
        """(step, rows written before)."""
        self.best: list[float] = []
        """Scores of the checkpoints kept as best."""
        self.learner = Learner(
            torch.nn.Linear(1, 2), recipe=config.recipe, input_config=config.input, num_classes=2, seed=0, num_steps=9
        )
        self.learner._trainer = cast(Any, SimpleNamespace(save_checkpoint=self._save))
        step, owed_row = owed or (0, None)
        section = {"best_score": best, "owed_row": owed_row}
        setup = Setup(
            config,
            world,
            cast(
                Any, SimpleNamespace(num_classes=2, training=SimpleNamespace(index_hash="of the shards", classes=None))
            ),
            self.plan,
            cast(Any, SimpleNamespace(checkpoints=Path(), check_owned=lambda: None, writing=nullcontext)),
            Start(step, content={checkpoints.SECTION: section}),
        )
        self.attempt = Attempt(
            setup,
            self.learner,
            ledger=Ledger(meter, {"weight": 8}, placement=world.placement, attempt=1, rank=0, reconciler=None),
            powersgd=None,
            tracker=cast(Any, SimpleNamespace(log=lambda step, row: self.rows.append((step, dict(row))))),
            loader=TimedLoader(cast(Any, SimpleNamespace(num_workers=0))),
            watchdog=StepWatchdog(world, self.learner, 10.0),
            narrator=Narrator("a", self.plan, step, best=Validated.of_section(section), bar=None, has_lines=False),
            reporter=Reporter(setup.run, None, num_classes=2, every_seconds=None, is_writer=False),
        )
        self.attempt._sync_record = lambda: None  # type: ignore[method-assign]
        self.attempt._settle = self._settle  # type: ignore[method-assign]

    def _save(self, path: Path) -> None:
        self.saved.append((self.learner.committed_steps, len(self.rows)))

    def _settle(self, path: Path, best_score: float | None) -> None:
        self.best += [] if best_score is None else [best_score]

    def run(self, scores: Iterator[float], until: int | None = None, stop_at: int | None = None) -> "Training":
        self.attempt._write_ledger = lambda **_: None  # type: ignore[method-assign]
        self.attempt._resume_time()
        for step in range(1, (until or self.plan.num_steps) + 1):
            self.learner.committed_steps = step
            self.attempt.step_done(
                StepResult(step, loss=1 / step, top1=0.5, lr=0.1, grad_norm=2.0, stop=step == stop_at)
            )
            if self.plan.validation_due(step):
                self.attempt.validated({"loss": 0.3, "top1": next(scores), "top5": 1.0, "num_samples": 5})
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
    for step, num_rows in training.saved:
        assert num_rows == step  # the record is never behind the state
    saved = [step for step, _ in training.saved]
    assert saved == sorted(set(saved))
    assert {step for step in range(1, num_steps + 1) if plan.checkpoint_due(step)} <= set(saved)
    best = training.best
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
    assert [step for step, _ in training.saved] == [3, 4] and training.best == [0.7]
    assert training.attempt.summary()["best_val_top1"] == 0.7


def test_a_row_without_validation_is_written_at_once() -> None:
    training = Training(num_steps=5, validate=0, save=0).run(iter([]), until=3)
    assert [step for step, _ in training.rows] == [1, 2, 3]


def test_asked_to_stop_it_saves_once_and_leaves() -> None:
    training = Training(num_steps=9, validate=0, save=9)
    with pytest.raises(Preempted, match="step 3 of 9 is saved"):
        training.run(iter([]), stop_at=3)
    assert training.saved == [(3, 3)]


def test_a_row_whose_validation_was_broken_off_goes_into_the_checkpoint_and_is_written_by_the_next_attempt() -> None:
    first = Training(num_steps=9, validate=3, save=9)
    with pytest.raises(Preempted, match="step 3 of 9 is saved"):
        first.run(iter([]), stop_at=3)
    assert first.saved == [(3, 2)] and first.attempt.owed_row is not None
    second = Training(num_steps=9, validate=3, save=9, owed=(3, first.attempt.owed_row))
    second.learner.committed_steps = 3
    second.attempt.validated({"loss": 0.3, "top1": 0.5, "top5": 1.0})
    ((step, row),) = second.rows
    assert step == 3 and row["val/top1"] == 0.5 and row["train/loss"] == first.attempt.owed_row["train/loss"]


def test_what_the_attempt_was_like_is_said_in_words() -> None:
    attempt = Training(num_steps=3, validate=0, save=0).attempt
    assert attempt.sentence() == ""
    for _ in range(4):
        attempt.clock.step_seconds.append(2.0)
        attempt.clock.wait_seconds.append(1.0)
    said = attempt.sentence()
    assert said.startswith("2 pictures/s, 50.0% ") and "short_side=256" in said
    attempt.clock.wait_seconds.clear()
    attempt.clock.wait_seconds.append(0.0)
    assert "keeps up" in attempt.sentence()


def test_a_dead_network_ends_the_run() -> None:
    """After so many steps with a gradient of 0; what was done before stands."""
    training = Training(num_steps=90, validate=0, save=0)
    with pytest.raises(NonFiniteError, match=rf"Step {NUM_DEAD_STEPS + 5}: .*cannot learn any more"):
        for step in range(1, 91):
            norm = 1.0 if step <= 5 else 0.0
            training.attempt.step_done(StepResult(step, loss=2.3, top1=0.1, lr=0.1, grad_norm=norm))
    assert [step for step, _ in training.rows] == list(range(1, NUM_DEAD_STEPS + 5))
