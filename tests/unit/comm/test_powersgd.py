"""PowerSGD's state over restarts: what needs no second rank."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comm.powersgd import PowerSGD
from pipeline.core.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("world_of_one")


def saved_by(num_ranks: int, seed: int = 0) -> dict[str, Any]:
    """The state of a run on so many ranks, with two buckets."""
    generator = torch.Generator().manual_seed(seed)
    errors = {index: torch.randn(num_ranks, size, generator=generator) for index, size in enumerate((12, 30))}
    fresh = PowerSGD(rank=2, start_step=2, seed=5).state_dict()
    p, q = ({index: torch.randn(4, generator=generator) for index in errors} for _ in range(2))
    return {**fresh, "layout": [[[3, 4]], [[5, 6]]], "errors": errors, "p": p, "q": q}


def loaded(saved: dict[str, Any], rank: int, num_ranks: int) -> dict[str, Any]:
    """What rank `rank` then has."""
    powersgd = PowerSGD(rank=2, start_step=2)
    powersgd.load_state_dict(saved, rank, num_ranks)
    return powersgd.state_dict()


@given(st.integers(1, 5), st.integers(0, 99))
def test_on_the_same_number_of_ranks_each_has_its_own_again(num_ranks: int, seed: int) -> None:
    saved = saved_by(num_ranks, seed)
    for rank in range(num_ranks):
        found = loaded(saved, rank, num_ranks)
        for index, errors in saved["errors"].items():
            assert torch.equal(found["errors"][index], errors[rank : rank + 1])
        for name in ("p", "q"):
            assert all(torch.equal(found[name][index], saved[name][index]) for index in saved[name])
        assert torch.equal(found["rng_keys"], saved["rng_keys"]) and found["rng_position"] == saved["rng_position"]
        assert found["layout"] == saved["layout"]


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_on_any_number_of_ranks_the_mean_that_is_owed_stays(before: int, after: int, seed: int) -> None:
    saved = saved_by(before, seed)
    ranks = [loaded(saved, rank, after)["errors"] for rank in range(after)]
    for index, errors in saved["errors"].items():
        mean = torch.cat([found[index] for found in ranks]).mean(0)
        torch.testing.assert_close(mean, errors.mean(0))


def test_what_is_loaded_is_not_shared_with_the_checkpoint() -> None:
    saved = saved_by(2)
    before = saved["errors"][0].clone()
    powersgd = PowerSGD(rank=2, start_step=2)
    powersgd.load_state_dict(saved, 0, 2)
    saved["errors"][0].zero_()
    assert torch.equal(powersgd.state_dict()["errors"][0][0], before[0])


def test_a_state_of_another_rank_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"is of rank 2, the run's is 3: set comm\.powersgd_rank=2"):
        PowerSGD(rank=3, start_step=2).load_state_dict(saved_by(2), 0, 2)


def test_where_no_hook_runs_the_layout_is_taken_as_it_was() -> None:
    powersgd = PowerSGD(rank=2, start_step=2)
    powersgd.load_state_dict(saved_by(2), 0, 1)
    with powersgd.resting():
        pass
    assert powersgd.state_dict()["layout"] == saved_by(2)["layout"]
