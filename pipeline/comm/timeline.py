"""When a training step computes and when it communicates: marks, which become the times of `step_times`.

Nothing here waits or synchronises: a mark is a time stamp and an append, also on a GPU, where it is an event that the
stream passes. Marks are only read when the step is over.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

import torch

from pipeline.comm.collectives import Call, MeterObserver
from pipeline.comm.step_times import Average, BucketMarks, Interval, MedianTimes, StepTimes, account

NUM_TIMED_STEPS = 2000  # medians and percentiles are of this many latest steps

# --- clocks ---


class Clock(Protocol):
    """Marks points of time without waiting for anything."""

    def now(self) -> Any:
        """A mark of the present, as the device sees it."""
        ...

    def seconds(self, start: Any, end: Any) -> float:
        """From one mark to the other; both must have passed."""
        ...

    def has_passed(self, mark: Any) -> bool:
        """Whether the device has come to the mark. Asks, never waits."""
        ...


class HostClock:
    """The CPU's: work is done when the call returns."""

    def now(self) -> float:
        """Seconds of a monotonic clock."""
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        """The difference."""
        return end - start

    def has_passed(self, mark: float) -> bool:
        """Always."""
        del mark
        return True


class CudaClock:
    """A GPU's: a mark is an event on the current stream, passed when the stream has done all that was asked before it.

    A future's callback runs on a stream that waits for the collective, so a mark made there is the collective's end.
    The logic is tested with a stand-in for the event; it has not run on a GPU.
    """

    def __init__(self, make_event: Callable[[], Any] | None = None) -> None:
        self._make_event = make_event or (lambda: torch.cuda.Event(enable_timing=True))

    def now(self) -> Any:
        """An event, recorded."""
        event = self._make_event()
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """CUDA counts in milliseconds."""
        return start.elapsed_time(end) / 1000

    def has_passed(self, mark: Any) -> bool:
        """cudaEventQuery: does not block."""
        return mark.query()


# --- recording ---


@dataclass(slots=True)
class _OpenBucket:
    """Marks of a bucket under way, None until they are made."""

    index: int
    ready: Any
    sent: Any = None
    returned: Any = None
    done: Any = None


@dataclass(slots=True)
class _OpenStep:
    """Marks of the step under way."""

    is_steady: bool
    """No pause came before it: it is neither the first nor the one after a validation or a checkpoint."""
    forwards: list[tuple[Any, Any]] = field(default_factory=list)
    backwards: list[tuple[Any, Any]] = field(default_factory=list)
    waits: list[tuple[Any, Any]] = field(default_factory=list)
    buckets: list[_OpenBucket] = field(default_factory=list)
    payloads: list[int] = field(default_factory=list)
    """Bytes of each gradient all-reduce. A list: appending is safe from any thread, adding up is not."""
    first: Any = None
    """The earliest mark, from which the others are counted."""

    def marks(self) -> Iterator[Any]:
        """Every mark, the bucket's included."""
        for intervals in (self.forwards, self.backwards, self.waits):
            for interval in intervals:
                yield from interval
        for bucket in self.buckets:
            yield from (bucket.ready, bucket.sent, bucket.done, bucket.returned)


class _InHook(threading.local):
    """The bucket whose communication hook this thread is in."""

    bucket: _OpenBucket | None = None


class Timeline(MeterObserver):
    """Marks what a training step does, in phase `train` only; a step ends with `take_step`.

    It observes the meter, which says when a collective is issued and when a phase begins. In a world of one nothing is
    issued: what remains is when the rank computes and when its buckets are ready.

    Threads: marks come from the main thread, from autograd's and from those that complete futures. They only append.

    Args:
        num_ranks: ranks of the process group.
        clock: makes the marks; the host's by default.
        metered: whether the meter that is observed records anything.
        enabled: False lets every call pass through: the switch for measuring what the timeline costs.
    """

    def __init__(
        self, num_ranks: int, clock: Clock | None = None, *, metered: bool = True, enabled: bool = True
    ) -> None:
        self._num_ranks = num_ranks
        self._clock = clock or HostClock()
        self._metered, self._enabled = metered, enabled
        self._recording = False
        self._step = _OpenStep(is_steady=False)
        self._steps: deque[tuple[bool, StepTimes]] = deque(maxlen=NUM_TIMED_STEPS)
        self._in_hook = _InHook()

    @property
    def why_off(self) -> str | None:
        """Why nothing is timed, or None where something is."""
        if not self._metered:
            return "Communication is timed with the meter, which was off (comm.meter=false)."
        return None if self._enabled else "The timeline was off (comm.timeline=false)."

    # --- what the meter sees ---

    def phase_changes(self, old: str, new: str) -> None:
        """Only training is timed."""
        self._recording = new == "train" and self.why_off is None

    def issued(self, call: Call) -> None:
        """Mark when a bucket's first collective was issued, by the thread that asks."""
        if not self._recording or call.origin != "gradients":
            return
        self._step.payloads.append(call.payload_bytes)
        bucket = self._in_hook.bucket
        if bucket is not None and bucket.sent is None:
            bucket.sent = self._clock.now()

    # --- marks ---

    @contextmanager
    def forward(self) -> Iterator[None]:
        """The forward pass and the loss of a micro-batch are computed inside."""
        with self._between("forwards"):
            yield

    @contextmanager
    def backward(self) -> Iterator[None]:
        """A backward pass runs inside, until it returns."""
        if self._recording:
            self._step.buckets.clear()
        with self._between("backwards"):
            yield

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """This rank does nothing inside but exchange something with the others and wait for it."""
        with self._between("waits"):
            yield

    @contextmanager
    def _between(self, kind: str) -> Iterator[None]:
        if not self._recording:
            yield
            return
        step, start = self._step, self._clock.now()
        if step.first is None:
            step.first = start
        intervals = getattr(step, kind)
        try:
            yield
        finally:
            intervals.append((start, self._clock.now()))

    def hand_over(
        self, index: int, reduce: Callable[[], torch.futures.Future[torch.Tensor]]
    ) -> torch.futures.Future[torch.Tensor]:
        """DDP hands over bucket `index`, which `reduce` sends; returns its future, which completes after the mark.

        A callback added to the future itself could come after DDP has woken up from waiting for it.
        """
        if not self._recording:
            return reduce()
        bucket = _OpenBucket(index, self._clock.now())
        self._step.buckets.append(bucket)
        self._in_hook.bucket = bucket
        try:
            future = reduce()
        finally:
            self._in_hook.bucket = None
        bucket.returned = self._clock.now()
        if bucket.sent is None:  # a hook that leaves even its first collective to a callback
            bucket.sent = bucket.returned

        def done(completed: torch.futures.Future[torch.Tensor]) -> torch.Tensor:
            bucket.done = self._clock.now()
            return completed.value()

        return future.then(done)

    # --- results ---

    def restart(self) -> None:
        """A pause is over (start-up, validation, a checkpoint): forget what was open; the step that follows is cold."""
        self._step = _OpenStep(is_steady=False)

    def take_step(self) -> StepTimes | None:
        """End the step. None if nothing was recorded, or if the device has not passed its marks: it is not waited for.

        On a GPU the step's own read-back of the loss comes before, and with it every mark.
        """
        step, self._step = self._step, _OpenStep(is_steady=True)
        if not self._recording or not step.backwards:
            return None
        if not all(mark is not None and self._clock.has_passed(mark) for mark in step.marks()):
            return None
        times = self._read(step)
        self._steps.append((step.is_steady, times))
        return times

    def _read(self, step: _OpenStep) -> StepTimes:
        def at(mark: Any) -> float:
            return self._clock.seconds(step.first, mark)

        def read(intervals: list[tuple[Any, Any]]) -> list[Interval]:
            return [(at(start), at(end)) for start, end in intervals]

        return account(
            forwards=read(step.forwards),
            backwards=read(step.backwards),
            waits=read(step.waits),
            buckets=[
                BucketMarks(bucket.index, at(bucket.ready), at(bucket.sent), at(bucket.done), at(bucket.returned))
                for bucket in step.buckets
            ],
            payload_bytes=sum(step.payloads),
            num_ranks=self._num_ranks,
        )

    def medians(self, average: Average = median) -> MedianTimes | None:
        """Over the steps of this attempt that follow no pause, else over all; None before the first.

        `average`: in place of the median.
        """
        steady = [times for is_steady, times in self._steps if is_steady]
        steps = steady or [times for _, times in self._steps]
        return MedianTimes.of(steps, average) if steps else None
