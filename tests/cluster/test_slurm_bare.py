"""Ranks of a bare `srun`, without slurm/train.sh: what they end with where one of them ends."""

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.cluster.test_slurm_survives import JOB_SECONDS, KEYS, REPOSITORY, Checkout, kill_ranks
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.cluster.conftest import SlurmCluster

pytestmark = pytest.mark.cluster

BARE = """#!/bin/sh
srun --kill-on-bad-exit=0 sh -c '"$@"; code=$?; echo $code > "$FED_TO/code$SLURM_PROCID"; exit $code' sh \\
    sh -c 'exec "$0" -m pipeline.train "$@" "data.root=shards/$SLURM_PROCID"' {python} "$@"
"""


@pytest.mark.parametrize(
    ("happens", "codes", "told"),
    [
        ("killed", ["75", "137"], "ended without a word (was it killed?)"),
        ("fails", ["3", "3"], "ended by itself with exit code 3: "),
    ],
)
def test_ranks_of_a_bare_srun_of_which_one_ends(
    happens: str, codes: list[str], told: str, slurm: "SlurmCluster", tmp_path: Path
) -> None:
    """Nobody collects why they end: each finds out by itself. One is killed, or its shards are cut short."""
    checkout = Checkout(tmp_path / "checkout")
    for rank in ("0", "1"):
        shutil.copytree(checkout.root / "shards/builtin", checkout.root / "shards" / rank, dirs_exist_ok=True)
    name, fed = f"bare-{happens}", checkout.root / "fed"
    fed.mkdir(exist_ok=True)
    hold = fed / f"{name}.hold"
    hold.write_text("4")
    (checkout.root / "bare.sh").write_text(BARE.format(python=checkout.root / "python"))
    keys = [key for key in KEYS if not key.startswith("data.root=")]
    env = {"PYTHONPATH": f"{checkout.root}:{REPOSITORY}", "FED_TO": str(fed), "PACE_SECONDS": "0"}
    options = ("--nodes=2", "--cpus-per-task=2", "--output=bare.out")
    job_id = slurm.submit(*options, "bare.sh", f"name={name}", *keys, cwd=checkout.root, env=env)
    wait_until(lambda: checkout.num_rows(name) >= 3, "no step 4", seconds=JOB_SECONDS)
    time.sleep(0.5)
    if happens == "killed":
        kill_ranks(slurm, "node2")(job_id)
    else:
        for shard in (checkout.root / "shards/1").glob("*.tar"):
            shard.write_bytes(b"")
    hold.unlink()
    job = slurm.wait(job_id, JOB_SECONDS)
    log = (checkout.root / "bare.out").read_text()
    assert [(fed / f"code{rank}").read_text().strip() for rank in (0, 1)] == codes, log
    assert job["ExitCode"] == f"{max(map(int, codes))}:0", log
    assert "error: Rank 0 lost its connection to another rank" in log and "rank 1 on node2 at " in log, log
    assert told in log and "Traceback" not in log, log
