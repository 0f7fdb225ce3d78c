"""`sbatch slurm/train.sh` on two nodes: a run, the same run with more steps, and once more when it is finished."""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.cluster.conftest import SlurmCluster

pytestmark = pytest.mark.cluster

REPOSITORY = Path(__file__).resolve().parents[2]
JOB_SECONDS = 150  # a deadline, not an expectation
KEYS = (
    "name=small",
    "data.root=shards/builtin",
    "model=squeezenet_small",
    "data.num_workers=0",
    "batch.global_size=8",
    "trainer.validate_every_steps=0",
    "trainer.checkpoint_every_steps=3",
    "cluster.accelerator=cpu",
    "cluster.num_threads=1",
    "cluster.timeout_seconds=60",
)
PREPARE_KEYS = ("source=builtin", "out=shards/builtin", "num_images=80", "num_classes=2", "short_side=32")


@pytest.fixture(scope="module")
def checkout(slurm: "SlurmCluster", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh checkout with small built-in shards, made by `sbatch slurm/prepare.sh`."""
    root = tmp_path_factory.mktemp("checkout")
    for room in ("pipeline", "conf", "slurm"):
        shutil.copytree(REPOSITORY / room, root / room, ignore=shutil.ignore_patterns("__pycache__"))
    job, output = submit(slurm, root, "--cpus-per-task=2", "slurm/prepare.sh", *PREPARE_KEYS)
    assert job["ExitCode"] == "0:0", output
    return root


def submit(slurm: "SlurmCluster", checkout: Path, *arguments: str) -> tuple[dict[str, str], str]:
    """The ended job and what it printed."""
    env = {"SQUEEZEWIRE_PYTHON": sys.executable}  # nothing else: what a fresh checkout has
    job = slurm.wait(slurm.submit("--cpus-per-task=1", *arguments, cwd=checkout, env=env), JOB_SECONDS)
    (log,) = checkout.glob(f"squeezewire-*-{job['JobId']}.out")
    return job, log.read_text()


def train(slurm: "SlurmCluster", checkout: Path, num_steps: int) -> tuple[dict[str, str], str]:
    """`sbatch slurm/train.sh` for so many steps in all."""
    return submit(slurm, checkout, "slurm/train.sh", *KEYS, f"trainer.max_steps={num_steps}")


def ledger(checkout: Path) -> dict[str, Any]:
    """ledger.json of the run."""
    return json.loads((checkout / "runs/small/ledger.json").read_text())


def training_steps(checkout: Path) -> list[int]:
    """The step of every row of metrics.jsonl that holds a training loss, in the order written."""
    rows = [json.loads(line) for line in (checkout / "runs/small/metrics.jsonl").read_text().splitlines()]
    return [row["trainer/step"] for row in rows if "train/loss" in row]


def contents(directory: Path) -> dict[str, str]:
    """What a finished run must keep: the record, the ledger and the checkpoints, by their hash."""
    kept = [directory / "metrics.jsonl", directory / "ledger.json", *sorted((directory / "checkpoints").rglob("*"))]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept if path.is_file()}


def test_run_resume_and_finished(slurm: "SlurmCluster", checkout: Path) -> None:
    job, output = train(slurm, checkout, num_steps=4)
    assert (job["JobState"], job["ExitCode"], job["NodeList"]) == ("COMPLETED", "0:0", "node[1-2]"), output
    first = ledger(checkout)
    assert (first["world_size"], first["num_servers"], first["server_of_rank"]) == (2, 2, [0, 1])
    assert (first["backend"], first["num_steps"]) == ("gloo", 4)
    steps = training_steps(checkout)
    assert len(steps) == 4

    job, output = train(slurm, checkout, num_steps=7)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), output
    assert training_steps(checkout) == list(range(steps[0], steps[0] + 7))  # each step once: nothing was trained again
    second = ledger(checkout)
    assert (second["num_steps"], second["gradient_bytes"]) == (7, first["gradient_bytes"])

    before = contents(checkout / "runs/small")
    job, output = train(slurm, checkout, num_steps=7)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), output
    assert contents(checkout / "runs/small") == before


def test_wrong_key_ends_the_job_with_the_configurations_code(slurm: "SlurmCluster", checkout: Path) -> None:
    job, output = submit(slurm, checkout, "slurm/train.sh", *KEYS, "trainer.max_step=4")
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0"), output
    assert "Did you mean 'trainer.max_steps'?" in output


def test_preflight_measures_the_link_and_leaves_nothing(slurm: "SlurmCluster", checkout: Path) -> None:
    keys = [key for key in KEYS if not key.startswith("name=")]
    job, output = submit(slurm, checkout, "slurm/preflight.sh", "name=new", *keys, "trainer.max_steps=4")
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), output
    assert "ok     ranks          2 on node1, node2, gloo" in output
    assert output.count("bit/s, ") == 2 and "server 0 to 1: " in output and "server 1 to 0: " in output
    assert output.splitlines()[-1] == "Ready."
    assert not (checkout / "runs/new").exists()


FAILS_ON_ONE_NODE = """#!/bin/sh
if [ "$SLURM_NODEID" = 1 ] && [ "$2" != pipeline.requeue ]; then echo "FAILED $SLURM_NODEID"; {how}; fi
exec {python} "$@"
"""


@pytest.mark.parametrize(
    ("script", "how", "state", "code"),
    [
        ("train", "exit 3", "FAILED", "3:0"),
        ("preflight", "kill -KILL $$", "FAILED", "137:0"),
    ],
)
def test_a_rank_that_ends_before_the_ranks_have_met_is_not_waited_for(
    script: str, how: str, state: str, code: str, slurm: "SlurmCluster", checkout: Path
) -> None:
    """Without a word of its own, and the others would wait for an hour."""
    python = checkout / f"python-{script}"
    python.write_text(FAILS_ON_ONE_NODE.format(how=how, python=sys.executable))
    python.chmod(0o755)
    keys = [key for key in KEYS if not key.startswith(("name=", "cluster.timeout_seconds="))]
    options = [f"--export=ALL,SLURM_WAIT=3600,SQUEEZEWIRE_PYTHON={python}", f"slurm/{script}.sh"]
    keys += ["name=alone", "trainer.max_steps=4", "cluster.timeout_seconds=3600"]
    job, output = submit(slurm, checkout, *options, *keys)
    assert (job["JobState"], job["ExitCode"]) == (state, code), output
    assert output.count("FAILED 1") == 1 and "rank 1 ended before the ranks had met" in output, output
    assert "Traceback" not in output and not (checkout / ".slurm-causes").exists()
