"""`--help` answers at once and says what can be set."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[3]
COMMANDS = [
    path.stem
    for path in sorted((REPOSITORY / "pipeline").glob("*.py"))
    if "run_command(" in path.read_text() and path.stem != "cli"
]
HEAVY = {"torch", "torchvision", "pytorch_lightning", "wandb", "matplotlib"}
"""What takes seconds to import: without it help is there within one."""
SAY_WHAT_WAS_IMPORTED = """
import atexit, runpy, sys
atexit.register(lambda: print(*sorted(sys.modules), file=sys.stderr))
command = sys.argv.pop(1)
runpy.run_module(f"pipeline.{command}", run_name="__main__")
"""


def test_the_commands_are_there() -> None:
    assert {"train", "evaluate", "predict", "prepare", "compare"} <= set(COMMANDS)


@pytest.mark.not_quick
@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_no_torch_and_lists_every_key(command: str) -> None:
    line = [sys.executable, "-W", "error", "-c", SAY_WHAT_WAS_IMPORTED, command, "--help"]
    answer = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    modules = set(answer.stderr.split())
    assert "pipeline.core.help" in modules and not modules & HEAVY
    configuration = REPOSITORY / f"conf/{command}.yaml"
    if not configuration.exists():  # a command about trainings takes what `train` takes
        configuration = REPOSITORY / "conf/train.yaml"
    settings = yaml.safe_load(configuration.read_text())
    groups = {name for entry in settings.pop("defaults", []) if isinstance(entry, dict) for name in entry}
    for key in settings:
        assert f" {key}=" in answer.stdout or f" {key}." in answer.stdout, key
    for group in groups:
        assert f"{group}: " in answer.stdout, group
