"""metrics.jsonl: the record of a run, one JSON object per line, every step exactly once."""

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

Row = Mapping[str, float | int | None]
STEP_KEY = "trainer/step"
"""Optimiser steps committed, this one included: the key of a row here and the x-axis in W&B."""


class MetricsLog:
    """Appends rows; each is handed to the operating system at once, and made durable by `sync`.

    Opening drops a last line that a crash cut short. `num_not_finite` counts, by metric, the values that were NaN or
    infinite: JSON has no such numbers, and they are written as null.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_not_finite: Counter[str] = Counter()
        self.last_step = -1
        self._file: BinaryIO = path.open("ab")
        self.truncate_to(None)

    def append(self, step: int, row: Row) -> dict[str, float | int | None]:
        """Write the one row of a step.

        Args:
            step: Optimiser steps committed; larger than every step so far.
            row: Values by metric name.

        Returns:
            The row as written, without the step.
        """
        assert step > self.last_step, f"step {step} after step {self.last_step}"
        clean = {key: self._finite(key, value) for key, value in row.items()}
        self._write(json.dumps({STEP_KEY: step, **clean}, allow_nan=False).encode() + b"\n")
        self.last_step = step
        return clean

    def truncate_to(self, step: int | None) -> int:
        """Drop the rows of later steps than `step` (None: none), which a resumed run will write again.

        Rows lie in order, so this cuts the file at one place: a single system call, which a crash does or does not
        reach. Returns how many whole rows were dropped.
        """
        end, num_dropped, last_step = 0, 0, -1
        with self.path.open("rb") as file:
            lines = file.readlines()
        for line in lines:
            row_step = _step_of(line)
            if (
                num_dropped
                or not line.endswith(b"\n")
                or (step is not None and row_step is not None and row_step > step)
            ):
                num_dropped += line.endswith(b"\n")
                continue
            if row_step is None:
                print(f"warning: a damaged line in {self.path} is left as it is", file=sys.stderr)
            end += len(line)
            last_step = row_step if row_step is not None else last_step
        os.ftruncate(self._file.fileno(), end)
        self.last_step = last_step
        self.sync()
        return num_dropped

    def sync(self) -> None:
        """Make everything written so far durable. Called with every checkpoint."""
        os.fsync(self._file.fileno())

    def _write(self, line: bytes) -> None:
        """Append the line, whole or not at all: past any buffer, which would write again when it is closed."""
        descriptor = self._file.fileno()
        end = os.fstat(descriptor).st_size
        try:
            while line:
                line = line[os.write(descriptor, line) :]
        except OSError:  # a full disk takes part of it
            os.ftruncate(descriptor, end)
            raise

    def close(self) -> None:
        """Make the rows durable and accept no more. Does nothing when closed."""
        if not self._file.closed:
            self.sync()
            self._file.close()

    def _finite(self, key: str, value: float | int | None) -> float | int | None:
        if value is None or isinstance(value, int):
            return value
        value = float(value)  # numpy scalars and tensors of one element too
        if not math.isfinite(value):
            self.num_not_finite[key] += 1
            return None
        return value


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a metrics.jsonl; a line that is no row is skipped."""
    with path.open("rb") as file:
        for line in file:
            if _step_of(line) is not None:
                yield json.loads(line)


def _step_of(line: bytes) -> int | None:
    """Return the step of a row; None for what is no row."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    step = row.get(STEP_KEY) if isinstance(row, dict) else None
    return step if isinstance(step, int) else None
