"""What slurm/*.sh make of an allocation: ranks, CPUs, interpreter. The real Slurm runs them; Python is a recorder."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import SlurmCluster

pytestmark = pytest.mark.cluster

REPOSITORY = Path(__file__).resolve().parents[2]
RECORDER = """#!/bin/sh
echo "RAN procid=${SLURM_PROCID-none} node=${SLURM_NODEID-none} of=${SLURM_NTASKS-none} \
threads=${OMP_NUM_THREADS-none} interface=${GLOO_SOCKET_IFNAME-none} argv=$*"
[ "${SLURM_PROCID-none}" = "${RECORDER_SLOW_RANK-}" ] && sleep "$RECORDER_SLOW_SECONDS"
exit ${RECORDER_EXIT:-0}
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose environment holds the recorder. Its path has a space, as people's do."""
    root = tmp_path / "my checkout"
    shutil.copytree(REPOSITORY / "slurm", root / "slurm")
    (root / ".venv/bin").mkdir(parents=True)
    python = root / ".venv/bin/python"
    python.write_text(RECORDER)
    python.chmod(0o755)
    return root


def ran(
    slurm: "SlurmCluster", checkout: Path, *arguments: str, env: dict[str, str] | None = None
) -> tuple[str, list[str], str]:
    """(exit code as scontrol writes it, sorted lines of the recorder, whole output) of one job."""
    job = slurm.wait(slurm.submit(*arguments, cwd=checkout, env=env), timeout_seconds=60)
    output = next(checkout.glob(f"squeezewire-*-{job['JobId']}.out")).read_text()
    return job["ExitCode"], sorted(line for line in output.splitlines() if line.startswith("RAN ")), output


def test_train_on_a_cpu_partition(slurm: "SlurmCluster", checkout: Path) -> None:
    env = {"GLOO_SOCKET_IFNAME": "eth0"}
    code, lines, output = ran(slurm, checkout, "slurm/train.sh", "name=first", "models=[a, b]", env=env)
    assert code == "0:0", output
    assert lines == [
        f"RAN procid={rank} node={rank} of=2 threads=8 interface=eth0 argv=-m pipeline.train name=first models=[a, b]"
        for rank in (0, 1)
    ]
    assert "2 ranks on 2 nodes (node[1-2]), 8 CPUs each, 0 GPUs per node" in output


def test_train_with_two_ranks_per_node(slurm: "SlurmCluster", checkout: Path) -> None:
    options = ("--ntasks-per-node=2", "--cpus-per-task=3")
    code, lines, output = ran(slurm, checkout, *options, "slurm/train.sh", "name=first")
    assert code == "0:0", output
    assert [line.partition(" threads=")[0] for line in lines] == [
        f"RAN procid={rank} node={node} of=4" for rank, node in ((0, 0), (1, 0), (2, 1), (3, 1))
    ]
    assert all(" threads=3 " in line for line in lines)


def test_train_gives_every_gpu_a_rank(slurm: "SlurmCluster", checkout: Path) -> None:
    code, lines, output = ran(slurm, checkout, "--gpus-per-node=2", "slurm/train.sh", "name=first")
    assert code == "0:0", output
    assert [line.partition(" threads=")[0] for line in lines] == [
        f"RAN procid={rank} node={node} of=4" for rank, node in ((0, 0), (1, 0), (2, 1), (3, 1))
    ]
    assert all(" threads=4 " in line for line in lines)
    assert "2 GPUs per node" in output


def test_train_refuses_idle_gpus(slurm: "SlurmCluster", checkout: Path) -> None:
    options = ("--gpus-per-node=2", "--ntasks-per-node=1")
    code, lines, output = ran(slurm, checkout, *options, "slurm/train.sh", "name=first")
    assert (code, lines) == ("2:0", [])
    assert "error: 1 ranks for 2 GPUs on each node" in output


def test_exit_code_of_the_ranks_is_the_jobs(slurm: "SlurmCluster", checkout: Path) -> None:
    """Also of ranks that do not leave at the same instant: none is killed while it still saves."""
    env = {"RECORDER_EXIT": "3", "RECORDER_SLOW_RANK": "1", "RECORDER_SLOW_SECONDS": "2"}
    code, lines, output = ran(slurm, checkout, "slurm/train.sh", "name=first", env=env)
    assert (code, len(lines)) == ("3:0", 2), output


def test_rank_that_hangs_after_another_failed_is_ended(slurm: "SlurmCluster", checkout: Path) -> None:
    env = {"RECORDER_EXIT": "3", "RECORDER_SLOW_RANK": "0", "RECORDER_SLOW_SECONDS": "600", "SLURM_WAIT": "2"}
    code, lines, output = ran(slurm, checkout, "slurm/train.sh", "name=first", env=env)
    assert (code != "0:0", len(lines)) == (True, 2), output


def test_compare_and_prepare_are_no_ranks_of_the_job(slurm: "SlurmCluster", checkout: Path) -> None:
    code, lines, output = ran(slurm, checkout, "slurm/compare.sh", "models=[a]")
    assert code == "0:0", output
    unranked = "RAN procid=none node=none of=none threads=none interface=none argv=-m"
    assert lines == [f"{unranked} pipeline.compare cluster.devices=2 models=[a]"]
    code, lines, output = ran(slurm, checkout, "slurm/prepare.sh", "source=builtin", "out=shards/x")
    assert code == "0:0", output
    assert lines == [f"{unranked} pipeline.prepare source=builtin out=shards/x"]


def test_compare_over_nodes_is_started_once_and_told_of_its_allocation(slurm: "SlurmCluster", checkout: Path) -> None:
    """It starts the ranks itself, with srun: test_slurm_compare.py."""
    options = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=3")
    code, lines, output = ran(slurm, checkout, *options, "slurm/compare.sh", "models=[a]")
    assert code == "0:0", output
    assert lines == ["RAN procid=0 node=0 of=4 threads=3 interface=none argv=-m pipeline.compare models=[a]"]
    assert "4 ranks on 2 nodes (node[1-2]), 3 CPUs each" in output


@pytest.mark.parametrize("script", ["train", "compare", "prepare"])
def test_missing_environment_and_wrong_directory_are_explained(
    slurm: "SlurmCluster", checkout: Path, script: str
) -> None:
    shutil.rmtree(checkout / ".venv")
    code, lines, output = ran(slurm, checkout, f"slurm/{script}.sh", "name=first")
    assert (code, lines) == ("2:0", [])
    assert "run 'make venv' there" in output
    elsewhere = checkout / "slurm"
    code, lines, output = ran(slurm, elsewhere, f"{script}.sh", "name=first")
    assert (code, lines) == ("2:0", [])
    assert f"error: {elsewhere} is not the checkout" in output
