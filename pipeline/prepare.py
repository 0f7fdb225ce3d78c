"""Pictures to verified WebDataset shards.

python -m pipeline.prepare source=builtin out=shards/builtin
python -m pipeline.prepare source=ILSVRC2012/ out=shards/imagenet devkit=ILSVRC2012_devkit_t12.tar.gz short_side=256
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipeline.cli import run_command
from pipeline.config import one_of, require

if TYPE_CHECKING:
    from pipeline.data.manifest import Manifest
    from pipeline.data.sources import Source
    from pipeline.data.writer import WrittenShard

NUM_BAD_SHOWN = 20
KINDS = ("folders", "tar", "ilsvrc2012", "builtin")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Pictures to verified WebDataset shards: `<key>.jpg` and `<key>.cls` in plain tars, and a manifest.

    The same input gives the same bytes whatever num_workers is; run again after a kill, it goes on; finished, it exits
    at once.
    """

    source: str
    """A directory of class folders, a tar of them, one of ILSVRC2012's archives or the directory that holds them, or
    `builtin`: the generator of a learnable picture set."""
    out: str
    """Directory for the shards. Splits that are there already are kept, if they have the same classes."""
    split: str | None = None
    """The split to write. Null: every split that the source has. Where it has none of its own, the name to give it
    (null: train). A `test` folder becomes `val`, unless there is a `val` too."""
    classes: str | None = None
    """Text file of class names in index order, one per line. Null: those already in `out`, else sorted folder names."""
    devkit: str | None = None
    """ILSVRC2012_devkit_t12.tar.gz, packed or not: the labels of ILSVRC2012's validation pictures. Null: looked for
    beside them."""
    kind: str | None = None
    """folders, tar, ilsvrc2012 or builtin. Null: recognised from the source."""
    seed: int = 0
    """Fixes the random order in which samples are written, and the pictures of `builtin`."""
    shard_bytes: int = 64 * 1024**2
    """Bytes that a shard should have, about; all shards of a split come out about equally large."""
    short_side: int | None = None
    """Pixels to which the shorter side of larger pictures is reduced. Null: they stay as they are, byte for byte."""
    jpeg_quality: int = 90
    """Quality, 1 to 95, of what must be encoded: pictures that are reduced, and PNGs."""
    max_bad_fraction: float = 0.0
    """Share of a split's pictures that may fail to decode. They are left out and named in the manifest."""
    num_workers: int | None = None
    """Processes that write shards. Null: one per core."""
    num_images: int = 2000
    """builtin: training pictures; a quarter as many validation pictures are made beside them."""
    num_classes: int = 10
    """builtin: classes, 2 to 10."""

    def __post_init__(self) -> None:
        if self.kind is not None:
            one_of("kind", self.kind, KINDS)
        name = self.split or "train"
        require(
            name.replace("_", "").isalnum() and name.isascii(),
            f"split={self.split!r} names files: use letters, digits and underscores.",
        )
        require(self.shard_bytes >= 1, f"shard_bytes={self.shard_bytes} must be positive.")
        require(self.short_side is None or self.short_side >= 1, f"short_side={self.short_side} must be positive.")
        require(1 <= self.jpeg_quality <= 95, f"jpeg_quality={self.jpeg_quality} must be from 1 to 95.")
        require(
            0 <= self.max_bad_fraction <= 1, f"max_bad_fraction={self.max_bad_fraction} is a share: between 0 and 1."
        )
        require(self.num_workers is None or self.num_workers >= 1, f"num_workers={self.num_workers} must be positive.")
        require(2 <= self.num_classes <= 10, f"num_classes={self.num_classes} must be from 2 to 10.")
        require(
            self.num_images >= 4 * self.num_classes,
            f"num_images={self.num_images} must be at least {4 * self.num_classes}, "
            "for one validation picture of every class.",
        )


def prepare(config: PrepareConfig) -> None:
    """Write the shards that `config` asks for, and say what they are.

    Raises:
        DataError: the source, the pictures or the output directory are not as they must be.
    """
    from pipeline.data.builtin import BuiltinPictures
    from pipeline.data.images import Encoding
    from pipeline.data.opening import open_source, read_classes
    from pipeline.data.preparation import exclusive, existing_manifest, finished_splits, plan_splits
    from pipeline.data.writer import ShardWriter, write_splits

    start_seconds = time.monotonic()
    out = Path(config.out)
    classes = read_classes(Path(config.classes)) if config.classes else None
    request = _request(config, classes)
    with exclusive(out):
        manifest = existing_manifest(out)
        if finished := finished_splits(out, manifest, request, config.split):
            print(f"Finished already: {', '.join(finished)} in {out}.")
            return
        source = open_source(
            config.source,
            kind=cast(Any, config.kind),  # checked by PrepareConfig
            split=config.split,
            classes=classes or (manifest.classes if manifest else None),
            devkit=Path(config.devkit) if config.devkit else None,
            builtin=BuiltinPictures(config.seed, config.num_classes, config.num_images),
        )
        _announce(source, config)
        encoding = Encoding(config.short_side, config.jpeg_quality)
        plans = plan_splits(
            source,
            out,
            manifest,
            seed=config.seed,
            shard_bytes=config.shard_bytes,
            encoding=encoding,
            request=request,
            is_whole_source=config.split is None,
        )
        with _progress(sum(plan.num_samples for plan in plans)) as report:
            manifest, results = write_splits(
                plans,
                ShardWriter(out, source.read, encoding),
                source.classes,
                manifest,
                num_workers=config.num_workers or len(os.sched_getaffinity(0)),
                max_bad_fraction=config.max_bad_fraction,
                report=report,
            )
    _summarise(out, manifest, results, time.monotonic() - start_seconds)


def _request(config: PrepareConfig, classes: tuple[str, ...] | None) -> dict[str, Any]:
    """All that determines the shards. It names no directory of this machine, so that shards can be compared."""
    request: dict[str, Any] = {
        "source": Path(config.source).resolve().name if config.source != "builtin" else "builtin",
        "seed": config.seed,
        "shard_bytes": config.shard_bytes,
        "short_side": config.short_side,
        "jpeg_quality": config.jpeg_quality,
        "classes_sha256": hashlib.sha256("\n".join(classes).encode()).hexdigest() if classes else None,
    }
    if config.source == "builtin":
        request |= {"num_images": config.num_images, "num_classes": config.num_classes}
    return request


def _announce(source: "Source", config: PrepareConfig) -> None:
    """What was recognised, before the work starts."""
    origin = "as kind= says" if config.kind else "recognised"
    counts = ", ".join(f"{name} {len(images):,}" for name, images in sorted(source.splits.items()))
    print(f"Source {config.source}: {source.kind} ({origin}), {len(source.classes)} classes, images: {counts}.")
    for note in source.notes:
        print(note)


@contextmanager
def _progress(num_samples: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, and silence elsewhere. Yields what is to be called with the number done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("images", total=num_samples)
        yield lambda num_done: progress.update(bar, completed=num_done)


def _summarise(out: Path, manifest: "Manifest", results: "list[WrittenShard]", seconds: float) -> None:
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


if __name__ == "__main__":
    run_command("prepare", PrepareConfig, prepare)
