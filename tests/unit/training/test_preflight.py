"""What is refused before ranks start, and what only the checkpoint can tell."""

from pathlib import Path

import pytest
import yaml

from pipeline.config.evaluate import EvaluateConfig
from pipeline.config.training import TrainConfig
from pipeline.core.cli import compose
from pipeline.core.errors import ConfigError, DataError
from pipeline.training.preflight import check_evaluation, check_model


def evaluation(checkpoint: Path, *more: str) -> EvaluateConfig:
    return compose("evaluate", EvaluateConfig, [f"checkpoint={checkpoint}", "data.root=nowhere", "data.size=8", *more])


def test_an_evaluation_knows_the_models_of_runs_and_caffe(tmp_path: Path) -> None:
    """Shards are looked for last: that they are missed says that the pictures were taken."""
    with pytest.raises(ConfigError, match=r"squeezenet1_1 cannot take pictures of 8 x 8 .* data.size to 17"):
        check_evaluation(evaluation(tmp_path / "weights.npz"), "val")
    run = tmp_path / "run"
    run.mkdir()
    for metaparameters, error in (({}, ConfigError), ({"pool_after": [1]}, DataError)):
        (run / "config.yaml").write_text(yaml.safe_dump({"model": {"metaparameters": metaparameters}}))
        with pytest.raises(error):
            check_evaluation(evaluation(run), "val")
    with pytest.raises(ConfigError):
        check_evaluation(evaluation(run, "model.metaparameters.pool_after=[1,3,5]"), "val")


@pytest.mark.parametrize("text", [None, "", "model: 3", "[", "model: {metaparameters: 7}"])
def test_what_only_the_ranks_can_find_out_is_left_to_them(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(DataError, match="nowhere"):
        check_evaluation(evaluation(tmp_path), "val")


def test_one_picture_a_rank_depends_on_the_number_of_ranks() -> None:
    asked = ["name=x", "data.root=nowhere", "trainer.max_steps=1", "model=resnet18", "data.size=32"]
    config = compose("train", TrainConfig, [*asked, "batch.global_size=4"])
    check_model(config, 2)
    with pytest.raises(ConfigError, match=r"one picture of 32 x 32 .*raise batch.global_size"):
        check_model(config, 4)
