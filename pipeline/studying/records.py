"""What each run of a study was told and how it ended, kept beside its directory; and a study's one owner at a time."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict, cast

from pipeline.config.data import DataConfig
from pipeline.config.training import ClusterConfig
from pipeline.core.files import write_json_atomic
from pipeline.core.overrides import literal, split_override
from pipeline.core.trees import flat
from pipeline.run.lock import RunLock

LOCK = "lock"
"""In the study's directory."""
SUFFIXES = (".html", ".csv", ".json", ".png", ".svg")
"""Of the study's own files."""


class RecordJson(TypedDict):
    """What the study knows of a run that it has begun."""

    overrides: list[str]
    """Of `train`."""
    conditions: dict[str, Any]
    """What it was told besides, by key; empty in a record of a version that did not keep it."""
    exit_code: int | None
    """Of the training; null: it has not ended by itself."""


def record_path(directory: Path) -> Path:
    """Return where the record of a run's directory lies."""
    return directory.with_name(f"{directory.name}.json")


def read_record(directory: Path) -> RecordJson | None:
    """Return what `write_record` left of a run; None where nothing was, or it cannot be read."""
    try:
        record = json.loads(record_path(directory).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict):
        return None
    found = cast(dict[str, Any], {"conditions": {}, "exit_code": None, **record})
    overrides = found.get("overrides")
    is_readable = isinstance(overrides, list) and all(isinstance(one, str) for one in cast("list[Any]", overrides))
    return cast(RecordJson, found) if is_readable and isinstance(found["conditions"], dict) else None


def write_record(directory: Path, overrides: Sequence[str], conditions: Mapping[str, Any], code: int | None) -> None:
    """Write down what a run is told.

    Args:
        directory: Of the run.
        overrides: Of `train`.
        conditions: What else it stands on, by key.
        code: Its exit code; None: it is about to begin.
    """
    record_path(directory).parent.mkdir(parents=True, exist_ok=True)
    content: RecordJson = {"overrides": list(overrides), "conditions": dict(conditions), "exit_code": code}
    write_json_atomic(record_path(directory), content)


def differing_keys(record: RecordJson, overrides: Sequence[str], conditions: Mapping[str, Any]) -> list[str]:
    """Return the keys of which a record and what would be told now say different things.

    A key that the record does not have, of a version before it, is the same where it has its default.

    Args:
        record: Of an earlier start.
        overrides: Of `train` now.
        conditions: As in `write_record`, now.
    """
    told, now = (dict(map(split_override, each)) for each in (record["overrides"], overrides))
    earlier = {**_defaults(), **told}
    differing = {key for key in told.keys() | now.keys() if earlier.get(key) != now.get(key)}
    return sorted(differing | {key for key, value in record["conditions"].items() if value != conditions.get(key)})


def _defaults() -> dict[str, str]:
    groups = {"data": asdict(DataConfig()), "cluster": asdict(ClusterConfig())}
    return {key: literal(value) for key, value in flat(groups).items()}


def earlier_shards(directory: Path) -> str | None:
    """Return the hash of the training pictures that a run began with; None where there is none or it does not say."""
    try:
        return json.loads((directory / "environment.json").read_text())["shards"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def owned(directory: Path, name: str, part: str | None = None) -> Iterator[None]:
    """Own a study, or a part of it: no second command trains that, or writes its report, meanwhile.

    Parts have no variant in common. What a part trains is also kept from a command for all by the lock of each run.

    Args:
        directory: Of the study; it is made.
        name: Its name, for messages.
        part: `study.part`.

    Yields:
        Nothing.

    Raises:
        ConfigError: Another process is at it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = RunLock(directory / (LOCK if part is None else f"{LOCK}.{part.replace('/', 'of')}"), name)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()
