"""Exact sums over every picture of a split. Tensors only.

Shape suffixes: B pictures of a micro-batch, K classes.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from pipeline.core.compute import has_peers


class ExactMetrics(nn.Module):
    """Top-1, top-5 and mean cross-entropy over every picture once, on any number of ranks: sums, added up once."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        # sync_on_compute: each metric would gather its states by itself; here one all-reduce carries all the sums.
        arguments: dict[str, Any] = {
            "num_classes": num_classes,
            "average": "micro",
            "validate_args": False,
            "sync_on_compute": False,
        }
        self.top1 = MulticlassAccuracy(top_k=1, **arguments)
        self.top5 = MulticlassAccuracy(top_k=min(5, num_classes), **arguments)
        # Double: single precision would lose pictures from the sum over a large split.
        self.loss_sum = torch.zeros((), dtype=torch.float64)
        self.num_samples = 0

    def update(self, logits_BK: Tensor, labels_B: Tensor, sample_ids_B: Tensor) -> None:
        """Add a micro-batch; rows whose sample id is -1 are padding and left out."""
        real_B = sample_ids_B >= 0
        logits_BK, labels_B = logits_BK[real_B].float(), labels_B[real_B]
        if len(labels_B):
            self.top1.update(logits_BK, labels_B)
            self.top5.update(logits_BK, labels_B)
            loss = F.cross_entropy(logits_BK, labels_B, reduction="sum").double()
            self.loss_sum = self.loss_sum.to(loss.device) + loss
            self.num_samples += len(labels_B)

    def compute(self) -> dict[str, float | int]:
        """{top1, top5, loss, num_samples, num_correct_top1, num_correct_top5} over all ranks. Collective."""
        device = self.top1.device
        correct = [cast(Tensor, metric.tp).sum().double() for metric in (self.top1, self.top5)]
        total = torch.tensor(self.num_samples, dtype=torch.float64, device=device)
        sums = torch.stack([*correct, self.loss_sum.to(device), total])
        if has_peers():
            dist.all_reduce(sums)
        top1, top5, loss, num_samples = sums.tolist()
        return {
            "num_samples": int(num_samples),
            "num_correct_top1": int(top1),
            "num_correct_top5": int(top5),
            "top1": top1 / num_samples,
            "top5": top5 / num_samples,
            "loss": loss / num_samples,
        }

    def reset(self) -> None:
        """Forget everything."""
        self.top1.reset()
        self.top5.reset()
        self.loss_sum = torch.zeros_like(self.loss_sum)
        self.num_samples = 0
