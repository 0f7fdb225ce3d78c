"""The files that a metered program leaves: ledger.json, metrics.jsonl, environment.json and the report, by rank 0."""

import os
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from pipeline.core.errors import ConfigError, UserError
from pipeline.core.files import try_lock, write_json_atomic
from pipeline.core.schemas.ledger import LedgerJson
from pipeline.core.text import one_line
from pipeline.metering.hosts import Hello
from pipeline.metering.settings import Settings
from pipeline.run.directory import RunDirectory
from pipeline.run.launch.ranks import lab_conditions
from pipeline.run.provenance import describe_cpu, versions
from pipeline.run.record.metrics_log import MetricsLog


def say(text: str) -> None:
    """Tell something about the meter beside the program's own output."""
    # In one piece: ranks share a terminal, and print() writes the line and its end apart.
    sys.stderr.write(f"meter: {one_line(text)}\n")
    sys.stderr.flush()


def open_run(settings: Settings) -> tuple[RunDirectory, IO[bytes]]:
    """Make the run's directory and take its lock, which the kernel gives back when the file is closed.

    Raises:
        ConfigError: It is a training's, another program writes there, or it cannot be made.
    """
    directory = RunDirectory(settings.run_root, settings.name)
    if directory.config.exists():
        raise ConfigError(
            f"{directory.path} holds a training of pipeline.train: give the metered program another name=."
        )
    try:
        directory.path.mkdir(parents=True, exist_ok=True)
        lock = (directory.path / "lock").open("ab")
    except OSError as error:
        raise ConfigError(
            f"Cannot write the run directory {directory.path} ({error.strerror}): set run_root= to a place that can be"
            " written."
        ) from error
    if not try_lock(lock.fileno()):
        lock.close()
        raise ConfigError(f"{directory.path} is being written by another program: give this one another name=.")
    return directory, lock


class Record:
    """One start of a program in its run directory. Files of an earlier start are kept under a number.

    Raises:
        ConfigError: As `open_run`.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.name = settings.name
        self.directory, self._lock = open_run(settings)
        lock = weakref.ref(self._lock)  # a forked process that outlives this one must not hold on to it
        os.register_at_fork(after_in_child=lambda: (file := lock()) and file.close())
        self.attempt = 1 + _set_aside(self.directory)
        """Number of this start, from 1."""
        self._metrics = MetricsLog(self.directory.metrics)
        self._mirrors = True

    def begin(self, num_ranks: int, hellos: Sequence[Hello | None], notes: Sequence[str]) -> None:
        """Write down what runs where, and tell what is worth knowing about it."""
        import torch

        for note in notes:
            say(note)
        said = [one for one in hellos if one is not None]
        self.directory.write_environment(
            {
                "schema": 1,
                "command": list(self._settings.command or [sys.executable, *sys.argv]),
                "python": sys.version.split()[0],
                "packages": versions(),
                "hosts": [one["hostname"] for one in said],
                "world_size": num_ranks,
                "script": said[0]["script"] if said else None,
                "notes": list(notes),
                "lab": lab_conditions(),
                "cpu": describe_cpu(),
                "num_threads_per_rank": torch.get_num_threads(),
            }
        )

    def log(self, step: int, row: Mapping[str, float | int | None]) -> None:
        """Append the row of a step, and have it go with what the program itself logs next to its W&B run, if any."""
        self._metrics.append(step, row)
        run = getattr(sys.modules.get("wandb"), "run", None) if self._mirrors else None
        if run is None:
            return
        try:
            # Not committed: W&B's steps stay the program's own, and its next log takes these along.
            known = {key: value for key, value in row.items() if key.startswith("comm/") and value is not None}
            run.log(known, commit=False)
        except Exception as error:  # whatever it is: the program's run is not the meter's to end
            self._mirrors = False
            say(f"no more rows in the program's W&B run: {type(error).__name__}: {error}")

    def write_ledger(self, content: LedgerJson) -> None:
        """Write ledger.json."""
        write_json_atomic(self.directory.ledger, content)

    def close(self) -> None:
        """Nothing more is written."""
        self._metrics.close()
        self._lock.close()


def _set_aside(directory: RunDirectory) -> int:
    """Rename the files of an earlier start (`ledger.1.json`); returns how many starts there were."""
    number = 1
    while (directory.path / f"ledger.{number}.json").exists():
        number += 1
    if not directory.ledger.exists():
        directory.metrics.unlink(missing_ok=True)  # of a start that ended before its first ledger
        return number - 1
    for path in (directory.metrics, directory.ledger):
        if path.exists():
            path.replace(path.with_name(f"{path.stem}.{number}{path.suffix}"))
    return number


def report_quietly(settings: Settings) -> Path | None:
    """Write the run's report; say why where there is none, which is no fault of the program's."""
    try:
        from pipeline.reporting.page import write_run_report

        return write_run_report(Path(settings.run_root) / settings.name)
    except (UserError, OSError, ImportError) as error:
        say(f"no report: {error}")
        return None


def require_writable(settings: Settings) -> None:
    """Refuse, before a program starts, what rank 0 would refuse.

    Raises:
        ConfigError: As `open_run`.
    """
    open_run(settings)[1].close()
