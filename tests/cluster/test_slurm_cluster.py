"""The cluster the other tests stand on: two nodes that can be told apart, and nothing left when it is gone."""

import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from tests.cluster.conftest import SlurmCluster

pytestmark = pytest.mark.cluster

TRIVIAL = """#!/bin/sh
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.out
srun sh -c 'echo rank=$SLURM_PROCID node=$SLURM_NODEID host=$(hostname) address=$(hostname -I)'
"""
SLEEPING = """#!/bin/sh
#SBATCH --nodes=2
srun sleep 600
"""


def machine_state() -> tuple[set[str], str, str]:
    """What a cluster must not change outside its scope: interfaces, name resolution, namespaces."""
    interfaces = set(psutil.net_if_addrs())
    namespaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return interfaces, Path("/etc/hosts").read_text(), namespaces


def processes_naming(text: str) -> list[str]:
    """Command lines and environments of living processes that hold `text`."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *process.environ().values()]
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
        if process.pid != os.getpid() and any(text in word for word in words):
            found.append(" ".join(words[:5]))
    return found


def test_job_runs_on_two_hosts(slurm: "SlurmCluster", tmp_path: Path) -> None:
    (tmp_path / "trivial.sh").write_text(TRIVIAL)
    job = slurm.wait(slurm.submit("trivial.sh", cwd=tmp_path), timeout_seconds=60)
    assert (job["JobState"], job["NodeList"]) == ("COMPLETED", "node[1-2]")
    assert sorted(line.strip() for line in Path(job["StdOut"]).read_text().splitlines()) == [
        "rank=0 node=0 host=node1 address=10.77.0.11",
        "rank=1 node=1 host=node2 address=10.77.0.12",
    ]


def test_second_cluster_leaves_nothing_behind(slurm: "SlurmCluster", tmp_path: Path) -> None:
    """Ended while a job runs; the first one, beside it, is not disturbed."""
    before = machine_state()
    (tmp_path / "sleeping.sh").write_text(SLEEPING)
    second = type(slurm).make(num_nodes=2)
    try:
        second.start()
        job_id = second.submit("sleeping.sh", cwd=tmp_path)
        deadline = time.monotonic() + 30
        while second.job(job_id)["JobState"] != "RUNNING" and time.monotonic() < deadline:
            time.sleep(0.1)
        assert second.job(job_id)["JobState"] == "RUNNING"
        assert processes_naming(str(second.directory))
    finally:
        second.stop()
    assert machine_state() == before
    assert processes_naming(str(second.directory)) == []
    assert not second.directory.exists()
    assert slurm.states() == ["idle", "idle"]


def test_failed_start_leaves_nothing_behind(slurm: "SlurmCluster") -> None:
    broken = type(slurm).make(num_nodes=2)
    before = machine_state()
    try:
        with pytest.raises(RuntimeError, match="slurmctld"):
            broken.start(extra_configuration="NoSuchKey=1")
    finally:
        broken.stop()
    assert machine_state() == before
    assert processes_naming(str(broken.directory)) == []
