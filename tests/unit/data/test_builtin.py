"""The built-in set is what the demo leans on: pure, balanced, as heavy as ImageNet, and beyond a linear model."""

import io
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.core.errors import DataError
from pipeline.data.prepare.builtin import CLASSES, EXPECTED_BYTES, BuiltinPictures, open_builtin
from pipeline.data.prepare.textures import TEXTURES, draw

PICTURES = BuiltinPictures(seed=0, num_classes=10)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32), index=st.integers(0, 10**6), split=st.sampled_from(["train", "val"]))
def test_a_picture_is_a_function_of_seed_split_and_index(seed: int, index: int, split: str) -> None:
    first, second = (BuiltinPictures(seed=seed, num_classes=10).jpeg(split, index) for _ in range(2))
    assert first == second
    image = Image.open(io.BytesIO(first))
    image.load()
    assert (image.format, image.mode) == ("JPEG", "RGB")
    assert 300 <= min(image.size) <= 500


def test_seeds_splits_and_indices_give_different_pictures() -> None:
    contents = [
        BuiltinPictures(seed=seed, num_classes=10).jpeg(split, index)
        for seed in (0, 1)
        for split in ("train", "val")
        for index in (0, 10)
    ]
    assert len(set(contents)) == 8


def test_files_weigh_what_imagenet_s_do() -> None:
    """ImageNet's training files are 106 KB on average; ours are planned with that."""
    mean_bytes = np.mean([len(PICTURES.jpeg("train", index)) for index in range(100)])
    assert mean_bytes == pytest.approx(EXPECTED_BYTES, rel=0.12)


def test_classes_are_balanced() -> None:
    source = open_builtin(BuiltinPictures(seed=0, num_classes=4, num_images=100), None, None)
    assert source.classes == CLASSES[:4]
    for split, num_images in (("train", 100), ("val", 25)):
        names = [image.class_name for image in source.splits[split]]
        counts = [names.count(name) for name in source.classes]
        assert sum(counts) == num_images and max(counts) - min(counts) <= 1
        assert source.read(source.splits[split][0]) == BuiltinPictures(seed=0, num_classes=4).jpeg(split, 0)


def test_a_split_it_does_not_have() -> None:
    with pytest.raises(DataError, match=r"split=dev is not in source=builtin; it has train, val"):
        open_builtin(PICTURES, "dev", None)


@pytest.mark.parametrize("name", TEXTURES)
def test_a_texture_covers_part_of_the_picture(name: str) -> None:
    coverage_HW = np.stack([draw(name, 120, 160, np.random.default_rng(seed)) for seed in range(8)])
    assert coverage_HW.shape == (8, 120, 160) and coverage_HW.dtype == np.float32
    assert coverage_HW.min() >= 0 and coverage_HW.max() <= 1
    assert name == "plain" or 0.1 < coverage_HW.mean() < 0.9


def small_pixels(split: str, indices: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of 32x32 pixels `(N, 3072)` and their labels `(N,)`."""
    rows = [
        np.asarray(Image.fromarray(PICTURES.pixels(split, index)).resize((32, 32), Image.Resampling.BOX)).ravel()
        for index in indices
    ]
    return torch.tensor(np.stack(rows)).float(), torch.tensor([PICTURES.label(index) for index in indices])


def fit_linear(images_ND: torch.Tensor, labels_N: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Multinomial logistic regression, by L-BFGS to convergence."""
    weight = torch.zeros(images_ND.shape[1], 10, requires_grad=True)
    bias = torch.zeros(10, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(images_ND @ weight + bias, labels_N) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)  # pyright: ignore[reportArgumentType]  # torch's stub wants a float
    return weight.detach(), bias.detach()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small matrices are not worth torch's threads, which fight over a loaded machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.not_quick
@pytest.mark.usefixtures("one_thread")
def test_a_linear_model_does_not_learn_it() -> None:
    """On 32x32 pixels it must stay below 0.5, though it has the means to fit what it is shown."""
    train_ND, train_labels_N = small_pixels("train", range(600))
    val_ND, val_labels_N = small_pixels("val", range(200))
    mean_D, std_D = train_ND.mean(0), train_ND.std(0)
    train_ND, val_ND = (train_ND - mean_D) / std_D, (val_ND - mean_D) / std_D
    accuracies = []
    for penalty in (1e-4, 1e-1):
        weight, bias = fit_linear(train_ND, train_labels_N, penalty)
        fitted = ((train_ND @ weight + bias).argmax(1) == train_labels_N).float().mean().item()
        accuracies.append(((val_ND @ weight + bias).argmax(1) == val_labels_N).float().mean().item())
        assert penalty > 1e-4 or fitted > 0.95
    assert max(accuracies) < 0.5
