"""The arithmetic of a training step in torch alone: what the learner computes between Lightning's calls.

Apart from Lightning so that it can be measured, and used, where torch is all there is. Nothing in here waits for the
device: what it returns are tensors, and whoever reads one waits.

Shape suffixes: B pictures of a micro-batch, C channels, H W pixels, K classes.
"""

import random
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.training import RecipeConfig
from pipeline.models.normalizer import Normalizer

LR_FACTOR = "lr_factor"
"""Key of a group of parameters: its learning rate over that of the recipe."""


def make_optimizer(
    parameters: Iterable[nn.Parameter], recipe: RecipeConfig, lr: float, head: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """SGD or AdamW over all parameters, biases decayed too, as the Caffe solver does.

    Args:
        parameters: All of them. The saved state goes by their order, which groups do not change: the head is last.
        recipe: Optimiser and its numbers.
        lr: Learning rate of the first step; `set_learning_rate` sets that of the others.
        head: Those that learn `recipe.head_lr_factor` times as fast.
    """
    everything, last = list(parameters), list(head) if recipe.head_lr_factor != 1 else []
    body = everything[: len(everything) - len(last)]
    assert all(one is other for one, other in zip(everything[len(body) :], last, strict=True)), "the head is last"
    groups = [
        {"params": some, "lr": lr * factor, LR_FACTOR: factor}
        for some, factor in ((body, 1.0), (last, recipe.head_lr_factor))
        if some
    ]
    # Fused: the same arithmetic, bit for bit, in one pass over memory instead of five.
    if recipe.optimizer == "adamw":
        betas = (recipe.momentum, recipe.beta2)
        return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=recipe.weight_decay, fused=True)
    return torch.optim.SGD(
        groups,
        lr=lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the coming step; that of the head is so many times as high as the recipe says."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group[LR_FACTOR]


def seed_generators(numbers: tuple[int, ...], device: torch.device) -> None:
    """Everything random from here on is a function of these numbers: the CPU's generator and this rank's device's.

    `torch.manual_seed` would also note the whole stack of who asked, for every kind of device that is absent: three
    times per micro-step (torch 2.14).
    """
    words = np.random.SeedSequence(numbers).generate_state(2)
    seed = int(words[0]) << 32 | int(words[1])
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    # Nothing of ours draws from these two; what a model of somebody's draws is the same after a resume.
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))


def micro_batch(
    model: nn.Module,
    normalizer: Normalizer,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    memory_format: torch.memory_format,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """The mean loss of a micro-batch, and its sums for the metrics: loss, correct, pictures."""
    logits_BK = model(normalizer(images_BCHW, memory_format))
    loss = F.cross_entropy(logits_BK.float(), labels_B, label_smoothing=label_smoothing)
    with torch.no_grad():
        num_correct = (logits_BK.argmax(1) == labels_B).sum()
        size = len(labels_B)
        return loss, torch.stack([loss.detach() * size, num_correct, torch.full_like(loss, size)])


def reduced_gradient(optimizer: torch.optim.Optimizer) -> tuple[list[nn.Parameter], Tensor]:
    """The parameters that have a gradient, and its norm, which is finite where every element is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return parameters, torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])


def clip(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Shorten a gradient of this norm to `max_norm`; 0: never."""
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
