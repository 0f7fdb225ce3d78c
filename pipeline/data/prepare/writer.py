"""Write shards: in parallel, each of them whole or absent, none of them twice, and the manifest last.

out/train-000000.tar ...      plain WebDataset tars: <key>.jpg, <key>.cls
out/_info.json                what timm's reader of WebDataset wants to know
out/train.index.npz           where every sample lies (table.py)
out/manifest.json             written when everything else is complete
out/.sources.json             which place each split came from, as a digest (request.py)
out/.prepare/<shard>.json     only while unfinished: which plan a finished shard is of, with its size and hash
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, cast

from pipeline.core.errors import DataError
from pipeline.core.files import TEMPORARY_MARK, sha256_of_file, write_atomic, write_json_atomic
from pipeline.core.schemas.manifest import IndexJson
from pipeline.data.pictures import BadImageError, Encoding, shard_jpeg
from pipeline.data.prepare.plan import PlannedShard
from pipeline.data.prepare.pool import run_tasks
from pipeline.data.prepare.sources import Reader, expect_image
from pipeline.data.shards.allowance import allowed_bad
from pipeline.data.shards.manifest import MANIFEST_NAME, STATE_DIRECTORY, Manifest, Shard, Split
from pipeline.data.shards.scan import scanned_table
from pipeline.data.shards.table import INDEX_KEY, index_name, shards_of

TIMM_INFO_NAME = "_info.json"
NUM_BAD_SHOWN = 5
NUM_EXPECTED = 16
"""Pictures that the kernel may read ahead of the one that is worked on."""
WRITE_BYTES = 1024**2
"""At least so many are hashed and written at once."""


@dataclass(frozen=True)
class BadImage:
    """A picture that was left out."""

    name: str
    reason: str


@dataclass(frozen=True)
class WrittenShard:
    """What a shard became."""

    shard: Shard
    bad: tuple[BadImage, ...] = ()
    is_kept: bool = False
    """It was finished by an earlier attempt."""


@dataclass(frozen=True)
class SplitPlan:
    """A split to write, and what the manifest records about it."""

    name: str
    shards: Sequence[PlannedShard]
    record: dict[str, object]

    @property
    def num_samples(self) -> int:
        """Number of samples over all shards."""
        return sum(len(shard.samples) for shard in self.shards)


@dataclass(frozen=True)
class ShardWriter:
    """Writes one shard; pickles, so that a worker process can."""

    out: Path
    read: Reader
    encoding: Encoding

    def __call__(self, planned: PlannedShard, tick: Callable[[int], None]) -> WrittenShard:
        """Write `planned`, or keep it if it is there already, byte for byte.

        Args:
            planned: What the shard is to hold.
            tick: Called with the number of samples done since the last call; it may raise to stop the work.

        Raises:
            DataError: `out` cannot be written.
        """
        if (kept := self._finished(planned)) is not None:
            tick(len(planned.samples))
            return kept
        bad: list[BadImage] = []
        written: list[Shard] = []
        try:
            path = self.out / planned.name
            write_atomic(path, lambda file: written.append(self._write(planned, file, bad, tick)))
            result = WrittenShard(written[0], tuple(bad))
            if not written[0].num_samples:
                path.unlink()  # readers take an empty tar for a broken one
            write_json_atomic(self._state_path(planned), {"plan": planned.digest, **asdict(result)})
        except OSError as error:
            raise cannot_write(self.out, error) from error
        return result

    def _write(self, planned: PlannedShard, file: BinaryIO, bad: list[BadImage], tick: Callable[[int], None]) -> Shard:
        from webdataset.writer import TarWriter

        hashed = _HashedFile(file)
        num_samples = 0
        # Fixed time and owner: the same input gives the same bytes.
        with TarWriter(cast(BinaryIO, hashed), encoder=False, mtime=0) as tar:
            for number, sample in enumerate(planned.samples):
                for later in planned.samples[number + NUM_EXPECTED : number + NUM_EXPECTED + 1]:
                    expect_image(later.image)
                try:
                    jpeg = shard_jpeg(self.read(sample.image), self.encoding)
                except BadImageError as error:
                    bad.append(BadImage(sample.image.name, str(error)))
                except OSError as error:  # of the source: the tar is written outside this block
                    bad.append(BadImage(sample.image.name, f"cannot be read: {error}"))
                else:
                    tar.write({"__key__": sample.key, "jpg": jpeg, "cls": str(sample.label).encode()})
                    num_samples += 1
                tick(1)
        hashed.flush()
        return Shard(planned.name, hashed.num_bytes, hashed.sha.hexdigest(), num_samples)

    def _state_path(self, planned: PlannedShard) -> Path:
        return self.out / STATE_DIRECTORY / f"{planned.name}.json"

    def _finished(self, planned: PlannedShard) -> WrittenShard | None:
        """The shard as an earlier attempt left it. One with bad pictures is tried again: they may read this time."""
        try:
            state = json.loads(self._state_path(planned).read_text())
            shard = Shard(**state["shard"])
            path = self.out / planned.name
            is_ours = state["plan"] == planned.digest and not state["bad"] and path.stat().st_size == shard.bytes
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return WrittenShard(shard, is_kept=True) if is_ours and sha256_of_file(path) == shard.sha256 else None


class _HashedFile:
    """A file that is only written to, and hashed on the way. What was written last may wait until `flush`."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha, self.num_bytes = file, hashlib.sha256(), 0
        self._waiting = bytearray()

    def write(self, content: bytes) -> int:
        self._waiting += content
        if len(self._waiting) >= WRITE_BYTES:
            self.flush()
        return len(content)

    def flush(self) -> None:
        self.sha.update(self._waiting)
        self.num_bytes += len(self._waiting)
        self.file.write(self._waiting)
        self._waiting.clear()


def write_splits(
    plans: Sequence[SplitPlan],
    writer: ShardWriter,
    classes: tuple[str, ...],
    manifest: Manifest | None,
    *,
    num_workers: int,
    max_bad_fraction: float,
    report: Callable[[int], None],
) -> tuple[Manifest, list[WrittenShard]]:
    """Write every shard of `plans`, then `_info.json`, then `manifest.json` with the splits of `manifest` kept.

    Args:
        plans: The splits to write.
        writer: Writes one shard.
        classes: Names in index order.
        manifest: The manifest in `out`; None: there is none.
        num_workers: Number of processes that write.
        max_bad_fraction: Share of a split's pictures that may be left out.
        report: Called now and then with the number of samples done in all.

    Raises:
        DataError: `out` cannot be written or holds foreign tars, or more than `max_bad_fraction` of a split's
            pictures are bad. Finished shards stay, so that the same command goes on from there.
    """
    out = writer.out
    _begin(out, plans, manifest)
    allowance = _BadAllowance(plans, max_bad_fraction)
    planned = [shard for plan in plans for shard in plan.shards]
    results = run_tasks(writer, planned, num_workers=num_workers, report=report, accept=allowance.accept)
    splits = dict(manifest.splits) if manifest else {}
    by_name = {result.shard.name: result for result in results}
    for plan in plans:
        of_split = [by_name[shard.name] for shard in plan.shards]
        bad = [asdict(image) for result in of_split for image in result.bad]
        shards = tuple(result.shard for result in of_split if result.shard.num_samples)
        if not shards:
            raise DataError(f"No picture of the split {plan.name!r} can be decoded: there is nothing to write.")
        splits[plan.name] = Split(shards, {**plan.record, "num_bad": len(bad), "bad": bad})
    merged = Manifest(classes, splits, manifest.extra if manifest else {})
    try:
        for plan in plans:
            merged.splits[plan.name].extra[INDEX_KEY] = _write_index(out, merged, plan.name)
        write_json_atomic(out / TIMM_INFO_NAME, timm_info(merged))
        merged.save(out)
        shutil.rmtree(out / STATE_DIRECTORY)
    except OSError as error:
        raise cannot_write(out, error) from error
    return merged, results


def _write_index(out: Path, manifest: Manifest, split: str) -> IndexJson:
    """Where every sample lies, for readers who fetch the shards from elsewhere; described for the manifest."""
    path = out / index_name(split)
    write_atomic(path, scanned_table(out, shards_of(manifest, split)).save)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def timm_info(manifest: Manifest) -> dict[str, dict[str, object]]:
    """The `_info.json` by which timm's reader knows a split's tars and counts."""
    return {
        "splits": {
            name: {
                "name": name,
                "num_samples": split.num_samples,
                "filenames": [shard.name for shard in split.shards],
                "shard_lengths": [shard.num_samples for shard in split.shards],
            }
            for name, split in sorted(manifest.splits.items())
        }
    }


def cannot_write(out: Path, error: OSError) -> DataError:
    """The sentence for a full, read-only or missing disk."""
    return DataError(
        f"out={out} cannot be written: {error.strerror or error}. Free space there, or choose another out=; "
        "finished shards are kept and the same command goes on."
    )


def _begin(out: Path, plans: Sequence[SplitPlan], manifest: Manifest | None) -> None:
    """Make room: leftovers of our own are removed, foreign tars are not touched."""
    try:
        state = out / STATE_DIRECTORY
        planned = {shard.name for plan in plans for shard in plan.shards}
        known = {shard.name for split in manifest.splits.values() for shard in split.shards} if manifest else set()
        # Killed between a shard and its record, an attempt leaves only a name that its plan has.
        known |= planned if state.is_dir() else set()
        known |= {path.name.removesuffix(".json") for path in state.glob("*.tar.json")}
        tars = [path for plan in plans for path in sorted(out.glob(f"{plan.name}-*.tar"))]
        if foreign := [path.name for path in tars if path.name not in known]:
            raise DataError(f"out={out} holds {foreign[0]}, which is not of this run. Choose an empty out=.")
        state.mkdir(exist_ok=True)
        _retract(out, {plan.name for plan in plans}, manifest)
        for path in tars:
            if path.name not in planned:
                path.unlink()
        # Nobody else writes here (`request.exclusive`), so whatever is half-made is left over.
        for pattern in (f"*.tar{TEMPORARY_MARK}*", f"*.json{TEMPORARY_MARK}*", f"*.npz{TEMPORARY_MARK}*"):
            for path in (*out.glob(pattern), *state.glob(pattern)):
                path.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from error


def _retract(out: Path, names: set[str], manifest: Manifest | None) -> None:
    """Take splits that are written again out of the manifest: it may only list what is complete."""
    if manifest is None or not names & set(manifest.splits):
        return
    rest = {name: split for name, split in manifest.splits.items() if name not in names}
    if rest:
        Manifest(manifest.classes, rest, manifest.extra).save(out)
    else:
        (out / MANIFEST_NAME).unlink()


class _BadAllowance:
    """Stops the work as soon as a split has more bad pictures than allowed."""

    def __init__(self, plans: Sequence[SplitPlan], max_bad_fraction: float) -> None:
        self.max_bad_fraction = max_bad_fraction
        self.split_of_shard = {shard.name: plan for plan in plans for shard in plan.shards}
        self.bad: dict[str, list[BadImage]] = {plan.name: [] for plan in plans}

    def accept(self, result: WrittenShard) -> None:
        plan = self.split_of_shard[result.shard.name]
        bad = self.bad[plan.name]
        bad.extend(result.bad)
        if len(bad) > allowed_bad(self.max_bad_fraction, plan.num_samples):
            shown = "; ".join(f"{image.name}: {image.reason}" for image in bad[:NUM_BAD_SHOWN])
            raise DataError(
                f"At least {len(bad)} of the {plan.num_samples} pictures of the split {plan.name!r} are bad, more than "
                f"max_bad_fraction={self.max_bad_fraction:g} allows ({shown}). Mend them, or allow them to be left out "
                f"with max_bad_fraction={_enough(len(bad), plan.num_samples)}."
            )


def _enough(num_bad: int, num_samples: int) -> str:
    """A fraction in two digits, surely not below num_bad / num_samples."""
    return f"{min(1.0, 1.1 * num_bad / num_samples):.2g}"
