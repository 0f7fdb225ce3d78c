"""What ranks leave behind for slurm/train.sh, and how a command ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core.exits import VARIABLE, Causes, read_causes

pytestmark = pytest.mark.not_quick

ROOT = Path(__file__).resolve().parents[3]
# A command whose body does one thing, as a rank of a job.
PROGRAM = """
import os, sys
from pipeline.core.cli import run_command
from pipeline.config.training import TrainConfig
from pipeline.core.errors import DataError, PeerLost, Preempted

def body(config):
    {body}

run_command("train", TrainConfig, body, argv=["name=x", "data.root=somewhere", "trainer.max_steps=1"])
"""


def end(body: str, directory: Path, rank: int = 0, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(body=body)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, VARIABLE: str(directory), "SLURM_PROCID": str(rank), **environment},
    )


@pytest.mark.parametrize(
    ("body", "code", "causes"),
    [
        ("return 0", 0, Causes()),
        ("raise Preempted('later')", 75, Causes()),
        ("raise DataError('torn')", 3, Causes((3,))),
        ("raise PeerLost('gone')", 1, Causes((), 1)),
        ("raise KeyError('ours')", 1, Causes((1,))),
        ("raise BrokenPipeError(32, 'a worker is gone')", 1, Causes((1,))),  # not the end of `--help | head`
        ("sys.exit(1)", 1, Causes((1,))),
        ("sys.exit('of a library')", 1, Causes((1,))),
    ],
)
def test_each_end_has_its_code_and_its_cause(body: str, code: int, causes: Causes, tmp_path: Path) -> None:
    done = end(body, tmp_path / "causes")
    assert (done.returncode, read_causes(str(tmp_path / "causes"))) == (code, causes), done.stderr
    assert ("BrokenPipeError" in done.stderr) == ("BrokenPipe" in body)


def test_the_most_telling_error_is_the_cause(tmp_path: Path) -> None:
    for rank, body in enumerate(("raise PeerLost('gone')", "raise KeyError('ours')", "raise DataError('torn')")):
        end(body, tmp_path, rank)
    causes = read_causes(str(tmp_path))
    assert (causes.error, causes.num_lost) == (3, 1)


def test_who_cannot_leave_a_cause_ends_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert end("raise DataError('torn')", tmp_path / "file").returncode == 3
    assert read_causes(None) == read_causes(str(tmp_path / "none")) == Causes()


def test_nobody_who_reads_does_not_change_the_code(tmp_path: Path) -> None:
    for body, code in (("raise Preempted('later')", 75), ("raise DataError('torn')", 3)):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(body=body)],
            cwd=ROOT,
            stdout=write,
            stderr=write,
            timeout=60,
            env={**os.environ, VARIABLE: str(tmp_path / str(code)), "SLURM_PROCID": "0"},
        )
        os.close(write)
        assert done.returncode == code


def test_help_that_nobody_reads_to_its_end_is_no_error() -> None:
    line = f"{sys.executable} -m pipeline.train --help | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "0" and not done.stderr
