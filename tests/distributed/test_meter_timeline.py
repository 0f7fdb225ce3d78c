"""Real DDP on two and three ranks, slowed down on purpose: a delay is exposed time where it is waited for, only there.

A delay is far longer than anything else a step does; what must not show it stays below half of it.
"""

from typing import Any

import pytest

from tests.distributed.meter_ranks import run_ranks

Results = list[dict[str, Any]]
COMPUTE = ("forward_seconds", "backward_seconds")


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What every rank found; all scenarios run in one start of the processes."""
    return run_ranks("meter_timeline_rank.py", request.param, tmp_path_factory.mktemp("ranks"))


def assert_waited(result: dict[str, Any], scenario: str) -> None:
    times, delay = result[scenario]["json"]["time"], result["delay"]
    assert times["exposed_seconds"] > 0.75 * delay
    assert times["communication_seconds"] > 0.75 * delay
    assert all(times[part] < 0.5 * delay for part in COMPUTE)


def test_others_wait_for_a_rank_that_is_late_in_its_backward_pass(ranks: Results) -> None:
    *others, late = ranks
    for result in others:
        assert_waited(result, "late_backward")
    times, delay = late["late_backward"]["json"]["time"], late["delay"]
    assert times["backward_seconds"] >= delay
    assert times["exposed_seconds"] < 0.5 * delay
    first, last = late["late_backward"]["json"]["buckets"]
    assert first["ready_seconds"] < 0.5 * delay <= delay <= last["ready_seconds"]


def test_others_wait_for_a_rank_that_is_late_for_the_metrics(ranks: Results) -> None:
    *others, late = ranks
    for result in others:
        assert_waited(result, "late_metrics")
    assert late["late_metrics"]["json"]["time"]["exposed_seconds"] < 0.5 * late["delay"]


def test_waiting_for_buffers_is_not_forward_computation(ranks: Results) -> None:
    first, *others = ranks
    for result in others:
        assert_waited(result, "late_buffers")
    assert first["late_buffers"]["json"]["time"]["exposed_seconds"] < 0.5 * first["delay"]


def test_waiting_inside_a_hook_is_not_backward_computation(ranks: Results) -> None:
    *others, late = ranks
    for result in others:
        assert_waited(result, "late_for_compression")
        first, _, last = result["late_for_compression"]["json"]["buckets"]
        assert first["ready_seconds"] < 0.5 * result["delay"] < last["ready_seconds"]
    assert late["late_for_compression"]["json"]["time"]["exposed_seconds"] < 0.5 * late["delay"]


def flight(bucket: dict[str, Any]) -> float:
    return bucket["done_seconds"] - bucket["sent_seconds"]


def test_a_large_bucket_that_travels_during_computation_is_overlapped(ranks: Results) -> None:
    for result in ranks:
        times = result["hidden"]["last"]
        large, small = times["buckets"].values()
        assert large["done_seconds"] < small["ready_seconds"]
        assert times["overlapped_seconds"] >= 0.99 * flight(large)
        assert times["backward_seconds"] >= 2 * result["delay"]
        assert times["exposed_seconds"] < times["backward_seconds"] / 2


def test_the_same_bucket_at_the_end_is_exposed(ranks: Results) -> None:
    for result in ranks:
        times = result["bare"]["last"]
        small, large = times["buckets"].values()
        assert flight(large) > 0
        assert times["exposed_seconds"] >= flight(large)
        assert times["overlapped_seconds"] <= flight(small) + 1e-6


def test_buckets_are_ready_sent_and_done_in_this_order(ranks: Results) -> None:
    for result in ranks:
        for scenario in ("late_backward", "late_metrics", "late_buffers", "hidden", "bare"):
            for bucket in result[scenario]["last"]["buckets"].values():
                assert 0 < bucket["ready_seconds"] <= bucket["sent_seconds"] < bucket["done_seconds"]


def test_bus_bandwidth_is_that_of_nccl_tests(ranks: Results) -> None:
    num_ranks = len(ranks)
    for result in ranks:
        times = result["bare"]["last"]
        first, second = ((bucket["sent_seconds"], bucket["done_seconds"]) for bucket in times["buckets"].values())
        both = max(first[1], second[1]) - first[0] if second[0] < first[1] else flight_of(first) + flight_of(second)
        payload_bytes = result["bare"]["json"]["gradient_bytes"]
        assert times["bus_bandwidth"] == pytest.approx(payload_bytes / both * 2 * (num_ranks - 1) / num_ranks)


def flight_of(interval: tuple[float, float]) -> float:
    return interval[1] - interval[0]
