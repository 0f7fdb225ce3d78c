"""The cluster the other tests stand on: two nodes that can be told apart, and nothing left when it is gone."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from conftest import SlurmCluster

pytestmark = pytest.mark.cluster

TRIVIAL = """#!/bin/sh
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.out
srun sh -c 'echo rank=$SLURM_PROCID node=$SLURM_NODEID host=$(hostname) address=$(hostname -I)'
"""


def test_job_runs_on_two_hosts(slurm: "SlurmCluster", tmp_path: Path) -> None:
    (tmp_path / "trivial.sh").write_text(TRIVIAL)
    answer = slurm.run("sbatch", "--wait", "--parsable", "trivial.sh", cwd=tmp_path)
    job_id = int(answer.stdout)
    assert answer.returncode == 0, answer.stderr
    assert slurm.job(job_id)["JobState"] == "COMPLETED"
    lines = sorted((tmp_path / f"trivial.sh-{job_id}.out").read_text().split("\n"))
    assert [line.strip() for line in lines if line] == [
        "rank=0 node=0 host=node1 address=10.77.0.11",
        "rank=1 node=1 host=node2 address=10.77.0.12",
    ]
