"""`study` on two ranks: three variants, interrupted twice, one of them failing; nothing is trained twice."""

import csv
import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.commands import interrupted, run

NUM_STEPS = 40
VARIANTS = (
    "{name:plain,overrides:['model=squeezenet_small'],shows:{exchange:every step}}",
    "{name:rounds,overrides:['model=squeezenet_small','comm=local','comm.period=4'],shows:{exchange:every 4 steps}}",
    "{name:hot,overrides:['model=squeezenet_small','recipe.lr=1e30','recipe.warmup_steps=0']}",
)


def study(root: Path, shards: Path, *more: str) -> list[str]:
    every = "[batch.global_size=12,recipe.lr=0.01,trainer.validate_every_steps=8,trainer.checkpoint_every_steps=4]"
    return [
        *("-m", "pipeline.study", "name=s", f"run_root={root}", f"data.root={shards}"),
        *("data.num_workers=0", "data.size=32", "cluster.num_threads=1"),
        *(f"study.variants=[{','.join(VARIANTS)}]", f"study.overrides={every}", f"study.budget.steps={NUM_STEPS}"),
        *("study.targets=[0.01,1.0]", *more),
    ]


def attempts(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "attempts.jsonl").read_text().splitlines()]


def has_saved(directory: Path) -> bool:
    return any((directory / "checkpoints").glob("step=*.ckpt"))


def test_interrupted_twice_and_ended(shards: Path, tmp_path: Path) -> None:
    root = tmp_path / "s"
    command = study(tmp_path, shards)

    of_part = [*command, "study.part=1/3"]
    stopped = interrupted(of_part, signal.SIGTERM, lambda: has_saved(root / "plain/seed0"), expect=75)
    assert "The same command goes on" in stopped.output
    interrupted(command, signal.SIGKILL, lambda: has_saved(root / "rounds/seed0"), expect=-signal.SIGKILL)
    part = run(of_part, expect=0)
    assert "plain, seed 0: was there" in part.output and "without study.part=1/3 writes it" in part.output
    assert not (root / "study.json").exists()
    plain_metrics = (root / "plain/seed0/metrics.jsonl").read_bytes()

    ended = run(command, expect=5)  # the one that diverges
    assert "plain, seed 0: was there" in ended.output and "rounds, seed 0: done" in ended.output
    assert re.search(r"error: hot, seed 0: .*exit code 5", ended.output)
    assert (root / "plain/seed0/metrics.jsonl").read_bytes() == plain_metrics
    for variant in ("plain", "rounds"):
        first, second = attempts(root / variant / "seed0")  # begun once, gone on with once, and never again
        assert first["start_step"] == 0 and 0 < second["start_step"] < NUM_STEPS
        assert len((root / variant / "seed0/metrics.jsonl").read_text().splitlines()) == NUM_STEPS

    result = json.loads((root / "study.json").read_text())
    *trained, hot = result["rows"]
    for row in trained:
        ledger = json.loads((root / row["runs"][0]["directory"] / "ledger.json").read_text())
        assert row["ledger_closed"] is ledger["closed"] is True
        assert row["gradient_bytes"] == ledger["gradient_bytes"]
        assert row["gigabytes"] * 1e9 == pytest.approx(sum(ledger["servers"]["predicted_egress_bytes"]), rel=1e-12)
        assert [point["step"] for point in row["curve"]] == [8, 16, 24, 32, 40]
        (always, _) = row["reach"]
        assert (always["steps"], always["images"]) == (8, 96) and always["gigabytes"] == row["curve"][0]["gigabytes"]
        assert all((forecast["seconds"] or 0) > 0 for forecast in always["forecasts"]) is (row["name"] == "plain")
    assert trained[1]["gigabytes"] < trained[0]["gigabytes"] / 2
    assert hot["top1"] is None and hot["ledger_closed"] is None and hot["curve"] == []
    assert "exit code 5" in hot["runs"][0]["reason"]
    assert result["null_reasons"]["rows.2.top1"] == hot["runs"][0]["reason"]
    assert {point["name"] for point in result["envelope"]["gigabytes"]} <= {"plain", "rounds"}
    lines = list(csv.DictReader((root / "study.csv").read_text().splitlines()))
    assert [(line["name"], line["ledger_closed"]) for line in lines] == [
        ("plain", "true"),
        ("rounds", "true"),
        ("hot", ""),
    ]
    page = (root / "report.html").read_text()
    assert "exit code 5" in page and "study-of-exchange" in page and "http" not in page
    assert (root / "study-of-exchange.png").is_file() and (root / "study-against-gigabytes.svg").is_file()
