"""What is refused before ranks start."""

import pytest

from pipeline.config.training import TrainConfig
from pipeline.core.cli import compose
from pipeline.core.errors import ConfigError
from pipeline.training.preflight import check_model


def test_one_picture_a_rank_depends_on_the_number_of_ranks() -> None:
    asked = ["name=x", "data.root=nowhere", "trainer.max_steps=1", "model=resnet18", "data.size=32"]
    config = compose("train", TrainConfig, [*asked, "batch.global_size=4"])
    check_model(config, 2)
    with pytest.raises(ConfigError, match=r"one picture of 32 x 32 .*raise batch.global_size"):
        check_model(config, 4)
