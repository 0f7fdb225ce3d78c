"""`compare` on two ranks, nothing simulated: the rows come from what the runs' collectives carried."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.wandb_file import tables


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
    where = ["name=c", f"run_root={root}", f"data.root={shards}", "alone=false"]
    said = run(["pipeline.compare", f"models=[{models}]", *where, *conditions, *more], expect)
    return json.loads((root / "c" / "comparison.json").read_text()), said


def test_bytes_are_those_the_collectives_carried(shards: Path, tmp_path: Path) -> None:
    """One model fails: it is a row, and the others are reported. Then the same name is used again."""
    # 32 pixels are too few for AlexNet's strides, which is known without a run.
    result, said = compare(shards, tmp_path, "squeezenet1_1,squeezenet1_0:sr=0.25,alexnet")
    *measured, failed = result["models"]
    assert failed["gradient_bytes"] is None and "cannot take pictures of 32x32 pixels" in failed["reason"]
    assert "error: alexnet: " in said and "squeezenet1_0:sr=0.25" in said
    assert not (tmp_path / "c/alexnet.log").exists()
    by_model = {row["model"]: row for row in measured}
    assert by_model["squeezenet1_1"]["gradient_bytes"] == 4_941_984
    assert by_model["squeezenet1_0:sr=0.25"]["times_baseline"] > 1
    assert all(row["step_seconds"] > 0 for row in measured)
    ledger = json.loads((tmp_path / "c" / result["runs"]["squeezenet1_1"] / "ledger.json").read_text())
    gradients = [row for row in ledger["collectives"] if (row["origin"], row["phase"]) == ("gradients", "train")]
    assert sum(row["payload_bytes"] for row in gradients) == 3 * 4_941_984
    assert any(row["origin"] == "lightning" for row in ledger["collectives"])
    assert all(row["ledger_closed"] is True and row["scaling_efficiency"] is None for row in measured)
    assert "alone=false" in result["null_reasons"]["models.0.scaling_efficiency"]
    page = (tmp_path / "c" / "report.html").read_text()
    assert "4,941,984 bytes" in page and "http" not in page
    (table,) = tables(tmp_path / "c", "comparison/models")
    assert table == [{key: row.get(key) for key in table[0]} for row in result["models"]]
    assert {"model", "gradient_bytes", "step_seconds", "times_baseline", "ledger_closed"} <= table[0].keys()

    again, _ = compare(shards, tmp_path, "alexnet", expect=2)
    assert [row["model"] for row in again["models"]] == ["alexnet"]


def test_compressions_and_a_rank_alone(shards: Path, tmp_path: Path) -> None:
    hooks = ("hooks=[none,powersgd]", "alone=true", "steps=4", "num_classes=2")
    result, said = compare(shards, tmp_path, "squeezenet_small", *hooks)
    plain, compressed = result["models"]
    assert [plain["label"], compressed["label"]] == ["squeezenet_small", "squeezenet_small + powersgd"]
    assert compressed["gradient_bytes"] == plain["gradient_bytes"] == plain["payload_bytes_per_step"]
    # Compressed is what the last step carried: what it issued less than a plain one is what it saved.
    rows = [
        json.loads(line)["comm/payload_bytes"]
        for line in (tmp_path / "c/squeezenet_small+powersgd/metrics.jsonl").read_text().splitlines()
    ]
    assert plain["gradient_bytes"] - compressed["payload_bytes_per_step"] == rows[0] - rows[-1] > 0
    assert compressed["times_baseline"] == compressed["payload_bytes_per_step"] / plain["payload_bytes_per_step"]
    assert plain["scaling_efficiency"] > 0 and compressed["scaling_efficiency"] > 0
    alone = json.loads((tmp_path / "c/alone/squeezenet_small/ledger.json").read_text())
    assert (alone["world_size"], alone["global_batch"], alone["num_steps"]) == (1, 2, 4)
    assert "squeezenet_small + powersgd" in said
    # Forecast from the rank alone, two ranks send what two ranks sent.
    there = [f"run={tmp_path / 'c/alone/squeezenet_small'}", f"run_root={tmp_path}", "bandwidth=[1gbit]"]
    assert "ran on one rank alone" in run(["pipeline.plan", *there, "servers=[1,2]"])
    forecast = json.loads((tmp_path / "plan/forecast.json").read_text())
    together = json.loads((tmp_path / "c/squeezenet_small/ledger.json").read_text())
    assert forecast["points"][1]["server_egress_bytes_per_step"] == max(together["per_step"]["server_egress_bytes"])
    (source,) = forecast["sources"]
    assert [one["payload_bytes"] for one in source["buckets"]] == [one["bytes"] for one in together["buckets"]]
    assert source["buckets"][-1]["ready_seconds"] <= source["backward_seconds"]
    assert forecast["points"][0]["step_seconds"] == pytest.approx(
        alone["time"]["step_seconds"]["p50"] - alone["time"]["data_wait_seconds"]
    )


def test_what_cannot_fit_is_not_started(shards: Path, tmp_path: Path) -> None:
    too_much = ("data.size=224", "batch.global_size=1048576", "batch.max_per_rank=1048576", "tracking=disabled")
    result, said = compare(shards, tmp_path, "vgg16", *too_much, expect=2)
    (failed,) = result["models"]
    assert "It was not started" in failed["reason"]
    assert failed["training_memory_bytes"] > 10**13 and failed["gradient_bytes"] is None
    assert "error: vgg16: " in said
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "comparison.csv",
        "comparison.json",
        "report.html",
    ]
