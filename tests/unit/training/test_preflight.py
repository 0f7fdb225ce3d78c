"""What is refused before ranks start."""

import json
from pathlib import Path

import pytest

from pipeline.config.evaluate import EvaluateConfig
from pipeline.config.training import TrainConfig
from pipeline.core.cli import compose
from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.training.preflight import check_evaluation, check_model


def test_one_picture_a_rank_depends_on_the_number_of_ranks() -> None:
    asked = ["name=x", "data.root=nowhere", "trainer.max_steps=1", "model=resnet18", "data.size=32"]
    config = compose("train", TrainConfig, [*asked, "batch.global_size=4"])
    check_model(config, 2)
    with pytest.raises(ConfigError, match=r"one picture of 32 x 32 .*raise batch.global_size"):
        check_model(config, 4)


@pytest.mark.parametrize("checkpoint", [".", "/", ".."])
def test_weights_may_be_named_from_inside_their_run(
    checkpoint: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_evaluation(compose("evaluate", EvaluateConfig, [f"checkpoint={checkpoint}", f"data.root={shards}"]), "val")


def test_a_network_of_others_is_recognised_from_inside_its_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt.json").write_text(json.dumps({"model": "timm:resnet10t"}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError):  # it is loaded, and there is no such file
        check_evaluation(compose("evaluate", EvaluateConfig, ["checkpoint=.", f"data.root={shards}"]), "val")
