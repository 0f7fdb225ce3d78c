"""Weights of any origin with what is needed to use them: the model, its classes, the pictures it expects."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image

from pipeline import load_model
from pipeline.config.evaluate import EvaluateConfig
from pipeline.config.model import InputConfig, ModelConfig
from pipeline.config.predict import PredictConfig
from pipeline.config.registry import preset_input
from pipeline.core.cli import compose
from pipeline.core.errors import CheckpointError, ConfigError, DataError
from pipeline.data.pixels import eval_view
from pipeline.models import zoo
from pipeline.models.normalizer import Normalizer
from pipeline.run.checkpoint import SECTION, AtomicCheckpointIO
from pipeline.training import prediction
from pipeline.training.scoring import check_batch
from pipeline.training.trained import load_trained

CLASSES = ("ant", "bee", "cat")
SEEN = InputConfig(size=40, resize_side=48, channel_order="bgr", mean=(1.0, 2.0, 3.0))
NOTHING = ModelConfig(name="")


def ours(path: Path, **section: Any) -> Path:
    """A checkpoint of a run of three classes."""
    torch.manual_seed(0)
    model = zoo.build("squeezenet1_1", len(CLASSES), final_relu=False)
    facts = {"step": 7, "world_size": 1, "model": "squeezenet1_1", "num_parameters": 1, "num_classes": len(CLASSES)}
    facts |= {"classes": list(CLASSES), "metaparameters": {"final_relu": False}, "best_score": None}
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    AtomicCheckpointIO().save_checkpoint({"state_dict": state, SECTION: facts | section}, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    told = json.loads(json.dumps(dataclasses.asdict(SEEN)))
    return ours(tmp_path_factory.mktemp("run") / "step=000000007.ckpt", input=told)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number, name in enumerate(("b.jpg", "a [1].png")):
        Image.linear_gradient("L").rotate(90 * number).convert("RGB").resize((70, 60)).save(folder / name)
    return folder


def predict_config(checkpoint: Path, source: Path | str, *more: str) -> PredictConfig:
    return compose("predict", PredictConfig, [f"checkpoint={checkpoint}", f"source={source}", *more])


def test_any_name_is_one_that_no_preset_has() -> None:
    assert preset_input("x" * 300) == preset_input("../model/squeezenet1_0_caffe") == InputConfig()


def test_a_checkpoint_says_all_that_is_needed(checkpoint: Path) -> None:
    trained = load_trained(checkpoint, NOTHING)
    assert (trained.name, trained.num_outputs, trained.classes) == ("squeezenet1_1", 3, CLASSES)
    assert trained.input == SEEN and not trained.differences and not trained.model.training
    # The usual input of a model that is named is no wish; what is unlike it, and another size, are, and are said.
    named = ModelConfig(name="squeezenet1_1", input=preset_input("squeezenet1_1"))
    assert load_trained(checkpoint, named).input == SEEN
    wish = dataclasses.replace(named, input=dataclasses.replace(named.input, resize_mode="warp"))
    other = load_trained(checkpoint, wish, size=20)
    assert other.input == dataclasses.replace(SEEN, size=20, resize_side=24, resize_mode="warp")
    assert other.differences == (
        "model.input.size was 40 and is 20 here",
        "model.input.resize_side was 48 and is 24 here",
        "model.input.resize_mode was short and is warp here",
    )
    with pytest.raises(ConfigError, match=r"squeezenet1_1 cannot take pictures of 8 x 8 .* data\.size to 17"):
        load_trained(checkpoint, NOTHING, size=8)


def test_what_fits_into_memory_depends_on_the_size_that_is_fed(checkpoint: Path) -> None:
    keys = [f"checkpoint={checkpoint}", "data.root=r", "batch_per_rank=1000000000"]
    config = compose("evaluate", EvaluateConfig, keys)
    with pytest.raises(ConfigError, match=r"batch_per_rank=1000000000 pictures of 48 x 48 pixels"):
        check_batch(config, load_trained(checkpoint, NOTHING), 1)


def test_older_checkpoints_tell_their_input_among_their_settings(tmp_path: Path) -> None:
    told = {f"model.input.{key}": value for key, value in dataclasses.asdict(InputConfig()).items()}
    path = ours(tmp_path / "step=000000007.ckpt", free_fields={"data.size": 56, "recipe.lr": 0.1, **told})
    assert load_trained(path, NOTHING).input == InputConfig().resized(56)


@pytest.mark.not_quick
def test_weights_of_others_name_no_model_and_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "theirs.pth"
    theirs = torchvision.models.squeezenet1_1(num_classes=7)
    torch.save(theirs.state_dict(), path)
    fit = "Its weights have the shapes of model=squeezenet1_1 and of model=squeezenet1_1_caffe"
    with pytest.raises(ConfigError, match=f"add model=NAME. {fit}"):
        load_model(path)
    trained = load_model(path, "squeezenet1_1")
    assert (trained.num_outputs, trained.classes, trained.input) == (7, None, InputConfig())
    images_BCHW = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(trained.model(images_BCHW), theirs.eval()(images_BCHW))
    torch.save({"other.weight": torch.ones(3)}, path)
    with pytest.raises(ConfigError, match="No model here has weights like it"):
        load_model(path)


@pytest.mark.parametrize("content", [{"weight": 1}, {0: torch.ones(1), "": {"a": 1}}, {"weight": [1.0]}, {"x": None}])
def test_what_holds_more_than_tensors_is_no_state_dict(content: dict[Any, Any], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "theirs.pth")
    for model in ("", "squeezenet1_1"):
        with pytest.raises(CheckpointError, match=r"holds no weights: .* not a tensor"):
            load_model(tmp_path / "theirs.pth", model)


@pytest.mark.parametrize("key", ["model", "num_classes", "metaparameters"])
def test_a_part_that_is_missing_is_not_guessed(key: str, checkpoint: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    del content[SECTION][key]
    torch.save(content, tmp_path / "step=000000007.ckpt")
    with pytest.raises(CheckpointError, match=f"its '{key}' is missing"):
        load_trained(tmp_path / "step=000000007.ckpt", NOTHING)


@pytest.mark.parametrize("change", [{"num_classes": 9_000_000}, {"metaparameters": {"base_e": 900_000}}])
def test_a_checkpoint_that_says_that_it_is_enormous_is_compared_before_it_is_built(
    change: dict[str, Any], tmp_path: Path
) -> None:
    path = ours(tmp_path / "step=000000007.ckpt", **change)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_trained(path, NOTHING)


def test_a_picture_is_fed_as_in_evaluation(checkpoint: Path, pictures: Path) -> None:
    trained = load_model(checkpoint)
    content = (pictures / "b.jpg").read_bytes()
    view = torch.tensor(eval_view(content, SEEN)).permute(2, 0, 1).unsqueeze(0)
    fed = Normalizer(SEEN)(view, torch.contiguous_format)
    assert torch.equal(trained.preprocess(pictures / "b.jpg"), fed)
    (told,) = trained.predict(content, top=2)
    probabilities = trained.model(fed).softmax(dim=1)[0]
    assert [CLASSES[one.label] for one in told] == [one.name for one in told]
    assert [one.probability for one in told] == sorted(probabilities.tolist(), reverse=True)[:2]
    assert trained.predict() == []


def test_pictures_are_found_by_path_folder_pattern_and_stdin(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    both = [str(pictures / "a [1].png"), str(pictures / "b.jpg")]
    (pictures / "notes.txt").touch()
    assert prediction.find_pictures(str(pictures)) == both
    assert "1 others below" in capsys.readouterr().err
    assert prediction.find_pictures(str(pictures / "*.[jp]*g")) == both
    assert prediction.find_pictures(both[0]) == both[:1]  # as it is, though it looks like a pattern
    (tmp_path / "stdin").write_text(f"{both[1]}\n\n{both[0]}\r\n")
    with (tmp_path / "stdin").open(newline="") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert prediction.find_pictures("-") == both[::-1]
    with pytest.raises(DataError, match="no such file or folder"):
        prediction.find_pictures(str(pictures / "*.tif"))


@pytest.mark.parametrize("format_", ["table", "jsonl", "csv"])
def test_what_is_no_picture_is_named_and_the_others_are_told(
    format_: str, checkpoint: Path, pictures: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"GIF89a and so on")
    config = predict_config(checkpoint, pictures, "top=2", f"format={format_}", "accelerator=cpu")
    trained = prediction.load(config)
    paths = [str(pictures / "b.jpg"), str(bad), str(tmp_path / "none.jpg"), str(pictures / "a [1].png")]
    assert prediction.tell(trained, paths, config) == 2
    said = capsys.readouterr()
    assert "GIF" in said.err and "none.jpg: there is no such file" in said.err and "2 of 4" in said.err
    lines = said.out.splitlines()
    (first,) = trained.predict(paths[0], top=2)
    if format_ == "table":
        assert len(lines) == 2 and lines[0].startswith(f"{paths[0]}  {first[0].name} {first[0].probability:.3f}, ")
    elif format_ == "jsonl":
        told = json.loads(lines[0])
        assert told["path"] == paths[0] and len(lines) == 2
        assert told["predictions"][1] == dict(zip(("label", "class", "probability"), first[1], strict=True))
    else:
        assert lines[0] == "path,rank,class,label,probability" and len(lines) == 5
        assert lines[1].split(",")[1:4] == ["1", first[0].name, str(first[0].label)]


def test_names_of_classes_can_be_given_and_must_fit(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    unnamed = ours(tmp_path / "step=000000007.ckpt", classes=None)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(CLASSES[::-1]))
    assert prediction.load(predict_config(unnamed, pictures, f"classes={names}")).classes == CLASSES[::-1]
    with pytest.raises(ConfigError, match="is not what the checkpoint says"):
        prediction.load(predict_config(checkpoint, pictures, f"classes={names}"))
    with pytest.raises(ConfigError, match="names 1000 classes and the model has 3 outputs"):
        prediction.load(predict_config(unnamed, pictures, "classes=imagenet"))
    with pytest.raises(ConfigError, match="cannot be read as text"):
        prediction.load(predict_config(unnamed, pictures, f"classes={tmp_path}"))
