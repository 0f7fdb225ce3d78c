"""What others depend on: every command, key, choice, exit code, metric and JSON key stands in docs/surface.txt."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(REPOSITORY / "docs"))

import generate  # noqa: E402


def difference(before: str, after: str) -> dict[str, list[str]]:
    """Lines that came and lines that went."""
    old, new = set(before.splitlines()), set(after.splitlines())
    return {"grown by": sorted(new - old), "lost": sorted(old - new)}


@pytest.fixture(scope="module")
def surface() -> str:
    """The public surface as the code has it."""
    return generate.surface()


def test_the_surface_is_the_written_one(surface: str) -> None:
    """If it grew on purpose: `make docs`. What was lost breaks somebody's command, script or dashboard."""
    written = (REPOSITORY / "docs/surface.txt").read_text()
    assert difference(written, surface) == {"grown by": [], "lost": []}


def test_growth_and_loss_are_told_apart() -> None:
    assert difference("key train a\nkey train b\n", "key train a\nkey train c\n") == {
        "grown by": ["key train c"],
        "lost": ["key train b"],
    }


@pytest.mark.parametrize(
    "line",
    [
        "key train batch.global_size",
        "key compare data.root",
        "key lab bandwidth",
        "choice model=squeezenet1_0",
        "choice comm=powersgd",
        "metric train/loss",
        "metric comm/server_egress_bytes",
        "metric samples",
        "json ledger gradient_bytes",
        "json ledger transport.residual_bytes_per_rank",
        "json ledger attempts[].measured.rows[].phase",
        "json manifest splits.*.shards[].sha256",
        "json evaluation top1",
        "exit code 75 PREEMPTED",
        "command requeue",
    ],
)
def test_every_kind_of_name_is_in_it(surface: str, line: str) -> None:
    assert line in surface.splitlines()


def test_every_group_of_conf_is_in_it(surface: str) -> None:
    tracked = subprocess.run(["git", "ls-files", "conf"], cwd=REPOSITORY, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    for path in map(Path, tracked):
        if len(path.parts) == 3:
            assert f"choice {path.parts[1]}={path.stem}" in surface.splitlines()
