"""The proof of value finds a planted difference, whatever it lies in, and lets only chance differ."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.same_numbers import Comparer

ROW = {"trainer/step": 1, "train/loss": 2.5, "val/loss": None, "lr": 0.1, "perf/step_seconds": 0.2, "comm/seconds": 0.1}
LEDGER: dict[str, Any] = {
    "num_steps": 2,
    "buckets": [{"index": 0, "bytes": 8, "sent_seconds": 0.1}],
    "time": {"step_seconds": {"p50": 0.1}},
    "transport": {"measured_bytes_per_rank": [8, 8], "retransmitted_bytes_per_rank": [0, 8]},
    "null_reasons": {"time.exposed_seconds": "Not measured."},
}


def checkpoint() -> dict[str, Any]:
    """What a run saves, in small."""
    weight = torch.tensor([0.0, 1.0, float("nan")])
    return {"state_dict": {"weight": weight}, "squeezewire": {"step": 2, "size": (1, 2), "timeout_seconds": 60.0}}


def write_run(root: Path, rows: list[dict[str, Any]], ledger: dict[str, Any], saved: dict[str, Any]) -> Path:
    """A run directory of what is compared."""
    (root / "checkpoints").mkdir(parents=True)
    (root / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (root / "ledger.json").write_text(json.dumps(ledger))
    torch.save(saved, root / "checkpoints" / "step=000000002.ckpt")
    (root / "checkpoints" / "step=000000002.ckpt.json").write_text(json.dumps({"step": 2, "sha256": root.name}))
    return root


def differences(tmp_path: Path, rows: list[dict[str, Any]], ledger: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    """What the comparer says of these beside the run above, as `file: path`."""
    before = write_run(tmp_path / "before", [ROW, {**ROW, "trainer/step": 2}], LEDGER, checkpoint())
    after = write_run(tmp_path / "after", rows, ledger, saved)
    comparer = Comparer()
    comparer.compare_runs(before, after)
    assert comparer.num_tensors == 1 and comparer.num_values > 10
    return [f"{found.file}: {found.path}" for found in comparer.differences]


def test_chance_may_differ(tmp_path: Path) -> None:
    rows = [{**ROW, "perf/step_seconds": 9.0, "comm/seconds": 9.0}, {**ROW, "trainer/step": 2}]
    bucket = {"index": 0, "bytes": 8, "sent_seconds": 9.0}
    transport = {**LEDGER["transport"], "retransmitted_bytes_per_rank": [9, 9]}
    ledger = {**LEDGER, "buckets": [bucket], "time": {"step_seconds": {"p50": 9.0}}, "transport": transport}
    assert differences(tmp_path, rows, ledger, checkpoint()) == []


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"train/loss": 2.5000000000000004}, "train/loss"),
        ({"val/loss": 0.0}, "val/loss"),
        ({"lr": "0.1"}, "lr"),
        ({"new": None}, "new"),
    ],
)
def test_a_metric(changed: dict[str, Any], key: str, tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "trainer/step": 2, **changed}]
    assert differences(tmp_path, rows, LEDGER, checkpoint()) == [f"metrics.jsonl: [step 2].{key}"]


def test_a_row_that_is_missing_or_stands_twice(tmp_path: Path) -> None:
    assert differences(tmp_path / "one", [ROW], LEDGER, checkpoint()) == ["metrics.jsonl: [step 2]"]
    rows = [ROW, {**ROW, "trainer/step": 2}, {**ROW, "trainer/step": 2}]
    assert differences(tmp_path / "two", rows, LEDGER, checkpoint()) == ["metrics.jsonl: [step 2 again]"]


def test_the_ledger(tmp_path: Path) -> None:
    ledger = {
        **LEDGER,
        "num_steps": 2.0,
        "transport": {**LEDGER["transport"], "measured_bytes_per_rank": [8, 9]},
        "null_reasons": {"time.exposed_seconds": "Another sentence."},
    }
    assert set(differences(tmp_path, [ROW, {**ROW, "trainer/step": 2}], ledger, checkpoint())) == {
        "ledger.json: num_steps",
        "ledger.json: transport.measured_bytes_per_rank[1]",
        "ledger.json: null_reasons.time.exposed_seconds",
    }


@pytest.mark.parametrize(
    "weight",
    [
        torch.tensor([-0.0, 1.0, float("nan")]),  # equal by ==
        torch.tensor([0.0, 1.0000001, float("nan")]),
        torch.tensor([0.0, 1.0, float("nan")], dtype=torch.float64),
        torch.tensor([[0.0, 1.0, float("nan")]]),
    ],
)
def test_a_bit_of_a_tensor(weight: torch.Tensor, tmp_path: Path) -> None:
    saved = checkpoint() | {"state_dict": {"weight": weight}}
    found = differences(tmp_path, [ROW, {**ROW, "trainer/step": 2}], LEDGER, saved)
    assert found == ["checkpoints/step=000000002.ckpt: state_dict.weight"]


def test_plain_content_of_a_checkpoint(tmp_path: Path) -> None:
    saved = checkpoint() | {"squeezewire": {"step": 2, "size": (1, 3), "timeout_seconds": 61.0}}
    found = differences(tmp_path, [ROW, {**ROW, "trainer/step": 2}], LEDGER, saved)
    assert sorted(path.rpartition("squeezewire.")[2] for path in found) == ["size[1]", "timeout_seconds"]
