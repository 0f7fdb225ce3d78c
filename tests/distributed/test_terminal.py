"""What a terminal of 80 or 120 columns shows of a training and of a comparison: tmux is the terminal."""

import re
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.commands import HERE, MARK, SMALL, clean_environment, marked
from tests.waiting import wait_until

ROWS, LONGEST_SECONDS = 60, 240
LAST_LINES = (
    r"  learnt +training loss [\d.]+, top-1 [\d.]+%; validation loss [\d.]+, top-1 [\d.]+%; best [\d.]+% at step 60\.$",
    r"  the wire +[\d.]+ [KMG]B sent in training by all ranks, as predicted, to the byte: the ledger closed$",
    r"  report +runs/seen/report\.html$",
)


@pytest.fixture(params=[80, pytest.param(120, marks=pytest.mark.slow)])
def columns(request: pytest.FixtureRequest) -> int:
    if shutil.which("tmux") is None:
        pytest.skip("needs tmux")
    return request.param


def tmux(server: str, *words: str) -> str:
    """What a command of tmux prints."""
    command = ["tmux", "-L", server, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def screens(columns: int, directory: Path, *words: str, expect: int = 0) -> list[list[str]]:
    """Run `python WORDS` in a terminal and return its lines, as often as they were looked at until the end.

    A line that the terminal itself broke, as it does in the middle of words, comes as one: it is too long.

    Args:
        columns: Width of the terminal in characters.
        directory: Where the user is.
        words: Of the command.
        expect: Its exit code.
    """
    mark = uuid.uuid4().hex
    server = f"squeezewire-{mark}"
    environment = {**clean_environment(), MARK: mark, "PYTHONPATH": str(HERE.parent), "TERM": "screen"}
    settings = [f"{name}={value}" for name, value in environment.items() if not name.startswith("TMUX")]
    command = f"{shlex.join(['env', '-i', *settings, sys.executable, *words])}; echo code=$?; exec sleep 600"
    size = ["-x", str(columns), "-y", str(ROWS)]
    seen: list[list[str]] = []
    tmux(server, "-f", "/dev/null", "new-session", "-d", "-c", str(directory), *size, command)
    try:
        deadline = time.monotonic() + LONGEST_SECONDS
        while not (seen and seen[-1] and seen[-1][-1].startswith("code=")):
            assert time.monotonic() < deadline, seen[-1]
            shown = tmux(server, "capture-pane", "-p", "-J", "-S", "-")
            seen.append([line.rstrip() for line in shown.splitlines() if line.strip()])
            time.sleep(0.1)
    finally:
        tmux(server, "kill-server")
        wait_until(lambda: not marked(mark), "processes are left", seconds=30)
    assert seen[-1].pop() == f"code={expect}", seen[-1]
    too_long = {line for lines in seen for line in lines if len(line) > columns or "…" in line}
    assert too_long == set()
    return seen


def whole(lines: list[str]) -> list[str]:
    """The lines as they would be on a wider terminal: what goes on below a label's text is put behind it."""
    return re.sub(r"\n {8,}", " ", "\n".join(lines)).splitlines()


def test_a_training_fits_and_ends_with_what_came_of_it(columns: int, shards: Path, tmp_path: Path) -> None:
    words = [f"data.root={shards}", "name=seen", "cluster.devices=2", "tracking=disabled"]
    steps = [
        "trainer.max_steps=60",
        "trainer.checkpoint_every_steps=30",
        "trainer.validate_every_steps=30",
        "recipe.lr=0.002",
    ]
    seen = screens(columns, tmp_path, "-m", "pipeline.train", *words, *SMALL, *steps)
    bars = {line for lines in seen for line in lines if re.search(r"^epoch [\d.]+/12\.0  loss .*━", line)}
    assert bars and all(("pictures/s" in line) == (columns >= 100) for line in bars)
    assert len([line for line in seen[-1] if ": validation loss" in line]) == 2
    *_, learnt, wire, report = whole(seen[-1])
    for pattern, line in zip(LAST_LINES, (learnt, wire, report), strict=True):
        assert re.match(pattern, line), line


def test_a_comparison_fits_and_ends_with_its_table(columns: int, shards: Path, tmp_path: Path) -> None:
    words = ["name=seen", "models=[squeezenet1_1,shufflenet_v2_x0_5]", f"data.root={shards}"]
    small = ["data.size=32", "steps=2", "alone=false", "tracking=disabled"]
    *_, last = screens(columns, tmp_path, "-m", "pipeline.compare", *words, *small)
    text = " ".join(last)
    assert re.search(r"squeezenet1_1 +[\d.]+ MB +1\.00× .*shufflenet_v2_x0_5 +[\d.]+ MB", text), text
    assert "exchanges" in text and text.endswith("Report: runs/seen/report.html")


def test_an_error_is_broken_between_words(columns: int, tmp_path: Path) -> None:
    words = ["name=seen", "data.root=nothing/there", "trainer.max_steps=1"]
    *_, last = screens(columns, tmp_path, "-m", "pipeline.train", *words, expect=3)
    assert len(last) > 1 and "error: data.root=nothing/there" in " ".join(last)
