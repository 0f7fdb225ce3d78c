"""The learner: its schedule, its guard, and one step however it is cut up."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from benchmarks.gpu_loops import HostReads
from pipeline.config.comm import CommConfig
from pipeline.config.model import InputConfig
from pipeline.config.training import RecipeConfig
from pipeline.core.errors import NonFiniteError
from pipeline.data.batches import LoadedBatch
from pipeline.training.learner import Learner
from pipeline.training.step_result import StepResult

NUM_CLASSES = 7
SIDE = 8
PLAIN = InputConfig(size=SIDE, resize_side=SIDE)

# --- learning rate ---

recipes = st.builds(
    RecipeConfig,
    lr=st.floats(1e-6, 10.0),
    warmup_steps=st.integers(0, 50),
    decay=st.sampled_from(["linear", "cosine", "none"]),
)


@given(recipes, st.integers(1, 300))
def test_the_rate_climbs_to_its_peak_and_never_again(recipe: RecipeConfig, num_steps: int) -> None:
    rates = [recipe.learning_rate(step, num_steps) for step in range(num_steps)]
    climb, rest = rates[: recipe.warmup_steps], rates[recipe.warmup_steps :]
    assert climb == sorted(climb) and rest == sorted(rest, reverse=True)
    assert all(0 < rate <= recipe.peak_lr * (1 + 1e-12) for rate in rates)
    if rest:
        assert rest[0] == recipe.peak_lr


@given(recipes, st.integers(1, 300), st.integers(0, 300))
def test_past_its_end_a_decayed_rate_is_zero(recipe: RecipeConfig, num_steps: int, past: int) -> None:
    rate = recipe.learning_rate(max(num_steps, recipe.warmup_steps + 1) + past, num_steps)
    assert rate == pytest.approx(recipe.peak_lr if recipe.decay == "none" else 0.0, abs=1e-12 * recipe.peak_lr)


def test_the_rate_is_half_way_down_at_half_time() -> None:
    for decay in ("linear", "cosine"):
        recipe = RecipeConfig(lr=0.4, warmup_steps=10, decay=decay)
        assert recipe.learning_rate(0, 110) == pytest.approx(0.04)
        assert recipe.learning_rate(60, 110) == pytest.approx(0.2)
    # Caffe's poly policy of power 1: base_lr * (1 - iter / max_iter).
    assert RecipeConfig(lr=0.04, decay="linear").learning_rate(42_500, 170_000) == pytest.approx(0.03)


# --- steps ---


class SmallNet(nn.Module):
    """Enough of a network: weights, biases, and dropout that draws random numbers."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.LazyLinear(NUM_CLASSES)
        )
        self.layers(torch.zeros(1, 3, SIDE, SIDE))

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self.layers(images_BCHW)


def make_learner(recipe: RecipeConfig, *, dropout: float = 0.0, **options: Any) -> Learner:
    torch.manual_seed(3)
    options = {"num_steps": 10, "seed": 1, "num_classes": NUM_CLASSES, "input_config": PLAIN} | options
    return Learner(SmallNet(dropout), recipe=recipe, **options)


def pictures(num_pictures: int, seed: int = 0) -> LoadedBatch:
    generator = torch.Generator().manual_seed(seed)
    return LoadedBatch(
        torch.randint(256, (num_pictures, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator),
        torch.randint(NUM_CLASSES, (num_pictures,), generator=generator),
        torch.arange(100, 100 + num_pictures),
    )


def rows_of(batch: LoadedBatch, rows: slice) -> LoadedBatch:
    return LoadedBatch(batch.images_BCHW[rows], batch.labels_B[rows], batch.sample_ids_B[rows])


class Steps:
    """What Lightning does with a learner in one step, without the trainer around it."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.optimizer = learner.configure_optimizers()
        self.results: list[StepResult] = []
        learner.optimizers = lambda *_, **__: self.optimizer  # type: ignore[method-assign]  the trainer's answer

    def take(self, micro_batches: list[LoadedBatch]) -> StepResult:
        for number, loaded in enumerate(micro_batches):
            self.learner.on_train_batch_start(loaded, number)
            loss = self.learner.training_step(loaded, number)
            (loss / len(micro_batches)).backward()
            if number == len(micro_batches) - 1:
                self.learner.on_before_optimizer_step(self.optimizer)
                self.optimizer.step()
                self.optimizer.zero_grad()
            result = self.learner.end_micro_batch(stop_asked=False)
            assert (result is not None) == (number == len(micro_batches) - 1)
            self.results += [] if result is None else [result]
        return self.results[-1]


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in learner.model.state_dict().items()}


@pytest.mark.parametrize("num_micro_batches", [1, 2, 4])
def test_a_step_in_parts_is_the_step_in_one(num_micro_batches: int) -> None:
    recipe, batch = RecipeConfig(lr=0.01, label_smoothing=0.1, warmup_steps=2), pictures(8)
    whole = Steps(make_learner(recipe))
    expected = whole.take([batch])
    learner = make_learner(recipe, num_micro_batches=num_micro_batches)
    size = 8 // num_micro_batches
    found = Steps(learner).take([rows_of(batch, slice(i * size, (i + 1) * size)) for i in range(num_micro_batches)])
    assert found.step == expected.step == 1 and found.top1 == expected.top1 and found.lr == expected.lr == 0.005
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    torch.testing.assert_close(weights(learner), weights(whole.learner))
    assert learner.between_steps


def test_what_is_random_in_a_step_depends_on_seed_step_and_rank_alone() -> None:
    recipe = RecipeConfig(lr=0.01)

    def after_one_step(**options: Any) -> dict[str, torch.Tensor]:
        learner = make_learner(recipe, dropout=0.5, **options)
        torch.manual_seed(torch.randint(1000, ()).item())  # whatever was drawn before
        Steps(learner).take([pictures(8)])
        return weights(learner)

    base = after_one_step(start_step=4)
    torch.testing.assert_close(after_one_step(start_step=4), base, rtol=0, atol=0)
    for changed in ({"start_step": 5}, {"start_step": 4, "seed": 2}, {"start_step": 4, "rank": 1}):
        assert not torch.equal(after_one_step(**changed)["layers.0.weight"], base["layers.0.weight"])


def test_the_optimiser_is_caffes_sgd_at_the_rate_of_the_step() -> None:
    recipe = RecipeConfig(lr=0.1, momentum=0.9, weight_decay=0.01, warmup_steps=4)
    steps = Steps(make_learner(recipe, start_step=2, num_steps=20))
    before, batch = copy.deepcopy(steps.learner), pictures(4)
    result = steps.take([batch])
    assert result.lr == pytest.approx(0.1 * 3 / 4) and result.step == 3
    F.cross_entropy(
        before.model(before.normalizer(batch.images_BCHW, torch.contiguous_format)), batch.labels_B
    ).backward()
    for name, parameter in before.model.named_parameters():
        assert parameter.grad is not None
        expected = parameter - result.lr * (parameter.grad + 0.01 * parameter)  # biases too
        torch.testing.assert_close(weights(steps.learner)[name], expected.detach())


def test_a_clipped_step_is_no_longer_than_the_recipe_says() -> None:
    recipe = RecipeConfig(lr=1.0, momentum=0.0, weight_decay=0.0, grad_clip_norm=0.25)
    steps = Steps(make_learner(recipe))
    before = weights(steps.learner)
    result = steps.take([pictures(4)])
    moved = torch.cat([(weights(steps.learner)[name] - value).flatten() for name, value in before.items()])
    assert (result.grad_norm or 0) > 0.25  # as it was before clipping
    assert float(moved.norm()) == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_before_the_weights(value: float) -> None:
    steps = Steps(make_learner(RecipeConfig(lr=0.1), start_step=6, num_steps=20, rank=3))
    with torch.no_grad():
        steps.learner.model.layers[0].weight[0, 0, 0, 0] = value  # type: ignore[union-attr,index]
    before = weights(steps.learner)
    with pytest.raises(
        NonFiniteError, match=r"Step 7.*loss of rank 0.*recipe\.lr.*rank 3.*100, 101, 102, 103\."
    ) as raised:
        steps.take([pictures(4)])
    assert raised.value.exit_code == 5
    torch.testing.assert_close(weights(steps.learner), before, rtol=0, atol=0, equal_nan=True)
    assert steps.learner.committed_steps == 6 and not steps.results


def test_a_finite_loss_with_an_infinite_gradient_is_refused_too() -> None:
    steps = Steps(make_learner(RecipeConfig(lr=0.1)))
    steps.learner.model.layers[0].weight.register_hook(lambda gradient: gradient * math.inf)  # type: ignore[union-attr]
    with pytest.raises(NonFiniteError, match="the reduced gradient is not finite"):
        steps.take([pictures(4)])


def test_how_often_a_step_waits_for_the_device() -> None:
    """The norm before the optimiser, the sums at the end; torch's average asks its own counter twice more."""
    for ema_decay, num_waits in ((0.0, 2), (0.5, 4)):
        steps = Steps(make_learner(RecipeConfig(lr=0.01, ema_decay=ema_decay, grad_clip_norm=0.1), num_micro_batches=2))
        with HostReads() as reads:
            steps.take([pictures(4), pictures(4)])
        assert reads.count == num_waits


def test_a_warm_up_pass_leaves_no_trace_in_the_sums() -> None:
    steps = Steps(make_learner(RecipeConfig(lr=0.01)))
    steps.learner.warming_up = True
    steps.learner.training_step(pictures(4, seed=9), 0)
    steps.learner.warming_up = False
    fresh = Steps(make_learner(RecipeConfig(lr=0.01)))
    assert steps.take([pictures(4)]) == fresh.take([pictures(4)])


# --- averaged weights, and state ---


def test_the_average_follows_the_weights_and_is_what_is_validated() -> None:
    decay = 0.75
    steps = Steps(make_learner(RecipeConfig(lr=0.05, ema_decay=decay)))
    learner, expected = steps.learner, None
    for seed in range(3):
        steps.take([pictures(4, seed)])
        now = weights(learner)
        # torch's AveragedModel starts from the first weights it is shown.
        expected = now if expected is None else {k: decay * expected[k] + (1 - decay) * now[k] for k in now}
    assert expected is not None
    torch.testing.assert_close(dict(learner.averaged_model.state_dict()), expected)
    batch = pictures(16, 5)
    learner.on_validation_epoch_start()
    learner.validation_step(batch, 0)
    learner.on_validation_epoch_end()
    with torch.no_grad():
        logits_BK = learner.averaged_model(learner.normalizer(batch.images_BCHW, torch.contiguous_format))
    assert learner.last_validation is not None
    assert learner.last_validation["loss"] == pytest.approx(float(F.cross_entropy(logits_BK, batch.labels_B)), rel=1e-5)
    assert not any("average" in name for name in learner.state_dict())


def test_validated_are_the_weights_in_common_where_ranks_have_others() -> None:
    learner = make_learner(RecipeConfig(lr=0.04), comm=CommConfig(period=4, delay=1))
    learner.averaging.begin()
    batch = pictures(16, 5)
    learner.model.eval()
    with torch.no_grad():
        logits_BK = learner.model(learner.normalizer(batch.images_BCHW, torch.contiguous_format))
        for parameter in learner.model.parameters():
            parameter.add_(0.1)
        own = weights(learner)
        learner.on_validation_epoch_start()
        learner.validation_step(batch, 0)
        learner.on_validation_epoch_end()
    expected = float(F.cross_entropy(logits_BK, batch.labels_B))
    assert learner.last_validation["loss"] == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(weights(learner), own, rtol=0, atol=0)


ADAMW = RecipeConfig(optimizer="adamw", lr=0.01, weight_decay=0.1, warmup_steps=3, head_lr_factor=4.0)


@pytest.mark.parametrize(
    "recipe",
    [
        RecipeConfig(lr=0.05, warmup_steps=3),
        RecipeConfig(lr=0.05, ema_decay=0.5, warmup_steps=3),
        RecipeConfig(lr=0.05, warmup_steps=3, head_lr_factor=4.0),
        ADAMW,
    ],
    ids=["sgd", "averaged", "two groups", "adamw, two groups"],
)
def test_a_restored_learner_goes_on_as_if_nothing_had_happened(recipe: RecipeConfig) -> None:
    unbroken = Steps(make_learner(recipe, dropout=0.5))
    for seed in range(2):
        unbroken.take([pictures(4, seed)])
    saved = copy.deepcopy(
        (unbroken.learner.state_dict(), unbroken.optimizer.state_dict(), unbroken.learner.extra_state())
    )
    torch.manual_seed(99)
    learner = make_learner(recipe, dropout=0.5, start_step=2)
    learner.restore(*saved)
    resumed = Steps(learner)
    for seed in range(2, 5):
        batch = pictures(4, seed)
        assert unbroken.take([batch]) == resumed.take([batch])
    torch.testing.assert_close(weights(learner), weights(unbroken.learner), rtol=0, atol=0)
    torch.testing.assert_close(
        dict(learner.averaged_model.state_dict()), dict(unbroken.learner.averaged_model.state_dict()), rtol=0, atol=0
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_head_learns_so_many_times_as_fast(optimizer: str) -> None:
    """As torch's own optimiser does with two groups written by hand."""
    recipe = RecipeConfig(optimizer=optimizer, lr=0.01, weight_decay=0.1, head_lr_factor=5.0, decay="none")
    steps = Steps(make_learner(recipe))
    by_hand = copy.deepcopy(steps.learner.model)
    head = list(by_hand.get_submodule("layers.4").parameters())
    body = [one for one in by_hand.parameters() if not any(one is other for other in head)]
    groups: list[dict[str, Any]] = [{"params": body, "lr": 0.01}, {"params": head, "lr": 0.05}]
    theirs: torch.optim.Optimizer
    if optimizer == "adamw":
        theirs = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.1, fused=True)
    else:
        theirs = torch.optim.SGD(groups, lr=0.01, momentum=0.9, weight_decay=0.1, fused=True)
    for seed in range(3):
        batch = pictures(4, seed)
        steps.take([batch])
        theirs.zero_grad()
        logits_BK = by_hand(steps.learner.normalizer(batch.images_BCHW, torch.contiguous_format))
        F.cross_entropy(logits_BK, batch.labels_B).backward()
        theirs.step()
    torch.testing.assert_close(weights(steps.learner), by_hand.state_dict(), rtol=0, atol=0)


def test_momentum_of_other_weights_is_refused() -> None:
    first = Steps(make_learner(RecipeConfig(lr=0.05)))
    first.take([pictures(4)])
    optimizer_state = copy.deepcopy(first.optimizer.state_dict())
    optimizer_state["state"][0]["momentum_buffer"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"the momentum of parameter 0 is \(3,\) of torch.float32"):
        make_learner(RecipeConfig(lr=0.05)).restore(first.learner.state_dict(), optimizer_state, {})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda state: state[0].update(momentum_buffer=torch.ones_like(state[0]["momentum_buffer"]) * math.nan),
            "finite",
        ),
        (lambda state: state[0].update(momentum_buffer=state[0]["momentum_buffer"].to("meta")), "without plain values"),
        (lambda state: state[0].update(momentum_buffer=1.0), "not a tensor"),
        (lambda state: state.update({-1: state.pop(0)}), "of none of the"),
        (lambda state: state.clear(), "momenta are missing"),
    ],
)
def test_a_momentum_that_cannot_be_one_is_refused(change: Callable[[dict[Any, Any]], None], said: str) -> None:
    first = Steps(make_learner(RecipeConfig(lr=0.05)))
    first.take([pictures(4)])
    optimizer_state = copy.deepcopy(first.optimizer.state_dict())
    change(optimizer_state["state"])
    with pytest.raises(ValueError, match=said):
        make_learner(RecipeConfig(lr=0.05)).restore(first.learner.state_dict(), optimizer_state, {})


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("exp_avg", torch.ones(3), r"the mean gradient of parameter 0 is \(3,\)"),
        ("exp_avg_sq", torch.tensor(math.nan), r"mean squared gradient"),
        ("step", 3, "the count of steps of parameter 0 is of type int"),
        ("step", torch.tensor(math.inf), "not finite"),
    ],
)
def test_what_adamw_cannot_have_kept_is_refused(key: str, value: object, said: str) -> None:
    first = Steps(make_learner(ADAMW))
    first.take([pictures(4)])
    optimizer_state = copy.deepcopy(first.optimizer.state_dict())
    optimizer_state["state"][0][key] = value
    with pytest.raises(ValueError, match=said):
        make_learner(ADAMW).restore(first.learner.state_dict(), optimizer_state, {})


def test_an_average_that_no_model_can_have_is_refused() -> None:
    recipe = RecipeConfig(lr=0.05, ema_decay=0.5)
    first = Steps(make_learner(recipe))
    first.take([pictures(4)])
    extra = first.learner.extra_state()
    name, value = next((name, value) for name, value in extra["average"].items() if value.is_floating_point())
    extra["average"] = extra["average"] | {name: torch.full_like(value, math.nan)}
    with pytest.raises(ValueError, match=r"in the averaged weights .*not finite"):
        make_learner(recipe).restore(first.learner.state_dict(), first.optimizer.state_dict(), extra)


def test_an_edited_recipe_holds_after_a_resume() -> None:
    first = Steps(make_learner(RecipeConfig(lr=0.05, momentum=0.9, weight_decay=0.1)))
    first.take([pictures(4)])
    learner = make_learner(RecipeConfig(lr=0.05, momentum=0.5, weight_decay=0.0, ema_decay=0.5), start_step=1)
    learner.restore(first.learner.state_dict(), first.optimizer.state_dict(), {})
    (group,) = learner.configure_optimizers().param_groups
    assert (group["momentum"], group["weight_decay"]) == (0.5, 0.0)
    # Averaging switched on in the middle of a run starts from the weights there are.
    torch.testing.assert_close(dict(learner.averaged_model.state_dict()), weights(learner), rtol=0, atol=0)
