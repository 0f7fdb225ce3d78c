"""What the benchmarks share: running our commands, reading what they left, and writing a result with its conditions.

Each benchmark runs the public commands as a user would, works below `runs/benchmarks/` and `shards/benchmarks/`, and
leaves one JSON file in `benchmarks/results/`.
"""

import argparse
import datetime
import json
import math
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.files import write_json_atomic
from pipeline.run.provenance import CODE_ROOT, PACKAGES, describe_cpu, describe_git, package_version

RUNS, SHARDS = Path("runs/benchmarks"), Path("shards/benchmarks")
RESULTS = Path("benchmarks/results")


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the options every benchmark has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--results", type=Path, default=RESULTS, help="directory of the result files (%(default)s)")
    return made


@dataclass(frozen=True)
class Floor:
    """A bound that a figure must keep."""

    figure: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def is_kept(self) -> bool:
        """NaN keeps no bound."""
        low = -math.inf if self.at_least is None else self.at_least
        high = math.inf if self.at_most is None else self.at_most
        return low <= self.value <= high

    def __str__(self) -> str:
        bound = f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"
        return f"{self.figure} {self.value:.4g} (must be {bound}): {'kept' if self.is_kept else 'MISSED'}"


@dataclass
class Result:
    """A published figure under way: what was asked, what came out, and what must hold."""

    name: str
    settings: Mapping[str, Any]
    figures: dict[str, Any] = field(default_factory=dict)
    floors: list[Floor] = field(default_factory=list)

    def finish(self, directory: Path) -> int:
        """Write `<directory>/<name>.json`, print the floors; returns the exit code, 1 where a floor was missed."""
        module = Path(sys.argv[0]).stem  # one may publish several figures
        content = {
            "schema": 1,
            "benchmark": self.name,
            "command": shlex.join(["python", "-m", f"benchmarks.{module}", *map(portable, sys.argv[1:])]),
            "conditions": conditions(),
            "settings": {key: portable(value) for key, value in self.settings.items()},
            **self.figures,
            "floors": [
                {"figure": floor.figure, "value": floor.value, "at_least": floor.at_least, "at_most": floor.at_most}
                for floor in self.floors
            ],
            "passed": all(floor.is_kept for floor in self.floors),
        }
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.name}.json"
        write_json_atomic(path, content)
        for floor in self.floors:
            print(f"  {floor}")
        print(f"  written to {path}", flush=True)
        return 0 if content["passed"] else 1


def portable(value: Any) -> Any:
    """As it may be published: a path by its name alone, for where it lies on this machine helps nobody."""
    path = Path(value) if isinstance(value, str | Path) else None
    if path is not None and path.is_absolute():
        return path.name
    return str(value) if isinstance(value, Path) else value


def conditions() -> dict[str, Any]:
    """Machine, versions, code and date."""
    packages = {name: package_version(name) for name in PACKAGES}
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": describe_cpu(),
        "packages": packages,
        "git": {key: value for key, value in describe_git(CODE_ROOT).items() if key != "reason"},
    }


def print_conditions() -> None:
    """In a few lines, before anything is measured."""
    told = conditions()
    cpu, packages = told["cpu"], told["packages"]
    print(f"{told['date']}  {cpu['model']}, {cpu['num_cores']} cores ({', '.join(cpu['flags'])})")
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "pytorch-lightning", "numpy"))
    print(f"  {versions}; commit {told['git']['commit']}{' with changes' if told['git']['dirty'] else ''}", flush=True)


def run(command: str, *overrides: str) -> float:
    """`python -m pipeline.<command>` with these overrides. Returns its seconds; ends the benchmark if it fails."""
    print(f"$ python -m pipeline.{command} {shlex.join(overrides)}", flush=True)
    started = time.monotonic()
    code = subprocess.run([sys.executable, "-m", f"pipeline.{command}", *overrides], check=False).returncode
    if code:
        sys.exit(f"pipeline.{command} ended with {code}.")
    return time.monotonic() - started


def prepare_for_timing(name: str, num_pictures: int) -> None:
    """Shards of at least so many pictures, and no run of an earlier time. By whoever starts the ranks."""
    print_conditions()
    run("prepare", "source=builtin", f"out={SHARDS / name}", f"num_images={max(200, num_pictures)}")
    fresh(name)


def fresh(name: str) -> str:
    """The run `benchmarks/<name>`, its directory removed: a figure is of one attempt, never of a resumed one."""
    shutil.rmtree(RUNS / name, ignore_errors=True)
    return f"benchmarks/{name}"


def read_rows(name: str) -> list[dict[str, Any]]:
    """metrics.jsonl of the run `benchmarks/<name>`."""
    from pipeline.run.record.metrics_log import read_rows as read

    return list(read(RUNS / name / "metrics.jsonl"))


def read_json(path: Path) -> dict[str, Any]:
    """One object."""
    return json.loads(path.read_text())


def last_of(rows: Sequence[Mapping[str, Any]], key: str) -> Any:
    """The latest value of `key` that was recorded, or None."""
    return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)


def median_of(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    """Over the steps, the first left out: it carries the start."""
    return statistics.median(row[key] for row in rows[1:] or rows)


def show(name: str, row: Mapping[str, Any]) -> None:
    """One line of what was found."""
    values = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
    print(f"  {name}: {', '.join(values)}", flush=True)


def train_overrides(seed: int, steps: int | None, extra: Sequence[str]) -> list[str]:
    """A seed, fewer steps for a trial of the benchmark itself, and the user's own overrides, which win."""
    limit = [] if steps is None else [f"trainer.max_steps={steps}"]
    return [f"seed={seed}", *limit, *extra]
