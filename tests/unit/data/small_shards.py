"""Small shards as `prepare` leaves them: tars by webdataset's own writer, and a manifest."""

from collections.abc import Sequence
from pathlib import Path

from webdataset.writer import TarWriter

from pipeline.core.files import sha256_of_file
from pipeline.data.shards.manifest import Manifest, Shard, Split
from tests.unit.data.pictures_on_disk import picture

CLASSES = ("ant", "bee", "cat", "dog")


def write_tar(path: Path, samples: Sequence[dict[str, str | bytes]]) -> Path:
    """Samples as webdataset takes them: {"__key__": ..., "jpg": bytes, "cls": "3"}."""
    with TarWriter(str(path), mtime=0) as tar:
        for sample in samples:
            tar.write(sample)
    return path


def samples_of(first: int, count: int) -> list[dict[str, str | bytes]]:
    """Pictures of random pixels, all different; the label is the number modulo the classes."""
    return [
        {"__key__": f"{number:09d}", "jpg": picture(number), "cls": str(number % len(CLASSES))}
        for number in range(first, first + count)
    ]


def write_manifest(root: Path, counts: dict[str, dict[str, int]]) -> None:
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
    Manifest(CLASSES, splits).save(root)


def write_shards(root: Path, **counts: Sequence[int]) -> Path:
    """`write_shards(root, train=(3, 4))`: two shards of 3 and 4 samples. Returns `root`."""
    root.mkdir(parents=True, exist_ok=True)
    written: dict[str, dict[str, int]] = {}
    for split, sizes in counts.items():
        written[split] = {}
        for number, size in enumerate(sizes):
            name = f"{split}-{number:06d}.tar"
            write_tar(root / name, samples_of(sum(sizes[:number]), size))
            written[split][name] = size
    write_manifest(root, written)
    return root
