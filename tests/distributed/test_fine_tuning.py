"""Two ranks go on with the weights of others, of which only the head is trained, and only the head is sent."""

import json
from pathlib import Path

import torch
import torchvision
from safetensors.torch import save_file

from tests.commands import rows, train
from tests.comparing import load


def test_a_frozen_backbone_owes_nothing_and_stays_as_it_is(shards: Path, tmp_path: Path) -> None:
    """Broken off and resumed: the weights to begin with are not looked at again."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=9).state_dict()  # its BatchNorms have statistics to keep
    save_file({f"module.{name}": value for name, value in theirs.items()}, tmp_path / "theirs.safetensors")
    keys = (
        "model=resnet18",
        f"init.checkpoint={tmp_path / 'theirs.safetensors'}",
        "init.head=new",
        "init.freeze=[all_but_head]",
        "recipe=adamw",
        "recipe.head_lr_factor=2",
    )
    half = train(tmp_path, shards, "tuned", 2, *keys, "trainer.max_steps=5", "recipe.decay=none")
    assert "begins with resnet18 from" in half.output and "but for the head (fc), which is drawn anew" in half.output
    (tmp_path / "theirs.safetensors").unlink()
    train(tmp_path, shards, "tuned", 2, *keys, "trainer.max_steps=8", "recipe.decay=none")
    run = tmp_path / "tuned"
    ledger = json.loads((run / "ledger.json").read_text())
    head_bytes = 4 * (4 * 512 + 4)
    assert ledger["gradient_bytes"] == head_bytes and ledger["closed"] is True
    assert ledger["transport"]["residual_bytes_per_rank"] == [0, 0]
    assert {row["comm/gradient_bytes"] for row in rows(run)} == {head_bytes} and len(rows(run)) == 8
    weights = {name.removeprefix("model."): value for name, value in load(run)["state_dict"].items()}
    assert {name for name, value in theirs.items() if not torch.equal(weights[name], value)} == {"fc.weight", "fc.bias"}
