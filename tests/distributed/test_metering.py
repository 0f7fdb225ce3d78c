"""`pipeline.meter` around programs that know nothing of it: real ranks on gloo, bytes by equality."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import ExitCode
from tests.distributed.meter_ranks import DEADLINE_SECONDS, HERE, REPOSITORY
from tests.wandb_file import histories

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
OWED_BYTES = 4 * (37 * 28 + 74 + 301 * (37 * 9 + 1) + 1001 * 302 + 7 * 6)


def run(*command: str, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        cwd=REPOSITORY,
        text=True,
        capture_output=True,
        timeout=DEADLINE_SECONDS,
        stdin=subprocess.DEVNULL,
    )


def meter(root: Path, name: str, *command: str, **more: Any) -> "subprocess.CompletedProcess[str]":
    own = [f"name={name}", f"run_root={root}", "placement=rank"]
    return run(sys.executable, "-m", "pipeline.meter", *own, "--", *command, **more)


def ledger_of(root: Path, name: str) -> dict[str, Any]:
    return json.loads((root / name / "ledger.json").read_text())


def rows_of(root: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]


def foreign(how: str, num_ranks: int) -> list[str]:
    return [*TORCHRUN, f"--nproc-per-node={num_ranks}", str(HERE / "foreign_ddp.py"), how]


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_an_unchanged_program_closes_its_ledger(tmp_path: Path, num_ranks: int) -> None:
    ended = meter(tmp_path, "mine", *foreign("destroys", num_ranks))
    assert ended.returncode == 0, ended.stderr
    ledger, rows = ledger_of(tmp_path, "mine"), rows_of(tmp_path, "mine")
    assert ledger["closed"] is True
    assert (ledger["num_steps"], ledger["gradient_bytes"], ledger["model"]) == (6, OWED_BYTES, "Net")
    (measured,) = [attempt["measured"] for attempt in ledger["attempts"]]
    assert measured["num_steps"] == 6
    assert all(row["residual_bytes_per_rank"] == [0] * num_ranks for row in measured["rows"])
    assert {(row["phase"], row["committed"]) for row in measured["rows"]} >= {("startup", True), ("train", True)}
    issued = {(row["op"], row["origin"], row["phase"]): row for row in ledger["collectives"]}
    assert (
        issued["all_reduce", "gradients", "train"]["payload_bytes"] == 6 * OWED_BYTES
    )  # once a step, whatever no_sync
    assert issued["all_reduce", "find_unused_parameters", "train"]["payload_bytes"] == 6 * 4 * 10
    assert issued["broadcast", "buffers", "train"]["num_calls"] >= 6
    assert issued["broadcast", "parameters", "startup"]["payload_bytes"] >= OWED_BYTES
    own = issued["all_reduce", "__main__.main", "train"]
    assert own["payload_bytes"] == 12 and own["group"].startswith(f"ranks 0,{num_ranks - 1} ")
    assert [row["trainer/step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["comm/gradient_bytes"] == OWED_BYTES for row in rows)
    assert {row.get("comm/residual_bytes", 0) for row in rows} == {0}
    assert "comm/residual_bytes" in rows[-1]
    assert ledger["meter_overhead_fraction"] > 0
    assert (tmp_path / "mine" / "report.html").is_file()
    assert "The ledger closes" in ended.stderr


def test_a_program_that_is_killed_leaves_what_is_known(tmp_path: Path) -> None:
    ended = meter(tmp_path, "mine", *foreign("killed", 2))
    assert ended.returncode == 1, ended.stderr  # torchrun's own
    assert "SIGKILL" in ended.stderr
    ledger = ledger_of(tmp_path, "mine")
    assert ledger["num_steps"] >= 1
    assert "It ended early (exit code 1): the ledger is known up to step" in ended.stderr
    measured = ledger["attempts"][0]["measured"]
    assert ledger["closed"] is (True if measured and measured["num_steps"] == ledger["num_steps"] else None)
    assert ledger["attempts"][0]["lost_payload_bytes"] is None
    assert [row["trainer/step"] for row in rows_of(tmp_path, "mine")] == [1, 2, 3, 4, 5]
    again = meter(tmp_path, "mine", *foreign("exits 9", 2))
    assert again.returncode == 1, again.stderr
    assert "exitcode  : 9" in again.stderr
    assert ledger_of(tmp_path, "mine")["closed"] is True  # compared at the interpreter's end
    assert ledger_of(tmp_path, "mine")["attempts"][0]["attempt"] == 2
    assert json.loads((tmp_path / "mine" / "ledger.1.json").read_text()) == ledger


def test_blocks_meter_groups_and_modules_of_before_and_inside(tmp_path: Path) -> None:
    ranks = [*TORCHRUN, "--nproc-per-node=2", str(HERE / "foreign_attached.py"), str(tmp_path)]
    ended = run(*ranks, env={"PYTHONPATH": str(REPOSITORY)})
    assert ended.returncode == 0, ended.stderr
    owed_bytes = 4 * (101 * 300 + 301 * 10)
    for order in ("before", "inside"):
        ledger = ledger_of(tmp_path, order)
        assert ledger["closed"] is True and ledger["num_steps"] == 3
        measured = ledger["attempts"][0]["measured"]["rows"]
        assert all(row["residual_bytes_per_rank"] == [0, 0] for row in measured)
        phases = {(row["phase"], row["origin"]): row["payload_bytes"] for row in ledger["collectives"]}
        assert phases["train", "gradients"] == 3 * owed_bytes == 3 * ledger["gradient_bytes"]
        assert phases["validation", "__main__.train"] == 400
        assert (("startup", "parameters") in phases) == (order == "inside")
        assert (tmp_path / order / "report.html").is_file()


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        ([], ExitCode.CONFIG, "No command: give it after `--`"),
        (["sh", "-c", "kill -TERM $$"], 128 + signal.SIGTERM, "no process of the command made a process group"),
    ],
)
def test_the_exit_code_is_the_commands_and_nothing_is_refused_in_silence(
    tmp_path: Path, command: list[str], code: int, says: str
) -> None:
    ended = meter(tmp_path, "mine", *command)
    assert ended.returncode == code
    assert says in ended.stderr
    assert not (tmp_path / "mine" / "ledger.json").exists()


def test_the_run_of_another_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("name: mine\n")
    ended = meter(tmp_path, "mine", "touch", str(tmp_path / "ran"))
    assert ended.returncode == ExitCode.CONFIG and "give the metered program another name=" in ended.stderr
    assert not (tmp_path / "ran").exists()


def test_programs_told_apart_by_what_they_do(tmp_path: Path) -> None:
    """One start of Python, a fork for each rank: what each scenario does beside training is in its name."""
    names = [
        "thrice_at_one_port",
        "two_models_of_the_same_names",
        "what_is_stepped_changes",
        "a_step_that_raises",
        "something_under_way",
        "a_store_and_a_barrier_of_its_own",
        "a_monitored_barrier",
        "a_pipeline_of_its_own",
        "a_block_of_its_own",
        "a_run_of_its_own_in_wandb",
    ]
    startup = {"PYTHONPATH": str(REPOSITORY / "pipeline/metering/startup"), "SQUEEZEWIRE_METER": "of each"}
    ended = run(sys.executable, str(HERE / "foreign_scenarios.py"), str(tmp_path), *names, env=startup)
    assert ended.returncode == 0, ended.stderr
    said = [line for line in ended.stderr.splitlines() if line.startswith("meter:")]
    assert len(said) == 2 and all("inner: pipeline.meter meters this whole program" in line for line in said)
    assert not (tmp_path / "inner").exists()
    ledgers = {name: ledger_of(tmp_path, name) for name in names}
    owed = {name: [row["comm/gradient_bytes"] for row in rows_of(tmp_path, name)] for name in names}
    null = {"something_under_way": "under way when a step", "a_monitored_barrier": "not told of a monitored_barrier"}
    for name, ledger in ledgers.items():
        assert ledger["closed"] is (None if name in null else True), (name, ledger["attempts"])
        assert null.get(name, "") in ledger["null_reasons"].get("closed", ""), name
        assert ledger["num_steps"] == 1 or 0 < ledger["meter_overhead_fraction"] < 1, name

    every = [tmp_path / "thrice_at_one_port" / f"ledger{part}.json" for part in (".1", ".2", "")]
    found = [json.loads(path.read_text()) for path in every]
    assert [one["num_steps"] for one in found] == [4, 5, 6]
    for one in found:
        assert one["closed"] is True
        by_phase = {row["phase"]: row["num_calls"] for row in one["collectives"] if row["op"] == "all_reduce"}
        assert by_phase == {"train": 2 * one["num_steps"]}  # the first step is training in each of them

    first, second = 4 * (100 * 200 + 200 + 200 * 10 + 10), 4 * (50 * 70 + 70 + 70 * 10 + 10)
    assert owed["two_models_of_the_same_names"] == [*[first + second] * 3, first, *[first + second] * 2]
    assert ledgers["two_models_of_the_same_names"]["gradient_bytes"] == first + second

    head, body = 4 * (100 * 10 + 10), 4 * (1000 * 100 + 100)
    folds = [4 * (100 * fold * 10 + 10) for fold in (1, 2, 3) for _ in range(4)]
    assert owed["what_is_stepped_changes"] == [*[head] * 4, *[head + body] * 4, *folds]
    assert len(owed["a_step_that_raises"]) == 5
    assert len(owed["a_pipeline_of_its_own"]) == 1
    validated = [row for row in ledgers["a_block_of_its_own"]["collectives"] if row["phase"] == "validation"]
    assert [row["payload_bytes"] for row in validated] == [400]

    metered = rows_of(tmp_path, "a_run_of_its_own_in_wandb")
    logged = histories(tmp_path)
    assert [row["loss"] for row in logged if "loss" in row] == [1, 3]
    for row, step in zip(logged, (metered[2], metered[4]), strict=True):
        assert {key: row[key] for key in row if key.startswith("comm/")} == {
            key: value for key, value in step.items() if key.startswith("comm/") and key in row
        }
        assert row["comm/gradient_bytes"] == 4 * (100 * 100 + 100)
