"""A network of a user's own on two ranks: its bytes are accounted for, and its code belongs to the run."""

import json
import re
from pathlib import Path

import pytest

from tests.commands import run, sentences, train
from tests.making.nets import write_nets

KEYS = ("model.allow_code=true", "model.metaparameters.width=4", "trainer.validate_every_steps=0")


def test_a_file_of_ones_own_is_trained_judged_and_kept_to(shards: Path, tmp_path: Path) -> None:
    path = write_nets(tmp_path / "my nets")
    model = f"model={path}:tiny"
    refused = train(tmp_path, shards, "net", 2, f"model={path}:Idle", *KEYS[:1], expect=2)
    (sentence,) = sentences(refused.output)
    assert "idle.weight, idle.bias" in sentence and not (tmp_path / "net").exists()

    train(tmp_path, shards, "net", 2, model, *KEYS, "trainer.max_steps=4", "trainer.checkpoint_every_steps=2")
    ledger = json.loads((tmp_path / "net" / "ledger.json").read_text())
    num_parameters = 3 * 4 * 9 + 4 + 2 * 4 + 4 * 4 + 4
    assert ledger["model"] == f"{path}:tiny" and ledger["gradient_bytes"] == 4 * num_parameters
    assert ledger["closed"] is True and ledger["transport"]["residual_bytes_per_rank"] == [0, 0]

    where = [f"run_root={tmp_path}", f"data.root={shards}", f"checkpoint={tmp_path / 'net'}"]
    two = ("name=no", "cluster.devices=2", "cluster.num_threads=1")
    refused = run(["-m", "pipeline.evaluate", *where, *two], expect=2)
    assert refused.output.count("add model.allow_code=true") == refused.output.count("\n") == 1, refused.output
    path.write_text(path.read_text().replace("nn.Flatten()", "nn.Dropout(0.9), nn.Flatten()"))
    refused = train(tmp_path, shards, "net", 2, model, *KEYS, "trainer.max_steps=6", expect=4)
    assert any("model.source_sha256 was" in sentence for sentence in sentences(refused.output))
    path.write_text(f"{path.read_text()}# a remark\n".replace("nn.Dropout(0.9), ", ""))
    judged = run(["-m", "pipeline.evaluate", *where, "name=yes", "model.allow_code=true"])
    assert "not as trained: the code of" in judged.output and "top-1" in judged.output


@pytest.mark.slow
def test_models_of_others_are_compared_with_ours(shards: Path, tmp_path: Path) -> None:
    path = write_nets(tmp_path)
    models = f"models=[timm:resnet10t,torchvision:regnet_y_400mf,{path}:tiny:width=8]"
    small = ["data.size=32", "data.num_workers=0", "steps=2", "num_classes=4", "batch.global_size=8", "alone=false"]
    where = [f"run_root={tmp_path}", f"data.root={shards}", "name=all", "cluster.num_threads=1", "tracking=disabled"]
    ended = run(["-m", "pipeline.compare", models, "allow_code=true", *small, *where])
    rows = json.loads((tmp_path / "all" / "comparison.json").read_text())["models"]
    assert [row["ledger_closed"] for row in rows] == [True] * 3, ended.output
    by_model = {re.sub(r".*nets", "nets", row["model"]): row for row in rows}
    assert by_model["timm:resnet10t"]["gradient_bytes"] == 4 * by_model["timm:resnet10t"]["num_parameters"]
    assert by_model["torchvision:regnet_y_400mf"]["published_top1"] == 0.74046
    assert by_model["nets.py:tiny:width=8"]["training_memory_bytes"] > 0
