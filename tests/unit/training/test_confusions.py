"""What a validation said of each picture: counted as by hand, and bounded."""

import json
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.schemas.validation import ValidationJson
from pipeline.data.index import ShardIndex
from pipeline.training.confusions import NUM_WORST, OutcomeRecord, thumbnails_of, to_json
from tests.json_shape import mismatches


def index_of(labels: Any) -> ShardIndex:
    """Stands in for a split of which only the labels matter."""
    array = np.asarray(labels)
    return cast(
        ShardIndex,
        SimpleNamespace(
            table=SimpleNamespace(label=array),
            classes=None,
            label=lambda number: int(array[number]),
            sample_key=lambda number: f"picture{number}",
            shard_name=lambda _: "val-000000.tar",
        ),
    )


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_samples=st.integers(1, 60),
    num_classes=st.sampled_from([2, 5, 40, 41, 300]),
    batch=st.integers(1, 20),
    levels=st.sampled_from([1, 2, 1000]),
)
def test_as_counted_by_hand(seed: int, num_samples: int, num_classes: int, batch: int, levels: int) -> None:
    """Whatever the micro-batches, with padding, and with many equal losses (`levels` of logits)."""
    torch.manual_seed(seed)
    labels = torch.randint(num_classes, (num_samples,))
    logits = torch.randint(levels, (num_samples, num_classes)).float()
    images = torch.randint(256, (num_samples, 3, 8, 8), dtype=torch.uint8)
    record = OutcomeRecord(num_samples)
    for start in range(0, num_samples, batch):
        ids = torch.arange(start, min(start + batch, num_samples))
        padded = torch.cat([ids, torch.tensor([-1])])
        record.update(images[padded], logits[padded], labels[padded], padded)
    outcomes = record.gather()
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert outcomes.predicted_N.tolist() == logits.argmax(1).tolist()
    assert outcomes.losses_N.tolist() == losses.tolist()
    by_hand = sorted(range(num_samples), key=lambda number: (-losses[number].item(), number))[:NUM_WORST]
    assert outcomes.worst_W.tolist() == by_hand
    shown = thumbnails_of(images[by_hand]).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(outcomes.thumbnails_WHWC, shown)

    content = to_json(outcomes, index_of(labels.numpy()), step=3, num_classes=num_classes)
    assert mismatches(content, ValidationJson) == []
    counts: dict[tuple[int, int], int] = {}
    for label, said in zip(labels.tolist(), logits.argmax(1).tolist(), strict=True):
        counts[label, said] = counts.get((label, said), 0) + 1
    told = {(row["label"], row["predicted"]): row["num_pictures"] for row in content["confusions"]}
    assert told.items() <= counts.items()
    if num_classes <= 40:
        assert told == counts
    else:
        wrong = sorted((count for (label, said), count in counts.items() if label != said), reverse=True)
        assert list(told.values()) == wrong[:40]
    assert content["num_correct"] == sum(count for (label, said), count in counts.items() if label == said)
    assert all(row["num_of_label"] == (labels == row["label"]).sum() for row in content["confusions"])


def test_a_loss_that_is_no_number_is_the_worst_and_is_null() -> None:
    record = OutcomeRecord(4)
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 0.0], [5.0, 0.0], [0.0, 0.0]])
    images = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    record.update(images, logits, torch.tensor([0, 0, 1, 1]), torch.arange(4))
    content = to_json(record.gather(), index_of([0, 0, 1, 1]), step=1, num_classes=2)
    assert [picture["sample_id"] for picture in content["worst"]] == [1, 2, 0, 3]
    assert content["worst"][0]["loss"] is None
    json.dumps(content, allow_nan=False)


def test_of_a_thousand_classes_the_file_stays_small() -> None:
    torch.manual_seed(0)
    labels, logits = torch.randint(1000, (20_000,)), torch.randn(20_000, 1000)
    record = OutcomeRecord(20_000)
    for ids in torch.arange(20_000).split(1000):
        images = torch.randint(256, (len(ids), 3, 32, 32), dtype=torch.uint8)
        record.update(images, logits[ids], labels[ids], ids)
    content = json.dumps(to_json(record.gather(), index_of(labels.numpy()), step=1, num_classes=1000))
    assert len(content) < 200_000


def test_pictures_that_were_not_scored_are_not_counted() -> None:
    record = OutcomeRecord(3)
    images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    record.update(images, torch.tensor([[0.0, 1.0]]), torch.tensor([1]), torch.tensor([2]))
    content = to_json(record.gather(), index_of([0, 0, 1]), step=1, num_classes=2)
    assert (content["num_samples"], content["num_correct"], len(content["worst"])) == (1, 1, 1)
