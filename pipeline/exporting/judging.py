"""How much worse an artefact is than the weights it was made from: the same pictures, answer by answer."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.errors import DataError
from pipeline.data.index import ShardIndex
from pipeline.training.trained import Trained

BATCH = 32
Network = Callable[[Tensor], Tensor]
"""Normalised pictures, float32 (B, 3, H, W), to logits (B, K)."""


@dataclass(frozen=True)
class Pictures:
    """Some pictures of a split, read anew each time they are gone through."""

    trained: Trained
    """Says how they are cut, and to which output their labels belong."""
    index: ShardIndex
    sample_ids: tuple[int, ...]
    label_of_class: tuple[int, ...] | None = None
    """The output that stands for each class of the split; None: the same order."""

    def __len__(self) -> int:
        return len(self.sample_ids)

    def batches(self, size: int = BATCH) -> Iterator[Tensor]:
        """Yield normalised pictures, float32 (B, 3, H, W).

        Raises:
            DataError: One cannot be read.
        """
        for first in range(0, len(self), size):
            ids = self.sample_ids[first : first + size]
            yield self.trained.preprocess(*(self.index.read(sample_id) for sample_id in ids))

    def labels(self) -> Tensor:
        """Return the output that is right for each picture, int64 (N,)."""
        labels = [self.index.label(sample_id) for sample_id in self.sample_ids]
        return torch.tensor(labels if self.label_of_class is None else [self.label_of_class[label] for label in labels])


def split_pictures(pictures: Pictures, num_first: int, *, seed: int = 0) -> tuple[Pictures, Pictures]:
    """Return so many pictures, drawn at random, and the rest; each in the order of the split."""
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed)).tolist()
    first, rest = sorted(order[:num_first]), sorted(order[num_first:])
    chosen, others = (tuple(pictures.sample_ids[number] for number in numbers) for numbers in (first, rest))
    return dataclasses.replace(pictures, sample_ids=chosen), dataclasses.replace(pictures, sample_ids=others)


@torch.inference_mode()
def logits_of(network: Network, pictures: Pictures) -> Tensor:
    """Return what a network says of pictures, float32 (N, K), on the CPU.

    Raises:
        DataError: There are none, or one cannot be read.
    """
    if not len(pictures):
        raise DataError("There are no pictures to judge by: give a split with more of them, or fewer to calibrate on.")
    return torch.cat([network(images_BCHW).float().cpu() for images_BCHW in pictures.batches()])


@dataclass(frozen=True)
class Judgement:
    """An artefact beside the weights it was made from, on the same pictures."""

    num_images: int
    num_correct_top1: int
    num_correct_top5: int
    reference_num_correct_top1: int
    loss: float
    loss_change: float
    """Mean cross-entropy less the reference's, in nats."""
    loss_change_standard_error: float
    """Of the mean of the paired differences."""
    agreement: float
    """Share of pictures with the same first answer as the reference's."""
    kl_divergence: float
    """From the reference's probabilities to the artefact's, in nats per picture."""
    mcnemar_p: float
    """Probability of as uneven a split of the pictures that one alone has right, if both were as good (exact)."""


def judge(logits_NK: Tensor, reference_NK: Tensor, labels_N: Tensor) -> Judgement:
    """Compare two networks' answers.

    Args:
        logits_NK: The artefact's.
        reference_NK: Those of the weights it was made from.
        labels_N: The right outputs.
    """
    loss_N, reference_loss_N = (
        F.cross_entropy(values_NK, labels_N, reduction="none") for values_NK in (logits_NK, reference_NK)
    )
    change_N = loss_N - reference_loss_N
    said_N, reference_said_N = logits_NK.argmax(1), reference_NK.argmax(1)
    right_N, reference_right_N = said_N == labels_N, reference_said_N == labels_N
    top5_NK = logits_NK.topk(min(5, logits_NK.shape[1])).indices
    num = len(labels_N)
    return Judgement(
        num_images=num,
        num_correct_top1=int(right_N.sum()),
        num_correct_top5=int((top5_NK == labels_N[:, None]).any(1).sum()),
        reference_num_correct_top1=int(reference_right_N.sum()),
        loss=float(loss_N.mean()),
        loss_change=float(change_N.mean()),
        loss_change_standard_error=float(change_N.std() / math.sqrt(num)) if num > 1 else math.inf,
        agreement=float((said_N == reference_said_N).float().mean()),
        kl_divergence=float(
            F.kl_div(logits_NK.log_softmax(1), reference_NK.log_softmax(1), reduction="batchmean", log_target=True)
        ),
        mcnemar_p=mcnemar_p(int((right_N & ~reference_right_N).sum()), int((~right_N & reference_right_N).sum())),
    )


def mcnemar_p(num_first_alone: int, num_second_alone: int) -> float:
    """Return the exact two-sided p of McNemar's test: a fair coin for each picture that one alone has right."""
    num, fewer = num_first_alone + num_second_alone, min(num_first_alone, num_second_alone)
    return min(1.0, 2 * sum(math.comb(num, count) for count in range(fewer + 1)) / 2**num)
