"""What `prepare` decides before it writes: is it done already, does it fit what is there, what goes where."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.core.errors import DataError
from pipeline.core.files import try_lock, write_json_atomic
from pipeline.data.pictures import BadImageError, Encoding, shard_jpeg
from pipeline.data.prepare.listing import SOURCES_NAME
from pipeline.data.prepare.plan import ORDER_RULE, plan_shards, shuffled
from pipeline.data.prepare.sources import PictureSource, SourceImage
from pipeline.data.prepare.writer import SplitPlan, cannot_write
from pipeline.data.shards.manifest import MANIFEST_NAME, Manifest, Split

Request = dict[str, str | int | float | None]
"""The settings that determine the shards, as the manifest records them."""
NUM_CALIBRATION_IMAGES = 64
"""Where pictures are encoded again, the size to plan with is the mean over this many of them."""


@contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Hold `out` (made if need be) against a second `prepare`; the kernel lets go if this process dies.

    Raises:
        DataError: it cannot be made, or another process holds it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise cannot_write(out, error) from error
    try:
        if not try_lock(descriptor):
            raise DataError(f"Another prepare is writing into out={out}. Wait for it, or choose another out=.")
        yield
    finally:
        os.close(descriptor)


def existing_manifest(out: Path) -> Manifest | None:
    """The manifest in `out`, if there is one."""
    return Manifest.load(out) if (out / MANIFEST_NAME).exists() else None


def digest_of_source(source: str) -> str:
    """Tells sources of one name in two places apart, and nobody where they lie."""
    return hashlib.sha256(os.fsencode(Path(source).resolve())).hexdigest()


def note_source(out: Path, splits: Iterable[str], digest: str | None) -> None:
    """Remember where `splits` come from; None: from no place, so nothing is to be known of them.

    Raises:
        DataError: `out` cannot be written.
    """
    before = _sources(out)
    now = {name: known for name, known in before.items() if name not in set(splits)}
    now |= dict.fromkeys(splits, digest) if digest else {}
    try:
        if now != before:
            write_json_atomic(out / SOURCES_NAME, now)
    except OSError as error:
        raise cannot_write(out, error) from error


def _sources(out: Path) -> dict[str, object]:
    try:
        content = json.loads((out / SOURCES_NAME).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _check_same_source(out: Path, names: Iterable[str], digest: str | None) -> None:
    known = _sources(out)
    for name in names:
        if known.get(name, digest) != digest:
            raise DataError(
                f"out={out} holds the split {name!r} made from a source= of this name that lay elsewhere. Choose"
                f" another out=, or remove it; if the same pictures have only moved, remove {out / SOURCES_NAME}."
            )


def finished_splits(
    out: Path, manifest: Manifest | None, request: Request, split: str | None, source_digest: str | None
) -> list[str]:
    """The splits that this very request has made already, if they are all that it asks for; else an empty list.

    The source is not opened: a finished run of hours must be told as such in a moment.

    Args:
        out: Directory of the shards.
        manifest: The manifest in `out`; None: there is none.
        request: The settings asked for.
        split: The split asked for; None: all of the source.
        source_digest: `digest_of_source`; None: of no place.

    Raises:
        DataError: they were made from another source of the same name.
    """
    if manifest is None:
        return []
    if split is not None:
        names = [split] if split in manifest.splits else []
    else:
        names = [name for name, found in manifest.splits.items() if found.extra.get("is_whole_source")]
    if not all(_is_complete(out, manifest.splits[name], request) for name in names):
        return []
    _check_same_source(out, names, source_digest)
    return names


def _is_complete(out: Path, split: Split, request: Request) -> bool:
    """Made by `request`, and every shard there with its size."""
    try:
        return split.extra.get("request") == request and all(
            (out / shard.name).stat().st_size == shard.bytes for shard in split.shards
        )
    except FileNotFoundError:
        return False


def plan_splits(
    source: PictureSource,
    out: Path,
    manifest: Manifest | None,
    *,
    seed: int,
    shard_bytes: int,
    encoding: Encoding,
    request: Request,
    is_whole_source: bool,
    source_digest: str | None = None,
) -> list[SplitPlan]:
    """Plan every split of `source` that `out` does not hold yet.

    Args:
        source: The pictures.
        out: Directory of the shards.
        manifest: The manifest in `out`; None: there is none.
        seed: Seed of the order of the samples.
        shard_bytes: Bytes that a shard should have.
        encoding: How pictures are encoded.
        request: What was asked for, to be recorded, and compared with what made a split that is there already.
        is_whole_source: Whether all splits of the source were asked for.
        source_digest: As in `finished_splits`.

    Raises:
        DataError: `out` has other classes or another split of the same name or place, or the disk is too small.
    """
    if manifest is not None and manifest.classes != source.classes:
        raise DataError(
            f"out={out} holds shards of {len(manifest.classes)} classes, and these are {len(source.classes)} others or "
            "in another order. Labels would mean two things: choose another out=."
        )
    class_index = {name: index for index, name in enumerate(source.classes)}
    plans = []
    for name, images in sorted(source.splits.items()):
        if manifest is not None and name in manifest.splits:
            _check_same_request(out, name, manifest.splits[name], request)
            _check_same_source(out, [name], source_digest)
            if _is_complete(out, manifest.splits[name], request):
                continue
        ordered = shuffled(images, seed, name)
        shards = plan_shards(
            ordered,
            name,
            class_index,
            shard_bytes=shard_bytes,
            sample_bytes=_expected_bytes(source, ordered, encoding) if encoding.short_side else None,
            settings={**request, "kind": source.kind, **source.extra},
        )
        record = {
            "kind": source.kind,
            "seed": seed,
            "order": ORDER_RULE,
            "short_side": encoding.short_side,
            "request": request,
            "is_whole_source": is_whole_source,
            **source.extra,
        }
        plans.append(SplitPlan(name, shards, record))
    _check_space(out, plans)
    return plans


def _expected_bytes(source: PictureSource, ordered: list[SourceImage], encoding: Encoding) -> int | None:
    """Mean bytes of the first few pictures once encoded; None if none of them can be."""
    sizes = []
    for image in ordered[:NUM_CALIBRATION_IMAGES]:
        try:
            sizes.append(len(shard_jpeg(source.read(image), encoding)))
        except (BadImageError, OSError):
            continue  # counted when the shard is written
    return round(sum(sizes) / len(sizes)) if sizes else None


def _check_same_request(out: Path, name: str, split: Split, request: Request) -> None:
    before = split.extra.get("request")
    if before == request:
        return
    if not isinstance(before, dict):
        raise DataError(f"out={out} holds a split {name!r} that prepare did not make. Choose another out=.")
    changed = [
        f"{key} was {before.get(key)!r} and is {request.get(key)!r}"
        for key in sorted({*before, *request})
        if before.get(key) != request.get(key)
    ]
    raise DataError(
        f"out={out} holds the split {name!r} made otherwise: {'; '.join(changed)}. Choose another out=, or remove it."
    )


def _check_space(out: Path, plans: list[SplitPlan]) -> None:
    """Refuse before hours of work what cannot fit."""
    needed = sum(shard.expected_bytes for plan in plans for shard in plan.shards)
    there = [out / shard.name for plan in plans for shard in plan.shards]
    available = shutil.disk_usage(out).free + sum(path.stat().st_size for path in there if path.exists())
    if needed > available:
        raise DataError(
            f"out={out} has room for {available / 1e9:.2f} GB, and the shards will take about {needed / 1e9:.2f} GB. "
            "Free space there, choose another out=, or reduce the pictures with short_side=."
        )
