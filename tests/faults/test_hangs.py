"""A rank that stops without ending: the others say so, and end in time."""

import time
from pathlib import Path

import pytest

from tests.commands import fired, train_recorded

STEP_TIMEOUT_SECONDS = 6
# The launcher gives the survivors 2 s, then the stopped rank 15 s from SIGTERM to SIGKILL; a busy machine more.
END_SECONDS = STEP_TIMEOUT_SECONDS + 17 + 40
OPTIONS = (f"cluster.step_timeout_seconds={STEP_TIMEOUT_SECONDS}", "trainer.validate_every_steps=0")


def hang(root: Path, shards: Path, devices: int, where: str, step: int) -> str:
    """A training whose last rank stops for good; returns what it printed until it had ended."""
    kill_at = f"{devices - 1} {step - 1} {where} hang"
    output = train_recorded(root, shards, "hung", devices, *OPTIONS, kill_at=kill_at, expect=1).output
    fed = root / "hung.fed"
    ((stopped, _),) = fired(fed)
    assert time.time() - stopped < END_SECONDS
    lines = [len((fed / f"rank{rank}.jsonl").read_text().splitlines()) for rank in range(devices)]
    assert lines == [step] * devices, "the rank did not stop there, or the others went on"
    return output


@pytest.mark.parametrize(
    ("devices", "where"),
    [
        (2, "backward"),
        pytest.param(3, "backward", marks=pytest.mark.slow),
        pytest.param(3, "0", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_rank_ends_the_others_at_the_timeout_of_a_step(
    devices: int, where: str, shards: Path, tmp_path: Path
) -> None:
    output = hang(tmp_path, shards, devices, where, step=5)
    for rank in range(devices - 1):
        assert f"rank {rank} got nowhere for 4.8 s in step 5; its threads stand at:" in output
        assert f"Rank {rank} lost its connection to another rank in step 5 and stops" in output
    # Of three, one may hear of the other's leaving before its own patience ends.
    assert "stops (silent for longer than cluster.step_timeout_seconds" in output
    assert output.count("Current thread 0x") == devices - 1  # the watch's own, then all others
    assert output.count("\nThread 0x") >= devices - 1
    assert "in training_step" in output or "in backward" in output  # Python's names of where they stand
    assert f"rank {devices - 1} did not end in time and is killed" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_rank_that_hangs_in_python_speaks_before_its_peers_give_up(shards: Path, tmp_path: Path) -> None:
    """It can still say where it stands, unlike a stopped process."""
    kill_at = "1 4 0 sleep"
    output = train_recorded(tmp_path, shards, "hung", 2, *OPTIONS, kill_at=kill_at, expect=1).output
    (_, its) = output.split("rank 1 got nowhere for 4.8 s in step 5; its threads stand at:", 1)
    assert "in strike" in its
