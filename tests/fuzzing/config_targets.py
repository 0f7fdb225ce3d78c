"""Overrides, configuration files, and what a run left of its configuration."""

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml

from pipeline.comparison import measure
from pipeline.config.compare import CompareConfig
from pipeline.config.dashboard import DashboardConfig
from pipeline.config.evaluate import EvaluateConfig
from pipeline.config.lab import LabConfig
from pipeline.config.meter import MeterConfig
from pipeline.config.plan import PlanConfig
from pipeline.config.prepare import PrepareConfig
from pipeline.config.training import TrainConfig
from pipeline.core.cli import compose, compose_container
from pipeline.core.errors import ExitCode
from pipeline.core.trees import plain
from pipeline.core.typed import build
from pipeline.reporting import sections
from pipeline.reporting.runs import read_run
from tests.fuzzing.damage import TEXTS, damage_bytes, damage_tree, odd_value
from tests.fuzzing.pool import Target, WrongResultError
from tests.making.runs import handmade_run

BASES: dict[str, tuple[type[Any], list[str]]] = {
    "train": (TrainConfig, ["name=a", "data.root=b", "trainer.max_steps=4", "model=squeezenet1_0", "recipe.lr=0.1"]),
    "evaluate": (EvaluateConfig, ["name=a", "data.root=b", "checkpoint=c", "data.split=val", "batch_per_rank=8"]),
    "prepare": (PrepareConfig, ["source=a", "out=b", "short_side=64", "num_workers=2", "split=train"]),
    "compare": (CompareConfig, ["name=a", "models=[squeezenet1_0,alexnet]", "hooks=[none,bf16]", "steps=4"]),
    "plan": (PlanConfig, ["run=a", "servers=[2,4]", "bandwidth=[10Gbit,1Gbit]", "epochs=90"]),
    "lab": (LabConfig, ["servers=2", "bandwidth=1Gbit", "placement=interleaved"]),
    "meter": (MeterConfig, ["name=a", "placement=rank"]),
    "dashboard": (DashboardConfig, ["entity=a"]),
}


def config_targets(under: Path) -> list[Target]:
    """The targets; a sound run is left below `under`."""
    containers = {command: compose_container(command, schema, asked) for command, (schema, asked) in BASES.items()}
    run = handmade_run().write(under / "handmade")

    def override(random: Random, case: Path) -> Callable[[], object]:
        del case
        command = random.choice(list(BASES))
        schema, asked = BASES[command]
        changed = [_damage_override(random, text) if random.random() < 0.4 else text for text in asked]
        if random.random() < 0.3:
            changed.append(_damage_override(random, random.choice(asked)))
        return lambda: _check_config(compose(command, schema, changed))

    def values(random: Random, case: Path) -> Callable[[], object]:
        """As a file of the configuration would hold them."""
        del case
        command = random.choice(list(BASES))
        text = yaml.safe_dump(damage_tree(random, containers[command]))
        if random.random() < 0.2:
            text = damage_bytes(random, text.encode()).decode(errors="replace")

        def use() -> None:
            try:
                found = yaml.safe_load(text)
            except (yaml.YAMLError, ValueError):  # the reader's own refusal
                return
            if isinstance(found, dict):
                _check_config(build(BASES[command][0], found))

        return use

    def run_files(random: Random, case: Path) -> Callable[[], object]:
        there = Path(shutil.copytree(run, case / "run", ignore=shutil.ignore_patterns("checkpoints", "*.html")))
        path = there / "config.yaml"
        content = path.read_bytes()
        if random.random() < 0.7:
            content = yaml.safe_dump(damage_tree(random, yaml.safe_load(content))).encode(errors="surrogatepass")
        else:
            content = damage_bytes(random, content)
        path.write_bytes(content)
        return lambda: random.choice((describe, compare))(there)

    def compare(run: Path) -> None:
        measure.read_outcomes(dataclasses.replace(comparing, runs=(str(run),)))

    def describe(directory: Path) -> None:
        """As the report does, but that nothing is drawn: what is drawn comes from other files."""
        run = read_run(directory)
        for part in (sections.run_sentence, sections.merit, sections.run_conditions, sections.command_of):
            part(run)

    comparing = compose("compare", CompareConfig, ["runs=[x]", "models=[]"])
    compare(run)  # what is sound passes, and is imported before the processes of the cases are forked
    describe(run)
    config_error, any_error = frozenset({int(ExitCode.CONFIG)}), frozenset({int(ExitCode.CONFIG), int(ExitCode.DATA)})
    return [
        Target("override", override, config_error),
        Target("values", values, config_error),
        Target("run-config", run_files, any_error | {int(ExitCode.LEDGER)}),
    ]


def _damage_override(random: Random, text: str) -> str:
    key, _, value = text.partition("=")
    place = random.randrange(len(text))
    odd = str(odd_value(random, random.choice([value, 1, 0.5])))
    return random.choice(
        [
            f"{key}={odd}",
            f"{key}={random.choice(TEXTS)}",
            f"{key}=[{odd},{odd}]",
            f"{key}={{a:{odd}}}",
            f"{key}.x={value}",
            f"+{text}",
            f"++{text}",
            f"~{key}",
            text[:place],
            text[:place] + random.choice("[]{}'\"\\$,:=@~ \n\t#%é\0") + text[place:],
            text.upper(),
            f"{key}@x={value}",
            f"{key}=${{{random.choice(['seed', 'name', 'a.b', 'oc.env:HOME', ''])}}}",
            f"{key}={'9' * random.choice((20, 400, 5000))}",
            f"{key}={'[' * random.choice((3, 200, 5000))}",
        ]
    )


def _check_config(config: Any) -> None:
    """Raise WrongResultError for a value that no command can mean; nothing that is derived may hang or fail."""
    for key, value in _leaves(dataclasses.asdict(config)):
        if isinstance(value, float) and not math.isfinite(value):
            raise WrongResultError(f"{key}={value}")
        if isinstance(value, str) and ("\0" in value or any("\ud800" <= c <= "\udfff" for c in value)):
            raise WrongResultError(f"{key}={value!r} can stand in no file")
    if isinstance(config, TrainConfig):
        config.batch.split(1)
    for name in ("input", "directory", "step_timeout_seconds", "bandwidth_bits_per_second"):
        getattr(config, name, None)
    again = yaml.safe_load(yaml.safe_dump(plain(dataclasses.asdict(config))))
    if again != plain(dataclasses.asdict(config)):
        raise WrongResultError("config.yaml would say something else")


def _leaves(value: Any, key: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for name, inner in value.items() for leaf in _leaves(inner, f"{key}.{name}")]
    if isinstance(value, list | tuple):
        return [leaf for inner in value for leaf in _leaves(inner, key)]
    return [(key, value)]
