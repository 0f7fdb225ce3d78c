"""A run may begin with the weights of another training, and leave a part of them as it is."""

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from pipeline.config.training import TrainConfig
from pipeline.core.cli import compose
from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.models import zoo
from pipeline.models.zoo import head_of
from pipeline.training.begin import begin_from, freeze


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of torchvision's squeezenet1_1 with seven classes."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "theirs.pth"
    torch.save(torchvision.models.squeezenet1_1(num_classes=7).state_dict(), path)
    return path


def begin(weights: Path, num_classes: int, *overrides: str, classes: tuple[str, ...] | None = None) -> nn.Module:
    base = ["name=x", "data.root=r", "trainer.max_steps=1", f"init.checkpoint={weights}"]
    config = compose("train", TrainConfig, [*base, *overrides])
    model = zoo.build(config.model.name, num_classes)
    said = begin_from(config, model, num_classes, classes)
    assert "begins with squeezenet1_1 from" in said[0]
    return model


def test_weights_of_the_same_classes_are_taken_whole(weights: Path) -> None:
    state = torch.load(weights, weights_only=True)
    assert all(torch.equal(value, state[name]) for name, value in begin(weights, 7).state_dict().items())


def test_a_new_head_is_drawn_and_the_rest_is_taken(weights: Path) -> None:
    state = torch.load(weights, weights_only=True)
    for num_classes in (4, 7):
        found = begin(weights, num_classes, "init.head=new").state_dict()
        same = {
            name
            for name, value in found.items()
            if value.shape == state[name].shape and torch.equal(value, state[name])
        }
        # A new bias is zero, as the old one is.
        assert {*found} - same in ({"classifier.1.weight"}, {"classifier.1.weight", "classifier.1.bias"})
        assert len(found["classifier.1.weight"]) == num_classes


def test_what_becomes_of_a_head_of_other_classes_is_asked(weights: Path) -> None:
    with pytest.raises(ConfigError, match=r"has 7 outputs, and this run has 4 classes: add init.head=new"):
        begin(weights, 4)
    with pytest.raises(
        ConfigError, match=r"init.head=keep: .* has 7 outputs.*init.head=new, or set model.num_classes=7"
    ):
        begin(weights, 4, "init.head=keep")
    with pytest.raises(ConfigError, match=r"init.head=new is about weights to begin from"):
        compose("train", TrainConfig, ["name=x", "data.root=r", "trainer.max_steps=1", "init.head=new"])
    with pytest.raises(CheckpointError, match=r"does not fit resnet18"):
        begin(weights, 7, "model=resnet18")


@pytest.mark.parametrize("name", zoo.names())
def test_the_head_is_what_depends_on_the_classes(name: str) -> None:
    with torch.device("meta"):
        few, many = zoo.build(name, 5), zoo.build(name, 6)
    pairs = zip(few.state_dict().items(), many.state_dict().values(), strict=True)
    differ = {key.rpartition(".")[0] for (key, value), other in pairs if value.shape != other.shape}
    assert differ == {head_of(few, 5)}
    frozen = freeze(few, ["all_but_head"], 5)
    trained = {key.rpartition(".")[0] for key, value in few.named_parameters() if value.requires_grad}
    assert trained == {head_of(few, 5)} and frozen


def test_modules_are_frozen_by_name_and_what_there_is_not_is_named() -> None:
    model = zoo.build("squeezenet1_1", 4)
    assert freeze(model, ["features.0", "features.3"], num_classes=5) == [
        model.get_submodule(f"features.{at}") for at in (0, 3)
    ]
    assert {name.rpartition(".")[0] for name, value in model.named_parameters() if not value.requires_grad} >= {
        "features.0",
        "features.3.squeeze",
    }
    with pytest.raises(ConfigError, match=r"no module 'feature' with parameters. Did you mean 'features'"):
        freeze(model, ["feature"], 5)
    with pytest.raises(ConfigError, match=r"leaves nothing to train"):
        freeze(model, ["features", "classifier"], 5)
