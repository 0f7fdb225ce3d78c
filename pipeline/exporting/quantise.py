"""Weights to symbols: each is rounded to where error and bits together cost least, and the others make up for it.

Per layer, columns are taken in turn (OBQ, arXiv 2208.11580; in the order of GPTQ, arXiv 2210.17323). An error d of a
weight costs s d^2 / (2 U_jj^2) nats, U the Cholesky factor of H's inverse, after the weights not yet rounded have made
up for it; a symbol costs `nats_per_bit` x its bits (rate-distortion optimised, as in DeepCABAC, arXiv 1907.11900). The
bias is free and takes its share at the end. Weights that are 0 stay 0: a pruned network's mask is kept.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.exporting.sensitivity import Sensitivity

SHRINKAGE = 0.05
"""How far H is moved towards its diagonal: some hundred pictures do not know how 500 inputs go together."""
ROW_SHRINKAGE = 0.6
"""How far the outputs' shares of the gradient are moved towards equal ones."""
RATE_WEIGHT = 0.5
"""How much of a bit's price decides between neighbouring symbols. At 1 too many weights become 0."""
NUM_PASSES = 2
"""Roundings, each with the bits that the symbols of the one before have."""
ROWS_AT_ONCE, COLUMNS_AT_ONCE = 512, 32
LOSS_OF_A_WEIGHT = 1e-5
"""Twice the nats that an error as large as its layer's weights costs, where nothing is known: a guess of the order, so
that prices mean about the same with pictures and without."""
RARE = 0.3
"""Occurrences that a symbol which did not occur is counted as."""
NUM_CLASSES = 3
"""Of older symbols, as a delta codes them apart: 0, up to 2, and larger ones."""


@dataclass(frozen=True)
class Quantised:
    """One layer on its grid, or each of its rows on its own."""

    symbols: Tensor
    """int32, in the shape of the weight."""
    step_R: Tensor
    """float32 (R,): distance of neighbouring values in each row; the same in all unless the caller said otherwise."""
    bias_change: Tensor
    """float32 (R,): what the bias takes over."""
    num_bits: float
    """Of the symbols, by how often each occurs."""
    loss: float
    """Expected rise of the loss, in nats per picture."""

    @property
    def step(self) -> float:
        """Distance of neighbouring values, where it is the same in all rows."""
        return float(self.step_R[0])

    @property
    def weight(self) -> Tensor:
        """The rounded weights, float32, in the shape of the weight."""
        return self.symbols * self.step_R.view(-1, *[1] * (self.symbols.ndim - 1))


class LayerQuantiser:
    """Rounds the weights of one layer, for any price of a bit."""

    def __init__(self, weight: Tensor, sensitivity: Sensitivity | None) -> None:
        """Prepare a layer.

        Args:
            weight: float32, (R, ...): one row per output.
            sensitivity: Of the layer; None: not known, an error costs as much everywhere relative to the weights.
        """
        self._shape = weight.shape
        self._weight_RN = weight.detach().float().flatten(1).cpu()
        num_rows, num_columns = self._weight_RN.shape
        if sensitivity is None:
            power = float(self._weight_RN.square().sum() / max(1, int((self._weight_RN != 0).sum())))
            moment = LOSS_OF_A_WEIGHT * num_rows / max(power, 1e-30)
            sensitivity = Sensitivity(torch.full((num_columns + 1,), moment), torch.full((num_rows,), 1 / num_rows))
        # An output that some hundred pictures hardly ask for is asked for by others.
        self._share_R = sensitivity.share_of_row * (1 - ROW_SHRINKAGE) + ROW_SHRINKAGE / num_rows
        self._bias_weight_N, self._parts = _factorise(self._weight_RN != 0, sensitivity.moments)
        curvatures = [self._share_R[part.rows, None] * part.precision_RN * part.is_weight_RN for part in self._parts]
        num_weights = sum(int(part.is_weight_RN.sum()) for part in self._parts)
        mean = sum(float(curvature.sum()) for curvature in curvatures) / max(1, num_weights)
        self._curvature = max(mean, 1e-30)  # of a layer without a weight, or that nothing reaches

    @property
    def num_weights(self) -> int:
        """Of the layer, pruned ones included."""
        return self._weight_RN.numel()

    def step(self, nats_per_bit: float) -> float:
        """Return the step at which a bit more saves what it costs: at high rate D^2 = 12 price / (curvature ln 2)."""
        return math.sqrt(12 * nats_per_bit / (self._curvature * math.log(2)))

    def quantise(
        self, nats_per_bit: float, *, step: float | Tensor | None = None, anchor: Tensor | None = None,
        bounds: tuple[int, int] | None = None,
    ) -> Quantised:  # fmt: skip
        """Round the weights.

        Args:
            nats_per_bit: Price of a bit.
            step: Of the grid, or of each row's, (R,); None: the best for this price.
            anchor: Symbols of an older version, by whose differences bits are counted; None: bits of the symbols.
            bounds: Smallest and largest symbol that the grid has; None: any.
        """
        step_R = torch.as_tensor(self.step(nats_per_bit) if step is None else step, dtype=torch.float32)
        step_R = step_R.expand(len(self._weight_RN))
        low, high = bounds or (-(1 << 15), 1 << 15)
        anchor_RN = torch.zeros_like(self._weight_RN) if anchor is None else anchor.flatten(1).float()
        symbols_RN = (self._weight_RN / step_R[:, None]).round().clamp(low, high)
        bits = _Bits(symbols_RN, anchor_RN)
        loss = 0.0
        for _ in range(NUM_PASSES):
            loss = 0.0
            for part in self._parts:
                rounded, part_loss = self._round(
                    part, step_R[part.rows], nats_per_bit * RATE_WEIGHT, bits, anchor_RN, (low, high)
                )
                symbols_RN[part.rows] = symbols_RN[part.rows].scatter(1, part.columns_RN, rounded)
                loss += part_loss
            bits = _Bits(symbols_RN, anchor_RN)
        error_RN = self._weight_RN - symbols_RN * step_R[:, None]
        return Quantised(
            symbols_RN.to(torch.int32).view(self._shape), step_R, error_RN @ self._bias_weight_N, bits.total, loss
        )

    def _round(
        self, part: "_Part", step_R: Tensor, price: float, bits: "_Bits", anchor_RN: Tensor, bounds: tuple[int, int]
    ) -> tuple[Tensor, float]:
        """Return the symbols of some rows, column by column, and the loss expected of them."""
        weight_NR = torch.gather(self._weight_RN[part.rows], 1, part.columns_RN).T.contiguous()
        anchor_NR = torch.gather(anchor_RN[part.rows], 1, part.columns_RN).T.contiguous()
        half_curvature_NR = (0.5 * self._share_R[part.rows, None] * part.precision_RN).T.contiguous()
        is_weight_NR = part.is_weight_RN.T.contiguous()
        rounded_NR, loss_R = torch.zeros_like(weight_NR), torch.zeros_like(step_R)
        num_columns = len(weight_NR)
        for first in range(0, num_columns, part.num_at_once):
            last = min(first + part.num_at_once, num_columns)
            error_NR = torch.zeros_like(weight_NR[first:last])
            for column in range(first, last):
                wanted_R, anchor_R = weight_NR[column] / step_R, anchor_NR[column]
                nearest_R = wanted_R.round().clamp(*bounds)
                inward_R = nearest_R - (nearest_R - anchor_R).sign()
                candidates_CR = torch.stack([nearest_R, inward_R, anchor_R])
                loss_CR = half_curvature_NR[column] * ((wanted_R - candidates_CR) * step_R).square()
                best_1R = (loss_CR + price * bits.of(candidates_CR, anchor_R)).argmin(0, keepdim=True)
                rounded_NR[column] = candidates_CR.gather(0, best_1R)[0] * is_weight_NR[column]
                loss_R += loss_CR.gather(0, best_1R)[0] * is_weight_NR[column]
                error_R = (wanted_R - rounded_NR[column]) * step_R * is_weight_NR[column]
                error_NR[column - first] = part.make_up(weight_NR, column, last, error_R)
            part.make_up_later(weight_NR, first, last, error_NR)
        return rounded_NR.T, float(loss_R.sum())


@dataclass(frozen=True)
class _Part:
    """Rows that are rounded together. Columns are those of the row's weights, most used inputs first."""

    rows: Tensor
    columns_RN: Tensor
    is_weight_RN: Tensor
    """Rows with fewer weights than others are filled up."""
    precision_RN: Tensor
    """1 / U_jj^2."""
    factor: Tensor | None
    """U, upper triangular: (N, N) for all rows, or (N, N, R). None: diagonal."""

    @property
    def num_at_once(self) -> int:
        """Columns after which the weights still to be rounded hear of all their errors together."""
        return (
            COLUMNS_AT_ONCE if self.factor is not None and self.factor.ndim == 2 else max(1, self.columns_RN.shape[1])
        )

    def make_up(self, weight_NR: Tensor, column: int, last: int, error_R: Tensor) -> Tensor:
        """Let the next weights, up to `last`, take over what they can of an error; returns it over U_jj."""
        if self.factor is None:
            return error_R
        scaled_R = error_R / self.factor[column, column]
        following_NR = weight_NR[column + 1 : last]
        if self.factor.ndim == 3:
            following_NR.addcmul_(self.factor[column, column + 1 : last], scaled_R, value=-1)
        else:
            following_NR.addr_(self.factor[column, column + 1 : last], scaled_R, alpha=-1)
        return scaled_R

    def make_up_later(self, weight_NR: Tensor, first: int, last: int, error_NR: Tensor) -> None:
        """Let the weights from `last` on take over the errors of columns `first` to `last`."""
        if self.factor is not None and last < len(weight_NR):
            weight_NR[last:].addmm_(self.factor[first:last, last:].T, error_NR, alpha=-1)


def _factorise(is_weight_RN: Tensor, moments: Tensor) -> tuple[Tensor, list[_Part]]:
    """Return what of an input's error the bias takes over, (N,), and the rows in parts."""
    num_rows, num_columns = is_weight_RN.shape
    if moments.ndim == 1:
        diagonal_N = moments[:num_columns].clamp_min(float(moments[:num_columns].mean()) * 1e-3 + 1e-30)
        everything = torch.arange(num_columns).expand(num_rows, -1)
        part = _Part(torch.arange(num_rows), everything, is_weight_RN, diagonal_N.expand(num_rows, -1), None)
        return torch.zeros(num_columns), [part]
    moments = moments.double()
    diagonal = moments.diagonal().clone()
    shrunk = moments * (1 - SHRINKAGE)
    floor = 1e-3 * diagonal[:num_columns].mean() + 1e-30
    shrunk.diagonal().copy_(diagonal + torch.cat([floor.expand(num_columns), floor.new_zeros(1)]))
    with_bias_N = moments[:num_columns, num_columns]
    of_bias = diagonal[num_columns].clamp_min(1e-30)
    # The bias is not rounded, so it makes up for whatever errors have in common: its Schur complement.
    shrunk_NN = shrunk[:num_columns, :num_columns] - torch.outer(with_bias_N, with_bias_N) * (1 - SHRINKAGE) / of_bias
    order_N = diagonal[:num_columns].argsort(descending=True)
    bias_weight_N = (with_bias_N / of_bias).float()
    if bool(is_weight_RN.all()):
        factor_NN = _factor(shrunk_NN[order_N][:, order_N][None])
        precision_RN = factor_NN.diagonal(dim1=1, dim2=2).square().reciprocal().expand(num_rows, -1)
        columns_RN = order_N.expand(num_rows, -1)
        return bias_weight_N, [_Part(torch.arange(num_rows), columns_RN, is_weight_RN, precision_RN, factor_NN[0])]
    parts: list[_Part] = []
    by_number = is_weight_RN.sum(1).argsort()
    for rows in by_number.split(ROWS_AT_ONCE):
        num_kept = max(1, int(is_weight_RN[rows].sum(1).max()))
        ordered_RN = is_weight_RN[rows][:, order_N]
        kept_RN = (~ordered_RN).long().argsort(dim=1, stable=True)[:, :num_kept]
        columns_RN, is_kept_RN = order_N[kept_RN], torch.gather(ordered_RN, 1, kept_RN)
        both_RNN = is_kept_RN[:, :, None] & is_kept_RN[:, None, :]
        own_RNN = shrunk_NN[columns_RN[:, :, None], columns_RN[:, None, :]] * both_RNN
        own_RNN.diagonal(dim1=1, dim2=2).add_((~is_kept_RN).double())
        factor_RNN = _factor(own_RNN)
        precision_RN = factor_RNN.diagonal(dim1=1, dim2=2).square().reciprocal()
        factor_NNR = factor_RNN.permute(1, 2, 0).contiguous()
        parts.append(_Part(rows, columns_RN, is_kept_RN, precision_RN, factor_NNR))
    return bias_weight_N, parts


def _factor(moments_RNN: Tensor) -> Tensor:
    """Return the upper Cholesky factors of the inverses, float32."""
    inverse_RNN = torch.cholesky_inverse(torch.linalg.cholesky(moments_RNN))
    return torch.linalg.cholesky(inverse_RNN, upper=True).float()


class _Bits:
    """Bits of each symbol by how often it occurs, given the class of its anchor."""

    def __init__(self, symbols_RN: Tensor, anchor_RN: Tensor) -> None:
        differences = (symbols_RN - anchor_RN).long()
        self._lowest = int(differences.min()) - 2
        num = int(differences.max()) + 3 - self._lowest
        classes = _class_of(anchor_RN)
        counts = torch.bincount((differences - self._lowest + num * classes).flatten(), minlength=num * NUM_CLASSES)
        counts_CS = counts.view(NUM_CLASSES, num).float() + RARE
        self._bits = -(counts_CS / counts_CS.sum(1, keepdim=True)).log2()
        self._num = num
        self.total = float((self._bits * (counts_CS - RARE)).sum())

    def of(self, candidates_CR: Tensor, anchor_R: Tensor) -> Tensor:
        """Return the bits of some symbols; what never occurred is as rare as what did so least."""
        place = (candidates_CR - anchor_R).long() - self._lowest
        return self._bits[_class_of(anchor_R).expand_as(place), place.clamp(0, self._num - 1)]


def _class_of(anchor: Tensor) -> Tensor:
    magnitude = anchor.abs()
    return (magnitude > 0).long() + (magnitude > 2).long()
