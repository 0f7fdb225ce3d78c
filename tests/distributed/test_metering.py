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
