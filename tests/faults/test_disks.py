"""Disks that fill up or vanish under a training, and places that a training does not expect."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.run.checkpoint import find_latest
from pipeline.run.record.metrics_log import read_rows
from tests.commands import SMALL, TRAIN_RECORDED, fired, rows, run, sentences, train, train_recorded
from tests.comparing import differences, load
from tests.making.pairs import PAIR_OPTIONS, Pair

REPOSITORY = Path(__file__).resolve().parents[2]
SHORT = ("trainer.max_steps=4", "trainer.validate_every_steps=0", "trainer.checkpoint_every_steps=2")
# In a mount namespace of its own: what the first argument does to the mounts, then the rest as a command.
IN_NAMESPACE = ("unshare", "--mount", "sh", "-c", 'set -e; eval "$0"; exec "$@"')


class Attack:
    """Runs a shell command when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch '{self.marker}'",))


def require_mounting() -> None:
    """Skip where mounting is not allowed."""
    done = subprocess.run([*IN_NAMESPACE[:-1], "mount -t tmpfs tmpfs /mnt"], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")


@contextlib.contextmanager
def small_disk(place: Path, num_bytes: int) -> Iterator[Path]:
    """A tmpfs of that size."""
    require_mounting()
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def assert_every_rank_said(output: str, words: str) -> None:
    """Rank 0, which met it, and rank 1, with the same words."""
    said = sorted(sentence for sentence in sentences(output) if words in sentence)
    assert len(said) == 2 and said[0].startswith("[rank 1]") and said[0].endswith("(seen by rank 0)"), output


def test_a_disk_that_fills_up_ends_all_ranks_and_costs_nothing_that_was_saved(
    two_ranks: Pair, shards: Path, tmp_path: Path
) -> None:
    """Room for one checkpoint, not for two; then room is made, and the run ends as the unbroken one did."""
    num_bytes = (two_ranks.unbroken / "checkpoints" / "step=000000011.ckpt").stat().st_size
    options = (*PAIR_OPTIONS, "tracking=disabled")
    with small_disk(tmp_path / "disk", 17 * num_bytes // 10) as root:
        ended = train(root, shards, "full", 2, *options, expect=4)
        assert_every_rank_said(ended.output, "Cannot save")
        assert "No space left on device" in ended.output and "make room" in ended.output
        assert not list((root / "full").rglob("*.tmp.*"))
        found = find_latest(root / "full" / "checkpoints", pytest.fail)
        assert found is not None and found.step < 11
        content = found.path.read_bytes()
        subprocess.run(["mount", "-o", "remount,size=200m", root], check=True)
        ended = train(root, shards, "full", 2, *options, "trainer.keep_checkpoints=99")
        assert f"resumed from {found.path.name}" in ended.output and found.path.read_bytes() == content
        unbroken, other = load(two_ranks.unbroken), load(root / "full")
        for part in ("state_dict", "optimizer_states", "global_step", "epoch"):
            assert not differences(unbroken[part], other[part], part)
        assert rows(two_ranks.unbroken) == rows(root / "full")


def test_a_full_tmp_a_read_only_checkout_and_a_strange_place_hurt_nobody(shards: Path, tmp_path: Path) -> None:
    """The system's place for temporary files is full, the code cannot be written, names hold spaces and accents, the
    clock's zone and the locale are unusual, the clock goes back an hour (as this process sees it), and where Lightning
    would look for a checkpoint lies one that runs a command."""
    require_mounting()
    kept = " ".join(f"'{path}'" for path in {REPOSITORY, Path(sys.prefix), tmp_path, shards.parent})
    mounts = f"""
        mount -t tmpfs tmpfs /mnt
        for place in {kept}; do mkdir -p "/mnt$place"; mount --rbind "$place" "/mnt$place"; done
        mount -t tmpfs -o size=1m tmpfs /tmp
        for place in {kept}; do mkdir -p "$place"; mount --rbind "/mnt$place" "$place"; done
        mount -o remount,bind,ro '{REPOSITORY}'
        head -c 2m /dev/zero > /tmp/full || true
        if touch '{REPOSITORY}/pipeline/new' || echo 1 > /tmp/more; then exit 99; fi
    """
    root, fed_to, marker = tmp_path / "läufe mit  spaces", tmp_path / "fed", tmp_path / "marker"
    root.mkdir()
    fed_to.mkdir()
    torch.save({"callbacks": Attack(marker)}, root / "hpc_ckpt_9.ckpt")
    where = [f"run_root={root}", f"data.root={shards}", "name=strange", "tracking=offline"]
    environment = {"TZ": "Pacific/Kiritimati", "LC_ALL": "tr_TR.UTF-8", "PYTHONDONTWRITEBYTECODE": ""}
    environment |= {"FED_TO": str(fed_to), "KILL_AT": "0 2 0 clock"}
    environment |= {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train"}  # where Lightning looks for hpc_ckpt_*.ckpt
    arguments = [str(TRAIN_RECORDED), *where, *SMALL, *SHORT]
    ended = run(arguments, prefix=[*IN_NAMESPACE, mounts], environment=environment)
    assert [what for _, what in fired(fed_to)] == ["0 2 0 clock"]
    assert "hpc" not in ended.output and not marker.exists()
    found = find_latest(root / "strange" / "checkpoints", pytest.fail)
    assert found is not None and found.step == 4
    assert (root / "strange" / "report.html").exists()
    assert all(row["perf/step_seconds"] > 0 for row in read_rows(root / "strange" / "metrics.jsonl"))


@pytest.mark.slow
def test_a_run_directory_that_vanishes_ends_all_ranks(shards: Path, tmp_path: Path) -> None:
    """It is moved away at the sixth step, and back before the same command is given again."""
    there, away = tmp_path / "vanishing", tmp_path / "away"
    move = {"DO": f"mv '{there}' '{away}'"}
    ended = train_recorded(tmp_path, shards, there.name, 2, kill_at="0 5 0 shell", environment=move, expect=4)
    assert_every_rank_said(ended.output, "Cannot write")
    assert not there.exists() or not list(there.rglob("*.ckpt")), "nothing pretends to be the run"
    if there.exists():
        there.rename(tmp_path / "left")
    away.rename(there)
    train_recorded(tmp_path, shards, there.name, 2)
    assert [row["trainer/step"] for row in rows(there)] == list(range(1, 12))


@pytest.mark.parametrize(("most", "size"), [pytest.param("4k", 32, marks=pytest.mark.slow), ("1m", 224)])
def test_without_shared_memory_a_run_with_workers_ends_with_the_cause(
    most: str, size: int, shards: Path, tmp_path: Path
) -> None:
    """Room for nothing; or for what processes need to speak, and not for a batch."""
    require_mounting()
    where = [f"run_root={tmp_path}", f"data.root={shards}", "name=shm", "cluster.devices=2", "tracking=disabled"]
    arguments = ["-m", "pipeline.train", *where, *SMALL, "data.num_workers=1", f"data.size={size}"]
    mounts = f"mount -t tmpfs -o size={most} tmpfs /dev/shm"
    ended = run(arguments, prefix=[*IN_NAMESPACE, mounts], expect=2, environment=dict(os.environ))
    told = [line for line in ended.output.splitlines() if "error: " in line and "lost its connection" not in line]
    assert told and all("No shared memory for" in line and "make /dev/shm larger" in line for line in told), (
        ended.output
    )
