"""Our SqueezeNet against the paper's Table 1 and against torchvision's implementation."""

import math
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.config.model import ModelConfig
from pipeline.config.squeezenet import FIRE_LAYERS, SqueezeNetConfig
from pipeline.core.errors import ConfigError
from pipeline.models import zoo
from pipeline.models.squeezenet import Fire, SqueezeNet

# arXiv 1602.07360, Table 1, column "# parameters before pruning".
TABLE_1 = {
    "conv1": 14_208,
    "fire2": 11_920,
    "fire3": 12_432,
    "fire4": 45_344,
    "fire5": 49_440,
    "fire6": 104_880,
    "fire7": 111_024,
    "fire8": 188_992,
    "fire9": 197_184,
    "conv10": 513_000,
}
VERSIONS = ("squeezenet1_0", "squeezenet1_1")


def build(name: str = "squeezenet1_0", num_classes: int = 1000, **metaparameters: Any) -> SqueezeNet:
    model = zoo.build(name, num_classes, **metaparameters)
    assert isinstance(model, SqueezeNet)
    return model


def meta(name: str = "squeezenet1_0", num_classes: int = 1000, **metaparameters: Any) -> SqueezeNet:
    with torch.device("meta"):
        return build(name, num_classes, **metaparameters)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def peer(name: str, **arguments: Any) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, **arguments)


def pictures(side: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(5))


def test_parameters_per_layer_equal_the_papers_table_1() -> None:
    assert {name: count(layer) for name, layer in meta().named_layers()} == TABLE_1
    assert count(meta()) == 1_248_424


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("squeezenet1_1", 1_235_496),
        ("squeezenet1_0_simple_bypass", 1_248_424),
        ("squeezenet1_0_complex_bypass", 1_589_672),
    ],
)
def test_parameters_of_the_variants(name: str, num_parameters: int) -> None:
    assert count(meta(name)) == num_parameters


def test_there_is_no_batch_norm() -> None:
    assert not list(meta().buffers())


@pytest.mark.parametrize("side", [224, 227, 97])
@pytest.mark.parametrize("name", VERSIONS)
def test_outputs_equal_torchvisions_and_state_dicts_load_strictly_both_ways(name: str, side: int) -> None:
    ours, theirs = build(name).eval(), peer(name).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(ours(pictures(side)), theirs(pictures(side)), atol=1e-5, rtol=0)
    theirs = peer(name).eval()  # new weights, the other direction
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(ours(pictures(side)), theirs(pictures(side)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", VERSIONS)
def test_gradients_equal_torchvisions(name: str) -> None:
    ours, theirs = build(name, 10, dropout=0.0), peer(name, num_classes=10, dropout=0.0)
    theirs.load_state_dict(ours.state_dict())
    for model in (ours, theirs):
        nn.functional.cross_entropy(model(pictures(64)), torch.tensor([3, 7])).backward()
    for (name_ours, mine), (name_theirs, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name_ours == name_theirs
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", VERSIONS)
def test_the_same_seed_gives_torchvisions_initial_weights(name: str) -> None:
    torch.manual_seed(11)
    ours = build(name, 10, init="torchvision").state_dict()
    torch.manual_seed(11)
    theirs = peer(name, num_classes=10).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(("init", "gain"), [("caffe", 3.0), ("torchvision", 6.0)])
def test_initial_weights_fill_their_bounds(init: str, gain: float) -> None:
    for name, conv in build(init=init).named_convolutions():
        assert conv.bias is not None
        assert not conv.bias.any()
        if name == "conv10":
            assert conv.weight.std().item() == pytest.approx(0.01, rel=0.02)
            continue
        fan_in = conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]
        bound = math.sqrt(gain / fan_in)
        assert 0.98 * bound < conv.weight.abs().max().item() <= bound
        assert conv.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize("name", [*VERSIONS, "squeezenet_small", "squeezenet1_0_complex_bypass"])
def test_the_default_weights_tell_pictures_apart(name: str) -> None:
    """Under He's initialisation nearly all pictures look alike, which is how a training begins at ln(classes)."""

    def alikeness(**metaparameters: Any) -> float:
        torch.manual_seed(3)
        model = build(name, 10, **metaparameters).eval()
        with torch.no_grad():
            features_BF = model.features(pictures(64, 8)).flatten(1)
        return torch.corrcoef(features_BF)[~torch.eye(8, dtype=torch.bool)].mean().item()

    assert alikeness() < 0.8 * alikeness(init="torchvision")


@pytest.mark.parametrize("name", VERSIONS)
def test_no_output_of_conv10_is_off_at_the_start(name: str) -> None:
    model = build(name, 10).eval()
    before_relu_BKHW = model.classifier[1](model.features(pictures(64, 8)))
    assert before_relu_BKHW.min() > 0


def test_the_default_weights_do_not_depend_on_the_number_of_threads() -> None:
    def drawn(num_threads: int) -> dict[str, Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            torch.manual_seed(11)
            return build("squeezenet1_1", 10).state_dict()
        finally:
            torch.set_num_threads(before)

    one, three = drawn(1), drawn(3)
    assert all(torch.equal(one[key], three[key]) for key in one)


def test_the_default_weights_of_a_network_that_halves_often_are_finite() -> None:
    state = build(num_classes=10, pool_after=(1, 2, 3, 4, 5, 6)).state_dict()
    assert all(value.isfinite().all() for value in state.values())


def test_caffes_conv10_averages_over_a_padded_map() -> None:
    def map_side(name: str) -> int:
        model = meta(name)
        map_BKHW = model.classifier[:3](model.features(torch.empty(1, 3, 227, 227, device="meta")))
        return map_BKHW.shape[-1]

    assert (map_side("squeezenet1_0"), map_side("squeezenet1_0_caffe")) == (13, 15)


def test_without_the_final_relu_logits_can_be_negative_and_keys_stay() -> None:
    with_relu, without = (build(num_classes=10, init="torchvision", final_relu=relu).eval() for relu in (True, False))
    without.load_state_dict(with_relu.state_dict(), strict=True)
    with torch.no_grad():
        assert with_relu(pictures(64)).min() >= 0
        assert without(pictures(64)).min() < 0


def test_all_negative_conv10_is_an_absorbing_state_only_behind_the_relu() -> None:
    def gradient(final_relu: bool) -> float:
        model = build(num_classes=10, final_relu=final_relu, dropout=0.0)
        model.state_dict()["classifier.1.bias"].fill_(-100.0)
        loss = nn.functional.cross_entropy(model(pictures(64)), torch.tensor([1, 2]))
        loss.backward()
        if final_relu:
            assert loss.item() == pytest.approx(math.log(10), abs=1e-6)
        return sum(p.grad.abs().sum().item() for p in model.parameters() if p.grad is not None)

    assert gradient(final_relu=True) == 0.0
    assert gradient(final_relu=False) > 0.0


def test_simple_bypass_goes_around_fire_3_5_7_9_and_complex_around_all() -> None:
    def kinds(name: str) -> dict[str, str]:
        layers = ((label, layer) for label, layer in meta(name).named_layers() if isinstance(layer, Fire))
        return {label: type(layer.bypass).__name__ for label, layer in layers}

    odd, even = ("fire3", "fire5", "fire7", "fire9"), ("fire2", "fire4", "fire6", "fire8")
    simple, complex_ = kinds("squeezenet1_0_simple_bypass"), kinds("squeezenet1_0_complex_bypass")
    assert {simple[name] for name in odd} == {"Identity"} == {complex_[name] for name in odd}
    assert {simple[name] for name in even} == {"NoneType"}
    assert {complex_[name] for name in even} == {"Conv2d"}


def test_a_bypassed_fire_module_adds_its_input() -> None:
    widths = SqueezeNetConfig(base_e=8, incr_e=8, sr=0.25).fire_widths(2)
    plain, bypassed = Fire(8, widths), Fire(8, widths, bypass="simple")
    bypassed.load_state_dict(plain.state_dict())
    x_BCHW = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(bypassed(x_BCHW), plain(x_BCHW) + x_BCHW)


@pytest.mark.parametrize("name", [name for name in zoo.names() if name.startswith("squeezenet")])
def test_every_parameter_of_every_variant_learns_under_bf16_and_channels_last(name: str) -> None:
    torch.manual_seed(0)
    model = build(name, 10, final_relu=False).to(memory_format=torch.channels_last)
    side = 32 if "small" in name else 64
    scale = 60.0 if "caffe" in name else 1.0
    with torch.autocast("cpu", torch.bfloat16):
        logits_BK = model(scale * pictures(side).to(memory_format=torch.channels_last))
    nn.functional.cross_entropy(logits_BK.float(), torch.tensor([1, 2])).backward()
    for key, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.any(), key


def lived_in(model: SqueezeNet) -> SqueezeNet:
    """With statistics as of a training: nothing is 0 or 1 any more."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                assert tensor is not None
                tensor.uniform_(0.2, 1.2, generator=generator)
    return model.eval()


@pytest.mark.parametrize("name", ["squeezenet1_0_complex_bypass", "squeezenet_small_simple_bypass"])
def test_batch_norm_stands_for_biases_and_folds_into_them(name: str) -> None:
    torch.manual_seed(0)
    model, plain = lived_in(build(name, 10, norm="batch")), build(name, 10)
    num_channels = sum(len(conv.weight) for name, conv in plain.named_convolutions())
    num_channels -= 10 + sum(len(conv.weight) for name, conv in plain.named_convolutions() if name.endswith("/bypass"))
    assert count(model) == count(plain) + num_channels  # a scale and a shift for a bias
    assert sum(buffer.numel() for buffer in model.buffers() if buffer.ndim) == 2 * num_channels
    before = torch.get_rng_state()
    folded = model.folded()
    assert torch.equal(torch.get_rng_state(), before)
    plain.load_state_dict(folded.state_dict(), strict=True)
    with torch.no_grad():
        expected_BK = model(pictures(64))
        torch.testing.assert_close(plain.eval()(pictures(64)), expected_BK, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(folded(pictures(64)), expected_BK, atol=1e-4, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(stem=st.sampled_from(["v1.0", "v1.1", "small"]), pool_after=st.sets(st.integers(1, 9), max_size=5))
@example(stem="v1.1", pool_after={1, 3, 5})
def test_one_picture_is_trained_on_where_batch_norm_sees_more_than_one_value(stem: str, pool_after: set[int]) -> None:
    metaparameters: dict[str, Any] = {"stem": stem, "pool_after": sorted(pool_after), "norm": "batch"}
    model = meta("squeezenet_small", 10, **metaparameters)
    asked = ModelConfig(name="squeezenet_small", metaparameters=metaparameters)
    config = SqueezeNetConfig(**metaparameters)
    refused, taken = config.max_side_of_one_value, max(config.max_side_of_one_value + 1, config.min_side)
    model(torch.empty(1, 3, taken, taken, device="meta"))
    zoo.check_pictures(asked, taken, per_rank=1)
    if refused >= config.min_side:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model(torch.empty(1, 3, refused, refused, device="meta"))
        with pytest.raises(ConfigError, match=f"data.size to {taken} or more"):
            zoo.check_pictures(asked, refused, per_rank=1)


@settings(max_examples=40, deadline=None)
@given(
    base_e=st.integers(16, 160),
    incr_e=st.integers(0, 160),
    freq=st.integers(1, 8),
    pct3x3=st.floats(0.1, 0.9),
    sr=st.floats(0.1, 1.0),
    pool_after=st.sets(st.integers(1, 9), max_size=4),
    stem=st.sampled_from(["v1.0", "v1.1", "small"]),
    bypass=st.sampled_from(["none", "complex"]),
)
def test_any_metaparameters_give_a_network_with_the_parameters_their_widths_say(
    base_e: int, incr_e: int, freq: int, pct3x3: float, sr: float, pool_after: set[int], stem: str, bypass: str
) -> None:
    model = meta(
        num_classes=7,
        base_e=base_e,
        incr_e=incr_e,
        freq=freq,
        pct3x3=pct3x3,
        sr=sr,
        pool_after=sorted(pool_after),
        stem=stem,
        bypass=bypass,
    )
    assert model(torch.empty(3, 3, 128, 128, device="meta")).shape == (3, 7)
    assert sum(isinstance(layer, nn.MaxPool2d) for layer in model.features) == len(pool_after)
    layers = dict(model.named_layers())
    num_inputs = {"v1.0": 96, "v1.1": 64, "small": 64}[stem]
    config = SqueezeNetConfig(base_e=base_e, incr_e=incr_e, freq=freq, pct3x3=pct3x3, sr=sr)
    for layer in FIRE_LAYERS:
        w = config.fire_widths(layer)
        expected = num_inputs * w.s1x1 + w.s1x1 * (w.e1x1 + 9 * w.e3x3) + w.s1x1 + w.e
        if bypass == "complex" and num_inputs != w.e:
            expected += (num_inputs + 1) * w.e
        assert count(layers[f"fire{layer}"]) == expected
        num_inputs = w.e
    assert count(layers["conv10"]) == (num_inputs + 1) * 7


@given(pool_after=st.sets(st.integers(1, 9), max_size=4))
@settings(max_examples=20, deadline=None)
def test_where_to_downsample_changes_no_parameter(pool_after: set[int]) -> None:
    assert count(meta(pool_after=sorted(pool_after))) == 1_248_424


def test_the_small_stem_halves_32_to_16_8_and_4() -> None:
    model = meta("squeezenet_small", 10)
    sides = []
    for layer in model.features:
        layer.register_forward_hook(lambda _module, _inputs, out: sides.append(out.shape[-1]))
    model(torch.empty(1, 3, 32, 32, device="meta"))
    assert list(dict.fromkeys(sides)) == [32, 16, 8, 4]
