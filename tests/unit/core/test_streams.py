"""What is printed is no reason to end: full disks, closed streams, readers that leave."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.not_quick

ROOT = Path(__file__).resolve().parents[3]
# Prints more than a pipe holds, and then does what counts: a file, whose number nothing printed to stderr may have.
PROGRAM = """
import os, sys, time
from pipeline.core.cli import run_command
from pipeline.config.dashboard import DashboardConfig

def body(config):
    kept = open(os.environ["KEPT"], "w")
    print("bee \\udce9 \\u00e9", flush=True)
    print("x" * 300_000, flush=True)
    print("of torch", file=sys.stderr)
    os.system("echo of a child; echo of a child >&2")
    kept.write("done")

run_command("dashboard", DashboardConfig, body, argv=["name=x"])
"""


def shell(script: str, kept: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a line of bash in which `$P` is the program; its stderr is the result's."""
    arguments = {"KEPT": str(kept), "PYTHON": sys.executable, "PROGRAM": PROGRAM, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "-c", f'p() {{ $PYTHON -c "$PROGRAM"; }}; {script}'],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **arguments, **environment},
    )


@pytest.mark.parametrize(
    ("script", "warnings"),
    [
        ("p > /dev/full", 1),
        ("p > /dev/full 2> /dev/full", 0),
        ("p <&- >&- 2>&-", 0),
        ("p 1</dev/null", 1),  # open, but not to be written to
        ("p | true; exit ${PIPESTATUS[0]}", 0),
    ],
)
def test_the_work_is_done_whatever_becomes_of_the_streams(script: str, warnings: int, tmp_path: Path) -> None:
    done = shell(script, tmp_path / "kept")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "kept").read_text() == "done"
    assert done.stderr.count("warning: stdout takes no more") == warnings and "Traceback" not in done.stderr


def test_a_pipe_that_does_not_block_gets_everything(tmp_path: Path) -> None:
    """Node and some terminals leave their pipes so; what does not fit waits for the reader."""
    unblock = "import fcntl, os; fcntl.fcntl(1, fcntl.F_SETFL, os.O_NONBLOCK)"
    done = shell(f"($PYTHON -c '{unblock}'; p) | (sleep 2; wc -c)", tmp_path / "kept")
    expected = len("bee \\udce9 é\n".encode()) + 300_001 + len("of a child\n")
    assert int(done.stdout) == expected and (tmp_path / "kept").read_text() == "done", done.stderr


def test_letters_that_the_encoding_lacks_are_printed_as_escapes(tmp_path: Path) -> None:
    done = shell("p | head -c 18", tmp_path / "kept", PYTHONIOENCODING="ascii")
    assert done.stdout.startswith("bee \\udce9 \\xe9"), done.stderr


def test_what_only_tells_says_when_it_could_not(tmp_path: Path) -> None:
    help_ = "$PYTHON -m pipeline.dashboard --help"
    full = shell(f"{help_} > /dev/full", tmp_path)
    assert full.returncode == 1 and "No space left on device" in full.stderr
    cut = shell(f"{help_} | true; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert (cut.returncode, cut.stderr) == (0, "")


def test_an_argument_that_is_no_text_is_refused(tmp_path: Path) -> None:
    done = shell("$PYTHON -m pipeline.dashboard name=x run_root=$'b\\xe9e'", tmp_path)
    assert done.returncode == 2 and "'run_root=b\\udce9e' is not UTF-8" in done.stderr
    assert done.stderr.count("\n") == 1
