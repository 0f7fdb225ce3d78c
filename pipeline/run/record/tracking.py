"""What a run records while it goes: metrics.jsonl, and W&B and Lightning's loggers as its mirrors. Rank 0 only."""

import contextlib
import os
import re
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.training import TrackingConfig
from pipeline.core.files import write_text_atomic
from pipeline.run.directory import RunDirectory
from pipeline.run.record.loggers import make_logger
from pipeline.run.record.metrics_log import MetricsLog, Row
from pipeline.run.record.wandb_mirror import WandbMirror
from pipeline.run.record.wandb_variables import mode_here, sweep_run_id

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger

ID_FILE = "wandb_id"


class Tracker:
    """The record of one attempt at a run. On every rank but the first it does nothing.

    Args:
        run: Directory of the run, open on rank 0.
        tracking: Where the mirror goes.
        rank: Rank of this process.
        model: Group of the mirrored run, so that runs of one model stand together.
        config: Plain values shown beside the mirrored run.
        notes: Conditions of the run in words.
        resume_step: Committed steps of the checkpoint this attempt starts from; later rows are dropped, the attempt
            writes them again.
        names_host: Whether the mirror may say where it runs.
    """

    def __init__(
        self,
        run: RunDirectory,
        tracking: TrackingConfig,
        *,
        rank: int,
        model: str,
        config: Mapping[str, object] | None = None,
        notes: str = "",
        resume_step: int = 0,
        names_host: bool = True,
    ) -> None:
        self.run_id: str | None = None
        self._metrics: MetricsLog | None = None
        self._mirror: WandbMirror | None = None
        self._loggers: list[Logger] = []
        if rank != 0:
            return
        self._metrics = MetricsLog(run.metrics)
        self._metrics.truncate_to(resume_step)
        self._loggers = [make_logger(name, run.path, resume_step) for name in tracking.loggers]
        mode = mode_here(tracking, os.environ)
        if mode == "disabled":
            return
        self.run_id = wandb_id(run)
        self._mirror = WandbMirror(
            run.path,
            run_id=self.run_id,
            mode=mode,
            name=run.name,
            group=model,
            job_type="train",
            project=tracking.project,
            entity=tracking.entity,
            tags=tracking.tags,
            config=config,
            notes=notes,
            names_host=names_host,
        )

    @property
    def mode(self) -> str:
        """Mode of the mirror as it turned out: `offline`, `online` or `disabled`."""
        return self._mirror.mode if self._mirror is not None and self._mirror.is_alive else "disabled"

    def log(self, step: int, row: Row) -> None:
        """Record the one row of `step`: flat metric names such as `train/loss`; None is written as null."""
        if self._metrics is not None:
            written = self._metrics.append(step, row)
            if self._mirror is not None:
                self._mirror.log(step, written)
            for logger in self._loggers:
                logger.log_metrics({name: value for name, value in written.items() if value is not None}, step)

    def sync(self) -> None:
        """Make the rows durable: called before a checkpoint, so that it never knows of a step the record lacks."""
        if self._metrics is not None:
            self._metrics.sync()
        for logger in self._loggers:
            logger.save()

    def summarize(self, values: Mapping[str, float | int | str | None]) -> None:
        """Put results beside the mirrored run."""
        if self._mirror is not None:
            self._mirror.summarize(values)

    def say(self, text: str) -> None:
        """Let the mirror show what is printed of the run."""
        if self._mirror is not None:
            self._mirror.say(text)

    def keep(self, files: Mapping[str, Path]) -> None:
        """Have the mirror keep files of the run, by the name of each."""
        if self._mirror is not None:
            for name, path in files.items():
                self._mirror.keep(name, path)

    def finish(self, exit_code: int = 0) -> None:
        """End the record. Bounded in time; raises nothing of W&B's; does nothing the second time."""
        if self._metrics is not None:
            self._metrics.close()
            for name, count in self._metrics.num_not_finite.items():
                print(f"warning: {count} values of {name} were not finite and were written as null.", file=sys.stderr)
            self._metrics.num_not_finite.clear()
        while self._loggers:
            self._loggers.pop().finalize("success" if exit_code == 0 else "failed")
        if self._mirror is not None:
            self._mirror.finish(exit_code)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
            return
        with contextlib.suppress(OSError):  # a full disk must not hide what ended the block
            self.finish(exit_code=int(getattr(kind, "exit_code", 1)))


def wandb_id(run: RunDirectory) -> str:
    """Return the W&B id of this run: made at its first attempt, kept in its directory, the same ever after.

    A run of a W&B sweep has the one that its agent gives it.
    """
    return kept_id(run.path / ID_FILE, run.name, given=sweep_run_id(os.environ))


def mirror_of(
    directory: Path,
    name: str,
    tracking: TrackingConfig,
    *,
    id_file: str,
    group: str,
    job_type: str,
    record: str,
    config: Mapping[str, object],
    notes: str = "",
    names_host: bool = True,
) -> WandbMirror | None:
    """Return the W&B run of what a command other than `train` has written, the same one ever after; None: disabled.

    Args:
        directory: Where the files lie.
        name: What the command was given as `name`.
        tracking: Whether and where W&B mirrors it.
        id_file: Keeps its id. Not `wandb_id`: the directory may be that of a training, which is another W&B run.
        group: Group of the W&B run.
        job_type: The command.
        record: File that holds the same.
        config: Plain values shown beside the run.
        notes: Conditions in words.
        names_host: Whether W&B is told the name of this machine.
    """
    mode = mode_here(tracking, os.environ)
    if mode == "disabled":
        return None
    return WandbMirror(
        directory,
        run_id=kept_id(directory / id_file, f"{job_type}-{name}"),
        mode=mode,
        name=name,
        group=group,
        job_type=job_type,
        project=tracking.project,
        entity=tracking.entity,
        tags=tracking.tags,
        config=config,
        notes=notes,
        names_host=names_host,
        record=record,
    )


def kept_id(path: Path, name: str, *, given: str | None = None) -> str:
    """Return the W&B id in this file; if there is none, the one `given`, or one made of `name`, is written there.

    The random part keeps runs of one name on two machines from writing into each other.
    """
    if path.exists():
        kept = path.read_text().strip()
        if re.fullmatch(r"[A-Za-z0-9_-]{1,100}", kept):
            return kept
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:60].strip("-")
    made = given or f"{readable}-{secrets.token_hex(4)}"
    write_text_atomic(path, made + "\n")
    return made
