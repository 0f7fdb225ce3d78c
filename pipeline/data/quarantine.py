"""Samples that cannot be used: named once each over all ranks and attempts of a run, and bounded.

The ranks share one file, `quarantine.jsonl`, to which each appends what it meets and from which it learns what the
others have met. No collective is needed, so what the run sends stays what it was; and a rank that is killed has told
already.
"""

import contextlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.core.errors import DataError
from pipeline.core.files import NO_LOCKS_HERE, try_lock
from pipeline.data.index import ShardIndex
from pipeline.data.shards.allowance import allowed_bad

NUM_BAD_SHOWN = 5


class BadSample(NamedTuple):
    """A sample that could not be decoded."""

    sample_id: int
    shard: str
    key: str
    cause: str

    @property
    def reason(self) -> str:
        """A clause with key, shard and cause."""
        return f"sample {self.key!r} of shard {self.shard}: {self.cause}"

    @classmethod
    def of(cls, index: ShardIndex, sample_id: int, error: Exception) -> "BadSample":
        """The sample and what its decoding raised."""
        return cls(sample_id, index.shard_name(sample_id), index.sample_key(sample_id), str(error))


class Quarantine:
    """The bad samples of a split, and the budget after which the run stops.

    Args:
        index: of the split.
        max_bad_fraction: share of its samples that may be bad.
        path: the file that all ranks of a run share, one JSON object {sample_id, shard, key, cause} a line. It is made
            when the first bad sample is met. None: only what this process meets counts.
    """

    def __init__(self, index: ShardIndex, max_bad_fraction: float, path: Path | None = None) -> None:
        self.index, self.max_bad_fraction, self.path = index, max_bad_fraction, path
        self.samples: dict[int, BadSample] = {}
        """By sample id, in the order they became known."""
        self._num_bytes_read = 0

    def add(self, bad: Sequence[BadSample]) -> list[BadSample]:
        """Record bad samples; returns those that no rank and no earlier attempt has met before.

        Raises:
            DataError: more samples are bad than the budget allows, or the file cannot be written.
        """
        if all(sample.sample_id in self.samples for sample in bad):
            return []
        try:
            new = self._note(bad)
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be written ({error.strerror}), and no bad sample may go unnamed: free space there."
            ) from error
        allowed = allowed_bad(self.max_bad_fraction, self.index.num_samples)
        if len(self.samples) > allowed:
            shown = "; ".join(sample.reason for sample in list(self.samples.values())[-NUM_BAD_SHOWN:])
            where = f" (all of them: {self.path})" if self.path else ""
            raise DataError(
                f"{len(self.samples)} of {self.index.num_samples} samples cannot be used, and"
                f" data.max_bad_fraction={self.max_bad_fraction} allows {allowed}:"
                f" {shown}{where}. Prepare the shards again into an empty out=, without them, or allow more."
            )
        return new

    def refresh(self) -> int:
        """Learn what the other ranks have noted; returns how many samples are known to be bad."""
        if self.path is not None:
            with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
                self._learn(file.fileno())
        return len(self.samples)

    def _note(self, bad: Sequence[BadSample]) -> list[BadSample]:
        if self.path is None:
            return self._keep(bad)
        # Opened for each: bad samples are rare, and a file kept open would be inherited by what is forked.
        with self.path.open("a+b") as file:
            _lock(file.fileno())
            self._learn(file.fileno())
            new = self._keep(bad)
            is_torn = os.fstat(file.fileno()).st_size > self._num_bytes_read  # by a crash in the middle of a line
            lines = "".join(json.dumps(sample._asdict()) + "\n" for sample in new).encode()
            if lines:
                file.write(b"\n" * is_torn + lines)
                file.flush()
                os.fsync(file.fileno())
            return new

    def _keep(self, bad: Sequence[BadSample]) -> list[BadSample]:
        """Those not known yet, which from now on are."""
        new = {sample.sample_id: sample for sample in bad if sample.sample_id not in self.samples}
        self.samples.update(new)
        return list(new.values())

    def _learn(self, descriptor: int) -> None:
        """Read the whole lines that were appended since the last time; those that are none are skipped."""
        added = os.pread(descriptor, os.fstat(descriptor).st_size - self._num_bytes_read, self._num_bytes_read)
        whole, newline, _ = added.rpartition(b"\n")
        self._num_bytes_read += len(whole) + len(newline)
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, TypeError):
                self._learn_line(BadSample(**json.loads(line)))

    def _learn_line(self, sample: BadSample) -> None:
        """Take it over, unless it is about other shards than these: they may have been prepared again."""
        number, index = sample.sample_id, self.index
        is_known = type(number) is int and 0 <= number < index.num_samples
        if is_known and (sample.shard, sample.key) == (index.shard_name(number), index.sample_key(number)):
            self.samples.setdefault(number, sample)


def _lock(descriptor: int) -> None:
    """Lock the file, where the file system has locks. Where not, a sample that two ranks meet may come twice."""
    try:
        try_lock(descriptor, seconds=math.inf)  # closing the descriptor unlocks it
    except OSError as error:
        if error.errno not in NO_LOCKS_HERE:
            raise
