"""What may be tracked. Also a commit hook: fast, standard library and PyYAML only."""

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[3]
LARGEST_BYTES = 500_000

# Joined from pieces, so that this file does not match itself.
FORBIDDEN = {
    "a private key": "-----BEGIN " + r"[A-Z ]*PRIVATE KEY",
    "a path of one machine": r"(?<![\w.\-/$}])/(?:"
    + "|".join(("work", "opt", "home", "Users"))
    + r")/\w|/ro"
    + r"ot/\.",
    "a package registry's host": "|".join((r"pypi\." + "org", r"python" + r"hosted\.org", r"npm" + r"js\.(?:org|com)")),
    "a W&B key": r"\b(?:wandb_v1_\w{20}|WANDB_API_" + r"KEY\s*=\s*['\"]?[0-9a-f]{40})",
}


@cache
def tracked() -> list[Path]:
    """Every file git tracks or is about to."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := REPOSITORY / name).is_file()]


def test_no_large_file() -> None:
    sizes = {str(path.relative_to(REPOSITORY)): path.stat().st_size for path in tracked()}
    assert {name: size for name, size in sizes.items() if size > LARGEST_BYTES} == {}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_tracked_file_holds(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what])
    found = [
        f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()[:100]}"
        for path in tracked()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    "text",
    ["-----BEGIN RSA " + "PRIVATE KEY-----", "root=" + "/ho" + "me/me/data", "--index https://py" + "pi.org/simple"],
)
def test_the_patterns_find_what_they_should(text: str) -> None:
    assert any(re.search(pattern, text) for pattern in FORBIDDEN.values())


def test_every_yaml_is_plain() -> None:
    """Parses without tags, and names nothing to import: a configuration is data."""
    for path in tracked():
        if path.suffix in (".yaml", ".yml"):
            yaml.safe_load(path.read_text())  # a tag such as !!python/object raises
            assert "_target_" not in path.read_text(), path


def test_scripts_can_be_run_and_are_bash() -> None:
    for path in tracked():
        if path.suffix == ".sh" or path.parent.name == ".ci":
            assert subprocess.run(["bash", "-n", str(path)], timeout=30).returncode == 0
            starts = path.read_text().startswith("#!/bin/bash\n")
            assert starts == bool(path.stat().st_mode & 0o100), (
                f"{path}: a first line #!/bin/bash and chmod +x go together"
            )


def test_the_table_of_faults_names_tests_that_exist() -> None:
    table = (REPOSITORY / "tests/README.md").read_text()
    named = re.findall(r"`(\w+(?:/\w+)+\.py)(?:::(test_\w+))?`", table)
    assert len(named) > 80
    for file, test in named:
        path = REPOSITORY / "tests" / file
        assert path.is_file(), file
        assert not test or f"def {test}(" in path.read_text(), f"{file}::{test}"
