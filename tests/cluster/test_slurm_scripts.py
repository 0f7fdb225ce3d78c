"""What slurm/*.sh make of an allocation: ranks, CPUs, interpreter. The real Slurm runs them; Python is a recorder."""

import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.cluster.conftest import SlurmCluster

pytestmark = pytest.mark.cluster

REPOSITORY = Path(__file__).resolve().parents[2]
RECORDER = """#!/bin/sh
[ "$2" = pipeline.run.launch.sweep ] && exec "$RECORDER_PYTHON" "$@"
if [ "$2" = pipeline.requeue ]; then
    echo "ASKED $*"
    [ -n "$RECORDER_PYTHON" ] && exec "$RECORDER_PYTHON" "$@"
    exit 1
fi
echo "RAN procid=${SLURM_PROCID-none} node=${SLURM_NODEID-none} of=${SLURM_NTASKS-none} \
threads=${OMP_NUM_THREADS-none} interface=${GLOO_SOCKET_IFNAME-none} argv=$*"
if [ -n "$RECORDER_CAUSE" ] && [ "${SLURM_PROCID-none}" != "${RECORDER_SLOW_RANK-}" ]; then
    mkdir -p "$SQUEEZEWIRE_CAUSES" && printf "$RECORDER_CAUSE" > "$SQUEEZEWIRE_CAUSES/rank$SLURM_PROCID"
fi
if [ "${SLURM_PROCID-none}" = "${RECORDER_SLOW_RANK-}" ]; then
    sleep "$RECORDER_SLOW_SECONDS" || kill -KILL $$ # killed with it, a rank says nothing more
fi
if [ -n "$RECORDER_WAITS" ] && [ -z "$SLURM_RESTART_COUNT" ]; then
    trap 'echo "TOLD ${SLURM_PROCID}"; exit 75' TERM USR1
    touch "ready.$SLURM_PROCID"
    while :; do sleep 0.1; done
fi
exit ${RECORDER_EXIT:-0}
"""
JOB_SECONDS = 60
TRAIN_KEYS = ("name=first", "data.root=none", "trainer.max_steps=9")


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


def test_what_the_script_exports_reaches_the_ranks_also_where_the_job_gets_no_variables(
    slurm: "SlurmCluster", checkout: Path
) -> None:
    """`--export=NONE` stays behind for srun, which would keep from the ranks what the script has set."""
    env = {"GLOO_SOCKET_IFNAME": "eth0"}
    code, lines, output = ran(slurm, checkout, "--export=NONE", "slurm/train.sh", "name=first", env=env)
    assert code == "0:0", output
    assert [line.partition(" argv=")[0] for line in lines] == [
        f"RAN procid={rank} node={rank} of=2 threads=8 interface=none" for rank in (0, 1)
    ]


def test_train_with_two_ranks_per_node(slurm: "SlurmCluster", checkout: Path) -> None:
    options = ("--ntasks-per-node=2", "--cpus-per-task=3")
    code, lines, output = ran(slurm, checkout, *options, "slurm/train.sh", "name=first")
    assert code == "0:0", output
    assert [line.partition(" threads=")[0] for line in lines] == [
        f"RAN procid={rank} node={node} of=4" for rank, node in ((0, 0), (1, 0), (2, 1), (3, 1))
    ]
    assert all(" threads=3 " in line for line in lines)


@pytest.mark.parametrize("num_gpus", [1, 2, 8])
def test_train_gives_every_gpu_a_rank(num_gpus: int, slurm: "SlurmCluster", checkout: Path) -> None:
    code, lines, output = ran(slurm, checkout, f"--gpus-per-node={num_gpus}", "slurm/train.sh", "name=first")
    assert code == "0:0", output
    ranks = [line.partition(" threads=")[0] for line in lines]
    assert ranks == sorted(
        f"RAN procid={rank} node={rank // num_gpus} of={2 * num_gpus}" for rank in range(2 * num_gpus)
    )
    assert all(f" threads={8 // num_gpus} " in line for line in lines)
    assert f"{num_gpus} GPUs per node" in output


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


def test_rank_that_waits_for_one_with_an_error_does_not_hide_it(slurm: "SlurmCluster", checkout: Path) -> None:
    """It is killed at last, for which srun reports 137: the job ends all the same, with the code of the error."""
    env = {"RECORDER_EXIT": "3", "RECORDER_SLOW_RANK": "0", "RECORDER_SLOW_SECONDS": "600", "SLURM_WAIT": "2"}
    real = {"RECORDER_PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY), "RECORDER_CAUSE": "3"}
    code, lines, output = ran(slurm, checkout, "slurm/train.sh", *TRAIN_KEYS, env={**env, **real})
    assert (code, len(lines)) == ("3:0", 2), output
    assert "ASKED -m pipeline.requeue 137 " in output and "by itself with exit code 3" in output
    assert not (checkout / ".slurm-causes").exists()


# --- back into the queue ---


def started(slurm: "SlurmCluster", checkout: Path, *arguments: str, options: tuple[str, ...] = (), **env: str) -> int:
    """A job of train.sh. RECORDER_WAITS: its ranks wait for TERM or USR1, leave with 75, and end at once next time."""
    real = {"RECORDER_PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY)}
    job_id = slurm.submit(*options, "slurm/train.sh", *TRAIN_KEYS, *arguments, cwd=checkout, env={**real, **env})
    if "RECORDER_WAITS" in env:
        wait_until(lambda: len(list(checkout.glob("ready.*"))) == 2, "the ranks did not start")
    return job_id


def log_of(checkout: Path, job_id: int) -> str:
    return (checkout / f"squeezewire-train-{job_id}.out").read_text()


def ended(slurm: "SlurmCluster", job_id: int) -> dict[str, str]:
    """The job, once it has ended; whenever it is put back, its wait of two minutes is cut short."""
    return slurm.wait(job_id, JOB_SECONDS, impatient=True)


@pytest.mark.parametrize("how", [["--signal=USR1"], ["--batch", "--signal=USR1"]], ids=["ranks", "batch shell"])
def test_a_signal_puts_the_job_back_once(slurm: "SlurmCluster", checkout: Path, how: list[str]) -> None:
    job_id = started(slurm, checkout, RECORDER_WAITS="1")
    assert slurm.run("scancel", *how, str(job_id)).returncode == 0
    job = ended(slurm, job_id)
    output = log_of(checkout, job_id)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), output
    assert output.count("TOLD ") == 2 and output.count("ASKED ") == 1, output
    assert "restart 1: 2 ranks" in output  # the same log: nothing of the first attempt is lost
    assert len((checkout / "runs/first/requeues.jsonl").read_text().splitlines()) == 1


def test_slurms_own_requeue_is_not_doubled(slurm: "SlurmCluster", checkout: Path) -> None:
    job_id = started(slurm, checkout, RECORDER_WAITS="1")
    assert slurm.run("scontrol", "requeue", str(job_id)).returncode == 0
    job = ended(slurm, job_id)
    output = log_of(checkout, job_id)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), output
    assert output.count("TOLD ") == 2 and "ASKED " not in output, output


def test_a_cancelled_job_stays_cancelled(slurm: "SlurmCluster", checkout: Path) -> None:
    job_id = started(slurm, checkout, RECORDER_WAITS="1")
    assert slurm.run("scancel", str(job_id)).returncode == 0
    job = ended(slurm, job_id)
    output = log_of(checkout, job_id)
    time.sleep(3)  # for whatever might put it back
    job = slurm.job(job_id)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), output
    assert output.count("TOLD ") == 2 and "ASKED " not in output, output


def test_a_job_that_fails_at_every_start_ends(slurm: "SlurmCluster", checkout: Path) -> None:
    job_id = started(slurm, checkout, "cluster.max_fruitless_requeues=2", RECORDER_EXIT="137")
    job = ended(slurm, job_id)
    output = log_of(checkout, job_id)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "137:0", "2"), output
    assert "was put back into the queue 2 times in a row without a new checkpoint" in output


def test_ranks_that_lost_one_another_come_back(slurm: "SlurmCluster", checkout: Path) -> None:
    """As after a switch that was restarted: nobody was killed, and nobody has a cause to tell."""
    once = "cluster.max_fruitless_requeues=1"
    job_id = started(slurm, checkout, once, RECORDER_EXIT="1", RECORDER_CAUSE="lost the others")
    job = ended(slurm, job_id)
    output = log_of(checkout, job_id)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "1:0", "1"), output
    assert "The ranks lost one another" in output


def commands(folder: Path, scontrol: str) -> str:
    """An option of sbatch: a PATH with what the script and the recorder need, and this `scontrol`, or none."""
    folder.mkdir()
    for name in ("srun", "bash", "sh", "hostname", "sed", "sleep", "mkdir", "rm", "rmdir", "touch"):
        found = shutil.which(name)
        assert found is not None, name
        (folder / name).symlink_to(found)
    if scontrol:
        (folder / "scontrol").write_text(scontrol)
        (folder / "scontrol").chmod(0o755)
    return f"--export=ALL,PATH={folder}"


def test_without_scontrol_the_job_says_so_and_keeps_the_code(
    slurm: "SlurmCluster", checkout: Path, tmp_path: Path
) -> None:
    path = commands(tmp_path / "commands", "")
    code, _, output = ran(slurm, checkout, path, "slurm/train.sh", *TRAIN_KEYS, env={"RECORDER_EXIT": "75"})
    assert code == "75:0", output
    assert "No scontrol here" in output and "75: submit it again" in output and "ASKED" not in output


def test_a_controller_that_does_not_answer_at_once_is_asked_again(
    slurm: "SlurmCluster", checkout: Path, tmp_path: Path
) -> None:
    """The first question and the first request each find nobody."""
    script = f"""#!/bin/sh
if [ ! -e "asked.$1" ]; then touch "asked.$1"; echo "slurm_load: Unable to contact slurm controller" >&2; exit 1; fi
exec {shutil.which("scontrol")} "$@"
"""
    path = commands(tmp_path / "commands", script)
    job_id = started(slurm, checkout, options=(path,), RECORDER_WAITS="1")
    assert slurm.run("scancel", "--signal=USR1", str(job_id)).returncode == 0
    job = ended(slurm, job_id)
    output = log_of(checkout, job_id)
    assert {file.name for file in checkout.glob("asked.*")} == {"asked.--oneliner", "asked.requeue"}
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), output
    assert output.count("Unable to contact") == 2, output


def test_an_array_runs_the_lines_of_a_sweep(slurm: "SlurmCluster", checkout: Path) -> None:
    (checkout / "sweep.txt").write_bytes(
        b"# rates\r\nname=sweep/a recipe.lr=0.1\r\n\r\nname=sweep/b 'run_root=my runs'\r\n"
    )
    real = {"RECORDER_PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY)}
    env = {"SQUEEZEWIRE_SWEEP": "sweep.txt", **real}
    job_id = slurm.submit("--array=1-3", "--nodes=1", "slurm/train.sh", "seed=3", cwd=checkout, env=env)
    wait_until(lambda: len(list(checkout.glob("*.out"))) == 3, "the tasks did not run")
    slurm.wait(job_id, JOB_SECONDS)
    wait_until(lambda: not slurm.run("squeue", "--noheader").stdout.strip(), "the tasks did not end")
    outputs = "".join(sorted(log.read_text() for log in checkout.glob("*.out")))
    for line in ("name=sweep/a recipe.lr=0.1", "name=sweep/b run_root=my runs"):
        assert f"argv=-m pipeline.train seed=3 {line}\n" in outputs
    assert "error: sweep.txt holds 2 trainings, and none is number 3" in outputs


def test_compare_and_prepare_are_no_ranks_of_the_job(slurm: "SlurmCluster", checkout: Path) -> None:
    code, lines, output = ran(slurm, checkout, "slurm/compare.sh", "models=[a]")
    assert code == "0:0", output
    unranked = "RAN procid=none node=none of=none threads=none interface=none argv=-m"
    assert lines == [f"{unranked} pipeline.compare cluster.devices=2 models=[a]"]
    code, lines, output = ran(slurm, checkout, "slurm/study.sh", "study=paper")
    assert code == "0:0", output
    assert lines == [f"{unranked} pipeline.study cluster.devices=2 study=paper"]
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


def test_an_array_takes_the_parts_of_a_study(slurm: "SlurmCluster", checkout: Path) -> None:
    job_id = slurm.submit("--array=4-6:2", "--nodes=1", "slurm/study.sh", "study=paper", cwd=checkout)
    slurm.wait(job_id, JOB_SECONDS)
    wait_until(lambda: not slurm.run("squeue", "--noheader").stdout.strip(), "the tasks did not end")
    outputs = "".join(sorted(log.read_text() for log in checkout.glob("*.out")))
    for part in ("1/2", "2/2"):
        assert f"argv=-m pipeline.study cluster.devices=2 study.part={part} study=paper\n" in outputs


@pytest.mark.parametrize("script", ["train", "compare", "study", "prepare"])
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
