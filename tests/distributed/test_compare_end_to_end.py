"""`compare` on two ranks, nothing simulated: the rows come from what the runs' collectives carried."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    source = tmp_path_factory.mktemp("pictures")
    from PIL import Image

    for label, colour in enumerate(("red", "blue")):
        for split in ("train", "val"):
            folder = source / split / colour
            folder.mkdir(parents=True)
            for index in range(8):
                Image.new("RGB", (48, 40), (200 * label, 20 * index, 90)).save(folder / f"{colour}{index}.jpg")
    run(["pipeline.prepare", f"source={source}", f"out={out}"])
    return out


def run(arguments: list[str], expect: int = 0) -> str:
    ended = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=400)
    assert ended.returncode == expect, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def compare(shards: Path, root: Path, models: str, *more: str, expect: int = 0) -> tuple[dict, str]:
    conditions = ["data.size=32", "batch.global_size=4", "steps=3", "cluster.num_threads=1", "data.num_workers=0"]
    where = ["name=c", f"run_root={root}", f"data.root={shards}"]
    said = run(["pipeline.compare", f"models=[{models}]", *where, *conditions, *more], expect)
    return json.loads((root / "c" / "comparison.json").read_text()), said


def test_bytes_are_those_the_collectives_carried(shards, tmp_path):
    result, said = compare(shards, tmp_path, "squeezenet1_0,squeezenet1_1,squeezenet1_0:sr=0.25")
    by_model = {row["model"]: row for row in result["models"]}
    assert by_model["squeezenet1_0"]["gradient_bytes"] == 4_993_696
    assert by_model["squeezenet1_1"]["gradient_bytes"] == 4_941_984
    assert by_model["squeezenet1_0:sr=0.25"]["times_baseline"] > 1
    assert all(row["step_seconds"] > 0 for row in result["models"])
    ledger = json.loads((tmp_path / "c" / result["runs"]["squeezenet1_1"] / "ledger.json").read_text())
    gradients = [row for row in ledger["collectives"] if (row["origin"], row["phase"]) == ("gradients", "train")]
    assert sum(row["payload_bytes"] for row in gradients) == 3 * 4_941_984
    assert any(row["origin"] == "lightning" for row in ledger["collectives"])
    page = (tmp_path / "c" / "report.html").read_text()
    assert "4,993,696 bytes" in page and "http" not in page
    assert "squeezenet1_0" in said

    again, _ = compare(shards, tmp_path, "squeezenet1_1")
    assert [row["model"] for row in again["models"]] == ["squeezenet1_1"]


def test_a_failing_model_is_a_row_and_the_others_are_reported(shards, tmp_path):
    # 32 pixels are too few for AlexNet's strides.
    result, said = compare(shards, tmp_path, "alexnet,squeezenet1_1")
    failed, measured = result["models"]
    assert failed["gradient_bytes"] is None and failed["reason"]
    assert measured["gradient_bytes"] == 4_941_984
    assert "error: alexnet: " in said
