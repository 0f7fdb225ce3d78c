"""How much the loss minds an error in each weight: second moments of a layer's inputs, weighted by its gradients.

For a layer with weights w (one row per output, the bias as a last column of inputs that are 1), an error d costs about
1/2 sum_r s_r d_r^T H d_r nats per picture: the Gauss-Newton approximation of the Kullback-Leibler divergence from the
network's answers (Fisher's information), with Kronecker factors. No labels are needed: they are drawn from the answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.core.progress import progress_bar
from pipeline.exporting.judging import Pictures
from pipeline.models.coded_layers import Layer, coded_layers

BATCH = 16
TEMPERATURE = 2.0
"""Answers are softened before labels are drawn. A picture that the network is sure of has hardly any gradient, and what
few others say would decide alone."""
MAX_COLUMNS = 4608
"""Layers with more inputs per output have the diagonal of H alone: the rest of AlexNet's would take 340 MB, VGG's 2.5
GB."""


@dataclass(frozen=True)
class Sensitivity:
    """Of one layer."""

    moments: Tensor
    """H, float32 (n + 1, n + 1) for n weights per output, the bias last; or its diagonal (n + 1,)."""
    share_of_row: Tensor
    """s, float32 (R,): how much of the gradient is each output's; sums to 1."""


def pooled(parts: Sequence[tuple[Mapping[str, Sensitivity], int]]) -> dict[str, Sensitivity]:
    """Return the sensitivities of pictures that were measured in parts.

    Args:
        parts: What each part gave, and how many pictures it had.
    """
    num_pictures = sum(count for _, count in parts)
    found: dict[str, Sensitivity] = {}
    for name in parts[0][0]:
        moments = sum(
            (part[name].moments * count for part, count in parts[1:]), parts[0][0][name].moments * parts[0][1]
        )
        # The bias's own moment is the layer's whole gradient, squared.
        squares_R = sum(
            (part[name].share_of_row * part[name].moments.flatten()[-1] * count for part, count in parts),
            torch.zeros_like(parts[0][0][name].share_of_row),
        )
        found[name] = Sensitivity(moments / num_pictures, squares_R / squares_R.sum().clamp_min(1e-30))
    return found


def measure(model: nn.Module, pictures: Pictures, *, seed: int = 0) -> dict[str, Sensitivity]:
    """Return the sensitivity of every layer that is coded.

    Args:
        model: In evaluation mode. Its parameters are left without gradients.
        pictures: That are answered; their labels are not looked at.
        seed: Of the labels drawn.

    Raises:
        DataError: A picture cannot be read.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(name: str, layer: Layer, inputs: Tensor, gradient: Tensor) -> None:
        moments, squares_R = _moments(layer, inputs, gradient)
        if name in sums:
            sums[name][0].add_(moments)
            sums[name][1].add_(squares_R)
        else:
            sums[name] = moments, squares_R

    def watch(name: str) -> "torch.utils.hooks.RemovableHandle":
        def hook(layer: Layer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen = inputs[0].detach().clone()  # what comes after it may be computed in its place
            output.register_hook(lambda gradient: add(name, layer, seen, gradient))

        return dict(model.named_modules())[name].register_forward_hook(hook)

    hooks = [watch(name) for name, _ in coded_layers(model)]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        with progress_bar("measuring sensitivity", len(pictures)) as bar:
            for number, images_BCHW in enumerate(pictures.batches(BATCH), 1):
                logits_BK = model(images_BCHW.requires_grad_(True))
                answers_BK = (logits_BK.detach() / TEMPERATURE).softmax(1)
                labels_B = torch.multinomial(answers_BK.cpu(), 1, generator=generator)[:, 0].to(answers_BK.device)
                logits_BK.backward(answers_BK - F.one_hot(labels_B, answers_BK.shape[1]).to(answers_BK))
                bar.update(min(number * BATCH, len(pictures)))
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in wanted:
            parameter.requires_grad_(True)
    return {
        name: Sensitivity(moments.cpu() / len(pictures), (squares_R / squares_R.sum().clamp_min(1e-30)).cpu())
        for name, (moments, squares_R) in sums.items()
    }


def _moments(layer: Layer, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a batch adds to H, and the squared gradients of each output."""
    if isinstance(layer, nn.Conv2d):
        columns_BNP = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
        gradient_BRP = gradient.flatten(2)
    else:
        columns_BNP, gradient_BRP = (
            inputs.reshape(len(inputs), -1, inputs.shape[-1]).mT,
            gradient.reshape(len(gradient), -1, gradient.shape[-1]).mT,
        )
    squares_BRP = gradient_BRP.square()
    weight_BP = squares_BRP.sum(1)
    ones_B1P = columns_BNP.new_ones(len(columns_BNP), 1, columns_BNP.shape[2])
    weighted_NS = (torch.cat([columns_BNP, ones_B1P], 1) * weight_BP.sqrt()[:, None]).transpose(0, 1).flatten(1)
    few = len(weighted_NS) - 1 <= MAX_COLUMNS
    moments = weighted_NS @ weighted_NS.T if few else weighted_NS.square().sum(1)
    return moments, squares_BRP.sum((0, 2))
