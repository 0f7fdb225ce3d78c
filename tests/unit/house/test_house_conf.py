"""Every file of conf/ composes, becomes a dataclass, and names things that exist."""

import ast
import importlib
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.cli import compose, compose_container
from pipeline.core.groups import config_groups

REPOSITORY = Path(__file__).resolve().parents[3]
CONF = REPOSITORY / "conf"
# Keys without a default, per command.
NEEDED = {
    "train": ["name=x", "data.root=x", "trainer.max_steps=1"],
    "evaluate": ["checkpoint=x", "data.root=x"],
    "predict": ["checkpoint=x", "source=x"],
    "export": ["checkpoint=x", "data.root=x"],
    "prepare": ["source=builtin", "out=x"],
    "compare": ["data.root=x"],
    "plan": ["run=x"],
    "study": ["study=strategies"],
    "report": ["run=x"],
    "meter": ["name=x"],
}


def schemas() -> dict[str, type[Any]]:
    """Command -> dataclass, read from each command's `run_command("name", Schema, ...)`."""
    found = {}
    for path in sorted((REPOSITORY / "pipeline").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "run_command" and len(node.args) == 3:
                command = ast.literal_eval(node.args[0])
                found[command] = getattr(importlib.import_module(f"pipeline.{path.stem}"), ast.unparse(node.args[1]))
    return found


SCHEMAS = schemas()
GROUPS = config_groups()
CHOICES = [(group, choice) for group, choices in GROUPS.items() for choice in choices]


def needed(command: str) -> list[str]:
    """Overrides that give every mandatory key a value."""
    return NEEDED.get(command, [])


@cache
def command_with(group: str) -> str:
    """A command whose configuration has this group: `train` where it does, and where it lies in another group."""
    commands = sorted(SCHEMAS, key=lambda command: command != "train")
    having = (one for one in commands if group in compose_container(one, SCHEMAS[one], needed(one)))
    return next(having, "train")


def test_every_command_has_a_configuration_and_back() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == set(SCHEMAS)
    assert {path.relative_to(CONF).parts[0] for path in CONF.glob("*/*.yaml")} == set(GROUPS)
    assert not [path for path in CONF.rglob("*") if path.is_file() and path.suffix != ".yaml"]


@pytest.mark.parametrize("command", SCHEMAS)
def test_command_composes(command: str) -> None:
    assert isinstance(compose(command, SCHEMAS[command], needed(command)), SCHEMAS[command])


@pytest.mark.parametrize(("group", "choice"), [pair for pair in CHOICES if pair[0] not in ("experiment", "model")])
def test_choice_composes(group: str, choice: str) -> None:
    """Models do in tests/unit/models/test_zoo.py."""
    command = command_with(group)
    compose(command, SCHEMAS[command], [f"{group}={choice}", *needed(command)])


@pytest.mark.parametrize("choice", GROUPS.get("experiment", ()))
def test_experiment_composes(choice: str) -> None:
    """As a person runs it: `experiment=NAME` and at most where the data is."""
    text = (CONF / f"experiment/{choice}.yaml").read_text()
    match = re.search(r"python -m pipeline\.(\w+) ", text)
    assert match, f"{choice}.yaml does not open with its command"
    overrides = [f"experiment={choice}"]
    if "data.root=" in text.partition("\n\n")[0]:
        overrides.append("data.root=x")
    compose(match[1], SCHEMAS[match[1]], overrides)


@pytest.mark.parametrize("choice", GROUPS.get("experiment", ()))
def test_experiment_opens_with_its_record(choice: str) -> None:
    """Command, machine, time, accuracy, bytes: what it costs and gives, before what it sets."""
    lines = (CONF / f"experiment/{choice}.yaml").read_text().splitlines()
    head = "\n".join(line for line in lines[:20] if line.startswith("#"))
    assert lines[0].startswith("#")
    for pattern in (r"python -m pipeline\.", "machine", "time", "top-1", "gigabytes|GB"):
        assert re.search(pattern, head, re.IGNORECASE), f"{choice}.yaml does not state its {pattern}"
