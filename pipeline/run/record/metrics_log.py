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
BLOCK_BYTES = 65_536
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
        reach. It is looked for from the end, and nothing before it is read. Returns how many whole rows were dropped.
        """
        end, num_dropped, num_undecided = 0, 0, 0
        self.last_step = -1
        with self.path.open("rb") as file:
            for start, line in _lines_backwards(file):
                row_step = _step_of(line) if line.endswith(b"\n") else None
                if row_step is None and line.endswith(b"\n"):  # damaged: the row before it decides
                    end, num_undecided = max(end, start + len(line)), num_undecided + 1
                elif row_step is None or (step is not None and row_step > step):
                    end, num_dropped, num_undecided = 0, num_dropped + num_undecided + line.endswith(b"\n"), 0
                else:
                    end, self.last_step = max(end, start + len(line)), row_step
                    break
        for _ in range(num_undecided):
            print(f"warning: a damaged line in {self.path} is left as it is", file=sys.stderr)
        os.ftruncate(self._file.fileno(), end)
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
        except OSError as error:  # a full disk takes part of it
            os.ftruncate(descriptor, end)
            raise OSError(error.errno, error.strerror, str(self.path)) from error

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


def _lines_backwards(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, line with its end) from the last line to the first; the last one may have no end."""
    position, begun = file.seek(0, os.SEEK_END), b""
    while position:
        size = min(position, max(BLOCK_BYTES, len(begun)))  # grows with a line that has no end
        position -= size
        file.seek(position)
        content = file.read(size) + begun
        first_end = content.find(b"\n") + 1 if position else 0
        begun, end = content[:first_end], len(content)
        while end > first_end:
            start = max(content.rfind(b"\n", 0, end - 1) + 1, first_end)
            yield position + start, content[start:end]
            end = start


def _step_of(line: bytes) -> int | None:
    """Return the step of a row; None for what is no row."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    step = row.get(STEP_KEY) if isinstance(row, dict) else None
    return step if isinstance(step, int) else None
