"""Shards fetched before they are needed: the order says which, long before.

One process of each server does it for all its ranks. It looks ahead as far as the cache has room. What it sees ahead
counts as used, and what is left behind is released: by last use alone the cache would evict a shard that waits for its
use rather than one whose use is over. Failures are left to who needs the shard.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import DataError
from pipeline.data.order import Ids
from pipeline.data.remote.shards import RemoteFiles

NUM_THREADS = 4
SHARE_OF_CACHE = 0.8
"""The rest is room for what is being fetched and for what is used a little longer than the order says."""
LOOK_AGAIN_SECONDS = 10.0
IDLE_SECONDS = 0.1
JOIN_SECONDS = 2.0


class Course(Protocol):
    """A sampler that knows its future (batches.py)."""

    place: int | None
    """What was last asked for; None: nothing yet, or everything."""

    def samples_ahead(self, ranks: range) -> Iterator[tuple[int, Ids]]:
        """(place, sample ids), from `place` on, or from the first place there is."""
        ...


class Prefetcher:
    """Fetches ahead inside a `with` block, in threads of its own.

    Args:
        files: of the split.
        shard_of_sample: of shape (num_samples,).
        course: what will be asked for.
        ranks: of this server.
        lag: places by which readers may be behind the course, which is asked before anything is read.
    """

    def __init__(
        self,
        files: RemoteFiles,
        shard_of_sample: NDArray[np.integer],
        course: Course,
        ranks: range,
        *,
        lag: int = 0,
    ) -> None:
        self.files, self.shard_of_sample, self.course = files, shard_of_sample, course
        self.ranks, self.lag = ranks, lag

    def __enter__(self) -> None:
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._window = _Window(self)
        self._seen: set[int] = set()
        self._look_again = 0.0
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(NUM_THREADS)]
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        deadline = time.monotonic() + JOIN_SECONDS  # a thread that waits for the network ends when it hears of it
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while not self._stopped.is_set():
            shard = self._next()
            if shard is None:
                self._stopped.wait(IDLE_SECONDS)
                continue
            try:
                self.files.fetch_ahead(shard, self._pulse)
            except DataError:
                pass  # whoever needs it will meet the error, and say it
            except _Stopped:
                return

    def _next(self) -> int | None:
        """The first shard of the window that was not looked at lately."""
        with self._lock:
            if time.monotonic() >= self._look_again:
                self._look_again = time.monotonic() + LOOK_AGAIN_SECONDS
                self._seen.clear()
            for shard in self._window.shards():
                if shard not in self._seen:
                    self._seen.add(shard)
                    return shard
        return None

    def _pulse(self) -> None:
        if self._stopped.is_set():
            raise _Stopped


class _Stopped(Exception):
    """The block was left while a shard was on its way."""


class _Step(NamedTuple):
    """A place of the course."""

    place: int
    shards: tuple[int, ...]
    """In the order of first use, not of number."""


class _Window:
    """The shards that are needed from now on, in the order of their first use, as many as the cache has room for."""

    def __init__(self, prefetcher: Prefetcher) -> None:
        self._files, self._course = prefetcher.files, prefetcher.course
        self._shard_of_sample = prefetcher.shard_of_sample
        self._lag = prefetcher.lag
        self._ahead = prefetcher.course.samples_ahead(prefetcher.ranks)
        self._steps: deque[_Step] = deque()
        self._uses: Counter[int] = Counter()
        self._num_bytes = 0
        self._limit_bytes = SHARE_OF_CACHE * self._files.cache.num_bytes
        self._next = self._following()

    def shards(self) -> list[int]:
        """Recomputed from where the sampler is by now."""
        if self._course.place is not None:
            while self._steps and self._steps[0].place < self._course.place - self._lag:
                self._forget(self._steps.popleft())
        while self._next is not None and len(self._uses) < len(self._files.shards) and self._has_room(self._next):
            self._remember(self._next)
            self._next = self._following()
        return list(self._uses)

    def _following(self) -> _Step | None:
        """The next step; None after the last one."""
        found = next(self._ahead, None)
        if found is None:
            return None
        place, ids = found
        shards, first_use = np.unique(self._shard_of_sample[ids], return_index=True)
        return _Step(place, tuple(shards[np.argsort(first_use)].tolist()))

    def _has_room(self, step: _Step) -> bool:
        """Whether the cache holds this step too; the step that is being read is looked at in any case."""
        more = sum(self._files.shards[shard].bytes for shard in step.shards if shard not in self._uses)
        return not self._steps or self._num_bytes + more <= self._limit_bytes

    def _remember(self, step: _Step) -> None:
        self._steps.append(step)
        for shard in step.shards:
            if shard not in self._uses:
                self._num_bytes += self._files.shards[shard].bytes
            self._uses[shard] += 1

    def _forget(self, step: _Step) -> None:
        for shard in step.shards:
            self._uses[shard] -= 1
            if not self._uses[shard]:
                del self._uses[shard]
                self._files.release(shard)
                self._num_bytes -= self._files.shards[shard].bytes
