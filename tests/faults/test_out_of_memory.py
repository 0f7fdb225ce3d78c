"""Memory that runs out: of a rank, and of a process that loads data for it."""

from pathlib import Path

import pytest

from tests.commands import train_recorded

OPTIONS = ("trainer.validate_every_steps=0", "trainer.checkpoint_every_steps=2", "cluster.step_timeout_seconds=60")


def test_a_data_loader_worker_that_is_killed_ends_all_ranks_with_the_cause(shards: Path, tmp_path: Path) -> None:
    """As the kernel's out-of-memory killer does it."""
    options = (*OPTIONS, "data.num_workers=1", "trainer.max_steps=60")
    ended = train_recorded(tmp_path, shards, "lost", 2, *options, kill_at="1 3 0 worker", expect=1)
    told = [line for line in ended.output.splitlines() if "DataLoader worker" in line]
    (sentence,) = [line for line in told if line.startswith("[rank 1] error:")]
    assert "data.num_workers" in sentence
    assert all("ended by itself with exit code 1: " in line for line in told if line != sentence), ended.output
    assert "signal: Killed" in sentence or "exited unexpectedly" in sentence  # as torch happens to notice
    assert "Traceback" not in ended.output


@pytest.mark.slow
def test_a_rank_without_memory_ends_all_with_the_cause(shards: Path, tmp_path: Path) -> None:
    """RLIMIT_AS, set to what the rank has, from its fourth step on; its batch is then larger than any before."""
    ended = train_recorded(tmp_path, shards, "full", 2, *OPTIONS, "data.size=224", kill_at="1 3 0 memory", expect=1)
    cause = ("can't allocate memory", "Cannot allocate memory", "MemoryError", "bad_alloc")
    assert any(words in ended.output for words in cause), ended.output
