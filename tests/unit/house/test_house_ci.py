"""What CI promises: the same commands as a person's, and no test that quietly did not run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[3]
LINT = re.compile(
    r"^\.venv/bin/(python -m (ruff|pyright)|lint-imports|shellcheck|codespell|check-jsonschema)\b.*$",
    re.MULTILINE,
)

SKIPPING = """
import pytest
@pytest.fixture
def data():
    pytest.skip("shared data not found")
def test_fixture(data): pass
def test_inside(): pytest.skip("Slurm is not installed")
@pytest.mark.skipif(True, reason="not on this system")
def test_mark(): pass
def test_hardware(): pytest.skip("needs a GPU")
@pytest.mark.xfail(reason="known")
def test_expected(): assert False
def test_fine(): pass
"""


def outcomes(directory: Path, in_ci: bool) -> dict[str, int]:
    """Counts in pytest's closing line for tests under the project's own hooks."""
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | ({"CI": "true"} if in_ci else {})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "."]
    answer = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=120)
    closing = answer.stdout.strip().splitlines()[-1]
    return {word.removesuffix("s"): int(count) for count, word in re.findall(r"(\d+) ([a-z]+)", closing)}


@pytest.mark.not_quick
def test_in_ci_only_hardware_may_skip(tmp_path: Path) -> None:
    hooks = "pytest_make_collect_report, pytest_runtest_makereport"
    line = f"from tests.skips import {hooks}"
    assert line in (REPOSITORY / "tests/conftest.py").read_text()
    (tmp_path / "conftest.py").write_text(line)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_skipping.py").write_text(SKIPPING)
    (tmp_path / "test_module.py").write_text("import pytest\npytest.skip('no data', allow_module_level=True)\n")
    assert outcomes(tmp_path, in_ci=False) == {"passed": 1, "skipped": 5, "xfailed": 1}
    # Failed where the test itself skipped; an error where its fixture, its mark or its module did.
    assert outcomes(tmp_path, in_ci=True) == {"passed": 1, "failed": 1, "error": 3, "skipped": 1, "xfailed": 1}


def test_pre_commit_runs_what_make_lint_runs() -> None:
    recipe = subprocess.run(["make", "--dry-run", "lint"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    config = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert [repository["repo"] for repository in config["repos"]] == ["local"]  # a remote one would be downloaded
    assert {hook["language"] for hook in hooks} == {"system"}
    commands = [match.group() for match in LINT.finditer(recipe.stdout)]
    assert len(commands) >= 6
    assert [hook["entry"] for hook in hooks if LINT.match(hook["entry"])] == commands


@pytest.mark.not_quick
def test_pre_commit_accepts_its_configuration() -> None:
    command = [sys.executable, "-m", "pre_commit", "validate-config", ".pre-commit-config.yaml"]
    assert subprocess.run(command, cwd=REPOSITORY, timeout=120).returncode == 0


@pytest.mark.parametrize("target", ["make lint", "make test"])
def test_ci_runs_the_commands_people_run(target: str) -> None:
    lines = (REPOSITORY / ".ci/run").read_text().splitlines()
    assert any(line.partition("#")[0].strip() == target for line in lines)


def test_every_make_target_is_explained() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^\.PHONY: ([a-z-]+)$", makefile, re.MULTILINE))
    printed = subprocess.run(["make"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert {"help", "venv", "demo", "test", "test-all", "lint", "bench"} <= targets
    assert set(re.findall(r"^  make ([a-z-]+) ", printed, re.MULTILINE)) == targets
