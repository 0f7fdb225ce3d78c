"""Accuracy and what was spent: the best for a budget, and the price of a target."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.schemas.study import CurvePointJson
from pipeline.studying.curves import AXES, envelope, mean_curve, reach


def point(step: int, top1: float, *, gigabytes: float = 1.0, seconds: float = 2.0) -> CurvePointJson:
    return {"step": step, "images": 8 * step, "gigabytes": gigabytes * step, "seconds": seconds * step, "top1": top1}


tops = st.lists(st.floats(0, 1), min_size=1, max_size=8)
curves = st.builds(
    lambda values, gigabytes, seconds: [
        point(step, top1, gigabytes=gigabytes, seconds=seconds) for step, top1 in enumerate(values, start=1)
    ],
    tops,
    st.floats(0.01, 100),
    st.floats(0.01, 100),
)


@given(st.dictionaries(st.sampled_from("abcde"), curves, max_size=5), st.sampled_from(AXES))
def test_the_envelope_is_the_best_there_was_for_as_much(of: dict[str, list[CurvePointJson]], axis: str) -> None:
    found = envelope(of, axis)
    everything = [(one[axis], one["top1"]) for curve in of.values() for one in curve]
    for spent, top1 in everything:
        best = max(one["top1"] for one in found if one["spent"] <= spent)
        assert best == max(other for before, other in everything if before <= spent) >= top1
    spents, accuracies = [one["spent"] for one in found], [one["top1"] for one in found]
    assert spents == sorted(set(spents)) and accuracies == sorted(set(accuracies))
    for one in found:
        assert any(other[axis] == one["spent"] and other["top1"] == one["top1"] for other in of[one["name"]])


@given(st.lists(curves, min_size=1, max_size=3), st.floats(0.01, 1))
def test_a_target_costs_what_its_first_validation_had_cost(seeds: list[list[CurvePointJson]], target: float) -> None:
    found = reach(seeds, target)
    steps = [next((one["step"] for one in curve if one["top1"] >= target), None) for curve in seeds]
    got_there = [step for step in steps if step is not None]
    assert (found.num_reached, found.num_runs) == (len(got_there), len(seeds))
    assert found.spent.get("step") == (sum(got_there) / len(got_there) if got_there else None)
    assert bool(found.spent) == bool(got_there)


def test_the_mean_is_of_validations_that_all_seeds_have() -> None:
    one, other = [point(1, 0.2), point(2, 0.4)], [point(1, 0.4, seconds=4.0), point(3, 0.9)]
    assert mean_curve([one, other]) == [
        {"step": 1, "images": 8, "gigabytes": 1.0, "seconds": 3.0, "top1": (0.2 + 0.4) / 2}
    ]
    assert mean_curve([]) == []
