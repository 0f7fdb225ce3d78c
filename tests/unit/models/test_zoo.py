"""The registry: names, presets, specs, published figures, and a configuration file for each model."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.model import ModelConfig
from pipeline.config.training import TrainConfig
from pipeline.core.cli import compose
from pipeline.core.errors import ConfigError
from pipeline.core.groups import config_groups
from pipeline.core.typed import build as build_config
from pipeline.models import zoo
from pipeline.models.squeezenet import SqueezeNet

CONF_MODEL = Path(__file__).parents[3] / "conf" / "model"
FROM_TORCHVISION = [name for name in zoo.names() if name in torchvision.models.list_models()]


def meta(name: str, num_classes: int = 1000, **metaparameters: Any) -> torch.nn.Module:
    with torch.device("meta"):
        return zoo.build(name, num_classes, **metaparameters)


@pytest.mark.not_quick
def test_names_specs_and_figures_need_no_torch() -> None:
    code = (
        "import sys; from pipeline.models import zoo; zoo.names(); zoo.published_accuracy('alexnet');"
        "zoo.parse_spec('squeezenet1_0:sr=0.5'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("name", zoo.names())
def test_every_model_has_the_classes_asked_for(name: str) -> None:
    model = meta(name, num_classes=13)
    side = 32 if name.startswith("squeezenet_small") else 224
    assert model.eval()(torch.empty(2, 3, side, side, device="meta")).shape == (2, 13)


def takes(model: torch.nn.Module, side: int, num_pictures: int = 2) -> bool:
    """Whether the network itself can train on so many pictures of this side."""
    try:
        model.train()(torch.empty(num_pictures, 3, side, side, device="meta"))
    except (RuntimeError, ValueError):
        return False
    return True


def accepts(model: ModelConfig, side: int, num_pictures: int = 2) -> bool:
    """Whether the check does, which imports no torch."""
    try:
        zoo.check_pictures(model, side, per_rank=num_pictures)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("name", zoo.names())
def test_pictures_and_batches_that_are_too_small_are_known(name: str) -> None:
    model, config = meta(name, 3), ModelConfig(name=name)
    smallest = next(side for side in range(1, 100) if accepts(config, side))
    assert takes(model, smallest) and (smallest == 1 or not takes(model, smallest - 1))
    alone = next(side for side in range(1, 100) if accepts(config, side, 1))
    assert takes(model, alone, 1) and (alone == 1 or not takes(model, alone - 1, 1))


@given(
    stem=st.sampled_from(("v1.0", "v1.1", "small")),
    pool_after=st.sets(st.integers(1, 9), max_size=5),
    conv10_pad=st.integers(0, 2),
    side=st.integers(1, 80),
)
def test_small_pictures_for_any_squeezenet(stem: str, pool_after: set[int], conv10_pad: int, side: int) -> None:
    narrow = {"base_e": 8, "incr_e": 0, "stem": stem, "pool_after": sorted(pool_after), "conv10_pad": conv10_pad}
    config = ModelConfig(name="squeezenet1_0", metaparameters=narrow)
    assert accepts(config, side, 1) == takes(meta("squeezenet1_0", 2, **narrow), side, 1)


def test_the_remedy_for_small_pictures_works() -> None:
    with pytest.raises(ConfigError, match=r"data.size to 63 or more, .* model=squeezenet_small") as raised:
        zoo.check_pictures(ModelConfig(name="alexnet"), 32)
    zoo.check_pictures(ModelConfig(name=str(raised.value).rpartition("=")[2].rstrip(".")), 32)
    with pytest.raises(ConfigError, match=r"resnet18 cannot train on one picture of 32 x 32 .* data.size to 33"):
        zoo.check_pictures(ModelConfig(name="resnet18"), 32, per_rank=1)
    zoo.check_pictures(ModelConfig(name="resnet18"), 32)  # evaluation


@pytest.mark.parametrize("name", FROM_TORCHVISION)
def test_published_figures_and_sizes_are_those_of_torchvisions_weights(name: str) -> None:
    weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].meta
    accuracy = weights["_metrics"]["ImageNet-1K"]
    published = zoo.published_accuracy(name)
    assert published is not None
    assert published.top1 == pytest.approx(accuracy["acc@1"] / 100)
    assert published.top5 == pytest.approx(accuracy["acc@5"] / 100)
    assert sum(parameter.numel() for parameter in meta(name).parameters()) == weights["num_params"]


def test_published_figures_of_the_paper() -> None:
    top1 = {name: accuracy.top1 for name in zoo.names() if (accuracy := zoo.published_accuracy(name))}
    assert top1["squeezenet1_0_caffe"] == 0.575
    assert top1["squeezenet1_0_simple_bypass"] == 0.604
    assert top1["squeezenet1_0_complex_bypass"] == 0.588
    assert zoo.published_accuracy("squeezenet_small") is None


@pytest.mark.parametrize(
    ("name", "metaparameters", "says"),
    [
        ("squeezenet10", {}, "There is no model 'squeezenet10'. Did you mean 'squeezenet1_0'"),
        ("resnet51", {}, "Did you mean 'resnet"),
        ("squeezenet1_0", {"by_pass": "simple"}, "no metaparameter 'by_pass'. Did you mean 'bypass'.*base_e, incr_e"),
        ("squeezenet1_0", {"weights": "DEFAULT"}, "no metaparameter 'weights'"),
        ("alexnet", {"sr": 0.5}, "alexnet has no metaparameter 'sr'.*It takes dropout"),
        ("shufflenet_v2_x0_5", {"dropout": 0.5}, "It takes none"),
        ("alexnet", {"dropout": 1.5}, "alexnet: dropout=1.5 must be a share"),
        ("mobilenet_v2", {"width_mult": 0}, "width_mult=0 must be a factor above 0"),
        ("resnet18", {"zero_init_residual": 1}, "must be true or false"),
        ("resnet18", {"stem": "v1.1"}, "resnet18: stem='v1.1' must be one of torchvision, small"),
        ("alexnet", {"stem": "small"}, "alexnet has no metaparameter 'stem'"),
    ],
)
def test_what_does_not_exist_is_refused_with_the_nearest_that_does(
    name: str, metaparameters: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        zoo.build(name, **metaparameters)


@pytest.mark.parametrize("num_classes", [0, 2.0, "10", True, 2**53 + 1, 2**80])
def test_an_impossible_number_of_classes_is_refused(num_classes: Any) -> None:
    with pytest.raises(ConfigError, match="num_classes"):
        zoo.build("resnet18", num_classes)


@pytest.mark.parametrize(
    ("name", "metaparameters"),
    [
        ("mobilenet_v2", {"width_mult": 0.5, "dropout": 0.1}),
        ("mobilenet_v3_small", {"width_mult": 0.5}),
        ("efficientnet_b0", {"dropout": 0.3, "stochastic_depth_prob": 0.1}),
        ("vgg11", {"dropout": 0.1}),
        ("mnasnet0_5", {"dropout": 0.1}),
        ("resnet18", {"zero_init_residual": True}),
        ("resnet50", {"stem": "torchvision"}),
    ],
)
def test_torchvision_models_take_the_metaparameters_that_the_registry_says(
    name: str, metaparameters: dict[str, Any]
) -> None:
    model = meta(name, **metaparameters)
    if "width_mult" in metaparameters:
        assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in meta(name).parameters())


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [("resnet18", 11_173_962), ("mobilenet_v2", 2_236_682)],  # the first as in many repositories for CIFAR-10
)
def test_a_small_stem_leaves_4x4_of_32x32(name: str, num_parameters: int) -> None:
    model, sides = zoo.build(name, 10, stem="small").eval(), []
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    for layer in (layers[0], layers[-1]):
        layer.register_forward_hook(lambda _module, _inputs, output: sides.append(output.shape[-1]))
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert sides == [32, 4]
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


def test_a_metaparameter_given_wins_over_the_preset() -> None:
    model = meta("squeezenet1_0_caffe", conv10_pad=0)
    assert isinstance(model, SqueezeNet)
    assert dict(model.named_convolutions())["conv10"].padding == (0, 0)


def test_parse_spec_reads_numbers_lists_and_words() -> None:
    spec = "squeezenet1_0:sr=0.5, pool_after=[1,2,3],bypass=simple,final_relu=false"
    expected = {"sr": 0.5, "pool_after": [1, 2, 3], "bypass": "simple", "final_relu": False}
    assert zoo.parse_spec(spec) == ("squeezenet1_0", expected)
    assert zoo.parse_spec("alexnet") == ("alexnet", {})


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("squeezenet1_0:", "key=value"),
        ("squeezenet1_0:sr", "'sr' is not of the form key=value"),
        ("squeezenet1_0:sr=", "'sr=' is not of the form key=value"),
        ("squeezenet1_0:sr=0.5,sr=0.25", "gives sr twice"),
        ("squeezenet1_0:srr=0.5", "Did you mean 'sr'"),
        ("squeznet1_0:sr=0.5", "Did you mean 'squeezenet1_0'"),
        ("", "There is no model ''"),
    ],
)
def test_a_wrong_spec_is_refused_with_the_rule(spec: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        zoo.parse_spec(spec)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "base_e": st.integers(1, 10**6),
            "sr": st.floats(0.001, 1),
            "pool_after": st.lists(st.integers(1, 9), max_size=9),
            "bypass": st.sampled_from(["none", "simple", "complex"]),
            "final_relu": st.booleans(),
        },
    )
)
def test_specs_survive_the_round_trip(metaparameters: dict[str, Any]) -> None:
    spec = zoo.format_spec("squeezenet1_0", metaparameters)
    assert " " not in spec
    assert zoo.parse_spec(spec) == ("squeezenet1_0", metaparameters)


def test_every_model_is_a_choice_and_has_a_file_only_where_its_input_differs() -> None:
    assert set(config_groups()["model"]) == {*zoo.names(), "own"}  # a network of others
    for path in CONF_MODEL.glob("*.yaml"):
        settings = yaml.safe_load(path.read_text())
        assert build_config(ModelConfig, settings) != ModelConfig(name=path.stem), f"{path.name} says nothing"


@pytest.mark.not_quick
@pytest.mark.parametrize("name", zoo.names())
def test_each_choice_is_valid_and_names_its_model(name: str) -> None:
    config = compose("train", TrainConfig, ["name=x", "data.root=x", "trainer.max_steps=1", f"model={name}"]).model
    assert config.name == name
    assert config.num_classes is None
    assert not config.metaparameters
    preset = config.input
    if name.endswith("_caffe"):
        assert (preset.size, preset.resize_side, preset.resize_mode, preset.channel_order) == (227, 256, "warp", "bgr")
        assert (tuple(preset.mean), tuple(preset.std)) == ((104.0, 117.0, 123.0), (1.0, 1.0, 1.0))
    elif name.startswith("squeezenet_small"):
        assert (preset.size, preset.resize_mode) == (32, "none")
    else:
        transform = (
            torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].transforms() if published(name) else None
        )
        if transform is not None:
            assert (preset.size, preset.resize_side) == (transform.crop_size[0], transform.resize_size[0])
            assert preset.mean == pytest.approx([255 * value for value in transform.mean])
            assert preset.std == pytest.approx([255 * value for value in transform.std])
        assert (preset.resize_mode, preset.channel_order) == ("short", "rgb")


def published(name: str) -> bool:
    """Whether torchvision has weights of this very name."""
    return name in FROM_TORCHVISION


def test_epochs_are_told_where_a_source_was_found() -> None:
    epochs = {name: recipe.epochs for name in zoo.names() if (recipe := zoo.published_recipe(name))}
    assert (epochs["squeezenet1_1"], epochs["alexnet"], epochs["vgg16_bn"], epochs["resnet50"]) == (100, 90, 90, 90)
    assert (epochs["mobilenet_v2"], epochs["mobilenet_v3_small"], epochs["shufflenet_v2_x2_0"]) == (300, 600, 600)
    assert round(epochs["squeezenet1_0_caffe"], 1) == 67.9
    assert round(epochs["shufflenet_v2_x0_5"], 1) == 239.8
    assert not {"squeezenet_small", "squeezenet1_0_simple_bypass", "mnasnet0_5", "efficientnet_b0"} & set(epochs)
    assert all(zoo.published_accuracy(name) for name in epochs)
