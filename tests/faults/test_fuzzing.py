"""Structured random damage to shards, indexes, checkpoints and configuration, the same each time (tests/fuzzing/)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = float(os.environ.get("FUZZ_SECONDS", "60"))
"""When no further case begins. `make fuzz` takes ten minutes and fresh seeds."""
NUM_CASES = 150
"""Of each target, at most: all of them are known to pass, so that a fast machine cannot fail by chance."""


@pytest.mark.timeout(SECONDS + 400)
def test_damaged_files_are_refused_in_a_sentence_or_read_right() -> None:
    arguments = [f"--seconds={SECONDS}", f"--cases={NUM_CASES}", "--seed=0", "--workers=1"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzzing", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS + 300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 failed" in done.stdout
    print(done.stdout)


def test_the_harness_finds_what_it_looks_for(tmp_path: Path) -> None:
    """A target that hangs, one that raises, one that takes memory, one that dies, one that lies about its exit code."""
    (tmp_path / "cases").mkdir()
    done = subprocess.run([sys.executable, "-c", PLANTED, str(tmp_path)], cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()


PLANTED = """
import itertools, os, sys, time
from pathlib import Path
from pipeline.core.errors import ConfigError, DataError
from tests.fuzzing.pool import Case, Limits, Target, run_cases

def die(): os._exit(9)
def hang(): time.sleep(1000)
def fail(): raise KeyError("x")
def take(): return bytearray(2**27)
def ask(): return bytearray(2**33)
def refuse(): raise DataError("no")
def misname(): raise ConfigError("no")
def ramble(): raise DataError("x" * 100_000)
uses = [die, hang, fail, take, ask, refuse, misname, ramble]
targets = {use.__name__: Target(use.__name__, lambda r, d, use=use: use, frozenset({3})) for use in uses}
cases = [Case(name, seed) for seed in range(2) for name in targets]
limits = Limits(seconds=5, peak_bytes=2**26, data_bytes=2**31)
found = list(run_cases(targets, iter(cases), limits, num_workers=2, under=Path(sys.argv[1]) / "cases"))
assert sorted(map(str, (r.case for r in found))) == sorted(map(str, cases)), found
said = {r.case.target: r.said.strip().splitlines()[-1] for r in found if r.is_failure}
assert said.keys() == set(targets) - {"refuse"}, said
words = dict(die="died", hang="still at it", fail="KeyError", take="MiB", ask="MemoryError", misname="exit code 2")
assert all(word in said[name] for name, word in words.items()), said
"""
