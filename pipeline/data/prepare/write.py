"""What `prepare` does, once it is configured: open, plan, write, and say what came of it."""

import hashlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipeline.core.progress import progress_bar
from pipeline.data.pictures import Encoding
from pipeline.data.prepare.builtin import BuiltinPictures
from pipeline.data.prepare.holdout import hold_out
from pipeline.data.prepare.label_files import read_labels
from pipeline.data.prepare.opening import BUILTIN, open_source, read_classes
from pipeline.data.prepare.request import (
    Request,
    digest_of_source,
    exclusive,
    existing_manifest,
    finished_splits,
    note_source,
    plan_splits,
)
from pipeline.data.prepare.sources import PictureSource
from pipeline.data.prepare.writer import ShardWriter, WrittenShard, write_splits
from pipeline.data.shards.manifest import Manifest

if TYPE_CHECKING:
    from pipeline.config.prepare import PrepareConfig

NUM_BAD_SHOWN = 20


def prepare_shards(config: "PrepareConfig") -> None:
    """Write the shards that `config` asks for.

    Raises:
        DataError: the source, the pictures or the output directory are not as they must be.
    """
    assert config.source is not None  # PrepareConfig refuses it
    start_seconds = time.monotonic()
    out = Path(config.out)
    classes = read_classes(Path(config.classes)) if config.classes else None
    request = _request(config, classes)
    source_digest = digest_of_source(config.source) if config.source != BUILTIN else None
    with exclusive(out):
        manifest = existing_manifest(out)
        if finished := finished_splits(out, manifest, request, config.split, source_digest):
            looked = "" if source_digest is None else f" {config.source} was not looked at again."
            print(f"Finished already: {', '.join(finished)} in {out}.{looked}")
            return
        source = open_source(
            config.source,
            kind=cast(Any, config.kind),  # checked by PrepareConfig
            split=config.split,
            classes=classes or (manifest.classes if manifest else None),
            devkit=Path(config.devkit) if config.devkit else None,
            builtin=BuiltinPictures(config.seed, config.num_classes, config.num_images),
            layout=config.layout,
            labels=Path(config.labels) if config.labels else None,
            out=out,
        )
        if config.val_fraction is not None:
            source = hold_out(source, config.val_fraction, config.seed)
        _announce(source, config)
        encoding = Encoding(config.short_side, config.jpeg_quality, config.check)
        plans = plan_splits(
            source,
            out,
            manifest,
            seed=config.seed,
            shard_bytes=config.shard_bytes,
            encoding=encoding,
            request=request,
            is_whole_source=config.split is None,
            source_digest=source_digest,
        )
        note_source(out, [plan.name for plan in plans], source_digest)
        with progress_bar("images", sum(plan.num_samples for plan in plans)) as bar:
            manifest, results = write_splits(
                plans,
                ShardWriter(out, source.read, encoding),
                source.classes,
                manifest,
                num_workers=config.num_workers or len(os.sched_getaffinity(0)),
                max_bad_fraction=config.max_bad_fraction,
                report=bar.update,
            )
    _summarise(out, manifest, results, time.monotonic() - start_seconds)


def _request(config: "PrepareConfig", classes: tuple[str, ...] | None) -> Request:
    """All that determines the shards. It names no directory of this machine, so that shards can be compared."""
    assert config.source is not None
    request: Request = {
        "source": Path(config.source).resolve().name if config.source != BUILTIN else BUILTIN,
        "seed": config.seed,
        "shard_bytes": config.shard_bytes,
        "short_side": config.short_side,
        "jpeg_quality": config.jpeg_quality,
        "classes_sha256": hashlib.sha256("\n".join(classes).encode()).hexdigest() if classes else None,
    }
    if config.layout:
        request["layout"] = config.layout
    if config.labels:
        said = "\n".join(f"{name} {of}" for name, of in sorted(read_labels(Path(config.labels)).items()))
        request["labels_sha256"] = hashlib.sha256(said.encode()).hexdigest()
    if config.val_fraction is not None:
        request["val_fraction"] = config.val_fraction
    if config.check != "pixels":
        request["check"] = config.check
    if config.source == BUILTIN:
        request |= {"num_images": config.num_images, "num_classes": config.num_classes}
    return request


def _announce(source: PictureSource, config: "PrepareConfig") -> None:
    """What was recognised, before the work starts."""
    origin = "as kind= says" if config.kind else "recognised"
    counts = ", ".join(f"{name} {len(images):,}" for name, images in sorted(source.splits.items()))
    print(f"Source {config.source}: {source.kind} ({origin}), {len(source.classes)} classes, images: {counts}.")
    for line in source.tree:
        print(f"  {line}")
    for note in source.notes:
        print(note)


def _summarise(out: Path, manifest: Manifest, results: list[WrittenShard], seconds: float) -> None:
    """Counts, bytes and rate; what was kept; what was left out."""
    for name, split in sorted(manifest.splits.items()):
        print(f"{name}: {split.num_samples:,} images, {split.num_bytes / 1e6:,.1f} MB, {len(split.shards)} shards")
    num_written = sum(result.shard.num_samples for result in results if not result.is_kept)
    print(f"{out}: {num_written:,} images written in {seconds:.1f} s, {num_written / seconds:,.0f} images/s")
    if num_kept := sum(result.is_kept for result in results):
        print(f"{num_kept} shards of an earlier attempt were whole and kept.")
    bad = [image for result in results for image in result.bad]
    for image in bad[:NUM_BAD_SHOWN]:
        print(f"left out: {image.name}: {image.reason}")
    if len(bad) > NUM_BAD_SHOWN:
        print(f"and {len(bad) - NUM_BAD_SHOWN} more, all named in manifest.json")
