"""What `prepare verify=true` does: read shards that are there, and say everything that is wrong with them."""

import os
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.errors import DataError
from pipeline.core.progress import progress_bar
from pipeline.data.prepare.pool import run_tasks
from pipeline.data.prepare.verifier import ExpectedFile, Found, ShardVerifier, expected_shards

if TYPE_CHECKING:
    from pipeline.config.prepare import PrepareConfig


def verify_shards(config: "PrepareConfig") -> None:
    """Check the shards in `config.out`; each thing that is wrong is a line on stdout.

    Raises:
        DataError: something is wrong, or there is nothing to check.
    """
    started = time.monotonic()
    root = Path(config.out)
    shards, notes = expected_shards(root, config.split)
    for note in notes:
        print(note)
    with progress_bar("checked", _num_bytes(root, shards), unit="bytes") as bar:
        found = run_tasks(
            ShardVerifier(root),
            shards,
            num_workers=config.num_workers or len(os.sched_getaffinity(0)),
            report=bar.update,
            accept=_tell,
        )
    _summarise(found, time.monotonic() - started)
    found += _without_samples(found)
    if wrong := [shard for shard in found if shard.problems]:
        raise DataError(
            f"Not sound: {len(wrong)} of {len(shards)} files of {root}, with"
            f" {sum(len(shard.problems) for shard in wrong)} faults, each named above. Copy these again from"
            " their source, or remove them and prepare them again."
        )


def _num_bytes(root: Path, shards: list[ExpectedFile]) -> int:
    paths = [root / shard.name for shard in shards]
    return sum(path.stat().st_size for path in paths if path.is_file())


def _tell(found: Found) -> None:
    """At once, because checking may take hours."""
    for problem in found.problems:
        print(f"wrong: {found.expected.name}: {problem}", flush=True)


def _without_samples(found: list[Found]) -> list[Found]:
    """A problem, said at once, for each split that seems sound and holds nothing: training refuses it."""
    empty = []
    for split in sorted({shard.expected.split for shard in found}):
        shards = [shard for shard in found if shard.expected.split == split]
        if not any(shard.num_pictures or shard.problems for shard in shards):
            problem = f"the split {split!r} holds no sample with a picture and a label"
            empty.append(replace(shards[0], problems=(problem,)))
            _tell(empty[-1])
    return empty


def _summarise(found: list[Found], seconds: float) -> None:
    """Counts by split, and the rate."""
    for split in sorted({shard.expected.split for shard in found}):
        shards = [shard for shard in found if shard.expected.split == split and not shard.expected.is_index]
        num_pictures, num_bytes = (sum(getattr(s, name) for s in shards) for name in ("num_pictures", "num_bytes"))
        num_wrong = sum(bool(shard.problems) for shard in shards)
        labels = [label for shard in shards if shard.labels for label in shard.labels]
        verdict = f"{num_wrong} not sound" if num_wrong else "all sound"
        print(
            f"{split}: {num_pictures:,} sound pictures, {num_bytes / 1e6:,.1f} MB, {len(shards)} shards, {verdict}"
            + (f"; labels {min(labels)} to {max(labels)}" if labels else "")
        )
        ignored = sum((Counter(shard.ignored) for shard in shards), Counter[str]())
        if ignored:
            print(f"{split}: members that are not read: {', '.join(f'{n:,} {name}' for name, n in ignored.items())}")
    total = sum(shard.num_pictures for shard in found)
    print(f"{total:,} pictures decoded in {seconds:.1f} s, {total / seconds:,.0f} pictures/s")
