"""The probe of NCCL's bytes, end to end on real ranks: over gloo and on CPUs, as there is no GPU here."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.nccl_probe import Probe, main, options_of

REPOSITORY = Path(__file__).parents[2]
DEADLINE_SECONDS = 120
SIZES = "4,1000,300004"
OPERATIONS = 5
# torch and what it cannot be without; no other package is on a machine that is lent for minutes.
TORCH_ALONE = """
import importlib.metadata, re, sys
def plain(name):
    return re.sub("[-_.]+", "-", name).lower()
needed = {"torch"}
for name in (waiting := ["torch"]):
    for line in importlib.metadata.requires(name) or []:
        other = plain(re.match(r"[\\w.-]+", line)[0])
        if "extra ==" not in line and other not in needed:
            try:
                importlib.metadata.distribution(other)
            except importlib.metadata.PackageNotFoundError:  # of another platform
                continue
            needed.add(other)
            waiting.append(other)
owners = importlib.metadata.packages_distributions()
allowed = {package for package, names in owners.items() if needed & set(map(plain, names))}
allowed |= {*sys.stdlib_module_names, "benchmarks", "pipeline"}
finders = list(sys.meta_path)
class Allowed:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in allowed or name.startswith("_"):
            return next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
    def find_distributions(self, *context):
        return importlib.metadata.MetadataPathFinder.find_distributions(*context)
sys.meta_path[:] = [Allowed()]
from benchmarks.nccl_probe import main
sys.exit(main(sys.argv[1:]))
"""


def started(*arguments: str, alone: bool = False, **variables: str) -> subprocess.Popen[str]:
    program = ["-c", TORCH_ALONE] if alone else ["-m", "benchmarks.nccl_probe"]
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(*arguments: str, alone: bool = False, **variables: str) -> tuple[int, str, str]:
    process = started(*arguments, alone=alone, **variables)
    try:
        out, err = process.communicate(timeout=DEADLINE_SECONDS)
    finally:
        process.kill()
    return process.returncode, out, err


def ranks_of(folder: Path) -> list[int]:
    """Processes that have the folder on their command line: the ranks are forked, and share the probe's."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder) in path.read_text().split("\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_for(what: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def results_in(folder: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*-*ranks-gloo.json")}


def test_every_byte_is_predicted_with_torch_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Collectives and training, two and three ranks; the folder is then not measured again, nor by anything else."""
    out = tmp_path / "probe"
    arguments = ("--out", str(out), "--dry-run", "--sizes", SIZES, "--steps", "2")
    code, said, error = ended(*arguments, alone=True)
    assert code == 0, said + error
    results = results_in(out)
    num_cases = {name: len(result["cases"]) for name, result in results.items()}
    collectives, steps = 1 + OPERATIONS * len(SIZES.split(",")), 2 * 2
    assert num_cases == {
        "collectives-2ranks-gloo": collectives,
        "collectives-3ranks-gloo": collectives,
        "training-2ranks-gloo": steps,
        "training-3ranks-gloo": steps,
    }
    for name, result in results.items():
        assert result["is_complete"], name
        for case in result["cases"]:
            assert case["residual_bytes_per_rank"] == [0] * result["made_by"]["launch"]["num_ranks"], (name, case)
            assert case["is_correct"], (name, case)
            assert max(case["sent_bytes_per_rank"]) > 0, (name, case)
        if name.startswith("training"):
            squeezenet, resnet = (result["cases"][index]["calls"] for index in (0, -1))
            assert squeezenet == [["all_reduce", 2_048_000, -1], ["all_reduce", 2_893_984, -1]]
            # BatchNorm's running means and variances, and its counters
            assert resnet[:2] == [["broadcast", 38_400, 0], ["broadcast", 160, 0]]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["num_equal"] == summary["num_cases"] == sum(num_cases.values())
    assert summary["largest_residual"] is None

    assert main(arguments) == 0
    assert capsys.readouterr().out.count(": measured before") == len(results)
    path = out / "training-2ranks-gloo.json"
    other = json.loads(path.read_text())
    other["made_by"]["torch"] = "2.11.0"
    path.write_text(json.dumps(other))
    assert main(arguments) == 2
    assert f"{path} was measured otherwise: torch differed." in capsys.readouterr().err
    assert path.read_text() == json.dumps(other)


def test_what_a_cut_leaves_and_the_next_run_takes_up(tmp_path: Path) -> None:
    """Killed in the middle of a launch, then asked to end in the middle of the next; no rank outlives the probe."""
    out = tmp_path / "probe"
    arguments = ("--out", str(out), "--dry-run", "--sizes", SIZES, "--steps", "1")
    all_collectives = 1 + OPERATIONS * len(SIZES.split(","))

    def wait_for_records(launch: str) -> None:
        records = out / launch / "rank0.jsonl"
        wait_for(lambda: records.exists() and records.read_text().count("sent_bytes") >= 2)

    process = started(*arguments)
    wait_for_records("collectives-2ranks-gloo")
    assert len(ranks_of(out)) == 3
    process.kill()
    process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == -signal.SIGKILL
    wait_for(lambda: not ranks_of(out), seconds=10)
    assert results_in(out) == {}

    process = started(*arguments)
    wait_for_records("collectives-3ranks-gloo")
    process.terminate()
    said, error = process.communicate(timeout=DEADLINE_SECONDS)
    assert (process.returncode, ranks_of(out)) == (4, []), error
    assert "error: SIGTERM ended the probe. The same command takes up what is missing." in error
    assert "collectives-2ranks-gloo: an earlier run was cut here, after" in said
    results = results_in(out)
    whole, cut = results["collectives-2ranks-gloo"], results["collectives-3ranks-gloo"]
    assert whole["is_complete"] and len(whole["cases"]) == all_collectives
    assert cut["problem"] == "SIGTERM ended it."
    assert 2 <= len(cut["cases"]) < all_collectives
    assert f"{all_collectives + len(cut['cases'])} cases in 2 launches" in said
    missing = [launch.name for launch, earlier in Probe(options_of(arguments)).earlier() if earlier is None]
    assert missing == ["collectives-3ranks-gloo", "training-2ranks-gloo", "training-3ranks-gloo"]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ((), 2, "torch finds no GPU here"),
        (("--dry-run", "--deadline", "0.01"), 3, "It hung: of 2 ranks 0, 1 had not ended after 0.01 s"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments: tuple[str, ...], code: int, sentence: str, tmp_path: Path) -> None:
    out = tmp_path / "probe"
    found, said, error = ended("--out", str(out), *arguments, CUDA_VISIBLE_DEVICES="")
    assert found == code, said + error
    assert sentence in said + error
    assert ranks_of(out) == []
