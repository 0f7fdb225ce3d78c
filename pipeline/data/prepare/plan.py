"""Which sample goes into which shard under which key: decided before anything is written, from names and sizes alone.

That is what makes the bytes independent of the number of workers, and a shard writable again on its own after a kill.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from tarfile import BLOCKSIZE

import numpy as np

from pipeline.data.prepare.sources import SourceImage

ORDER_RULE = "ascending blake2b-64 of 'seed/split/name'"
"""Recorded in the manifest. A hash gives the same order with every version of every library."""
KEY_STEM_LENGTH = 64


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """One sample: `<key>.jpg` and `<key>.cls`."""

    key: str
    label: int
    image: SourceImage


@dataclass(frozen=True)
class PlannedShard:
    """One tar to write."""

    name: str
    samples: tuple[PlannedSample, ...]
    expected_bytes: int
    digest: str
    """SHA-256 of all that determines the shard's bytes. A finished shard with another digest is of another plan."""


def shuffled(images: Iterable[SourceImage], seed: int, split: str) -> list[SourceImage]:
    """The images in a random order that depends on their names, the split and the seed only."""

    def rank(image: SourceImage) -> tuple[bytes, str]:
        return hashlib.blake2b(f"{seed}/{split}/{image.name}".encode(), digest_size=8).digest(), image.name

    return sorted(images, key=rank)


def plan_shards(
    images: Sequence[SourceImage],
    split: str,
    class_index: dict[str, int],
    *,
    shard_bytes: int,
    sample_bytes: int | None,
    settings: Mapping[str, object],
) -> list[PlannedShard]:
    """Cut `images`, in their order, into shards of about `shard_bytes`, all about equally large.

    Args:
        images: In the order they are to be written; at least one.
        split: Name of the split, with which the shards' names begin.
        class_index: Label by class name.
        shard_bytes: Bytes that a shard should have.
        sample_bytes: Expected bytes of a JPEG where the files' own sizes say nothing, as they are encoded again.
        settings: Whatever else determines the bytes; it goes into the digests.
    """
    jpeg_bytes_N = np.array([sample_bytes or image.num_bytes for image in images], dtype=np.int64)
    tar_bytes_N = tar_bytes(jpeg_bytes_N)
    cuts = _cuts(tar_bytes_N, shard_bytes)
    samples = [
        PlannedSample(f"{position:09d}-{key_stem(image)}", class_index[image.class_name], image)
        for position, image in enumerate(images)
    ]
    shards = []
    for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
        name = f"{split}-{number:06d}.tar"
        digest = _digest(name, samples[start:stop], settings)
        shards.append(PlannedShard(name, tuple(samples[start:stop]), int(tar_bytes_N[start:stop].sum()), digest))
    return shards


def tar_bytes(jpeg_bytes_N: np.ndarray) -> np.ndarray:
    """Bytes `(N,)` that samples take in a tar: two headers, the picture in whole blocks, and a block for the label."""
    return 3 * BLOCKSIZE + -(-jpeg_bytes_N // BLOCKSIZE) * BLOCKSIZE


def key_stem(image: SourceImage) -> str:
    """What tells a reader of the tar where the sample came from: class and file name, in safe characters.

    A dot would end the key for WebDataset, and ustar names hold 100 characters.
    """
    stem = PurePosixPath(image.name).stem
    if not stem.startswith(image.class_name):
        stem = f"{image.class_name}_{stem}"
    return re.sub(r"[^A-Za-z0-9_-]", "_", stem)[:KEY_STEM_LENGTH]


def _cuts(sample_bytes_N: np.ndarray, shard_bytes: int) -> list[int]:
    """Positions at which shards begin, and the end: sums as even as whole samples allow, no shard empty."""
    ends_N = np.cumsum(sample_bytes_N)
    total = int(ends_N[-1])
    num_shards = -(-total // shard_bytes)
    # A sample belongs to the shard in whose share of the total its middle byte lies.
    shard_N = (ends_N - sample_bytes_N / 2) * num_shards // total
    starts = np.flatnonzero(np.diff(shard_N, prepend=-1))
    return [*starts.tolist(), len(ends_N)]


def _digest(name: str, samples: Sequence[PlannedSample], settings: Mapping[str, object]) -> str:
    sha = hashlib.sha256(json.dumps([name, dict(settings)], sort_keys=True).encode())
    for sample in samples:
        image = sample.image
        sha.update(f"\n{sample.key} {sample.label} {image.name} {image.num_bytes} {image.mtime_ns}".encode())
    return sha.hexdigest()
