"""The times of an optimiser step, from its marks: pure arithmetic of intervals.

Of every gradient bucket: `ready`, DDP handed it over because its gradients are complete; `sent`, its (first) all-reduce
was issued, after any compression; `done`, its future completed, decompression included. All are seconds from the start
of the step's last backward pass, the only one of a step whose gradients travel.

Of a step:

- communication: the union of the intervals from sent to done, and of the blocking exchanges outside the backward pass
  (buffers, metrics, Lightning's own). The union, because buckets overlap one another.
- exposed: what of it the rank had to wait for, doing nothing else. From the hand-over of the last bucket, with which
  its own backward computation ends, to the return of the backward pass; every blocking exchange; and what a hook waits
  for before it returns. Two things are in it that no network causes: the (de)compression of the last bucket, and
  waiting for a rank that is late. The latter cannot be told apart by one rank's clock, so it is not tried.
- overlapped: communication that is not exposed.
- one rank alone communicates and waits for 0 seconds: what would be a wait for others is its own work.
- bus bandwidth: payload / time x 2(n-1)/n, as nccl-tests defines it (doc/PERFORMANCE.md), over the gradient buckets;
  payload is what the all-reduces carried, after compression, and time the union of the intervals from sent to done.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

Interval = tuple[float, float]
"""Start and end in seconds."""
Average = Callable[[Iterable[float]], float]


# --- intervals ---


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points of time as disjoint intervals in order; what ends before it starts counts for nothing."""
    joined: list[Interval] = []
    for start, end in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def without(intervals: Iterable[Interval], taken: Iterable[Interval]) -> list[Interval]:
    """The points of `intervals` that are not in `taken`, as disjoint intervals in order."""
    left = union(intervals)
    for start, end in union(taken):
        left = [part for first, last in left for part in ((first, min(last, start)), (max(first, end), last))]
        left = [part for part in left if part[0] < part[1]]
    return left


def length(intervals: Iterable[Interval]) -> float:
    """Seconds covered, each once."""
    return sum(end - start for start, end in union(intervals))


# --- a step ---


@dataclass(frozen=True, slots=True)
class BucketTimes:
    """Of one gradient bucket, in seconds from the start of the step's last backward pass."""

    ready_seconds: float
    sent_seconds: float
    done_seconds: float


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Where one optimiser step spent its time on this rank, as the module's text defines it."""

    buckets: dict[int, BucketTimes]
    """By bucket index. The largest `ready_seconds` is when the last backward computation was over."""
    communication_seconds: float
    exposed_seconds: float
    overlapped_seconds: float
    forward_seconds: float
    """Of all micro-batches, without what they waited for other ranks."""
    backward_seconds: float
    """Of all micro-batches: computation only, nothing exposed."""
    bus_bandwidth: float | None
    """Bytes per second; None where no gradient travelled."""

    def metrics(self, step_seconds: float) -> dict[str, float]:
        """Under their public names."""
        values = {
            "comm/seconds": self.communication_seconds,
            "comm/exposed_seconds": self.exposed_seconds,
            "comm/exposed_share": min(1.0, self.exposed_seconds / step_seconds),
            "comm/bus_bandwidth": self.bus_bandwidth,
        }
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class BucketMarks:
    """Of one bucket, in seconds of the clock. `returned`: the communication hook gave control back."""

    index: int
    ready: float
    sent: float
    done: float
    returned: float


def account(
    *,
    forwards: Sequence[Interval],
    backwards: Sequence[Interval],
    waits: Sequence[Interval],
    buckets: Sequence[BucketMarks],
    payload_bytes: int,
    num_ranks: int,
) -> StepTimes:
    """The step's times from its intervals, all in seconds of one clock.

    backwards: of every micro-batch, in order. waits: blocking exchanges, wherever they happened.
    payload_bytes: what the all-reduces of the buckets carried.
    """
    travelled, waits = (buckets, waits) if num_ranks > 1 else ([], [])
    in_flight = [(bucket.sent, bucket.done) for bucket in travelled]
    # A hook that returns only after its bucket is done has made the backward pass wait for it.
    blocked = [*waits, *((bucket.sent, bucket.done) for bucket in travelled if bucket.done <= bucket.returned)]
    start = backwards[-1][0] if backwards else 0.0
    if travelled and backwards:
        blocked.append((max(bucket.ready for bucket in travelled), backwards[-1][1]))
    communication = union([*in_flight, *waits])
    gradient_seconds = length(in_flight)
    return StepTimes(
        buckets={
            bucket.index: BucketTimes(bucket.ready - start, bucket.sent - start, bucket.done - start)
            for bucket in buckets
        },
        communication_seconds=length(communication),
        exposed_seconds=length(blocked),
        overlapped_seconds=length(without(communication, blocked)),
        forward_seconds=length(without(forwards, blocked)),
        backward_seconds=length(without(backwards, blocked)),
        bus_bandwidth=payload_bytes / gradient_seconds * 2 * (num_ranks - 1) / num_ranks if gradient_seconds else None,
    )


@dataclass(frozen=True, slots=True)
class MedianTimes:
    """Medians over the steps of an attempt, or their means."""

    communication_seconds: float
    exposed_seconds: float
    overlapped_seconds: float
    forward_seconds: float
    backward_seconds: float
    bus_bandwidth: float | None
    buckets: dict[int, BucketTimes]

    @classmethod
    def of(cls, steps: Sequence[StepTimes], average: Average = median) -> "MedianTimes":
        """Each value's own median; there must be a step. Buckets are the last step's: their layout does not change.

        `average`: in place of the median, where steps are not alike.
        """

        def middle(name: str) -> float:
            return average(getattr(step, name) for step in steps)

        def middle_of(index: int, name: str) -> float:
            return average(getattr(step.buckets[index], name) for step in steps if index in step.buckets)

        bandwidths = [step.bus_bandwidth for step in steps if step.bus_bandwidth is not None]
        return cls(
            communication_seconds=middle("communication_seconds"),
            exposed_seconds=middle("exposed_seconds"),
            overlapped_seconds=middle("overlapped_seconds"),
            forward_seconds=middle("forward_seconds"),
            backward_seconds=middle("backward_seconds"),
            bus_bandwidth=average(bandwidths) if bandwidths else None,
            buckets={
                index: BucketTimes(*(middle_of(index, f"{name}_seconds") for name in ("ready", "sent", "done")))
                for index in steps[-1].buckets
            },
        )


# --- ledger.json ---


def time_fields(times: MedianTimes | None) -> dict[str, float | None]:
    """What the timeline knows of `time` in ledger.json."""
    names = ("forward", "backward", "communication", "exposed", "overlapped")
    fields = {f"{name}_seconds": None if times is None else getattr(times, f"{name}_seconds") for name in names}
    return {**fields, "bus_bandwidth_bytes_per_second": None if times is None else times.bus_bandwidth}


def bucket_fields(times: MedianTimes | None, index: int) -> dict[str, float | None]:
    """What the timeline knows of bucket `index` in `buckets` of ledger.json."""
    bucket = None if times is None else times.buckets.get(index)
    return {
        f"{name}_seconds": None if bucket is None else getattr(bucket, f"{name}_seconds")
        for name in ("ready", "sent", "done")
    }
