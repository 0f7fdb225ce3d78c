"""`sbatch --nodes=2 slurm/compare.sh`: two small models, each measured between two nodes, and the report."""

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.cluster.conftest import SlurmCluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[2]
JOB_SECONDS = 400  # a deadline, not an expectation
PREPARE_KEYS = ("source=builtin", "out=shards/builtin", "num_images=60", "num_classes=2", "short_side=32")
KEYS = (
    "name=small",
    "models=[squeezenet1_1,squeezenet_small]",
    "data.root=shards/builtin",
    "data.size=32",
    "data.num_workers=0",
    "batch.global_size=4",
    "num_classes=2",
    "steps=3",
    "precision=fp32",
    "cluster.accelerator=cpu",
    "cluster.num_threads=1",
    "cluster.timeout_seconds=60",
)


def submit(slurm: "SlurmCluster", checkout: Path, *arguments: str) -> tuple[str, str]:
    """(exit code as scontrol writes it, what was printed) of the ended job."""
    env = {"SQUEEZEWIRE_PYTHON": sys.executable}
    job = slurm.wait(slurm.submit("--cpus-per-task=1", *arguments, cwd=checkout, env=env), JOB_SECONDS)
    (log,) = checkout.glob(f"squeezewire-*-{job['JobId']}.out")
    return job["ExitCode"], log.read_text()


def test_models_are_compared_between_real_nodes(slurm: "SlurmCluster", tmp_path: Path) -> None:
    for room in ("pipeline", "conf", "slurm"):
        shutil.copytree(REPOSITORY / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    code, output = submit(slurm, tmp_path, "slurm/prepare.sh", *PREPARE_KEYS)
    assert code == "0:0", output

    code, output = submit(slurm, tmp_path, "--nodes=2", "slurm/compare.sh", *KEYS)
    logs = "\n".join(log.read_text() for log in (tmp_path / "runs").rglob("*.log"))
    assert code == "0:0", output + logs
    directory = tmp_path / "runs/small"
    assert (directory / "report.html").stat().st_size
    result = json.loads((directory / "comparison.json").read_text())
    conditions = result["conditions"]
    assert (conditions["servers"], conditions["placement"], conditions["hosts"]) == (2, "measured", ["node1", "node2"])
    assert "all ranks share one machine" not in conditions
    for row in result["models"]:
        assert row["ledger_closed"] is True, row
        assert row["scaling_efficiency"] > 0, result["null_reasons"]
    ledger = json.loads((directory / result["runs"]["squeezenet1_1"] / "ledger.json").read_text())
    assert (ledger["num_servers"], ledger["server_of_rank"]) == (2, [0, 1])
    alone = json.loads((directory / "alone/squeezenet1_1/ledger.json").read_text())
    assert (alone["world_size"], alone["global_batch"]) == (1, 2)
