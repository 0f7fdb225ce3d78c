"""One set of pins: pyproject's ranges, constraints.txt and environment.yml say the same."""

import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
RANGES = {
    canonicalize_name(requirement.name): requirement
    for text in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"])
    if (requirement := Requirement(text))
}


def pins(lines: list[str]) -> dict[str, str]:
    """`name==version` lines as a dictionary."""
    found = [re.fullmatch(r"([\w.\-]+)(?:\[\w+\])?==(\S+)", line) for line in lines]
    return {canonicalize_name(match[1]): match[2] for match in found if match}


CONSTRAINTS = pins((REPOSITORY / "constraints.txt").read_text().splitlines())
CONDA = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
PIP_LINES: list[str] = next(entry["pip"] for entry in CONDA["dependencies"] if isinstance(entry, dict))


def test_every_line_of_the_constraints_is_a_pin() -> None:
    lines = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert len(CONSTRAINTS) == len(lines)


def test_every_dependency_is_pinned_within_its_range() -> None:
    for name, requirement in RANGES.items():
        assert name in CONSTRAINTS, f"{name} is in pyproject.toml but not pinned in constraints.txt"
        assert requirement.specifier.contains(CONSTRAINTS[name]), f"{name}=={CONSTRAINTS[name]} is not in {requirement}"
        assert requirement.specifier, f"{name} has no range in pyproject.toml"


def test_environment_yml_has_the_same_pins() -> None:
    assert pins(PIP_LINES) == {name: CONSTRAINTS[name] for name in RANGES}
    # The rest of pip's lines: everything else pinned by reference, and the project itself, so that `pipeline` is found.
    assert [line for line in PIP_LINES if "==" not in line] == ["-c constraints.txt", "-e ."]


def test_environment_yml_has_a_python_the_project_accepts() -> None:
    (version,) = [entry[len("python=") :] for entry in CONDA["dependencies"] if str(entry).startswith("python=")]
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{version}.0")
    assert version == "3.11"  # what the Makefile and CI use
    assert f"PYTHON ?= python{version}" in (REPOSITORY / "Makefile").read_text()
