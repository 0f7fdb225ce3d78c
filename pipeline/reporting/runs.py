"""A run directory, read back: what the report and the comparison are made from."""

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import numpy as np
import yaml

from pipeline.config.training import BatchConfig, BatchSplit, TrainConfig
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.schemas.ledger import LedgerJson
from pipeline.core.schemas.validation import ValidationJson
from pipeline.core.trees import flat
from pipeline.core.typed import check_known, require
from pipeline.core.units import format_bandwidth, median

STEP = "trainer/step"
Column = np.ndarray[tuple[int], np.dtype[np.float64]]
ROWS_AT_ONCE = 4096
BY_HAND = "the file was changed by hand"
LONGEST_CAUSE = 300
"""Characters of what a parser says that are repeated."""


@dataclass(frozen=True)
class RunRecord:
    """What one run left behind. A missing file is an empty mapping or list; without a ledger it is no run."""

    directory: Path
    ledger: LedgerJson
    config: dict[str, Any]
    """config.yaml, of whichever version of the program; see `setting`."""
    environment: dict[str, Any]
    """environment.json, of whichever version of the program; see `recorded`."""
    num_rows: int
    """Rows of metrics.jsonl."""
    metrics: dict[str, Column]
    """Each metric of metrics.jsonl, and the step, by row; NaN where it was not recorded."""
    attempts: list[dict[str, Any]] = field(default_factory=list)
    """Rows of attempts.jsonl: every start of the run."""
    validation: ValidationJson | None = None
    """What the last validation said of its pictures."""

    def setting(self, key: str) -> Any:
        """Return the value of a dotted key of the configuration; None where the run has none."""
        return flat(self.config).get(key)

    def recorded(self, key: str) -> Any:
        """Return the value of a dotted key of the environment; None where the run has none."""
        return flat(self.environment).get(key)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return (steps, values) of a metric, where it was recorded."""
        if key not in self.metrics or STEP not in self.metrics:
            return [], []
        steps, values = self.metrics[STEP], self.metrics[key]
        is_recorded = ~np.isnan(values) & ~np.isnan(steps)
        return steps[is_recorded].astype(np.int64).tolist(), values[is_recorded].tolist()

    @property
    def best_validation(self) -> tuple[float, int] | None:
        """Best validation top-1 and its step; of a run that prunes, of the weights as sparse as they have become.

        Of equal ones that of the lowest loss, which is the best checkpoint, too.
        """
        densities = dict(zip(*self.series("train/density"), strict=True))
        lowest = min(densities.values(), default=None)
        losses = dict(zip(*self.series("val/loss"), strict=True))
        rows = zip(*self.series("val/top1"), strict=True)
        found = [(top1, step) for step, top1 in rows if densities.get(step) == lowest]
        return max(found, key=lambda one: (one[0], -losses.get(one[1], 0.0)), default=None)

    def last(self, key: str) -> float | None:
        """Return the metric's latest value."""
        values = self.series(key)[1]
        return values[-1] if values else None

    def mean_of_latest(self, key: str, num_values: int) -> float | None:
        """Return the mean of the metric's latest values: what one step says jumps about."""
        values = self.series(key)[1][-num_values:]
        return sum(values) / len(values) if values else None

    @property
    def data_wait_share(self) -> float | None:
        """Share of all recorded steps' time that was spent waiting for data; the first step, which warms up, apart."""
        waited = dict(zip(*self.series("perf/data_wait_seconds"), strict=True))
        of_steps = zip(*self.series("perf/step_seconds"), strict=True)
        timed = [(waited[step], seconds) for step, seconds in of_steps if seconds and step in waited]
        waits, seconds = zip(*(timed[1:] or timed), strict=True) if timed else ((), ())
        return min(1.0, sum(waits) / sum(seconds)) if timed else None

    @property
    def global_batch(self) -> int:
        """Pictures of a step.

        Raises:
            ConfigError: The run is no training of ours.
        """
        size = self.ledger["global_batch"]
        if size is None:
            raise ConfigError(
                f"{self.directory} is a program under pipeline.meter, which does not say how many samples its step"
                " takes, and when its gradients are ready: give a run that pipeline.train made."
            )
        return size

    @property
    def batch(self) -> BatchSplit:
        """What a step took, and how the ranks shared it."""
        size = self.global_batch
        largest = self.setting("batch.max_per_rank") or size
        return BatchConfig(global_size=size, max_per_rank=largest).split(self.ledger["world_size"])

    @property
    def crop(self) -> int | None:
        """Side in pixels of the pictures that the model was given."""
        return self.setting("data.size") or self.setting("model.input.size")

    @property
    def arithmetic(self) -> str | None:
        """Precision in words, as recorded, else as configured."""
        return self.recorded("arithmetic") or self.setting("trainer.precision")

    @property
    def is_local(self) -> bool:
        """Whether ranks trained by themselves in rounds, so that most steps exchanged nothing, and none is like all."""
        return self.setting("comm.period") is not None and self.ledger["world_size"] > 1

    @property
    def rounds_sentence(self) -> str:
        """Why a run whose ranks trained by themselves does not serve as others do."""
        period = self.setting("comm.period")
        return f"{self.directory} was made with comm.period={period}, so that most of its steps exchanged nothing"

    @property
    def typical(self) -> str:
        """What `step_seconds` is over the steps: `median` or `mean`."""
        return "mean" if self.is_local else "median"

    @property
    def step_seconds(self) -> float | None:
        """Median seconds of a step: the ledger's, else that of the recorded steps without the first, which warms up.

        Of ranks that trained by themselves the mean of the recorded steps.
        """
        if self.is_local:
            values = self.series("perf/step_seconds")[1]
            return fmean(values[1:] or values) if values else None
        timed = self.ledger["time"]["step_seconds"]["p50"]
        if timed is not None:
            return timed
        values = self.series("perf/step_seconds")[1]
        return median(values[1:] or values)

    @property
    def egress_bytes_per_step(self) -> int | None:
        """Bytes that leave the busiest server in a step; predicted unless the ledger measured them.

        Of ranks that trained by themselves the mean over all steps, rounded.
        """
        if self.is_local:
            in_all, num_steps = self.ledger["servers"]["predicted_egress_bytes"], self.ledger["num_steps"]
            return round(max(in_all) / num_steps) if in_all and num_steps else None
        per_server = self.ledger["per_step"]["server_egress_bytes"]
        return max(per_server) if per_server else None

    @property
    def link(self) -> str | None:
        """Link of each server in words; None where no lab promised one."""
        lab = self.environment.get("lab")
        if not lab:
            return None
        rate = lab["bandwidth_bits_per_second"]
        return "unshaped, within one machine" if rate is None else f"{format_bandwidth(rate)}, emulated"

    @property
    def wire_gradient_bytes(self) -> float | None:
        """Gradient payload per committed training step as the collectives carried it (after compression), rank 0's.

        None if the run recorded no gradient collective: a world of one, or a meter that was off.
        """
        rows = [
            row
            for row in self.ledger["collectives"]
            if row["origin"] == "gradients" and row["phase"] == "train" and row.get("committed", True)
        ]
        num_steps = self.ledger["num_steps"]
        if not rows or not num_steps:
            return None
        return sum(row["payload_bytes"] for row in rows) / num_steps

    @property
    def carried_bytes_per_step(self) -> float | None:
        """Gradient payload of a step as carried, bytes: the mean, but PowerSGD's plain first steps are left out.

        A whole number is an int. None where `wire_gradient_bytes` is.
        """
        mean, num_steps = self.wire_gradient_bytes, self.ledger["num_steps"]
        num_plain = self.setting("comm.powersgd_start_step")
        if mean is not None and self.ledger["hook"] == "powersgd" and num_plain is not None and num_plain < num_steps:
            mean = (mean * num_steps - num_plain * self.ledger["gradient_bytes"]) / (num_steps - num_plain)
        return int(mean) if mean is not None and mean.is_integer() else mean

    @property
    def images_per_second(self) -> float | None:
        """Pictures over all ranks per second of a median step."""
        seconds, size = self.step_seconds, self.ledger["global_batch"]
        return size / seconds if seconds and size else None


def is_run(directory: Path) -> bool:
    """Return whether a run left its ledger here."""
    return (directory / "ledger.json").is_file()


def read_run(directory: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        DataError: there is no ledger, or a file is not what it should be.
    """
    if not is_run(directory):
        raise DataError(
            f"{directory} holds no ledger.json: give the directory of a run that `pipeline.train` made. One that has"
            " just begun writes it within half a minute of its first step."
        )
    ledger = _read_json(directory / "ledger.json")
    if ledger.get("schema") != 1:
        raise DataError(f"{directory / 'ledger.json'} has schema {ledger.get('schema')!r}, this program reads 1.")
    environment = directory / "environment.json"
    num_rows, metrics = _read_metrics(directory / "metrics.jsonl")
    return RunRecord(
        directory=directory,
        ledger=cast(LedgerJson, ledger),
        config=_read_yaml(directory / "config.yaml"),
        environment=_read_json(environment) if environment.is_file() else {},
        num_rows=num_rows,
        metrics=metrics,
        attempts=_read_attempts(directory / "attempts.jsonl"),
        validation=_read_validation(directory / "validation.json"),
    )


def _read_attempts(path: Path) -> list[dict[str, Any]]:
    """Return one row for each start; a line cut short by a crash was a start too, of which nothing is known."""
    rows: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            rows.append(row if isinstance(row, dict) else {})
    return rows


def _read_validation(path: Path) -> ValidationJson | None:
    if not path.is_file():
        return None
    validation = _read_json(path)
    if validation.get("schema") != 1:
        raise DataError(f"{path} has schema {validation.get('schema')!r}, this program reads 1.")
    return cast(ValidationJson, validation)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not readable JSON ({error}): the run has to be repeated.") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = yaml.safe_load(path.read_bytes()) or {}
        require(isinstance(value, dict), f"it holds a {type(value).__name__}, not keys and values.")
        check_known(TrainConfig, value)
    except (OSError, ValueError, RecursionError, yaml.YAMLError, ConfigError) as error:
        raise DataError(
            f"{path} is not what `train` wrote ({' '.join(str(error).split())[:LONGEST_CAUSE]}): copy it again from"
            " where the run was made, or repeat the run."
        ) from error
    return value


def _read_metrics(path: Path) -> tuple[int, dict[str, Column]]:
    """Return the number of rows and the metrics in them, each by step: numbers alone, 8 bytes for each.

    A last line without its end is a write cut short by a kill and is left out.
    """
    if not path.is_file():
        return 0, {}
    num_rows, columns = 0, dict[str, list[Column]]()
    num_chunks = 0
    with path.open("rb") as file:
        while lines := list(itertools.islice(file, ROWS_AT_ONCE)):
            if not lines[-1].endswith(b"\n"):
                lines.pop()
            rows = _parse_rows(lines, path, num_rows)
            for key in set[str]().union(*rows) - columns.keys():
                columns[key] = [np.full(ROWS_AT_ONCE, np.nan) for _ in range(num_chunks)]
            for key, column in columns.items():
                try:
                    column.append(np.array([row.get(key) for row in rows], np.float64))
                except (ValueError, TypeError, OverflowError) as error:
                    raise DataError(f"{path}: {key} is no number in every row ({error}): {BY_HAND}.") from error
            num_rows, num_chunks = num_rows + len(rows), num_chunks + 1
    metrics = {key: np.concatenate(column) for key, column in columns.items()}
    if STEP in metrics and np.any(np.diff(metrics[STEP]) < 0):
        order = np.argsort(metrics[STEP], kind="stable")
        metrics = {key: column[order] for key, column in metrics.items()}
    return num_rows, metrics


def _parse_rows(lines: list[bytes], path: Path, num_before: int) -> list[dict[str, Any]]:
    """Return the rows in lines, parsed at once: that takes a third less than each by itself.

    Args:
        lines: Whole lines.
        path: Their file, for messages.
        num_before: Lines of it before these.
    """
    try:
        rows = json.loads(b"[" + b",".join(lines) + b"]")
    except ValueError:
        rows = []
    if len(rows) == len(lines) and all(isinstance(row, dict) for row in rows):
        return rows
    for number, line in enumerate(lines, start=num_before + 1):
        try:
            if not isinstance(json.loads(line), dict):
                raise ValueError("it holds no keys and values")
        except ValueError as error:
            raise DataError(f"{path} line {number} is not JSON ({error}): {BY_HAND}.") from error
    raise AssertionError(f"{path}: lines that are rows one by one, and not together")
