"""What a network is fed, and exact sums over every picture of a split."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from pipeline.config.model import InputConfig
from pipeline.models.normalizer import Normalizer
from pipeline.models.scoring import ExactMetrics

# --- pixels ---


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_pixels_are_normalised_in_the_models_channel_order(order: str) -> None:
    config = InputConfig(channel_order=order, mean=(10.0, 20.0, 30.0), std=(1.0, 2.0, 4.0))
    pixels_BCHW = torch.tensor([0, 100, 250], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 2, 2).contiguous()
    before = pixels_BCHW.clone()
    values = Normalizer(config)(pixels_BCHW, torch.channels_last)
    red, green, blue = (0.0, 100.0, 250.0) if order == "rgb" else (250.0, 100.0, 0.0)
    expected = torch.tensor([(red - 10) / 1, (green - 20) / 2, (blue - 30) / 4])
    assert values.dtype == torch.float32 and values.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(values[0, :, 1, 1], expected)
    assert torch.equal(pixels_BCHW, before)


def test_the_normaliser_gives_ddp_nothing_to_synchronise() -> None:
    assert not list(Normalizer(InputConfig()).buffers()) and not list(Normalizer(InputConfig()).parameters())


# --- exact sums ---


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 5), st.integers(2, 12), st.integers(0, 2**31))
def test_every_picture_counts_once_and_padding_never(
    num_samples: int, batch_size: int, num_padding: int, num_classes: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_NK = torch.randn(num_samples, num_classes, generator=generator)
    labels_N = torch.randint(num_classes, (num_samples,), generator=generator)
    metrics = ExactMetrics(num_classes)
    metrics.update(torch.full((1, num_classes), 9.0), torch.zeros(1, dtype=torch.long), torch.tensor([0]))
    metrics.reset()  # forgets it
    padding_PK = torch.full((num_padding, num_classes), math.nan)  # would spoil any sum
    for start in range(0, num_samples, batch_size):
        labels_B = labels_N[start : start + batch_size]
        ids_B = torch.arange(start, start + len(labels_B))
        metrics.update(
            torch.cat([padding_PK, logits_NK[start : start + batch_size]]),
            torch.cat([torch.zeros(num_padding, dtype=torch.long), labels_B]),
            torch.cat([torch.full((num_padding,), -1), ids_B]),
        )
    results = metrics.compute()
    ranked = logits_NK.argsort(1, descending=True)[:, :5] == labels_N[:, None]
    assert results["num_samples"] == num_samples
    assert results["num_correct_top1"] == int(ranked[:, 0].sum())
    assert results["num_correct_top5"] == int(ranked.any(1).sum())
    assert results["top1"] == results["num_correct_top1"] / num_samples
    assert results["loss"] == pytest.approx(float(F.cross_entropy(logits_NK.double(), labels_N)), rel=1e-5)


def test_a_batch_of_padding_alone_changes_nothing() -> None:
    metrics = ExactMetrics(3)
    metrics.update(torch.tensor([[9.0, 0, 0]]), torch.tensor([0]), torch.tensor([4]))
    before = metrics.compute()
    metrics.update(torch.full((2, 3), math.inf), torch.tensor([0, 0]), torch.tensor([-1, -1]))
    assert metrics.compute() == before
