"""The plateau detector speaks when the loss rests at ln(classes), and only then."""

import math
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models.plateau import PlateauDetector, live_conv10_share


def sentences(detector: PlateauDetector, losses: Iterable[float], first_step: int = 1) -> list[tuple[int, str]]:
    said = ((step, detector.update(step, loss)) for step, loss in enumerate(losses, first_step))
    return [(step, sentence) for step, sentence in said if sentence is not None]


@given(
    num_classes=st.integers(2, 20_000), window=st.integers(1, 60), after=st.integers(0, 100), noise=st.floats(0, 0.009)
)
def test_a_loss_at_ln_classes_is_reported_once_as_soon_as_it_may_be(
    num_classes: int, window: int, after: int, noise: float
) -> None:
    ln = math.log(num_classes)
    losses = [ln + noise * (-1) ** step for step in range(200)]
    said = sentences(PlateauDetector(num_classes, window=window, after_steps=after), losses)
    assert [step for step, _ in said] == [max(window, after, 1)]
    assert f"ln({num_classes}) = {ln:.4f}" in said[0][1]


@given(
    num_classes=st.integers(2, 20_000),
    distances=st.lists(st.floats(0.011, 50), min_size=1, max_size=200),
    sign=st.sampled_from([-1, 1]),
)
def test_losses_all_on_one_side_are_never_reported(num_classes: int, distances: list[float], sign: int) -> None:
    detector = PlateauDetector(num_classes, window=5, after_steps=0)
    assert not sentences(detector, [math.log(num_classes) + sign * distance for distance in distances])


@given(losses=st.lists(st.floats(allow_nan=True, allow_infinity=True) | st.just(math.log(10)), max_size=60))
def test_any_stream_of_numbers_is_survived_and_nothing_is_said_early(losses: list[float]) -> None:
    for step, _ in sentences(PlateauDetector(10, window=4, after_steps=20), losses):
        assert step >= 20


def test_a_run_that_learns_is_left_alone() -> None:
    assert not sentences(PlateauDetector(10), [2.3 * math.exp(-step / 300) for step in range(2000)])


def test_it_speaks_again_only_after_the_loss_has_left_and_come_back() -> None:
    ln = math.log(10)
    losses = [ln] * 30 + [1.0] * 30 + [ln] * 30
    assert [step for step, _ in sentences(PlateauDetector(10, window=10, after_steps=0), losses)] == [10, 70]


def test_a_resumed_run_waits_for_a_full_window() -> None:
    detector = PlateauDetector(10, window=10, after_steps=500)
    assert [step for step, _ in sentences(detector, [math.log(10)] * 20, first_step=5001)] == [5010]


def test_the_advice_names_what_to_change() -> None:
    detector = PlateauDetector(1000, window=1, after_steps=0)
    sentence = detector.update(700, 6.9078)
    assert sentence is not None
    for remedy in ("recipe.lr", "recipe.warmup_steps", "final_relu=false", "seed", "init=caffe", "step 700", "6.9078"):
        assert remedy in sentence


def test_dead_conv10_is_told_apart() -> None:
    detector = PlateauDetector(10, window=1, after_steps=0)
    sentence = detector.update(9, math.log(10), live_share=0.0)
    assert sentence is not None and "cannot recover" in sentence


@pytest.mark.parametrize(
    ("logits", "share"),
    [([[0.0, 0.0], [0.0, 0.0]], 0.0), ([[0.0, 1.0], [0.0, 0.0]], 0.5), ([[0.1, 0.0], [0.0, 2.0]], 1.0)],
)
def test_live_share_counts_classes_that_any_picture_wakes(logits: list[list[float]], share: float) -> None:
    assert live_conv10_share(torch.tensor(logits)) == share
