"""Models of others: named, built, tried; what is wrong with them said in a sentence; their code known by its hash."""

import builtins
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.model import ModelConfig
from pipeline.config.training import TrainConfig
from pipeline.core.cli import compose
from pipeline.core.errors import ConfigError
from pipeline.core.overrides import as_typed
from pipeline.models import external, zoo
from pipeline.models.facts import model_facts
from pipeline.models.trial import try_apart, try_out
from tests.making.nets import write_nets

RUNNING = ["name=x", "data.root=x", "trainer.max_steps=1"]


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    """A folder with a blank and a bracket in its name, and a file with networks in it."""
    return write_nets(tmp_path / "my nets [v1]")


@pytest.mark.parametrize(
    "name",
    [
        "timm:resnet10t",
        "torchvision:regnet_y_400mf",
        "nets.tiny:make",
        "~/my nets [v1], really #2/net.py:make",
        "a/1.py:f",
    ],
)
def test_a_name_is_taken_as_typed(name: str) -> None:
    config = compose("train", TrainConfig, [f"model={name}", "model.metaparameters.width=2", *RUNNING])
    assert config.model.name == name and config.model.metaparameters == {"width": 2} and not config.model.allow_code


def test_a_sweep_is_of_one_kind() -> None:
    swept = as_typed(["model=timm:resnet10t,timm:vit_tiny_patch16_224"], TrainConfig, is_sweep=True)
    assert swept == ["model=own", "model.name='timm:resnet10t','timm:vit_tiny_patch16_224'"]
    with pytest.raises(ConfigError, match="a command of its own"):
        as_typed(["model=timm:resnet10t,squeezenet1_0"], TrainConfig, is_sweep=True)


@pytest.mark.parametrize(
    ("spec", "name", "metaparameters"),
    [
        ("timm:resnet10t", "timm:resnet10t", {}),
        ("timm:resnet10t.c3_in1k:drop_rate=0.1,output_stride=16", "timm:resnet10t.c3_in1k",
         {"drop_rate": 0.1, "output_stride": 16}),
        ("a/net.py:make:width=2", "a/net.py:make", {"width": 2}),
    ],
)  # fmt: skip
def test_specs(spec: str, name: str, metaparameters: dict[str, object]) -> None:
    assert zoo.parse_spec(spec) == (name, metaparameters)
    assert zoo.parse_spec(zoo.format_spec(name, metaparameters)) == (name, metaparameters)


@pytest.mark.parametrize(
    ("name", "metaparameters", "says"),
    [
        ("timm:resnet10x", {}, "timm has no classifier 'resnet10x'. Did you mean 'resnet10t'?"),
        ("timm:resnet10t", {"nonsense": 1}, "timm:resnet10t, called with num_classes=3, nonsense=1, raised TypeError"),
        ("timm:resnet10t", {"pretrained": True}, "takes no weights from timm .pretrained.: .* init.checkpoint=FILE"),
        ("timm:resnet10t", {"checkpoint_path": "x"}, "takes no weights from timm"),
        ("torchvision:regnet_y_400m", {}, "no classifier 'regnet_y_400m'. Did you mean 'regnet_y_400mf'?"),
        ("torchvision:fcn_resnet50", {}, "torchvision has no classifier 'fcn_resnet50'"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "takes no weights from torchvision"),
        ("squeezenet1_0:sr", {}, "write model=squeezenet1_0, and model.metaparameters"),
        ("timm:", {}, "names no model: write timm:NAME, torchvision:NAME, package.module:factory or"),
        ("no_such_module_xyz:make", {}, "neither installed nor in"),
        ("no-name:make", {}, "names no model"),
        ("nowhere.py:make", {}, "There is no file nowhere.py with a model .looked for from /"),
    ],
)
def test_what_is_none_is_said(name: str, metaparameters: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        zoo.build(name, 3, allow_code=True, **metaparameters)


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        ("tinny", "has no function 'tinny'. Did you mean 'tiny'?"),
        ("thing", "has no function 'thing'"),
        ("raises", r"raised RuntimeError \(no luck\) at .*nets.py:12"),
        ("nothing", "returned NoneType, not a torch.nn.Module"),
        ("no_vector", r"shape \(2, 5, 32, 32\) for 2 pictures, not logits of shape \(2, 5\)"),
        ("lazy", "1.weight, 1.bias has no shape before the first picture"),
        ("Idle", "2 of its parameters get no gradient, such as idle.weight, idle.bias"),
    ],
)
def test_a_factory_that_gives_no_classifier(nets: Path, factory: str, says: str) -> None:
    name = f"{nets}:{factory}"
    with pytest.raises(ConfigError, match=says):
        try_out(zoo.build(name, 5, allow_code=True), name, num_classes=5, side=32, per_rank=2)


def test_others_outputs_are_switched_off_by_who_asks() -> None:
    with pytest.raises(ConfigError, match=r"GoogLeNetOutputs in training, not one tensor .*aux_logits: false"):
        model = zoo.build("torchvision:googlenet", 5, init_weights=False)
        try_out(model, "torchvision:googlenet", num_classes=5, side=64, per_rank=2)


def test_code_runs_only_where_it_may(nets: Path) -> None:
    nets.write_text("raise SystemExit('it ran')")
    with pytest.raises(ConfigError, match=r"add model\.allow_code=true"):
        zoo.build(f"{nets}:tiny", 5)
    with pytest.raises(ConfigError, match=r"SystemExit \(it ran\)"):
        zoo.build(f"{nets}:tiny", 5, allow_code=True)


@pytest.mark.not_quick
def test_it_is_tried_apart_and_leaves_no_trace(nets: Path) -> None:
    with pytest.raises(ConfigError, match="no luck"):
        try_apart(ModelConfig(name=f"{nets}:raises", allow_code=True), 5, side=32, per_rank=2)
    try_apart(ModelConfig(name=f"{nets}:tiny", allow_code=True, metaparameters={"width": 2}), None, side=32, per_rank=2)
    model = zoo.build(f"{nets}:tiny", 5, allow_code=True)
    before, seed = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    try_out(model, "tiny", num_classes=5, side=32, per_rank=2)
    assert torch.equal(seed, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_costs_are_known_where_it_runs_without_memory(nets: Path) -> None:
    tiny = model_facts(f"{nets}:tiny:width=2", 5, 32, 2, allow_code=True)
    assert tiny.num_parameters == 3 * 2 * 9 + 2 + 2 * 2 + 2 * 5 + 5 and tiny.footprint is not None
    reckons = model_facts(f"{nets}:Reckons", 5, 32, 2, allow_code=True)
    assert reckons.parameter_bytes == 4 * (3 * 5 + 5) and reckons.footprint is None and reckons.why_no_footprint


def test_the_head_of_any_network() -> None:
    """The last entry of a state dict is not always the head's."""
    late = torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.LayerNorm(7))
    assert zoo.head_of(late, 7) == "0"
    assert zoo.head_of(zoo.build("timm:resnet10t", 7), 7) == "fc"


def test_torchvision_tells_its_accuracy() -> None:
    told = zoo.published_accuracy("torchvision:regnet_y_400mf")
    assert told is not None and (told.top1, told.top5) == (0.74046, 0.91716) and "torchvision 0." in told.source
    assert zoo.published_accuracy("torchvision:resnet18") == zoo.published_accuracy("resnet18")
    assert zoo.published_accuracy("timm:resnet10t") is None and zoo.published_recipe("timm:resnet10t") is None


def test_without_timm_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "timm":
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="timm:resnet10t needs timm, which is not installed here: pip install"):
        zoo.build("timm:resnet10t", 3)


@pytest.mark.not_quick
def test_the_hash_is_of_all_that_was_loaded_and_of_nothing_else(nets: Path) -> None:
    """In new processes: within one, the code is what it was when it was read. Nothing stands in for other modules."""

    def digest(name: str) -> str:
        code = f"from pipeline.models.external import *; print(source_sha256({name!r}, allow_code=True))"
        ended = subprocess.run(
            [sys.executable, "-P", "-c", code], cwd=nets.parent, capture_output=True, text=True, timeout=120
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.strip()

    by_file = digest(f"{nets}:tiny")
    (nets.parent / "random.py").write_text("raise RuntimeError('not this one')")
    (nets.parent / "pipeline.py").write_text("raise RuntimeError('nor this one')")
    assert digest("./nets.py:tiny") == digest("nets:tiny") == by_file
    (nets.parent / "blocks.py").write_text((nets.parent / "blocks.py").read_text() + "\n")
    assert digest("nets.py:tiny") != by_file
    assert external.source_sha256("timm:resnet10t", allow_code=False) is None
