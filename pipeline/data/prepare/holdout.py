"""Pictures held out of training for validation: a share of each class, and no picture on both sides."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from pipeline.core.errors import DataError
from pipeline.core.progress import progress_bar
from pipeline.data.prepare.sources import PictureSource, Reader, SourceImage
from pipeline.data.prepare.tree import some

VALIDATION = "val"


def hold_out(source: PictureSource, fraction: float, seed: int) -> PictureSource:
    """Return the source with a share of its one split as a second one, `val`.

    Which pictures are held out depends on their names, their bytes, the fraction and the seed, not on their order.
    Pictures with the same bytes stay together, whatever they are called and whichever their class.

    Args:
        source: Of one split.
        fraction: Share of each class to hold out, rounded to whole pictures; at least one, and not all.
        seed: Another one chooses others.

    Raises:
        DataError: The source has several splits, or a class would be without pictures on one side.
    """
    if len(source.splits) > 1 or VALIDATION in source.splits:
        raise DataError(
            f"val_fraction={fraction} makes the split {VALIDATION!r} of a source that has one split, and this one has"
            f" {', '.join(sorted(source.splits))}: leave val_fraction= out, or give the folder of one split as source=."
        )
    ((split, images),) = source.splits.items()
    same = _of_same_bytes(images, source.read)
    held = _choose(same, Counter(image.class_name for image in images), fraction, seed)
    kept = [image for image in images if image.name not in held]
    out = [image for image in images if image.name in held]
    num_copies = len(images) - len(same)
    note = (
        f"val_fraction={fraction}: {len(out):,} of {len(images):,} pictures are held out as the split {VALIDATION!r}."
    )
    if num_copies:
        note += f" {num_copies:,} have the bytes of another one, and stay on its side."
    return replace(source, splits={split: kept, VALIDATION: out}, notes=(*source.notes, note))


def _of_same_bytes(images: Sequence[SourceImage], read: Reader) -> list[list[SourceImage]]:
    """Every picture once, with those of the same bytes. Only what has as many bytes as another is read."""
    of_size: dict[int, list[SourceImage]] = defaultdict(list)
    for image in images:
        of_size[image.num_bytes].append(image)
    found: dict[tuple[int, bytes | str], list[SourceImage]] = defaultdict(list)
    num_done = 0
    with progress_bar("comparing pictures of the same size", len(images)) as bar:
        for num_bytes, alike in of_size.items():
            for image in alike:
                found[num_bytes, _content(image, read) if len(alike) > 1 else image.name].append(image)
            num_done += len(alike)
            bar.update(num_done)
    return list(found.values())


def _content(image: SourceImage, read: Reader) -> bytes | str:
    """What tells its bytes from others; one that cannot be read is left to those who will say so."""
    try:
        return hashlib.sha256(read(image)).digest()
    except OSError:
        return image.name


def _choose(same: Iterable[Sequence[SourceImage]], total: Counter[str], fraction: float, seed: int) -> set[str]:
    """Names of the pictures to hold out."""

    def rank(alike: Sequence[SourceImage]) -> tuple[bytes, str]:
        name = min(image.name for image in alike)
        return hashlib.blake2b(f"{seed}/{VALIDATION}/{name}".encode(), digest_size=8).digest(), name

    wanted = {name: max(1, round(fraction * count)) for name, count in total.items()}
    num_held: Counter[str] = Counter()
    held: set[str] = set()
    for alike in sorted(same, key=rank):
        of_class = Counter(image.class_name for image in alike)
        if all(num_held[name] < wanted[name] and num_held[name] + n < total[name] for name, n in of_class.items()):
            num_held += of_class
            held.update(image.name for image in alike)
    if without := sorted(name for name in total if not num_held[name]):
        raise DataError(
            f"val_fraction={fraction} leaves {len(without)} of {len(total)} classes without pictures on one side"
            f" ({some(without)}): they have one picture alone, or copies of one. Add pictures, or move these"
            " classes out of the source."
        )
    return held
