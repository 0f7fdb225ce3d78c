"""The preflight: what is fine is said, what is not gives the code a training would end with, and nothing is left."""

import socket
from pathlib import Path

import pytest

from tests.commands import SMALL, Ended, run


def ready(root: Path, shards: Path, devices: int, *more: str, expect: int = 0) -> Ended:
    where = [f"run_root={root}/runs", f"data.root={shards}", "name=a", f"cluster.devices={devices}"]
    return run(["-m", "pipeline.ready", *where, *SMALL, *more], expect=expect)


def test_all_is_well(shards: Path, tmp_path: Path) -> None:
    output = ready(tmp_path, shards, 2, "data.verify=sha256").output
    for line in (
        "ok     batch          12 = 2 ranks x 1 micro-batches x 6",
        "ok     W&B            offline",
        "ok     link           none between servers: all ranks are on one machine",
        "60 to train, 25 to validate, 4 classes, the same on every server (read and hashed",
        "can be written; new",
        "Ready.",
    ):
        assert line in output, output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("devices", "override", "code", "words"),
    [
        (1, "data.root=/no/such/place", 3, "data.root=/no/such/place is not a directory"),
        (2, "batch.global_size=13", 2, "batch.global_size=13 is not divisible by 2 ranks"),
        (1, "run_root=/proc/nowhere", 2, "Cannot write the run directory /proc/nowhere/a"),
    ],
)
def test_what_is_wrong_is_said_and_the_rest_is_checked(
    devices: int, override: str, code: int, words: str, shards: Path, tmp_path: Path
) -> None:
    output = ready(tmp_path, shards, devices, override, expect=code).output
    assert "WRONG" in output and words in output, output
    assert "checks failed." in output and "ok     ranks" in output


def test_a_run_that_is_there_is_left_as_it_is(shards: Path, tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "a"
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("")
    assert "can be written; new" in ready(tmp_path, shards, 1).output
    assert {path.name for path in directory.iterdir()} <= {"checkpoints", "metrics.jsonl", "lock"}


def test_ranks_that_do_not_find_one_another_do_not_hide_the_rest(shards: Path, tmp_path: Path) -> None:
    """Rank 0 of two, whose peer never comes."""
    lone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    where = [f"run_root={tmp_path}/runs", f"data.root={shards}", "name=a", "cluster.timeout_seconds=3", *SMALL]
    with socket.create_server(("127.0.0.1", 0)) as free:
        environment = {**lone, "MASTER_PORT": str(free.getsockname()[1])}
    output = run(["-m", "pipeline.ready", *where], expect=2, environment=environment).output
    assert "ok     configuration" in output and "ok     run directory" in output
    assert "did not find the others" in output and "rank 1 did not come" in output
    assert "1 of 4 checks failed." in output and "Traceback" not in output
