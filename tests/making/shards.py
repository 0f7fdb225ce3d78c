"""Small shards as `prepare` leaves them: tars by webdataset's own writer, a manifest, the index where asked."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from webdataset.writer import TarWriter

from pipeline.core.files import sha256_of_file, write_atomic
from pipeline.data.shards.manifest import Manifest, Shard, Split
from pipeline.data.shards.scan import scanned_table
from pipeline.data.shards.table import INDEX_KEY, index_name, shards_of
from tests.making.pictures import coloured

CLASSES = ("ant", "bee", "cat", "dog")
NUM_TRAINING, NUM_VALIDATION = (30, 30), 25  # the latter divisible by neither 2 nor 3 ranks

Sample = dict[str, Any]
"""As webdataset takes it: {"__key__": ..., "jpg": bytes, "cls": "3"}."""


def write_tar(path: Path, samples: Iterable[Sample]) -> Path:
    """A shard of these samples, the same bytes each time. Returns `path`."""
    with TarWriter(str(path), mtime=0) as tar:
        for sample in samples:
            tar.write(sample)
    return path


def samples_of(
    first: int, count: int, *, damaged: Sequence[int] = (), labels: Mapping[int, str] | None = None
) -> list[Sample]:
    """Pictures of a class each, all different; the label is the number modulo the classes.

    Args:
        first: Number of the first picture; it is its key, too.
        count: Number of pictures.
        damaged: Numbers of pictures that are cut short.
        labels: Other labels than the right ones, by number.
    """
    samples: list[Sample] = []
    for number in range(first, first + count):
        jpeg = coloured(number, number % len(CLASSES))
        content = jpeg[: len(jpeg) // 3] if number in damaged else jpeg
        label = (labels or {}).get(number, str(number % len(CLASSES)))
        samples.append({"__key__": f"{number:09d}", "jpg": content, "cls": label})
    return samples


def write_manifest(root: Path, counts: dict[str, dict[str, int]], classes: Sequence[str] = CLASSES) -> None:
    """`{split: {shard: samples}}` with the sizes and hashes that the files have now."""
    splits = {
        split: Split(
            tuple(
                Shard(name, (root / name).stat().st_size, sha256_of_file(root / name), count)
                for name, count in shards.items()
            )
        )
        for split, shards in counts.items()
    }
    Manifest(tuple(classes), splits).save(root)


def write_shards(
    root: Path, *, damaged: Sequence[int] = (), labels: Mapping[int, str] | None = None, **counts: Sequence[int]
) -> Path:
    """`write_shards(root, train=(3, 4))`: two shards of 3 and 4 samples. Returns `root`.

    Pictures are numbered through all splits, so that no two are alike.

    Args:
        root: Where; made if it is not there.
        damaged: Numbers of pictures that are cut short.
        labels: Other labels than the right ones, by number.
        counts: By split, the samples of each shard; 60 pictures to train on and 25 to validate if none is given.
    """
    counts = counts or {"train": NUM_TRAINING, "val": (NUM_VALIDATION,)}
    root.mkdir(parents=True, exist_ok=True)
    written: dict[str, dict[str, int]] = {}
    first = 0
    for split, sizes in counts.items():
        written[split] = {}
        for position, size in enumerate(sizes):
            path = root / f"{split}-{position:06d}.tar"
            write_tar(path, samples_of(first, size, damaged=damaged, labels=labels))
            written[split][path.name] = size
            first += size
    write_manifest(root, written)
    return root


def add_index(root: Path, *splits: str) -> Path:
    """The index that `prepare` leaves beside the shards, described in their manifest. Returns `root`."""
    manifest = Manifest.load(root)
    for split in splits:
        path = root / index_name(split)
        write_atomic(path, scanned_table(root, shards_of(manifest, split)).save)
        described = {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        manifest.split(split).extra[INDEX_KEY] = described
    manifest.save(root)
    return root
