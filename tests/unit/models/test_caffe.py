"""Foreign weights load completely or not at all, and the message names what does not fit."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

from pipeline.core.errors import CheckpointError
from pipeline.models import zoo
from pipeline.models.caffe import load_npz
from pipeline.models.squeezenet import SqueezeNet

SMALL = {"base_e": 16, "incr_e": 16}
DECOMPRESSED = "weights/squeezenet_v1_0_deepcompressed.npz"


def small_model(**metaparameters: Any) -> SqueezeNet:
    model = zoo.build("squeezenet1_0_caffe", 6, **SMALL, **metaparameters)
    assert isinstance(model, SqueezeNet)
    return model


def arrays_of(model: SqueezeNet) -> dict[str, np.ndarray]:
    arrays = {}
    for name, conv in model.named_convolutions():
        assert conv.bias is not None
        arrays[f"{name}.weight"] = conv.weight.detach().numpy().copy()
        arrays[f"{name}.bias"] = np.linspace(-1, 1, conv.out_channels, dtype=np.float32)
    return arrays


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    torch.manual_seed(3)
    return arrays_of(small_model())


def write(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    with path.open("wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    return path


def refused(path: Path, model: torch.nn.Module) -> str:
    """The message; the model must not have changed."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_npz(path, model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return str(caught.value)


def test_every_array_lands_in_its_layer(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    model = small_model()
    load_npz(write(tmp_path / "weights.npz", arrays), model)
    loaded = dict(model.named_convolutions())
    assert len(arrays) == 2 * len(loaded) == 52
    for name, conv in loaded.items():
        assert conv.bias is not None
        assert np.array_equal(conv.weight.detach().numpy(), arrays[f"{name}.weight"])
        assert np.array_equal(conv.bias.detach().numpy(), arrays[f"{name}.bias"])


def test_layers_have_caffes_names(arrays: dict[str, np.ndarray]) -> None:
    fires = [f"fire{i}/{part}" for i in range(2, 10) for part in ("squeeze1x1", "expand1x1", "expand3x3")]
    assert list(arrays) == [f"{name}.{kind}" for name in ("conv1", *fires, "conv10") for kind in ("weight", "bias")]


def test_missing_and_unknown_arrays_are_named(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    arrays["fire9/expand5x5.weight"] = arrays.pop("fire9/expand3x3.weight")
    message = refused(write(tmp_path / "weights.npz", arrays), small_model())
    assert "lacks fire9/expand3x3.weight and also holds fire9/expand5x5.weight" in message


def test_a_long_list_of_names_is_shortened(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    few = {name: array for name, array in arrays.items() if name.startswith("conv1.")}
    assert "fire2/expand1x1.bias and 46 more" in refused(write(tmp_path / "weights.npz", few), small_model())


def test_weights_of_another_width_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    message = refused(write(tmp_path / "weights.npz", arrays), small_model(sr=0.5))
    assert "fire2/squeeze1x1.weight has shape (2, 96, 1, 1), the model (8, 96, 1, 1)" in message


def test_weights_without_the_bypass_of_the_model_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    message = refused(write(tmp_path / "weights.npz", arrays), small_model(bypass="complex"))
    assert "lacks fire2/bypass.weight" in message


def test_values_that_are_not_finite_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    arrays["conv10.bias"][2] = np.nan
    message = refused(write(tmp_path / "weights.npz", arrays), small_model())
    assert "conv10.bias holds values that are not finite" in message


def test_arrays_of_objects_are_never_unpickled(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    arrays["conv1.bias"] = np.array([print], dtype=object)
    assert "not a readable .npz" in refused(write(tmp_path / "weights.npz", arrays), small_model())


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 broken"])
def test_damaged_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.npz"
    path.write_bytes(content)
    assert "not a readable" in refused(path, small_model())


def test_a_single_array_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    path = tmp_path / "weights.npz"
    with path.open("wb") as file:
        np.save(file, arrays["conv1.weight"])
    assert "not a readable .npz" in refused(path, small_model())


def test_a_file_that_swells_is_refused_before_it_is_read(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    path = tmp_path / "weights.npz"
    np.savez_compressed(path, allow_pickle=False, **arrays | {"conv1.weight": np.zeros(2**25, np.float32)})
    assert "would take 1" in refused(path, small_model())


def test_packed_data_that_is_damaged_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    path = tmp_path / "weights.npz"
    np.savez_compressed(path, allow_pickle=False, **arrays)
    content = bytearray(path.read_bytes())
    content[60:90] = bytes(range(30))
    path.write_bytes(content)
    assert "not a readable .npz" in refused(path, small_model())


def test_a_truncated_file_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    path = write(tmp_path / "weights.npz", arrays)
    path.write_bytes(path.read_bytes()[:-1000])
    assert "not a readable" in refused(path, small_model())


def test_a_missing_file_and_another_model_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "no.npz", small_model())
    assert "do not fit AlexNet" in refused(tmp_path / "no.npz", torchvision.models.AlexNet())


def test_the_published_deep_compressed_weights_load() -> None:
    shared = Path(os.environ.get("SQUEEZEWIRE_SHARED", Path(__file__).parents[4] / "shared"))
    if not (shared / DECOMPRESSED).is_file():
        pytest.skip(f"needs {DECOMPRESSED} under SQUEEZEWIRE_SHARED or in ../shared")
    model = zoo.build("squeezenet1_0_caffe")
    load_npz(shared / DECOMPRESSED, model)
    assert isinstance(model, SqueezeNet)
    weights = [conv.weight for _, conv in model.named_convolutions()]
    assert sum(int((weight != 0).sum()) for weight in weights) == 415_921
    load_npz(shared / DECOMPRESSED, zoo.build("squeezenet1_0"))
