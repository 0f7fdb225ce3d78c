"""How a comparison starts its trainings, and what each of them is told."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from pipeline.comparison.candidates import check_candidates
from pipeline.comparison.launcher import Launcher, choose_launcher
from pipeline.config.compare import CompareConfig
from pipeline.core.cli import compose
from pipeline.core.errors import ConfigError

TWO_NODES = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "8"}
ONE_NODE = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_ON_NODE": "8"}


def configured(*overrides: str) -> CompareConfig:
    return compose("compare", CompareConfig, overrides)


@pytest.mark.parametrize(
    ("overrides", "environment", "expected"),
    [
        ([], {}, ("local", 2, 1)),
        ([], ONE_NODE, ("local", 2, 1)),
        ([], TWO_NODES, ("slurm", 2, 2)),
        ([], TWO_NODES | {"SLURM_NTASKS": "8"}, ("slurm", 8, 2)),
        ([], TWO_NODES | {"SLURM_GPUS_ON_NODE": "4"}, ("slurm", 8, 2)),
        ([], ONE_NODE | {"SLURM_NTASKS": "4"}, ("slurm", 4, 1)),
        (["launcher=local", "cluster.devices=3"], TWO_NODES, ("local", 3, 1)),
        (["lab.servers=2", "lab.ranks_per_server=2"], TWO_NODES, ("lab", 4, 1)),
    ],
)
def test_the_launcher_follows_the_allocation(
    overrides: list[str], environment: dict[str, str], expected: tuple[str, int, int]
) -> None:
    launcher = choose_launcher(configured(*overrides), environment)
    assert (launcher.kind, launcher.num_ranks, launcher.num_machines) == expected


@pytest.mark.parametrize(
    ("overrides", "environment", "said"),
    [
        (["launcher=slurm"], {}, "no Slurm job"),
        (["launcher=slurm", "lab.servers=2"], TWO_NODES, "lab.servers makes a cluster of one machine"),
        (["launcher=slurm"], ONE_NODE, "at least 2"),
        (["cluster.devices=1"], {}, "at least 2"),
        (
            [],
            {"RANK": "1", "WORLD_SIZE": "2"},
            "rank 1 of 2, and each would start all of them: start the command once",
        ),
    ],
)
def test_what_cannot_be_started_is_refused(overrides: list[str], environment: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        choose_launcher(configured(*overrides), environment)


def test_a_training_runs_over_the_allocation_and_alone_on_one_rank_of_it() -> None:
    launcher = choose_launcher(configured(), TWO_NODES | {"SLURM_NTASKS": "4", "SLURM_CPUS_PER_TASK": "3"})
    assert launcher.command([], [], alone=False)[:4] == ["srun", "--nodes=2", "--ntasks=4", "--cpus-per-task=3"]
    assert launcher.command([], [], alone=True)[:4] == ["srun", "--nodes=1", "--ntasks=1", "--cpus-per-task=3"]


def test_slurms_variables_reach_srun_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in (TWO_NODES | {"RANK": "3", "SLURM_WAIT": "9"}).items():
        monkeypatch.setenv(key, value)
    over, local = choose_launcher(configured()).environment(), choose_launcher(configured("launcher=local"))
    assert (over["SLURM_JOB_ID"], over["SLURM_WAIT"], over["SLURM_KILL_BAD_EXIT"]) == ("7", "9", "0")
    assert "RANK" not in over
    assert not [key for key in local.environment() if key.startswith("SLURM_")]


# --- what the trainings are told ---


def test_each_model_is_run_once_per_compression(tmp_path: Path) -> None:
    config = configured("models=[squeezenet1_0,alexnet]", "hooks=[none,powersgd]", f"run_root='{tmp_path}'")
    candidates = check_candidates(config)
    assert [candidate.label for candidate in candidates] == [
        "squeezenet1_0",
        "squeezenet1_0 + powersgd",
        "alexnet",
        "alexnet + powersgd",
    ]
    assert candidates[1].slug == "squeezenet1_0+powersgd"
    assert "comm.hook=none" in candidates[0].overrides and "comm.hook=powersgd" in candidates[1].overrides
    assert candidates[0].alone_overrides == candidates[1].alone_overrides
    for said in ("cluster.devices=1", "batch.global_size=8", "comm.hook=none"):
        assert said in candidates[0].alone_overrides


@pytest.mark.parametrize(("asked", "expected"), [(1000, 2), (4, 4)])
def test_powersgd_begins_within_the_steps(tmp_path: Path, asked: int, expected: int) -> None:
    keys = ("hooks=[powersgd]", f"comm.powersgd_start_step={asked}", "steps=5", f"run_root='{tmp_path}'")
    (candidate,) = check_candidates(configured("models=[squeezenet1_0]", *keys))
    assert f"comm.powersgd_start_step={expected}" in candidate.overrides


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["hooks=[powersgd]", "steps=2"], "at least 3"),
        (["hooks=[nonsense]"], "'nonsense' is not one of"),
        (["hooks=[bf16,bf16]"], "names a hook twice"),
        (["alone_runs=[runs/one]"], "belongs to runs="),
        (["comm=local"], r"comm\.period=16: a comparison is of what each step exchanges"),
    ],
)
def test_impossible_compressions_are_refused(tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_candidates(configured("models=[squeezenet1_0]", f"run_root='{tmp_path}'", *overrides))
    assert list(tmp_path.iterdir()) == []


def test_a_second_signal_in_the_time_of_grace_leaves_nobody_behind(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def interrupt(*_: object) -> None:
        raise InterruptedError

    def send_twice() -> None:
        while not (log.exists() and "begun" in log.read_text()):
            time.sleep(0.01)
        time.sleep(0.3)  # for the launcher to wait for it
        os.kill(os.getpid(), signal.SIGUSR1)
        while "asked" not in log.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, interrupt)
    sender = threading.Thread(target=send_twice, daemon=True)
    try:
        sender.start()
        obstinate = "trap 'echo asked' TERM; echo begun; for second in 1 2 3 4 5 6 7 8 9; do sleep 1; done; echo ended"
        with pytest.raises(InterruptedError):
            Launcher("local", 2).run(["bash", "-c", obstinate], log, grace_seconds=60.0)
        sender.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert log.read_text().split() == ["begun", "asked"]
