"""What a model costs, against hand counts, torchvision's figures and a real run."""

import json
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from pipeline.core.errors import ConfigError
from pipeline.models import zoo
from pipeline.models.cost import ModelCost, cost, footprint, gradient_bytes, layer_kinds

ONE_PER_FAMILY = (
    "alexnet",
    "vgg16",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "shufflenet_v2_x1_0",
    "mnasnet0_5",
    "efficientnet_b0",
)


def meta_cost(name: str, image_size: int = 224, batch_size: int = 1, **metaparameters: Any) -> ModelCost:
    with torch.device("meta"):
        model = zoo.build(name, **metaparameters)
    return cost(model, image_size, batch_size)


@pytest.mark.parametrize(
    ("name", "image_size", "millions"),
    [
        ("squeezenet1_0", 224, 818.9),
        ("squeezenet1_0", 227, 832.7),
        ("squeezenet1_1", 224, 349.2),
        ("squeezenet1_1", 227, 387.7),
    ],
)
def test_squeezenets_multiply_adds(name: str, image_size: int, millions: float) -> None:
    assert meta_cost(name, image_size).macs / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.not_quick
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_multiply_adds_are_those_that_torchvision_states(name: str) -> None:
    weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    crop = weights.transforms().crop_size[0]
    assert meta_cost(name, crop).macs / 1e9 == pytest.approx(weights.meta["_ops"], abs=0.0011)


@pytest.mark.parametrize(
    ("name", "num_parameters", "times_squeezenet"),
    [("squeezenet1_0", 1_248_424, 1.0), ("alexnet", 61_100_840, 48.94), ("vgg19", 143_667_240, 115.08)],
)
def test_gradient_bytes_are_four_per_parameter(name: str, num_parameters: int, times_squeezenet: float) -> None:
    found = meta_cost(name)
    assert found.num_parameters == num_parameters
    assert found.gradient_bytes == 4 * num_parameters
    assert round(found.gradient_bytes / (4 * 1_248_424), 2) == times_squeezenet


@pytest.mark.parametrize("name", ["squeezenet1_0", "resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_layers_add_up_to_the_totals(name: str) -> None:
    found = meta_cost(name)
    assert sum(layer.num_parameters for layer in found.layers) == found.num_parameters
    assert sum(layer.bytes for layer in found.layers) == found.gradient_bytes
    assert sum(layer.macs for layer in found.layers) == found.macs
    assert sum(layer.activation_bytes for layer in found.layers) == found.training_activation_bytes
    assert len({layer.name for layer in found.layers}) == len(found.layers)


def test_layers_of_squeezenet_by_hand() -> None:
    layers = {layer.name: layer for layer in meta_cost("squeezenet1_0").layers}
    conv1 = layers["features.0"]
    assert (conv1.kind, conv1.num_parameters, conv1.bytes) == ("Conv2d", 14_208, 4 * 14_208)
    assert conv1.macs == 109 * 109 * 96 * 3 * 7 * 7
    assert conv1.output_bytes == 4 * 109 * 109 * 96
    assert conv1.activation_bytes == 4 * 3 * 224 * 224  # its input, the picture


def test_activations_of_a_chain_by_hand() -> None:
    """Two convolutions with a ReLU in place between them, on an 8x8 picture: every number can be counted."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1))
    found = cost(model, 8, batch_size=5)
    picture, first, second = (5 * 64 * channels * 4 for channels in (3, 4, 2))
    # The ReLU works in place, so its result, which it and the second convolution both keep, counts once.
    assert found.training_activation_bytes == picture + first
    assert found.inference_peak_activation_bytes == picture + first + second  # the caller holds the picture throughout
    assert found.macs == 64 * (3 * 4 + 4 * 2)


@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18", "mobilenet_v2"])
def test_training_activations_are_what_a_real_forward_pass_keeps(name: str) -> None:
    model = zoo.build(name, 10).train()
    expected = cost(model, 64, batch_size=2).training_activation_bytes
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    parameters |= {buffer.untyped_storage().data_ptr() for buffer in model.buffers()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        logits_BK = model(torch.randn(2, 3, 64, 64))
    assert logits_BK.requires_grad
    assert sum(storage.nbytes() for storage in kept.values()) == expected


def test_activations_of_squeezenet_are_about_ten_times_alexnets() -> None:
    squeezenet, alexnet = (meta_cost(name, 227) for name in ("squeezenet1_0", "alexnet"))
    assert 8 < squeezenet.training_activation_bytes / alexnet.training_activation_bytes < 11


@settings(max_examples=8, deadline=None)
@given(batch_size=st.integers(2, 64))
def test_activations_grow_with_the_batch_and_nothing_else_does(batch_size: int) -> None:
    one, many = (meta_cost("squeezenet1_1", 64, batch) for batch in (1, batch_size))
    assert many.macs == one.macs
    assert many.gradient_bytes == one.gradient_bytes
    assert many.inference_peak_activation_bytes == batch_size * one.inference_peak_activation_bytes
    assert many.training_activation_bytes == batch_size * one.training_activation_bytes


def test_what_batch_norm_keeps_besides_does_not_grow() -> None:
    one, two, five = (meta_cost("resnet18", 64, batch).training_activation_bytes for batch in (1, 2, 5))
    assert five - two == 3 * (two - one)
    # Mean and deviation of each of its 4,800 channels, in fp32.
    assert one - (two - one) == 2 * 4 * 4_800


@pytest.mark.parametrize(("earlier", "later"), [((1, 2, 3), (1, 3, 5)), ((1, 3, 5), (1, 4, 8)), ((1, 4, 8), (2, 5, 9))])
def test_downsampling_late_costs_memory_and_multiply_adds_but_no_bytes_on_the_wire(
    earlier: tuple[int, int, int], later: tuple[int, int, int]
) -> None:
    first, second = (meta_cost("squeezenet1_0", pool_after=layers) for layers in (earlier, later))
    assert second.macs > first.macs
    assert second.training_activation_bytes > first.training_activation_bytes
    assert second.gradient_bytes == first.gradient_bytes


def test_frozen_parameters_owe_nothing_and_are_still_counted() -> None:
    model = zoo.build("squeezenet1_1", 10)
    total = cost(model, 64)
    for parameter in model.get_submodule("features").parameters():
        parameter.requires_grad_(False)
    frozen = cost(model, 64)
    assert frozen.num_parameters == total.num_parameters
    assert frozen.gradient_bytes == 4 * 513 * 10
    assert frozen.training_activation_bytes < total.training_activation_bytes


def test_gradient_bytes_are_known_without_a_trace() -> None:
    model = zoo.build("squeezenet1_1", 10)
    assert gradient_bytes(model) == cost(model, 64).gradient_bytes


def test_half_precision_halves_the_bytes() -> None:
    full, half = (cost(zoo.build("squeezenet1_1", 10).to(dtype), 64) for dtype in (torch.float32, torch.bfloat16))
    assert full.gradient_bytes == 2 * half.gradient_bytes
    # The indices of the poolings are whole numbers of 8 bytes in both.
    assert half.training_activation_bytes < full.training_activation_bytes < 2 * half.training_activation_bytes


def test_the_model_is_left_as_it_was() -> None:
    model = zoo.build("resnet18", 10)
    model.get_submodule("layer1").eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cost(model, 64, batch_size=2)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_network_with_batch_norm_on_a_map_of_one_pixel_can_be_costed() -> None:
    assert meta_cost("resnet18", 32).training_activation_bytes > 0


def test_pictures_too_small_for_the_network_are_refused() -> None:
    with pytest.raises(ConfigError, match="SqueezeNet cannot take pictures of 8x8 pixels"):
        meta_cost("squeezenet1_0", 8)


def test_a_cost_is_json() -> None:
    found = json.loads(json.dumps(meta_cost("squeezenet1_1").as_dict()))
    assert found["gradient_bytes"] == 4_941_984
    assert found["layers"][0]["name"] == "features.0"


def test_footprint_counts_what_is_shipped_and_what_a_rank_holds() -> None:
    weights = 61_100_840 * 4
    with torch.device("meta"):
        alexnet = zoo.build("alexnet")
    taken, one, eight = footprint(alexnet, 224, 8), cost(alexnet), cost(alexnet, batch_size=8)
    assert taken.export_bytes == weights  # torchvision's file holds 233.1 MiB
    assert taken.inference_memory_bytes == weights + one.inference_peak_activation_bytes
    assert taken.training_memory_bytes == 3 * weights + eight.training_activation_bytes


def test_statistics_are_shipped_and_held_but_have_no_gradient() -> None:
    with torch.device("meta"):
        resnet = zoo.build("resnet18")
    taken, weights = footprint(resnet, 64, 4), 11_689_512 * 4
    statistics = 2 * 4 * 4800 + 8 * 20  # means and variances of 20 layers, and int64 counts of batches
    assert taken.export_bytes == weights + statistics
    assert taken.training_memory_bytes == 3 * weights + statistics + cost(resnet, 64, 4).training_activation_bytes


def test_layers_are_convolutions_or_fully_connected_or_something_else() -> None:
    with torch.device("meta"):
        kinds = {name: layer_kinds(zoo.build(name)) for name in ("squeezenet1_0", "alexnet", "resnet18")}
    assert set(kinds["squeezenet1_0"].values()) == {"convolution"}
    assert [name for name, kind in kinds["alexnet"].items() if kind == "fully connected"] == [
        "classifier.1",
        "classifier.4",
        "classifier.6",
    ]
    assert (kinds["resnet18"]["bn1"], kinds["resnet18"]["fc"]) == ("other", "fully connected")
