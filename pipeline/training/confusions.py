"""What a validation said of each picture: which classes are taken for which, and which pictures are worst.

Shape suffixes: B pictures of a micro-batch, N pictures of the split, W worst pictures, C channels, H W pixels,
K classes.
"""

import base64
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pipeline.core.compute import has_peers
from pipeline.core.schemas.validation import ConfusionJson, ValidationJson, WorstPictureJson
from pipeline.data.index import ShardIndex

NUM_WORST = 12
THUMBNAIL_SIDE = 96
"""Pixels. With the number above it bounds what is exchanged, and with JPEG's quality what the report holds."""
JPEG_QUALITY = 80
MOST_PICTURES = 1_000_000
"""Of a larger split nothing is recorded: each picture costs 8 bytes of every rank's memory, and of the network's."""
MOST_CLASSES_COMPLETE = 40
MOST_PAIRS = 40


@dataclass(frozen=True)
class Outcomes:
    """What was said of every picture of a split, over all ranks."""

    predicted_N: NDArray[np.int64]
    """The class that was said; -1: the picture was not scored."""
    losses_N: NDArray[np.float32]
    worst_W: NDArray[np.int64]
    """Sample ids of the pictures with the highest loss, the worst first."""
    thumbnails_WHWC: NDArray[np.uint8]


class OutcomeRecord:
    """Collects on each rank what was said of its pictures. Nothing in `update` waits for the device.

    Args:
        num_samples: N, at most MOST_PICTURES.
    """

    def __init__(self, num_samples: int) -> None:
        assert num_samples <= MOST_PICTURES
        self.num_samples = num_samples
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._said_2N = torch.zeros(2, self.num_samples)  # predicted class + 1 (exact up to 2^24) and loss
        self._losses_W, self._ids_W = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
        self._thumbnails_WCHW = torch.zeros(0, 3, THUMBNAIL_SIDE, THUMBNAIL_SIDE, dtype=torch.uint8)

    def update(self, images_BCHW: Tensor, logits_BK: Tensor, labels_B: Tensor, sample_ids_B: Tensor) -> None:
        """Add a micro-batch; rows whose sample id is -1 are padding and left out. Ids ascend from call to call.

        Args:
            images_BCHW: uint8, RGB, as read.
            logits_BK: What the model said.
            labels_B: Class indices.
            sample_ids_B: Numbers of the pictures in the split.
        """
        real_B = sample_ids_B >= 0
        logits_BK, labels_B, ids_B = logits_BK[real_B].float(), labels_B[real_B], sample_ids_B[real_B]
        if not len(ids_B):
            return
        device = ids_B.device
        losses_B = F.cross_entropy(logits_BK, labels_B, reduction="none")
        self._said_2N = self._said_2N.to(device)
        self._said_2N[0, ids_B] = (logits_BK.argmax(1) + 1).float()
        self._said_2N[1, ids_B] = losses_B
        top_W = _worst_first(losses_B)
        losses = torch.cat([self._losses_W.to(device), losses_B[top_W]])
        ids = torch.cat([self._ids_W.to(device), ids_B[top_W]])
        thumbnails = torch.cat([self._thumbnails_WCHW.to(device), thumbnails_of(images_BCHW[real_B][top_W])])
        kept = _worst_first(losses)
        self._losses_W, self._ids_W, self._thumbnails_WCHW = losses[kept], ids[kept], thumbnails[kept]

    def gather(self) -> Outcomes:
        """Join what all ranks have. Collective: one number and a half a picture, and the thumbnails of the worst."""
        if has_peers():
            dist.all_reduce(self._said_2N)  # each picture is one rank's; the others add 0
        said_2N = self._said_2N.cpu().numpy()
        predicted_N, losses_N = said_2N[0].astype(np.int64) - 1, said_2N[1]
        # The order of `_worst_first`, so that each of these is among what its rank has kept.
        scores_N = np.where(predicted_N < 0, -np.inf, np.nan_to_num(losses_N, nan=np.inf, posinf=np.inf))
        worst_W = np.argsort(-scores_N, kind="stable")[: min(NUM_WORST, int((predicted_N >= 0).sum()))]
        shown = torch.zeros(len(worst_W), 3, THUMBNAIL_SIDE, THUMBNAIL_SIDE, dtype=torch.uint8)
        mine = {int(sample_id): place for place, sample_id in enumerate(self._ids_W.tolist())}
        for place, sample_id in enumerate(worst_W.tolist()):
            if sample_id in mine:
                shown[place] = self._thumbnails_WCHW[mine[sample_id]].cpu()
        if has_peers():
            on_device = shown.to(self._said_2N.device)
            dist.all_reduce(on_device)
            shown = on_device.cpu()
        return Outcomes(predicted_N, losses_N, worst_W, shown.permute(0, 2, 3, 1).contiguous().numpy())


def _worst_first(losses: Tensor) -> Tensor:
    """Return the places of the highest losses: not a number before all, of equal ones the first, as the ids ascend."""
    scores = losses.nan_to_num(nan=math.inf, posinf=math.inf)
    return scores.sort(descending=True, stable=True).indices[:NUM_WORST]


def thumbnails_of(images_BCHW: Tensor) -> Tensor:
    """Return square pictures (uint8) at THUMBNAIL_SIDE pixels: the mean over the area of each."""
    small = F.interpolate(images_BCHW.float(), size=(THUMBNAIL_SIDE, THUMBNAIL_SIDE), mode="area")
    return small.round().clamp(0, 255).to(torch.uint8)


def to_json(outcomes: Outcomes, index: ShardIndex, *, step: int, num_classes: int) -> ValidationJson:
    """Return the content of validation.json, bounded whatever the number of classes and pictures.

    Args:
        outcomes: Of all pictures.
        index: The split.
        step: Steps committed before the validation.
        num_classes: Outputs of the model.
    """
    scored_N = outcomes.predicted_N >= 0
    labels = index.table.label[scored_N].astype(np.int64)
    predicted = outcomes.predicted_N[scored_N]
    is_complete = num_classes <= MOST_CLASSES_COMPLETE
    confusions = _confusions(labels, predicted, num_classes, is_complete=is_complete)
    worst = [_worst(outcomes, index, place) for place in range(len(outcomes.worst_W))]
    named = range(num_classes) if is_complete else _classes_of([*confusions, *worst])
    names = index.classes or ()
    return {
        "schema": 1,
        "step": step,
        "num_samples": int(scored_N.sum()),
        "num_correct": int((labels == predicted).sum()),
        "num_classes": num_classes,
        "class_names": {str(number): names[number] for number in named if number < len(names)},
        "is_complete": is_complete,
        "confusions": confusions,
        "worst": worst,
    }


def _confusions(
    labels: NDArray[np.int64], predicted: NDArray[np.int64], num_classes: int, *, is_complete: bool
) -> list[ConfusionJson]:
    """Count pairs, by sorting: a table of all would be 8 MB for 1000 classes, and have hardly anything in it."""
    pairs, counts = np.unique(labels * num_classes + predicted, return_counts=True)
    of_label = np.bincount(labels, minlength=1)
    order = np.argsort(-counts, kind="stable")
    found: list[ConfusionJson] = []
    for pair, count in zip(pairs[order].tolist(), counts[order].tolist(), strict=True):
        label, said = divmod(pair, num_classes)
        if not is_complete and (label == said or len(found) == MOST_PAIRS):
            continue
        found.append({"label": label, "predicted": said, "num_pictures": count, "num_of_label": int(of_label[label])})
    return found


def _worst(outcomes: Outcomes, index: ShardIndex, place: int) -> WorstPictureJson:
    sample_id = int(outcomes.worst_W[place])
    loss = float(outcomes.losses_N[sample_id])
    jpeg = simplejpeg.encode_jpeg(outcomes.thumbnails_WHWC[place], quality=JPEG_QUALITY, colorspace="RGB")
    return {
        "sample_id": sample_id,
        "key": index.sample_key(sample_id),
        "shard": index.shard_name(sample_id),
        "label": index.label(sample_id),
        "predicted": int(outcomes.predicted_N[sample_id]),
        "loss": loss if math.isfinite(loss) else None,
        "jpeg_base64": base64.b64encode(jpeg).decode(),
    }


def _classes_of(rows: "Iterable[ConfusionJson | WorstPictureJson]") -> list[int]:
    return sorted({number for row in rows for number in (row["label"], row["predicted"])})
