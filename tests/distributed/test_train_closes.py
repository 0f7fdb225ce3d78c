"""The ledger closes, and a run whose bytes nobody can explain fails."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands import SMALL, Ended, rows, run, train

HERE = Path(__file__).parent


def train_with(fault: str, root: Path, shards: Path, *more: str, expect: int = 0, devices: int = 2) -> Ended:
    where = [f"run_root={root}", f"data.root={shards}", "name=run", f"cluster.devices={devices}", "tracking=disabled"]
    script = str(HERE / "train_unmetered.py")
    return run([script, *where, *SMALL, "trainer.max_steps=6", *more], expect=expect, environment={"FAULT": fault})


def ledger_of(root: Path) -> dict[str, Any]:
    return json.loads((root / "run" / "ledger.json").read_text())


def test_a_collective_outside_the_meters_sight_fails_the_run_and_loses_nothing(shards: Path, tmp_path: Path) -> None:
    ended = train_with("group", tmp_path, shards, expect=6)
    assert "the fault fired" in ended.output
    assert "The ledger does not close" in ended.output and "residual" in ended.output
    assert ended.output.count("The ledger does not close") <= 2  # a sentence a rank, no traceback
    assert "Traceback" not in ended.output
    ledger = ledger_of(tmp_path)
    assert ledger["closed"] is False
    # Found at the checkpoint after the fault, which was saved first.
    assert json.loads((tmp_path / "run" / "checkpoints" / "last.json").read_text())["step"] == 4
    rows_of_training = [row for row in ledger["attempts"][0]["measured"]["rows"] if row["phase"] == "train"]
    for rank in (0, 1):
        assert sum(row["residual_bytes_per_rank"][rank] for row in rows_of_training) > 4000


def test_a_wrong_formula_fails_the_run(shards: Path, tmp_path: Path) -> None:
    ended = train_with("formula", tmp_path, shards, expect=6)
    assert "the fault fired" in ended.output and "The ledger does not close" in ended.output
    assert ledger_of(tmp_path)["closed"] is False


def test_not_strict_the_run_goes_on_and_keeps_its_residual(shards: Path, tmp_path: Path) -> None:
    train_with("group", tmp_path, shards, "comm.strict=false")
    ledger = ledger_of(tmp_path)
    assert ledger["closed"] is False
    assert all(residual > 4000 for residual in ledger["transport"]["residual_bytes_per_rank"])
    # A connection opened during a step is found when its phase ends, so the next step is charged with it.
    assert [row["comm/residual_bytes"] == 0 for row in rows(tmp_path / "run")] == [True] * 4 + [False] + [True]


@pytest.mark.parametrize(
    ("devices", "options"),
    [
        (2, ["model=resnet18", "comm.hook=fp16"]),
        (3, ["model=resnet18", "data.size=64", "batch.max_per_rank=2", "comm.find_unused_parameters=true"]),
    ],
    ids=["buffers, fp16", "accumulating on three, unused parameters looked for"],
)
def test_it_closes(devices: int, options: list[str], shards: Path, tmp_path: Path) -> None:
    train(tmp_path, shards, "run", devices, "trainer.max_steps=4", *options)
    ledger = ledger_of(tmp_path)
    assert ledger["closed"] is True
    phases = {row["phase"] for row in ledger["attempts"][0]["measured"]["rows"]}
    assert phases == {"startup", "train", "validation", "checkpoint"}
    assert ledger["transport"]["residual_bytes_per_rank"] == [0] * devices
    assert min(ledger["transport"]["measured_bytes_per_rank"]) > 4 * ledger["gradient_bytes"] / 2
