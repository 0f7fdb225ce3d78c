"""Run by test_peers.py: read a split with somebody else's reader and print one JSON row per sample.

python read_as_a_peer.py webdataset|timm ROOT SPLIT
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def by_webdataset(root: Path, split: str) -> Iterator[tuple[Any, int]]:
    """As webdataset's own documentation reads shards."""
    from webdataset.compat import WebDataset

    urls = [str(path) for path in sorted(root.glob(f"{split}-*.tar"))]
    dataset: Any = WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg", "cls")
    yield from dataset


def by_timm(root: Path, split: str) -> Iterator[tuple[Any, int]]:
    """As `train.py --dataset wds/` reads them."""
    from timm.data.dataset_factory import create_dataset

    dataset: Any = create_dataset("wds/", root=str(root), split=split, is_training=False, batch_size=4)
    yield from dataset


if __name__ == "__main__":
    _, peer, root, split = sys.argv
    for image, label in {"webdataset": by_webdataset, "timm": by_timm}[peer](Path(root), split):
        pixels_HWC = np.asarray(image, dtype=np.int64)
        print(json.dumps([list(pixels_HWC.shape), int(pixels_HWC.sum()), label]))
