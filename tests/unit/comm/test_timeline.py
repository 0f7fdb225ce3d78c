"""Times of a step: interval arithmetic, what counts as exposed, and marks; a stand-in for CUDA's events is in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comm.collectives import Call, CollectiveMeter
from pipeline.comm.step_times import (
    BucketMarks,
    BucketTimes,
    Interval,
    MedianTimes,
    StepTimes,
    account,
    bucket_fields,
    length,
    time_fields,
    union,
    without,
)
from pipeline.comm.timeline import NUM_TIMED_STEPS, Clock, CudaClock, HostClock, Timeline

HORIZON = 24
# Whole numbers of seconds: every interval is a set of unit cells, against which the arithmetic is checked.
seconds = st.integers(0, HORIZON)
intervals = st.lists(st.tuples(seconds, seconds), max_size=8)


def cells(found: list[Interval]) -> set[int]:
    return {cell for start, end in found for cell in range(int(start), int(end))}


# --- intervals ---


@given(intervals)
def test_a_union_covers_the_same_points_once(given_intervals: list[Interval]) -> None:
    joined = union(given_intervals)
    assert cells(joined) == cells(given_intervals)
    assert length(given_intervals) == len(cells(given_intervals))
    edges = [edge for interval in joined for edge in interval]
    assert edges == sorted(set(edges))  # in order, none empty, none touching


@given(intervals, intervals)
def test_without_is_the_difference_of_sets(one: list[Interval], other: list[Interval]) -> None:
    left = without(one, other)
    assert cells(left) == cells(one) - cells(other)
    assert union(left) == left


# --- a step ---


def stretch(low: int, high: int) -> st.SearchStrategy[Interval]:
    return st.tuples(st.integers(low, high), st.integers(low, high)).map(lambda pair: (min(pair), max(pair)))


@st.composite
def steps(draw: st.DrawFn) -> dict[str, Any]:
    """Forward in 0..8, backward from 8 or later, buckets handed over inside it, exchanges anywhere."""
    backward = (draw(st.integers(8, 10)), draw(st.integers(18, HORIZON)))
    buckets = []
    for index in range(draw(st.integers(0, 4))):
        ready, sent, done = sorted(draw(st.lists(st.integers(*backward), min_size=3, max_size=3)))
        buckets.append(BucketMarks(index, ready, sent, done, draw(st.integers(sent, HORIZON))))
    return {
        "forwards": [draw(stretch(0, 8))],
        "backwards": [backward],
        "waits": draw(st.lists(stretch(0, HORIZON), max_size=3)),
        "buckets": buckets,
        "payload_bytes": draw(st.integers(1, 10**9)),
        "num_ranks": draw(st.integers(2, 9)),
    }


@given(steps())
def test_communication_is_exposed_or_overlapped(step: dict[str, Any]) -> None:
    times = account(**step)
    communication = cells([(b.sent, b.done) for b in step["buckets"]]) | cells(step["waits"])
    assert times.communication_seconds == len(communication)
    assert times.communication_seconds <= times.exposed_seconds + times.overlapped_seconds
    assert times.overlapped_seconds <= times.communication_seconds
    assert times.backward_seconds + times.exposed_seconds >= length(step["backwards"])
    assert times.forward_seconds <= length(step["forwards"])


@given(steps())
def test_the_rank_waits_from_the_last_hand_over_to_the_end_and_wherever_it_blocks(step: dict[str, Any]) -> None:
    waited = cells(step["waits"])
    for bucket in step["buckets"]:
        if bucket.returned >= bucket.done:
            waited |= cells([(bucket.sent, bucket.done)])
    if step["buckets"]:
        waited |= cells([(max(bucket.ready for bucket in step["buckets"]), step["backwards"][-1][1])])
    times = account(**step)
    assert times.exposed_seconds == len(waited)
    assert times.backward_seconds == len(cells(step["backwards"]) - waited)
    assert times.forward_seconds == len(cells(step["forwards"]) - waited)


@given(steps())
def test_one_rank_alone_waits_for_nobody(step: dict[str, Any]) -> None:
    times = account(**{**step, "num_ranks": 1})
    assert (times.communication_seconds, times.exposed_seconds, times.overlapped_seconds) == (0, 0, 0)
    assert times.bus_bandwidth is None
    assert times.forward_seconds == length(step["forwards"])
    assert times.backward_seconds == length(step["backwards"])
    assert times.buckets == account(**step).buckets


@given(steps(), st.integers(-100, 100))
def test_times_do_not_depend_on_where_the_clock_began(step: dict[str, Any], shift: int) -> None:
    def moved(value: Interval) -> Interval:
        return (value[0] + shift, value[1] + shift)

    later = {
        **step,
        **{kind: [moved(interval) for interval in step[kind]] for kind in ("forwards", "backwards", "waits")},
        "buckets": [
            BucketMarks(b.index, b.ready + shift, b.sent + shift, b.done + shift, b.returned + shift)
            for b in step["buckets"]
        ],
    }
    assert account(**later) == account(**step)


def test_a_hook_that_hands_on_and_returns_exposes_only_the_last_bucket() -> None:
    times = account(
        forwards=[(0, 2)],
        backwards=[(2, 12)],
        waits=[(12, 13)],
        buckets=[BucketMarks(0, 4, 4, 7, 4), BucketMarks(1, 9, 9, 12, 9)],
        payload_bytes=6,
        num_ranks=4,
    )
    assert times == StepTimes(
        buckets={0: BucketTimes(2, 2, 5), 1: BucketTimes(7, 7, 10)},
        communication_seconds=7,
        exposed_seconds=4,
        overlapped_seconds=3,
        forward_seconds=2,
        backward_seconds=7,
        bus_bandwidth=6 / 6 * 2 * 3 / 4,
    )
    assert times.metrics(16)["comm/exposed_share"] == 0.25


def test_a_step_without_gradients_has_no_bandwidth() -> None:
    times = account(forwards=[], backwards=[(0, 1)], waits=[], buckets=[], payload_bytes=0, num_ranks=2)
    assert times.bus_bandwidth is None and "comm/bus_bandwidth" not in times.metrics(1)
    assert time_fields(MedianTimes.of([times]))["bus_bandwidth_bytes_per_second"] is None


@given(st.lists(steps(), min_size=1, max_size=9))
def test_medians_are_each_values_own(drawn: list[dict[str, Any]]) -> None:
    times = [account(**step) for step in drawn]
    middle = MedianTimes.of(times)
    for name, value in time_fields(middle).items():
        if value is None:
            continue
        values = sorted(v for step in times if (v := getattr(step, name.removesuffix("_bytes_per_second"))) is not None)
        assert value == pytest.approx((values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2)
    assert middle.buckets.keys() == times[-1].buckets.keys()


def test_what_is_not_timed_is_null() -> None:
    assert set(time_fields(None).values()) == set(bucket_fields(None, 0).values()) == {None}


# --- recording ---


class Device:
    """A queue that works through what it is asked, later than it is asked."""

    def __init__(self) -> None:
        self.asked = 0.0
        """Milliseconds of work queued so far."""
        self.worked = 0.0

    def event(self) -> "Event":
        return Event(self)


class Event:
    """What CudaClock needs of torch.cuda.Event."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self) -> None:
        self.at = self.device.asked

    def query(self) -> bool:
        return self.device.worked >= self.at

    def elapsed_time(self, end: "Event") -> float:
        assert self.query() and end.query(), "CUDA refuses to time events that have not happened"
        return end.at - self.at


class Steps:
    """A timeline that is led through steps by hand, on a device that works when it is told."""

    def __init__(self, num_ranks: int = 2, *, enabled: bool = True, metered: bool = True) -> None:
        self.device = Device()
        self.timeline = Timeline(num_ranks, CudaClock(self.device.event), metered=metered, enabled=enabled)
        self.meter = CollectiveMeter(enabled=metered, observers=[self.timeline])

    def work(self, milliseconds: float) -> None:
        self.device.asked += milliseconds

    def issue(self, num_bytes: int) -> None:
        self.timeline.issued(Call(self.meter.phase_name, "gradients", "all_reduce", num_bytes, 4, -1))

    def reduce(self, done_after: float) -> torch.futures.Future[torch.Tensor]:
        """Two milliseconds of compression, then an all-reduce."""
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        self.work(2)
        self.issue(4000)
        at = self.device.asked
        self.device.asked = at + done_after
        future.set_result(torch.ones(1))
        return future

    def step(self, phase: str = "train") -> StepTimes | None:
        """4 ms forward of which 1 ms waiting, 10 ms backward, one bucket."""
        with self.meter.phase(phase):
            with self.timeline.forward():
                self.work(3)
                with self.timeline.waiting():
                    self.work(1)
            with self.timeline.backward():
                self.work(10)
                assert self.timeline.hand_over(0, lambda: self.reduce(done_after=5)).wait() == torch.ones(1)
                self.work(5)
            return self.timeline.take_step()

    def finish(self) -> "Steps":
        self.device.worked = float("inf")
        return self


def test_marks_on_a_device_become_seconds() -> None:
    times = Steps().finish().step()
    assert times is not None
    assert times.forward_seconds == pytest.approx(0.003)
    assert times.backward_seconds == pytest.approx(0.010)
    bucket = times.buckets[0]
    assert (bucket.ready_seconds, bucket.sent_seconds, bucket.done_seconds) == pytest.approx((0.010, 0.012, 0.017))
    assert times.communication_seconds == pytest.approx(0.006)
    assert times.exposed_seconds == pytest.approx(0.001 + 0.012)
    assert times.bus_bandwidth == pytest.approx(4000 / 0.005)


def test_a_device_that_is_behind_is_not_waited_for() -> None:
    steps = Steps()
    assert steps.step() is None
    assert steps.timeline.medians() is None
    assert steps.finish().step() is not None


def test_only_training_is_timed() -> None:
    for phase in ("startup", "validation", "checkpoint"):
        assert Steps().finish().step(phase) is None


def test_waiting_outside_training_belongs_to_no_step() -> None:
    steps = Steps().finish()
    with steps.meter.phase("checkpoint"), steps.timeline.waiting():
        steps.work(1000)
    times = steps.step()
    assert times is not None and times.exposed_seconds < 0.1


def test_only_the_last_backward_pass_of_a_step_has_buckets() -> None:
    steps = Steps().finish()
    with steps.meter.phase("train"), steps.timeline.backward():
        steps.work(7)
    times = steps.step()
    assert times is not None
    assert times.backward_seconds == pytest.approx(0.017)
    assert times.buckets[0].ready_seconds == pytest.approx(0.010)


def test_medians_leave_out_steps_that_follow_a_pause() -> None:
    steps = Steps().finish()
    steps.timeline.restart()
    with steps.meter.phase("train"), steps.timeline.forward():
        steps.work(1000)
    assert steps.step() is not None
    medians = steps.timeline.medians()
    assert medians is not None and medians.forward_seconds > 1  # better than nothing
    for _ in range(3):
        for _ in range(2):
            assert steps.step() is not None
        steps.timeline.restart()
        with steps.meter.phase("train"), steps.timeline.forward():
            steps.work(1000)
        assert steps.step() is not None
    medians = steps.timeline.medians()
    assert medians is not None and medians.forward_seconds == pytest.approx(0.003)


def test_a_restart_forgets_what_was_open() -> None:
    steps = Steps().finish()
    with steps.meter.phase("train"), steps.timeline.waiting():
        steps.work(1000)
    steps.timeline.restart()
    times = steps.step()
    assert times is not None and times.exposed_seconds < 0.1


def test_medians_are_of_the_latest_steps() -> None:
    steps = Steps().finish()
    for _ in range(NUM_TIMED_STEPS + 1):
        with steps.meter.phase("train"), steps.timeline.forward():
            steps.work(1000)
        steps.step()
    for _ in range(NUM_TIMED_STEPS):
        steps.step()
    medians = steps.timeline.medians()
    assert medians is not None and medians.forward_seconds == pytest.approx(0.003)


@pytest.mark.parametrize(
    ("options", "world_size", "reason"),
    [
        ({"metered": False}, 2, "comm.meter=false"),
        ({"enabled": False}, 2, "comm.timeline=false"),
    ],
)
def test_where_nothing_is_timed_the_reason_is_told(options: dict[str, bool], world_size: int, reason: str) -> None:
    steps = Steps(world_size, **options).finish()
    assert steps.step() is None and steps.timeline.medians() is None
    assert reason in str(steps.timeline.why_off)
    assert Steps().timeline.why_off is None


@contextmanager
def clocked(*times: float) -> Iterator[None]:
    given_times = iter(times)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.comm.timeline.time.perf_counter", lambda: next(given_times))
        yield


def test_the_hosts_clock_counts_seconds() -> None:
    clock: Clock = HostClock()
    with clocked(5.0, 7.5):
        start, end = clock.now(), clock.now()
    assert clock.seconds(start, end) == 2.5 and clock.has_passed(end)
