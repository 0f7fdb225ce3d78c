"""Gradual magnitude pruning: its schedule, what it leaves, and a learner that goes on with it."""

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.config.pruning import PruneConfig
from pipeline.config.training import RecipeConfig
from pipeline.core.errors import ConfigError, NonFiniteError
from pipeline.training.pruning import Pruner, Schedule, make_schedule
from tests.unit.training.test_learner import Steps, make_learner, pictures, weights

LAYERS = ("layers.0.weight", "layers.4.weight")
PRUNE = PruneConfig(density=0.33, begin_step=1, end_step=4, every_steps=2)

# --- the schedule ---


@st.composite
def schedules(draw: st.DrawFn) -> tuple[Schedule, int]:
    """A schedule that a run has time for, and the run's number of steps."""
    num_steps = draw(st.integers(1, 300))
    begin = draw(st.none() | st.integers(0, num_steps // 4))
    end = draw(st.none() | st.integers(num_steps // 4, num_steps))
    density, every = draw(st.floats(0.001, 0.999)), draw(st.integers(1, 50))
    config = PruneConfig(density=density, begin_step=begin, end_step=end, every_steps=every)
    schedule = make_schedule(config, num_steps)
    assert schedule is not None
    return schedule, num_steps


@given(schedules())
def test_the_density_falls_to_its_end_and_stays(drawn: tuple[Schedule, int]) -> None:
    schedule, num_steps = drawn
    densities = [schedule.density_after(step) for step in range(num_steps + 1)]
    assert densities == sorted(densities, reverse=True)
    assert all(density == 1 for density in densities[: schedule.begin_step])
    assert all(density == schedule.density for density in densities[schedule.end_step :])
    due = [step for step in range(num_steps + 1) if schedule.is_due(step)]
    assert due[0] == schedule.begin_step and due[-1] == schedule.end_step <= num_steps
    steps = [later - earlier for earlier, later in itertools.pairwise(due)]
    assert all(step == schedule.every_steps for step in steps[:-1])
    assert all(0 < step <= schedule.every_steps for step in steps)


def test_the_curve_is_that_of_zhu_and_gupta() -> None:
    """Sparsity s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3, with s_i = 0, by hand."""
    schedule = Schedule(density=0.2, begin_step=100, end_step=300, every_steps=10)
    assert schedule.density_after(200) == pytest.approx(1 - (0.8 - 0.8 * 0.5**3))
    assert schedule.density_after(150) == pytest.approx(1 - (0.8 - 0.8 * 0.75**3))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"density": 0.0}, r"density=0\.0 must be above 0"),
        ({"density": 1.5}, r"density=1\.5 must be above 0 and at most 1"),
        ({"density": float("nan")}, "density=nan"),
        ({"scope": "layers"}, "Did you mean 'layer'"),
        ({"begin_step": -1}, r"begin_step=-1 must not be negative"),
        ({"every_steps": 0}, r"every_steps=0 must be at least 1"),
        ({"begin_step": 100}, r"begin_step=100, but the run has 100 steps"),
        ({"begin_step": 60, "end_step": 50}, r"end_step=50 \(given\) is before recipe\.prune\.begin_step=60"),
        ({"begin_step": 80}, r"end_step=75 \(three quarters of the run\) is before recipe\.prune\.begin_step=80"),
        # 1 - (100 - 20) / 160 = 0.5 of the way: 0.33 + 0.67 / 8.
        ({"begin_step": 20, "end_step": 180}, r"end at a density of 0\.414 instead of 0\.33.*at most 100"),
    ],
)
def test_what_cannot_be_done_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_schedule(PruneConfig(**{"density": 0.33, **values}), 100)


def test_a_density_of_one_prunes_nothing() -> None:
    assert make_schedule(PruneConfig(begin_step=10**6), 100) is None
    assert make_learner(RecipeConfig()).pruner is None


# --- what is pruned ---


def test_the_smallest_of_each_layer_or_of_all_go() -> None:
    convolution, linear = nn.Conv2d(1, 2, 2), nn.Linear(2, 4)
    model = nn.Sequential(convolution, linear, nn.Conv2d(2, 2, 1, groups=2))
    with torch.no_grad():
        convolution.weight.copy_(torch.tensor([1.0, -2, 3, -4, 5, -6, 7, -8]).view(2, 1, 2, 2))
        linear.weight.copy_(torch.tensor([10.0, -9, 0.5, -0.5, 0.5, 0.1, 0, 0]).view(4, 2))
    changed = ("0.weight", "1.weight")
    for scope, *expected in (
        (
            "layer",
            [0, 0, 0, 0, 5, -6, 7, -8],
            [10, -9, 0.5, -0.5, 0, 0, 0, 0],
        ),  # of three that are alike, the first two
        ("global", [0, 0, 3, -4, 5, -6, 7, -8], [10, -9, 0, 0, 0, 0, 0, 0]),
    ):
        pruned = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        assert Pruner(pruned, Schedule(0.5, 0, 0, 1), scope).density == 0.5
        state = pruned.state_dict()
        assert [state[name].flatten().tolist() for name in changed] == expected
        # Biases and grouped convolutions.
        assert all(torch.equal(state[name], one) for name, one in model.state_dict().items() if name not in changed)


def test_what_is_pruned_does_not_come_back_for_a_weight_that_happens_to_be_zero() -> None:
    layer = nn.Linear(6, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2, 3, 4, 5, 6]]))
        pruner = Pruner(layer, Schedule(1 / 3, 1, 3, 1), "layer")
        pruner.step_done(2)  # (1 / 3 + 2 / 3 / 8) x 6 = 2.5, rounded to even
        assert pruner.masks["weight"].tolist() == [[False, False, False, False, True, True]]
        layer.weight.zero_()
        pruner.step_done(3)
    assert pruner.masks["weight"].tolist() == [[False, False, False, False, True, True]]


def test_what_is_not_trained_is_not_pruned() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    assert set(Pruner(model, Schedule(0.5, 0, 0, 1), "layer").masks) == {"1.weight"}
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"no convolution \(without groups\) or linear layer that is trained"):
        Pruner(model, Schedule(0.5, 0, 0, 1), "layer")


# --- in training ---


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_density_is_reached_to_a_weight_and_what_is_pruned_stays_zero(scope: str) -> None:
    prune = PruneConfig(density=0.33, begin_step=1, end_step=4, every_steps=2, scope=scope)
    steps = Steps(make_learner(RecipeConfig(lr=0.05, ema_decay=0.5, momentum=0.9, prune=prune)))
    learner, pruned, state = steps.learner, dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    densities = []
    for seed in range(6):
        densities.append(steps.take([pictures(4, seed)]).density)
        state, average = weights(learner), dict(learner.averaged_model.state_dict())
        for name in LAYERS:
            zeros = state[name] == 0
            assert torch.equal(zeros, average[name] == 0)
            assert torch.equal(zeros & pruned.get(name, zeros), pruned.get(name, zeros)), "none comes back"
            pruned[name] = zeros
        assert not any((state[name.replace("weight", "bias")] == 0).any() for name in LAYERS)
    sizes = [state[name].numel() for name in LAYERS]
    left = [int((state[name] != 0).sum()) for name in LAYERS]
    if scope == "layer":
        assert left == [round(0.33 * size) for size in sizes]
    else:
        assert sum(left) == round(0.33 * sum(sizes)) and left != [round(0.33 * size) for size in sizes]
    assert densities[0] == 1 and densities[1] == 1 and 0.33 < densities[2] < 1  # type: ignore[operator]
    assert densities[3] == densities[4] == densities[5] == sum(left) / sum(sizes)


def test_a_gradient_of_what_is_pruned_counts_for_no_norm_unless_it_is_not_finite() -> None:
    recipe = RecipeConfig(lr=0.05, prune=PruneConfig(density=0.5, begin_step=0, end_step=0))
    steps = Steps(make_learner(recipe))
    weight = steps.learner.model.get_parameter(LAYERS[1])
    pruned = (weight == 0).float()
    assert int(pruned.sum()) == weight.numel() // 2, "those that it begins with are pruned at once"
    plain = copy.deepcopy(steps).take([pictures(4)]).grad_norm
    handle = weight.register_hook(lambda gradient: gradient + 1e6 * pruned)
    assert steps.take([pictures(4)]).grad_norm == plain
    handle.remove()
    weight.register_hook(lambda gradient: gradient + (pruned / 0).nan_to_num(0, posinf=float("inf")))
    with pytest.raises(NonFiniteError, match="the reduced gradient is not finite"):
        steps.take([pictures(4)])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_restored_learner_prunes_on(optimizer: str) -> None:
    recipe = RecipeConfig(optimizer=optimizer, lr=0.01, ema_decay=0.5, prune=PRUNE)
    unbroken = Steps(make_learner(recipe, dropout=0.5))
    for seed in range(3):
        unbroken.take([pictures(4, seed)])
    saved = copy.deepcopy(
        (unbroken.learner.state_dict(), unbroken.optimizer.state_dict(), unbroken.learner.extra_state())
    )
    learner = make_learner(recipe, dropout=0.5, start_step=3)
    learner.restore(*saved)
    resumed = Steps(learner)
    for seed in range(3, 6):
        assert unbroken.take([pictures(4, seed)]) == resumed.take([pictures(4, seed)])
    torch.testing.assert_close(weights(learner), weights(unbroken.learner), rtol=0, atol=0)
    assert unbroken.learner.pruner is not None and learner.pruner is not None
    torch.testing.assert_close(learner.pruner.masks, unbroken.learner.pruner.masks, rtol=0, atol=0)


def test_a_run_that_is_made_shorter_amid_its_pruning_reaches_the_density() -> None:
    recipe = RecipeConfig(lr=0.01, prune=PruneConfig(density=0.33, every_steps=1))
    longer = Steps(make_learner(recipe, num_steps=20))
    found = [longer.take([pictures(4, seed)]).density for seed in range(7)]  # pruned from 5 to 15
    assert found[-1] is not None and found[-1] > 0.5
    shorter = make_learner(recipe, num_steps=8, start_step=7)
    shorter.restore(longer.learner.state_dict(), longer.optimizer.state_dict(), longer.learner.extra_state())
    assert Steps(shorter).take([pictures(4)]).density == pytest.approx(0.33, abs=0.01)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda extra: extra.pop("masks"), "masks of what is pruned are missing"),
        (lambda extra: extra["masks"].pop(LAYERS[0]), "masks of what is pruned are missing, or of other layers"),
        (lambda extra: extra["masks"].update({LAYERS[0]: torch.ones(2, dtype=torch.bool)}), r"is \(2,\) of torch.bool"),
        (lambda extra: extra["masks"].update({LAYERS[0]: [True]}), "of type list, not a tensor"),
        (lambda extra: extra["masks"][LAYERS[0]].fill_(False), "weights that are pruned and not 0"),
    ],
)
def test_masks_that_are_not_of_these_weights_are_refused(change: Any, said: str) -> None:
    steps = Steps(make_learner(RecipeConfig(lr=0.01, prune=PRUNE)))
    for seed in range(4):
        steps.take([pictures(4, seed)])
    extra = copy.deepcopy(steps.learner.extra_state())
    change(extra)
    learner = make_learner(RecipeConfig(lr=0.01, prune=PRUNE), start_step=4)
    with pytest.raises(ValueError, match=said):
        learner.restore(steps.learner.state_dict(), steps.optimizer.state_dict(), extra)
