"""The states of ranks that train by themselves, as a checkpoint holds them."""

from typing import Any, cast

import pytest
import torch

from pipeline.comm.rounds import plan_rounds
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


NUM_WEIGHTS = 9 + 6 + 8  # of two linear layers and a normalisation between them


def section_of(learner: Learner, num_ranks: int = 2, changed: dict[str, torch.Tensor] | None = None) -> Any:
    widths = {"parameters": NUM_WEIGHTS, "buffers": 6, "momentum_buffer": NUM_WEIGHTS, "sums": 3}
    states = {name: torch.zeros(num_ranks, width) for name, width in widths.items()}
    section = {"world_size": num_ranks, "free_fields": {"comm.period": 4}, "rank_states": states | (changed or {})}
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


def test_missing_states_are_refused_where_there_must_be_some(learner: Learner) -> None:
    section = section_of(learner)
    del section["rank_states"]
    with pytest.raises(ValueError, match="the states of its 2 ranks are missing"):
        rank_states.require_complete(section, learner)
    section["free_fields"] = {"comm.period": None}
    rank_states.require_complete(section, learner)
