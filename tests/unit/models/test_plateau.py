"""The plateau detector speaks when the loss rests at ln(classes), and only then."""

import math
from collections.abc import Iterable

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models import zoo
from pipeline.models.plateau import NUM_DEAD_STEPS, DeadNetworkDetector, PlateauDetector


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


def verdicts(steps: Iterable[tuple[float, float]]) -> list[int]:
    """Steps at which (loss, gradient's norm) of each is called dead."""
    detector = DeadNetworkDetector()
    return [step for step, (loss, norm) in enumerate(steps, 1) if detector.update(step, loss, norm)]


def test_a_gradient_that_stays_0_is_the_end() -> None:
    ln = math.log(10)
    alive, dead = [(ln, 0.3)] * 77, [(ln, 0.0)] * NUM_DEAD_STEPS
    assert verdicts([*alive, *dead]) == [77 + NUM_DEAD_STEPS]
    assert verdicts([*dead[1:], (ln, 1e-30), *dead[1:]]) == []


def test_what_is_learnt_by_heart_has_no_gradient_either() -> None:
    assert verdicts([(0.0, 0.0)] * 200) == []


def test_every_relu_off_is_such_an_end() -> None:
    """SqueezeNet with all of conv10's outputs negative: real gradients, and nothing that training could change."""
    model = zoo.build("squeezenet1_1", 10)
    with torch.no_grad():
        model.get_parameter("classifier.1.bias").fill_(-100.0)
    detector, optimizer = DeadNetworkDetector(), torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4)
    images_BCHW, labels_B = torch.randn(4, 3, 32, 32), torch.arange(4)
    said = None
    for step in range(1, NUM_DEAD_STEPS + 1):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images_BCHW), labels_B)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        said = detector.update(step, loss.item(), norm.item())
        optimizer.step()
    assert said is not None and "final_relu=false" in said
