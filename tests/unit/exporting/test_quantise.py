"""Rounding weights: on the grid, zeros stay, errors are made up for, and a bit costs what it is said to."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.exporting.judging import judge, mcnemar_p
from pipeline.exporting.package import PRICES
from pipeline.exporting.quantise import LayerQuantiser
from pipeline.exporting.sensitivity import Sensitivity
from pipeline.models.coded_layers import coded_layers


def correlated(num_columns: int, seed: int) -> Tensor:
    """Inputs that go together, (S, N + 1), the bias's 1 last."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(400, max(1, num_columns // 3), generator=generator)
    mixed = few @ torch.randn(few.shape[1], num_columns, generator=generator)
    inputs = (mixed + 0.3 * torch.randn(400, num_columns, generator=generator)).relu()
    return torch.cat([inputs, torch.ones(400, 1)], 1)


def sensitivity_of(inputs_SN: Tensor, num_rows: int) -> Sensitivity:
    return Sensitivity(inputs_SN.T @ inputs_SN / len(inputs_SN), torch.full((num_rows,), 1 / num_rows))


def weight_of(num_rows: int, num_columns: int, share: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_rows, num_columns, generator=generator)
    return weight * (torch.rand(num_rows, num_columns, generator=generator) < share)


@given(st.integers(1, 9), st.integers(1, 24), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 99), st.floats(-9, -3))
@settings(max_examples=60, deadline=None)
def test_weights_are_on_the_grid_and_zeros_stay(rows: int, columns: int, share: float, seed: int, power: float) -> None:
    weight = weight_of(rows, columns, share, seed)
    quantiser = LayerQuantiser(weight, sensitivity_of(correlated(columns, seed), rows))
    found = quantiser.quantise(10**power)
    assert found.symbols.shape == weight.shape and found.symbols.dtype == torch.int32
    assert bool((found.symbols[weight == 0] == 0).all())
    assert found.bias_change.shape == (rows,) and bool(found.bias_change.isfinite().all())
    assert found.num_bits >= 0 and found.loss >= 0


def test_dearer_bits_are_fewer_and_lose_more() -> None:
    weight = weight_of(16, 30, 0.4, 1)
    quantiser = LayerQuantiser(weight, sensitivity_of(correlated(30, 1), 16))
    found = [quantiser.quantise(price) for price in (1e-7, 1e-6, 1e-5, 1e-4)]
    assert sorted((item.num_bits for item in found), reverse=True) == [item.num_bits for item in found]
    assert sorted(item.loss for item in found) == [item.loss for item in found]


def output_error(weight: Tensor, bias_change: Tensor, symbols: Tensor, step: float, inputs_SN: Tensor) -> float:
    error_RN = symbols * step - weight
    return float((inputs_SN @ torch.cat([error_RN, bias_change[:, None]], 1).T).square().mean())


@pytest.mark.parametrize("share", [0.3, 1.0], ids=["pruned", "dense"])
def test_errors_are_made_up_for_by_other_weights(share: float) -> None:
    """Inputs go together, so the output's error is far below that of rounding each weight to the nearest."""
    weight, inputs_SN = weight_of(12, 40, share, 2), correlated(40, 2)
    found = LayerQuantiser(weight, sensitivity_of(inputs_SN, 12)).quantise(3e-5)
    nearest = (weight / found.step).round()
    own = output_error(weight, found.bias_change, found.symbols, found.step, inputs_SN)
    theirs = output_error(weight, torch.zeros(12), nearest, found.step, inputs_SN)
    assert own < 0.5 * theirs
    assert found.loss == pytest.approx(own / 2, rel=0.6)  # 12 rows, each with a twelfth of the gradient


def test_what_an_older_version_has_is_kept_where_it_costs_little() -> None:
    weight = weight_of(8, 20, 0.5, 3)
    quantiser = LayerQuantiser(weight, sensitivity_of(correlated(20, 3), 8))
    older = quantiser.quantise(1e-6)
    low, high = int(older.symbols.min()), int(older.symbols.max())
    again = quantiser.quantise(1e-6, step=older.step, anchor=older.symbols, bounds=(low, high))
    assert torch.equal(again.symbols, older.symbols) and again.step == older.step
    moved = LayerQuantiser(weight * 1.5, sensitivity_of(correlated(20, 3), 8))
    found = moved.quantise(1e-6, step=older.step, anchor=older.symbols, bounds=(low, high))
    assert low <= int(found.symbols.min()) and int(found.symbols.max()) <= high


def test_layers_with_many_inputs_are_rounded_without_their_moments() -> None:
    weight = weight_of(4, 10, 1.0, 4)
    found = LayerQuantiser(weight, Sensitivity(torch.rand(11) + 0.1, torch.full((4,), 0.25))).quantise(1e-5)
    assert float((found.symbols * found.step - weight).abs().max()) <= found.step
    blind = LayerQuantiser(weight, None).quantise(1e-6)
    assert float((blind.symbols * blind.step - weight).abs().max()) <= blind.step


def test_where_nothing_is_known_all_layers_are_rounded_alike_and_to_any_size() -> None:
    """Prices reach from weights as they are to none at all, without pictures too, whatever a layer's size and scale."""
    generator = torch.Generator().manual_seed(0)
    coarseness = []
    for rows, columns, scale in ((4, 300, 0.01), (96, 27, 3.0), (1000, 64, 0.2)):
        weight = torch.randn(rows, columns, generator=generator) * scale
        quantiser = LayerQuantiser(weight, None)
        coarseness.append(quantiser.step(3e-8) / scale)
        assert not quantiser.quantise(PRICES[1]).symbols.any()
        error = quantiser.quantise(PRICES[0]).weight - weight
        assert float(error.std()) < 1e-3 * scale
    assert max(coarseness) < 1.05 * min(coarseness)


def test_layers_that_are_coded() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3, padding="same"), nn.Linear(4, 2)
    )
    assert [name for name, _ in coded_layers(model)] == ["0", "3"]


def test_judgement() -> None:
    reference_NK = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [2, 0, 0]])
    labels_N = torch.tensor([0, 1, 2, 1])
    same = judge(reference_NK, reference_NK, labels_N)
    assert (same.agreement, same.loss_change, same.kl_divergence, same.mcnemar_p) == (1, 0, 0, 1)
    assert same.num_correct_top1 == same.reference_num_correct_top1 == 3 and same.num_correct_top5 == 4
    other_NK = reference_NK.roll(1, 0)
    other = judge(other_NK, reference_NK, labels_N)
    assert other.agreement == 0.25 and other.kl_divergence > 0
    expected = F.cross_entropy(other_NK, labels_N) - F.cross_entropy(reference_NK, labels_N)
    assert other.loss_change == pytest.approx(float(expected), abs=1e-6)


def test_mcnemar_is_a_coin() -> None:
    assert mcnemar_p(0, 0) == mcnemar_p(3, 3) == 1
    assert mcnemar_p(0, 6) == mcnemar_p(6, 0) == pytest.approx(2 / 64)
    assert mcnemar_p(1, 9) == pytest.approx(2 * 11 / 1024)
