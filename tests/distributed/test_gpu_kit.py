"""The GPU kit from one end to the other, on the CPU: cut amid its work, gone on with, and without a card."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ["bash", "benchmarks/gpu_kit.sh"]


def environment(**variables: str) -> dict[str, str]:
    """One thread for each process, and no folder of somebody else's."""
    kept = {name: value for name, value in os.environ.items() if name not in ("OUT", "GPU_KIT_SECONDS")}
    return {**kept, "OMP_NUM_THREADS": "1", **variables}


def left_running(folder: Path) -> list[list[str]]:
    """Processes that were started for this folder."""
    return [
        process.info["cmdline"]
        for process in psutil.process_iter(["cmdline"])
        if any(str(folder) in word for word in process.info["cmdline"] or ()) and process.pid != os.getpid()
    ]


def results(folder: Path) -> dict[str, int]:
    """What was measured, and when each file was written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("*/*.json")}


def test_a_kit_that_is_cut_says_what_it_has_and_goes_on_from_there(tmp_path: Path) -> None:
    folder, copy = tmp_path / "kit", tmp_path / "copy"
    command = [*SCRIPT, str(folder), "--dry-run"]
    variables = environment(OUT=str(copy))
    cut = subprocess.Popen(command, cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.monotonic() + 240
    while not (found := list((folder / "step").glob("*.json"))):
        assert cut.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    cut.send_signal(signal.SIGTERM)
    told, errors = cut.communicate(timeout=60)
    assert cut.returncode == 143, errors
    assert "asked to end before its time" in errors and found[0].stem in told
    summary = json.loads((copy / "summary.json").read_text())
    before = results(folder)
    assert summary["ended"] and set(summary["results"]) == set(before)
    assert summary["parts"]["step"] == "was cut" and summary["parts"]["decode"] == "was not begun"
    assert not left_running(folder)

    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr + done.stdout
    after = results(folder)
    measured = [name for name in before if name.endswith(".json") and not name.endswith("summary.json")]
    assert measured and {name: after[name] for name in measured} == {name: before[name] for name in measured}
    summary = json.loads((copy / "summary.json").read_text())
    assert set(summary["results"]) == set(after) and summary == json.loads((folder / "summary.json").read_text())
    assert summary["ended"] is None and set(summary["parts"].values()) == {"all was measured"}
    assert {(row["reads"], row["same_weights"]) for row in summary["reads"]} == {
        (reads, True) for reads in ("once", "late", "lightning")
    }
    assert not any("error" in result for result in summary["results"].values())
    assert not left_running(folder)


def test_without_a_gpu_one_sentence_names_the_remedy(tmp_path: Path) -> None:
    from benchmarks.gpu_jobs import has_gpu

    if has_gpu():
        pytest.skip("this machine has a GPU")
    for command in (SCRIPT, [".venv/bin/python", "-m", "benchmarks.gpu_step", "--out"]):
        run = subprocess.run([*command, str(tmp_path)], cwd=ROOT, env=environment(), capture_output=True, text=True)
        assert run.returncode == 2 and run.stderr.count("\n") == 1 and "--dry-run" in run.stderr


def test_a_budget_that_is_no_number_is_refused(tmp_path: Path) -> None:
    run = subprocess.run(
        [*SCRIPT, str(tmp_path), "--dry-run"],
        cwd=ROOT,
        env=environment(GPU_KIT_SECONDS="8min"),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and "GPU_KIT_SECONDS=8min is not a number of seconds" in run.stderr


def test_a_summary_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("[]")
    for name in ("other.json", "absent.json"):
        run = subprocess.run(
            [*SCRIPT, str(tmp_path / "kit"), "--dry-run", "--resume", str(tmp_path / name)],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert run.returncode == 2 and name in run.stderr and run.stderr.count("\n") == 1


def test_a_budget_that_is_spent_leaves_the_rest_missing(tmp_path: Path) -> None:
    run = subprocess.run(
        [*SCRIPT, str(tmp_path), "--dry-run"],
        cwd=ROOT,
        env=environment(GPU_KIT_SECONDS="5"),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and "decode: was not begun" in run.stdout
