"""The same training in one go, and killed and run again."""

import json
from dataclasses import dataclass
from pathlib import Path

from tests.commands import train_recorded

PAIR_OPTIONS = (
    "batch.max_per_rank=3",
    "recipe.ema_decay=0.9",
    "prune=third",
    "recipe.prune.begin_step=2",
    "recipe.prune.end_step=9",
    "recipe.prune.every_steps=2",
    "model.num_classes=1000",
    "tracking=offline",
    "tracking.artifacts=[ledger,config,report,best]",
    "comm.bucket_megabytes=null",  # DDP's own buckets, of which the bytes are published
)


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


def take_unbroken(root: Path, other: Path) -> None:
    """Let the run of `root` that nothing happened to be that of `other`."""
    for name in ("unbroken", "unbroken.fed"):
        (root / name).symlink_to(other / name)


def make_pair(
    root: Path, shards: Path, devices: int, kill_at: str, *options: str, unbroken: Path | None = None
) -> Pair:
    """Train; train again under another name, be killed, and run the same command once more.

    Args:
        root: Where the runs lie.
        shards: What is trained on.
        devices: Number of ranks.
        kill_at: Who is killed, and when (commands.train_recorded).
        options: More of the command.
        unbroken: Where the same was trained in one go already.
    """
    if unbroken is None:
        train_recorded(root, shards, "unbroken", devices, *options)
    else:
        take_unbroken(root, unbroken)
    train_recorded(root, shards, "resumed", devices, *options, kill_at=kill_at)
    assert (root / "resumed" / "metrics.jsonl").read_text().count("\n") < 11
    saved = json.loads((root / "resumed" / "checkpoints" / "last.json").read_text())["step"]
    told = json.loads((root / "resumed" / "ledger.json").read_text())["num_steps"]
    assert told >= saved, "a checkpoint must never know of a step that the ledger lacks"
    ended = train_recorded(root, shards, "resumed", devices, *options)
    assert "resumed from" in ended.output
    return Pair(root, devices)
