"""Time that leaves the pauses out."""

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comm.timeline import NUM_TIMED_STEPS
from pipeline.training.timing import StepClock, TimedLoader, speed_sentence


def test_a_timed_loader_yields_what_it_wraps_and_counts_from_take_to_take() -> None:
    loader = TimedLoader(cast(Any, ["a", "b", "c"]))
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
        patch.setattr("pipeline.training.timing.time.perf_counter", lambda: now[0])
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


def test_only_where_cores_are_idle_workers_are_asked_for() -> None:
    assert speed_sentence(2, 0.1, num_workers=0, num_cores=8) == (
        "2 pictures/s, 10.0% of the time waiting for data: the loader keeps up."
    )
    idle = speed_sentence(2, 0.3, num_workers=1, num_cores=8)
    assert "holds training back: raise data.num_workers= (1 per rank now)" in idle and "short_side=256" in idle
    for num_workers, num_cores in ((0, 1), (0, 0), (7, 8)):
        busy = speed_sentence(2, 0.3, num_workers=num_workers, num_cores=num_cores)
        assert "as no others are idle" in busy and "data.num_workers" not in busy and "short_side=256" in busy
