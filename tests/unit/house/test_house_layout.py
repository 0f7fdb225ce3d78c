"""The house beyond what `make lint` holds: short modules, quick commands, nothing unpickled, tests that mirror it."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
PIPELINE = REPOSITORY / "pipeline"
MODULES = sorted(PIPELINE.rglob("*.py"))
LONGEST_MODULE_LINES = 400
LONGEST_COMMAND_LINES = 120
# What a command may import before it knows that it will run: `--help` must not wait for torch.
LIGHT = ("pipeline.config", "pipeline.core", "pipeline.metering.door", "pipeline.metering.settings")


@cache
def syntax(path: Path) -> ast.Module:
    """The parsed module."""
    return ast.parse(path.read_text(), str(path))


def name_of(path: Path) -> str:
    """pipeline/run/launch/supervisor.py -> pipeline.run.launch.supervisor"""
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST, module: str) -> Iterator[str]:
    """Full names of everything imported anywhere in `tree`, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def commands() -> list[Path]:
    """Modules that are run with `python -m`."""
    return [path for path in PIPELINE.glob("*.py") if "run_command(" in path.read_text() and path.stem != "cli"]


PLANTED = {
    "core/errors.py": ("from pipeline.config import training", "The stair"),
    "data/order.py": ("from pipeline.comm import hooks", "The stair"),
    "comparison/rows.py": (
        "from pipeline.training import steps",
        "A comparison, and a study, starts commands and reads runs",
    ),
    "studying/runs.py": (
        "from pipeline.training import steps",
        "A comparison, and a study, starts commands and reads runs",
    ),
    "comm/hooks.py": ("from pipeline.comm import ddp", "No circle, on any floor"),
    "data/index.py": ("from pipeline.data.prepare import writer", "Data: reading knows nothing of writing"),
    "oddments.py": ("", "The stair"),
}


@pytest.mark.not_quick
@pytest.mark.parametrize("file", PLANTED)
def test_the_contracts_catch_a_planted_violation(file: str, tmp_path: Path) -> None:
    """`make lint` runs them on the house as it stands; here each is seen to bite."""
    line, contract = PLANTED[file]
    shutil.copytree(PIPELINE, tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    path = tmp_path / "pipeline" / file
    path.write_text((path.read_text() if path.exists() else "") + f"\n{line}\n")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert re.search(rf"{re.escape(contract)}.* BROKEN", ended.stdout), ended.stdout


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_stay_short(path: Path) -> None:
    limit = LONGEST_COMMAND_LINES if path in commands() else LONGEST_MODULE_LINES
    num_lines = len(path.read_text().splitlines())
    assert num_lines <= limit


@pytest.mark.parametrize("path", commands(), ids=name_of)
def test_commands_import_nothing_heavy_at_the_top(path: Path) -> None:
    top = [node for node in syntax(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name for node in top for name in imports(node, name_of(path))}
    ours = {name for name in names if name.startswith("pipeline")}
    assert all(any(name == light or name.startswith(f"{light}.") for light in LIGHT) for name in ours), ours
    heavy = {"torch", "torchvision", "pytorch_lightning", "wandb", "matplotlib", "numpy", "PIL"}
    assert not {name.partition(".")[0] for name in names} & heavy


@pytest.mark.parametrize("folder", ["pipeline", "benchmarks"])
def test_nothing_is_unpickled_or_run(folder: str) -> None:
    """Every torch.load says weights_only=True, no array is loaded as objects, nothing is made that a string names.

    Beyond ruff's rules S102, S301, S302, S307, S506, S602, S604 and S605.
    """
    for path in sorted((REPOSITORY / folder).rglob("*.py")):
        for node in ast.walk(syntax(path)):
            if not isinstance(node, ast.Call):
                continue
            function, where = ast.unparse(node.func), f"{path}:{node.lineno}"
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            default = "unsaid" if function in ("torch.load", "load_state_dict_from_url") else "True"
            assert said.get("weights_only", default) == "True", where
            assert said.get("allow_pickle") in (None, "False"), where
            assert function not in ("yaml.load_all", "yaml.unsafe_load", "yaml.full_load"), where
            assert function.rpartition(".")[2] not in ("instantiate", "get_class", "get_method"), where


def test_tests_mirror_the_house() -> None:
    folders = {
        path.name for path in (REPOSITORY / "tests/unit").iterdir() if path.is_dir() and path.name[0] not in "._"
    }
    assert folders <= {"house", *(path.name for path in PIPELINE.iterdir() if path.is_dir())}
