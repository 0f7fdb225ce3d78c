"""Small shards, and runs over them that several tests look at."""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset.writer import TarWriter

from pipeline.core.files import sha256_of_file
from pipeline.data.shards.manifest import Manifest, Shard, Split
from tests.commands import train_recorded

CLASSES = ("ant", "bee", "cat", "dog")
PAIR_OPTIONS = (
    "batch.max_per_rank=3",
    "recipe.ema_decay=0.9",
    "model.num_classes=1000",
    "tracking=offline",
    "comm.bucket_megabytes=null",  # DDP's own buckets, of which the bytes are published
)
NUM_VALIDATION = 25  # divisible by neither 2 nor 3 ranks


def picture(number: int) -> bytes:
    """A JPEG of random pixels around a colour of its class."""
    rng = np.random.default_rng(number)
    colour = np.array([(200, 60, 60), (60, 200, 60), (60, 60, 200), (200, 200, 60)][number % len(CLASSES)])
    pixels_HWC = np.clip(colour + rng.integers(-50, 50, (40, 48, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "JPEG")
    return buffer.getvalue()


def write_shards(
    root: Path,
    *,
    damaged: tuple[int, ...] = (),
    labels: dict[int, str] | None = None,
    train: tuple[int, ...] = (30, 30),
) -> Path:
    """Shards as `prepare` leaves them: 60 pictures to train on, 25 to validate.

    damaged: numbers of training pictures that are cut short. labels: others than the right ones, by number.
    """
    root.mkdir(parents=True, exist_ok=True)
    splits, number = {}, 0
    for split, sizes in (("train", train), ("val", (NUM_VALIDATION,))):
        shards = []
        for position, size in enumerate(sizes):
            path = root / f"{split}-{position:06d}.tar"
            with TarWriter(str(path)) as tar:
                for _ in range(size):
                    jpeg = picture(number)
                    label = (labels or {}).get(number, str(number % len(CLASSES)))
                    content = jpeg[: len(jpeg) // 3] if number in damaged else jpeg
                    tar.write({"__key__": f"{number:09d}", "jpg": content, "cls": label})
                    number += 1
            shards.append(Shard(path.name, path.stat().st_size, sha256_of_file(path), size))
        splits[split] = Split(tuple(shards))
    Manifest(CLASSES, splits).save(root)
    return root


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound ones. Nobody changes them."""
    return write_shards(tmp_path_factory.mktemp("small") / "shards")


@dataclass(frozen=True)
class Pair:
    """The same training twice: in one go, and killed and run again."""

    root: Path
    devices: int
    name: str = "resumed"

    @property
    def unbroken(self) -> Path:
        """Its run directory."""
        return self.root / "unbroken"

    @property
    def resumed(self) -> Path:
        """Its run directory."""
        return self.root / self.name


def make_pair(root: Path, shards: Path, devices: int, kill_at: str, *options: str) -> Pair:
    """Train; train again under another name, be killed, and run the same command once more."""
    train_recorded(root, shards, "unbroken", devices, *options)
    train_recorded(root, shards, "resumed", devices, *options, kill_at=kill_at)
    assert (root / "resumed" / "metrics.jsonl").read_text().count("\n") < 11
    saved = json.loads((root / "resumed" / "checkpoints" / "last.json").read_text())["step"]
    told = json.loads((root / "resumed" / "ledger.json").read_text())["num_steps"]
    assert told >= saved, "a checkpoint must never know of a step that the ledger lacks"
    ended = train_recorded(root, shards, "resumed", devices, *options)
    assert "resumed from" in ended.output
    return Pair(root, devices)


@pytest.fixture(scope="session")
def two_ranks(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Everything at once: two ranks, two micro-batches a step, averaged weights, 1000 classes, the mirror offline.

    The supervisor is killed when rank 1 is fed the second half of step 7, in the second epoch.
    """
    return make_pair(tmp_path_factory.mktemp("two"), shards, 2, "1 7 1 supervisor", *PAIR_OPTIONS)
