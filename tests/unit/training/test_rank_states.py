"""The states of ranks that train by themselves, as a checkpoint holds them."""

import math
from typing import Any, cast

import pytest
import torch

from pipeline.comm.averaging import Averaging
from pipeline.comm.rounds import plan_rounds
from pipeline.config.comm import CommConfig
from pipeline.config.model import InputConfig
from pipeline.config.training import RecipeConfig
from pipeline.training import rank_states
from pipeline.training.learner import Learner


@pytest.fixture
def learner() -> Learner:
    made = Learner(
        torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)),
        recipe=RecipeConfig(momentum=0.9),
        input_config=InputConfig(size=1, resize_side=1),
        num_classes=2,
        seed=0,
        num_steps=9,
        rounds=plan_rounds(9, lambda _: 4),
    )
    momenta = {number: {"momentum_buffer": one.clone()} for number, one in enumerate(made.model.parameters())}
    made.optimizer_state = {"state": momenta, "param_groups": []}
    return made


NAMES = ("parameters", "buffers", "momentum_buffer", "sums")
NUM_WEIGHTS = 9 + 6 + 8  # of two linear layers and a normalisation between them


def section_of(learner: Learner, num_ranks: int = 2, changed: dict[str, torch.Tensor] | None = None) -> Any:
    widths = {"parameters": NUM_WEIGHTS, "buffers": 6, "momentum_buffer": NUM_WEIGHTS, "sums": 3}
    states = {name: torch.zeros(num_ranks, width) for name, width in widths.items()}
    states["sums"] = states["sums"].double()
    section = {
        "world_size": num_ranks,
        "step": 6,
        "free_fields": {"comm.period": 4},
        "rank_states": states | (changed or {}),
    }
    rank_states.require_complete(cast(Any, section), learner)
    return section


def test_complete_states_are_taken(learner: Learner) -> None:
    section_of(learner)
    section_of(learner, num_ranks=3)


@pytest.mark.parametrize("shape", [(1, NUM_WEIGHTS), (2, NUM_WEIGHTS - 1), (NUM_WEIGHTS,)])
@pytest.mark.parametrize("name", ["parameters", "momentum_buffer", "of nothing"])
def test_states_of_fewer_ranks_or_of_another_model_are_refused(
    learner: Learner, name: str, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=rf"the states of its 2 ranks are not complete \({name}\)"):
        section_of(learner, changed={name: torch.zeros(shape)})


@pytest.mark.parametrize("names", [["momentum_buffer"], ["sums"], ["parameters", "sums"], [*NAMES]])
def test_states_of_which_some_are_missing_are_refused(learner: Learner, names: list[str]) -> None:
    section = section_of(learner)
    for name in names:
        del section["rank_states"][name]
    with pytest.raises(ValueError, match="are not complete"):
        rank_states.require_complete(section, learner)


def test_after_a_round_ranks_differ_in_their_momenta_alone(learner: Learner) -> None:
    section = section_of(learner)
    for name in ("parameters", "buffers", "sums"):
        del section["rank_states"][name]
    rank_states.require_complete(section, learner)


def test_before_the_first_round_there_are_none(learner: Learner) -> None:
    section = section_of(learner)
    section |= {"rank_states": {}, "step": 4}
    section["free_fields"]["comm.local_start_step"] = 4
    rank_states.require_complete(section, learner)
    section["step"] = 5
    with pytest.raises(ValueError, match="are not complete"):
        rank_states.require_complete(section, learner)


@pytest.mark.parametrize("name", NAMES)
def test_states_that_cannot_be_computed_with_are_refused(learner: Learner, name: str) -> None:
    whole = section_of(learner)["rank_states"][name]
    for broken in (torch.full_like(whole, math.nan), whole.half()):
        with pytest.raises(ValueError, match="the states of its 2 ranks"):
            section_of(learner, changed={name: broken})


def test_modules_that_share_their_weights_share_the_mean(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a round, as rank 0 of two of which the other one's tensors are all 0."""
    shared = torch.nn.Linear(2, 2)
    learner.model = torch.nn.Sequential(shared, torch.nn.ReLU(), shared)
    learner.averaging = Averaging(learner.model, CommConfig())
    learner.committed_steps = 1
    monkeypatch.setattr(rank_states, "stack_on_first", lambda one: torch.stack([one.cpu(), torch.zeros_like(one)]))
    state = {f"model.{name}": value for name, value in learner.model.state_dict().items()}
    checkpoint = {"state_dict": state, "optimizer_states": [{"state": {}, "param_groups": []}]}
    rank_states.gather(learner, checkpoint)
    for name in ("weight", "bias"):
        for place in (0, 2):
            assert torch.equal(checkpoint["state_dict"][f"model.{place}.{name}"], getattr(shared, name) / 2)


def test_missing_states_are_refused_where_there_must_be_some(learner: Learner) -> None:
    section = section_of(learner)
    del section["rank_states"]
    with pytest.raises(ValueError, match="the states of its 2 ranks are missing"):
        rank_states.require_complete(section, learner)
    section["free_fields"] = {"comm.period": None}
    for states in ({}, {"rank_states": {}}):
        rank_states.require_complete(section | states, learner)


def outer_section(learner: Learner, **changed: Any) -> Any:
    """Saved with a fragment of the first 9 values under way, of an outer momentum and a codec."""
    wide = {"errors": torch.zeros(2, NUM_WEIGHTS), "left_with": torch.zeros(2, 9)}
    under_way = {"parameters": [0, 2], "codec": "int8", "has_turned": False, "values": torch.zeros(9)}
    section = {
        "world_size": 2,
        "step": 6,
        "free_fields": {"comm.period": 4, "comm.codec": "int8", "comm.outer_momentum": 0.9},
        "rank_states": wide | {name: torch.zeros(2, NUM_WEIGHTS) for name in ("parameters", "momentum_buffer")},
        "outer": {"momentum": torch.zeros(NUM_WEIGHTS), "under_way": under_way},
    }
    section["rank_states"] |= {"buffers": torch.zeros(2, 6), "sums": torch.zeros(2, 3, dtype=torch.float64)}
    for key, value in changed.items():
        holder = section["outer"] if key in section["outer"] else section["rank_states"]
        holder[key] = value
    rank_states.require_complete(cast(Any, section), learner)
    return section


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"momentum": None}, "the outer momentum is of type NoneType"),
        ({"momentum": torch.zeros(NUM_WEIGHTS - 1)}, "the outer momentum does not fit the weights"),
        ({"momentum": torch.full((NUM_WEIGHTS,), math.inf)}, "the outer momentum holds values that are not finite"),
        ({"under_way": None}, r"are not complete \(left_with\)"),
        ({"under_way": {"parameters": [0, 3], "values": torch.zeros(9)}}, "the fragment under way does not fit"),
        ({"errors": torch.zeros(1, NUM_WEIGHTS)}, r"are not complete \(errors\)"),
        ({"left_with": torch.zeros(2, 8)}, r"are not complete \(left_with\)"),
    ],
)
def test_what_ranks_have_in_common_must_fit_too(learner: Learner, changed: dict[str, Any], message: str) -> None:
    outer_section(learner)
    with pytest.raises(ValueError, match=message):
        outer_section(learner, **changed)
