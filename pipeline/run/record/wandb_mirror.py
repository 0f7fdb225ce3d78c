"""Weights & Biases as a mirror of metrics.jsonl that can fail in any way without a training noticing."""

import contextlib
import os
import shutil
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import psutil

from pipeline.core.errors import ExitCode
from pipeline.core.text import printable
from pipeline.run.directory import NOT_SAID

# How long a server may take to give any answer at all before the run goes offline.
PROBE_SECONDS = 5.0
INIT_SECONDS = 30.0
# For what is left to be uploaded; offline there is nothing.
FINISH_SECONDS = {"online": 60.0, "offline": 15.0}
# W&B is given its rows in memory, and waited for only where it takes none. Longer than that, and its helper is ended.
PATIENCE_SECONDS = 5.0
HELPER_NAME = "wandb-core"
LEAST_FREE_BYTES = 2**16
STEP_METRIC = "trainer/step"


class WandbMirror:
    """One W&B run. The mode is chosen once, at start; any failure later ends the mirror with one warning.

    Args:
        directory: Directory of the run; W&B writes below `<directory>/wandb`.
        run_id: Id fixed for the life of the run: every attempt continues it.
        mode: `offline` or `online`. Online becomes offline where there is no API key or the server does not answer.
        name: Name that W&B shows.
        group: Group of the run.
        job_type: `train` or `compare`.
        project: Project of the run.
        entity: User or team; None: W&B's default.
        tags: Labels of the run. A job of Slurm adds `slurm-<id>`.
        config: Plain values to show beside the run; `slurm_job_id` is added. No secrets: it is stored as it is.
        notes: Conditions of the run in words. No secrets either.
        names_host: Whether W&B is told the name of this machine.
        record: File that holds the same and is whole whatever becomes of W&B; warnings name it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        run_id: str,
        mode: str,
        name: str,
        group: str,
        job_type: str,
        project: str,
        entity: str | None = None,
        tags: Sequence[str] = (),
        config: Mapping[str, object] | None = None,
        notes: str = "",
        names_host: bool = True,
        record: str = "metrics.jsonl",
    ) -> None:
        assert mode in ("offline", "online"), mode
        self.mode = mode
        self._record = record
        self._names_host = names_host
        self._directory = directory
        self._run: Any = None
        # Its crash reports would go to a server that was not asked for.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        if not (Path.home().is_dir() and os.access(Path.home(), os.W_OK)):  # its log would go to stderr
            os.environ.setdefault("WANDB_CACHE_DIR", str(directory.absolute() / "wandb"))
        if mode == "online":
            reason = why_not_online()
            if reason:
                self.mode = "offline"
                _warn(f"W&B stays offline: {reason}. Upload later with `wandb sync`")
        os.environ.setdefault("WANDB_DATA_DIR", str(directory.absolute() / "wandb"))  # where artefacts wait
        job_id = slurm_job_id(os.environ)
        facts = {
            "name": name,
            "group": group,
            "job_type": job_type,
            "project": project,
            "entity": entity,
            "notes": notes or None,
            "tags": [*tags, *([f"slurm-{job_id}"] if job_id else [])],
            "config": {**(config or {}), "slurm_job_id": job_id},
        }
        try:
            with _patience(INIT_SECONDS + PATIENCE_SECONDS):
                self._run = self._start(directory, run_id, shown(facts))
        except Exception as error:
            self._give_up(error)

    @property
    def is_alive(self) -> bool:
        """Whether rows still reach it."""
        return self._run is not None

    def log(self, step: int, row: Mapping[str, float | int | None]) -> None:
        """Mirror a row; values that are None are left out. Returns without waiting for any server."""
        # Never wandb's own step=: it must only grow, and a resumed run repeats steps. The step is a metric, and every
        # other metric is drawn over it, so rows written twice fall on each other.
        values = {key: value for key, value in row.items() if value is not None}
        self._guard(lambda: self._run.log({STEP_METRIC: step, **values}))

    def log_media(self, make: Callable[[], Mapping[str, object]]) -> None:
        """Log the tables, charts and pictures that `make` returns, by name; what goes wrong in it ends the mirror."""
        self._guard(lambda: self._run.log(dict(make())), FINISH_SECONDS[self.mode])

    def summarize(self, values: Mapping[str, float | int | str | None]) -> None:
        """Put results beside the run."""
        self._guard(
            lambda: self._run.summary.update({key: shown(value) for key, value in values.items() if value is not None})
        )

    def say(self, text: str) -> None:
        """Put text into the console log of the run; not where the machine is not to be named, as it may hold paths."""
        if self._names_host:
            self._guard(lambda: self._run.write_logs(printable(text)))

    def keep(self, name: str, path: Path, aliases: Sequence[str] = ()) -> None:
        """Keep a file as an artefact of the run, of the type `name`; a copy of it waits below the run's directory.

        Args:
            name: Type; the artefact is called by the run's id and by it.
            path: The file.
            aliases: What this version is called besides `latest`.
        """

        def log() -> None:
            import wandb

            artifact = wandb.Artifact(f"{self._run.id}-{name}", type=name)
            artifact.add_file(str(path))
            self._run.log_artifact(artifact, aliases=["latest", *aliases])

        self._guard(log, FINISH_SECONDS[self.mode])

    def finish(self, exit_code: int = 0) -> None:
        """End the run and W&B's processes. Bounded in time; what was not uploaded stays on disk."""

        def end() -> None:
            if exit_code == ExitCode.PREEMPTED:
                self._run.mark_preempting()  # shown as preempted, not as failed
            self._run.finish(exit_code=exit_code)
            _teardown(exit_code)

        if self.is_alive:
            self._guard(end, FINISH_SECONDS[self.mode] + PATIENCE_SECONDS)
            with contextlib.suppress(OSError):
                if shutil.disk_usage(self._directory / "wandb").free < LEAST_FREE_BYTES:
                    _warn(f"the disk of {self._directory / 'wandb'} is full, and W&B may lack rows; {self._record} has"
                          " everything")  # fmt: skip
        self._run = None

    def _start(self, directory: Path, run_id: str, facts: dict[str, Any]) -> Any:
        import wandb

        settings = wandb.Settings(
            mode=self.mode,  # pyright: ignore[reportArgumentType]  asserted in __init__
            silent=True,
            console="off",  # our stdout stays ours
            x_disable_meta=True,  # the command line may hold what is private
            x_save_requirements=False,
            disable_code=True,
            disable_git=True,
            save_code=False,
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS[self.mode],
        )
        if not self._names_host:
            settings.host = NOT_SAID
        run = wandb.init(
            dir=str(directory), id=run_id, resume="allow", allow_val_change=True, settings=settings, **facts
        )
        run.define_metric(STEP_METRIC)
        run.define_metric("*", step_metric=STEP_METRIC)
        return run

    def _guard(self, action: Callable[[], None], seconds: float = PATIENCE_SECONDS) -> None:
        """Do something with the run, if there is one still, in at most so many seconds."""
        if self._run is not None:
            try:
                with _patience(seconds):
                    action()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        reason = " ".join(str(error).split())[:200]
        _warn(f"W&B is off from here on ({type(error).__name__}: {reason}); {self._record} has everything")
        # Its helper process goes too; what it had written can still be uploaded.
        with contextlib.suppress(Exception), _patience(PATIENCE_SECONDS):
            _teardown(1)


def _teardown(exit_code: int) -> None:
    """End W&B's helper process, and wait for its end."""
    import wandb

    try:
        wandb.teardown(exit_code=exit_code)
    except SystemExit as error:  # it would end this process with the helper's code
        raise RuntimeError(f"its helper process ended with {error.code}") from error


@contextlib.contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """End W&B's helper process where the block takes longer: whatever waits for it, in any of its locks, then fails.

    Raises:
        TimeoutError: It was ended, however the block has ended then.
    """
    late = threading.Event()

    def end_helper() -> None:
        late.set()
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if child.name() == HELPER_NAME:
                    child.kill()  # one that is stopped obeys nothing else

    timer = threading.Timer(seconds, end_helper)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception:
        if not late.is_set():
            raise
    finally:
        timer.cancel()
    if late.is_set():
        raise TimeoutError(f"its helper process gave no answer for {seconds:g} s, and is ended")


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> Any:
    """Return W&B's table of rows, whose class has no types.

    Args:
        rows: Values by column.
        columns: Of the table; None: those whose value is a number, a text or null in every row.
    """
    import wandb

    if columns is None:
        keys = dict.fromkeys(key for row in rows for key in row)
        columns = [key for key in keys if all(isinstance(row.get(key), int | float | str | None) for row in rows)]
    data = [[shown(row.get(column)) for column in columns] for row in rows]
    return wandb.Table(columns=shown(columns), data=data, allow_mixed_types=True)


def shown(value: Any) -> Any:
    """Return plain values with texts as a page may show them."""
    if isinstance(value, Mapping):
        return {shown(key): shown(inner) for key, inner in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [shown(inner) for inner in cast(list[Any], value)]
    return printable(value) if isinstance(value, str) else value


def slurm_job_id(environment: Mapping[str, str]) -> str | None:
    """Return the job of this process, for an array the one number all its tasks share; None outside of Slurm."""
    return environment.get("SLURM_ARRAY_JOB_ID") or environment.get("SLURM_JOB_ID") or None


def why_not_online() -> str | None:
    """Say in a clause why this machine cannot log online now; None if it can."""
    try:
        import wandb
        from wandb.sdk.lib import wbauth

        url = wandb.setup().settings.base_url
        if wbauth.authenticate_session(host=url, source="squeezewire", prompt=False, update_session=False) is None:
            return "no API key is configured (`wandb login`, or WANDB_API_KEY)"
    except Exception as error:
        return " ".join(str(error).split())[:200]
    try:
        urllib.request.urlopen(url, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError as answer:
        answer.close()  # any answer is an answer
    except (OSError, ValueError) as error:
        return f"{url} does not answer ({getattr(error, 'reason', error)})"
    return None


def _warn(text: str) -> None:
    print(f"warning: {text}.", file=sys.stderr, flush=True)
