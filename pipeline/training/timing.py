"""Where the time of a training goes: waiting for data, and the steps themselves."""

import statistics
import time
from collections import deque
from collections.abc import Iterator

from torch.utils.data import DataLoader

from pipeline.comm.timeline import NUM_TIMED_STEPS
from pipeline.data.batches import LoadedBatch

LARGEST_SHARE_OF_WAITING = 0.1  # above it, faster loading would make training faster by as much


class TimedLoader:
    """A loader that knows how long its consumer waited for it.

    Timed around `next` rather than between Lightning's hooks, between which Lightning also waits for other ranks.
    """

    def __init__(self, loader: DataLoader[LoadedBatch]) -> None:
        self.loader = loader
        self.waited_seconds = 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[LoadedBatch]:
        batches = iter(self.loader)
        while True:
            started = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited_seconds += time.perf_counter() - started
            yield batch

    @property
    def num_workers(self) -> int:
        """Processes that load for this rank."""
        return self.loader.num_workers

    def take(self) -> float:
        """Seconds waited since the last `take`."""
        waited, self.waited_seconds = self.waited_seconds, 0.0
        return waited


class StepClock:
    """Seconds per step, validation and checkpoints left out. Monotonic, so a clock set back does no harm."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.step_seconds: deque[float] = deque(maxlen=NUM_TIMED_STEPS)
        self.wait_seconds: deque[float] = deque(maxlen=NUM_TIMED_STEPS)

    def restart(self) -> None:
        """A step begins now."""
        self._started = time.perf_counter()

    def lap(self, waited_seconds: float) -> float:
        """End the step; returns its seconds."""
        now = time.perf_counter()
        seconds, self._started = now - self._started, now
        self.step_seconds.append(seconds)
        self.wait_seconds.append(waited_seconds)
        return seconds

    def percentiles(self) -> tuple[float, float] | None:
        """(p50, p90) of the step, or None before the first. The first step of an attempt is left out where possible."""
        steady = list(self.step_seconds)[1:] or list(self.step_seconds)
        if not steady:
            return None
        if len(steady) == 1:
            return steady[0], steady[0]
        return statistics.median(steady), statistics.quantiles(steady, n=10, method="inclusive")[8]

    def mean_seconds(self) -> float:
        """Mean of the steps, where they are not alike; of at least one. The first is left out as in `percentiles`."""
        return statistics.fmean(list(self.step_seconds)[1:] or self.step_seconds)

    def mean_wait_seconds(self) -> float | None:
        """Mean wait for data per step."""
        return statistics.fmean(self.wait_seconds) if self.wait_seconds else None

    def mean_wait_share(self) -> float | None:
        """Share of the time of the steps that was waiting for data."""
        total = sum(self.step_seconds)
        return sum(self.wait_seconds) / total if total else None


def speed_sentence(pictures_per_second: float, wait_share: float, *, num_workers: int, num_cores: int) -> str:
    """Say how fast a training was, how much of it was waiting for data, and what would help where that is much.

    Args:
        pictures_per_second: Of all ranks.
        wait_share: Share of the time of the steps.
        num_workers: Processes that load for a rank; 0: it loads between its steps.
        num_cores: Of a rank.
    """
    told = f"{pictures_per_second:,.0f} pictures/s, {wait_share:.1%} of the time waiting for data: "
    if wait_share <= LARGEST_SHARE_OF_WAITING:
        return told + "the loader keeps up."
    smaller = "large pictures decode about twice as fast from shards prepared with short_side=256."
    if num_workers + 1 >= num_cores:
        return told + f"pictures are decoded on the cores that train, as no others are idle; {smaller}"
    return told + f"the loader holds training back: raise data.num_workers= ({num_workers} per rank now); {smaller}"
