"""Which rank this process is, read from environments as schedulers write them."""

import re
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import ConfigError
from pipeline.run.launch.environment import RankEnvironment
from pipeline.run.launch.ports import SERVICE_PORTS, free_port, is_free, reserved_port
from pipeline.run.launch.ranks import RankInfo, expand_tasks_per_node, find_ranks, first_host

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
}
# As Slurm 22.05 sets them in a task started by `srun` in a job of two nodes with two tasks each.
SLURM_STEP = {
    "SLURM_JOB_ID": "81234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_JOB_NODELIST": "node[01-02]",
}


def test_torchrun_variables() -> None:
    assert find_ranks(1, TORCHRUN) == RankInfo(3, 4, 1, 2, 1, 2, "head", 29500, "torchrun")


def test_an_address_of_ipv6_may_stand_in_brackets() -> None:
    for variables in (TORCHRUN, SLURM_STEP):
        for address in ("fd00::1", "[fd00::1]"):
            ranks = find_ranks(1, variables | {"MASTER_ADDR": address})
            assert ranks is not None and ranks.master_addr == "fd00::1"


def test_a_node_of_slurms_need_not_be_a_name_of_the_network() -> None:
    one_node = {"SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "no-host-name"}
    ranks = find_ranks(1, SLURM_STEP | one_node | {"SLURM_LOCALID": "2", "SLURM_STEP_TASKS_PER_NODE": "4"})
    assert ranks is not None and ranks.master_addr == "127.0.0.1"


def test_torchrun_variables_win_over_a_slurm_step() -> None:
    ranks = find_ranks(1, SLURM_STEP | TORCHRUN)
    assert ranks is not None and ranks.source == "torchrun"


def test_torchrun_without_optional_variables_is_one_machine() -> None:
    variables = {key: TORCHRUN[key] for key in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    assert find_ranks(1, variables | {"RANK": "1", "LOCAL_RANK": "1"}) == RankInfo(
        1, 4, 1, 4, 0, 1, "head", 29500, "torchrun"
    )
    with pytest.raises(ConfigError, match="LOCAL_WORLD_SIZE"):
        find_ranks(1, variables | {"RANK": "3", "LOCAL_RANK": "1"})


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_incomplete_torchrun_variables_name_what_is_missing(missing: str) -> None:
    with pytest.raises(ConfigError, match=missing):
        find_ranks(1, {key: value for key, value in TORCHRUN.items() if key != missing})


@pytest.mark.parametrize(("key", "value"), [("RANK", "4"), ("RANK", "-1"), ("WORLD_SIZE", "four"), ("LOCAL_RANK", "2")])
def test_contradicting_variables_are_refused(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match="one command"):
        find_ranks(1, TORCHRUN | {key: value})


def test_slurm_step() -> None:
    ranks = find_ranks(1, SLURM_STEP)
    assert ranks is not None
    assert ranks == RankInfo(2, 4, 0, 2, 1, 2, "node01", ranks.master_port, "slurm")
    assert ranks.master_port in SERVICE_PORTS


def test_slurm_ranks_agree_on_the_port_and_neighbouring_jobs_do_not_share_it() -> None:
    def port(**changes: str) -> int:
        ranks = find_ranks(1, SLURM_STEP | changes)
        assert ranks is not None
        return ranks.master_port

    assert port(SLURM_PROCID="0", SLURM_NODEID="0") == port(SLURM_PROCID="3", SLURM_LOCALID="1")
    assert len({port(), port(SLURM_JOB_ID="81235"), port(SLURM_STEP_ID="1")}) == 3
    assert port(MASTER_PORT="29999") == 29999


def test_slurm_uneven_tasks_per_node() -> None:
    ranks = find_ranks(1, SLURM_STEP | {"SLURM_STEP_TASKS_PER_NODE": "3,1"})
    assert ranks is not None and ranks.local_world_size == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"SLURM_STEP_ID": ""},  # a batch script: SLURM_PROCID is set there too
        {"SLURM_STEP_ID": "batch"},
        {"SLURM_STEP_ID": str(0xFFFFFFFA)},  # the interactive step of salloc
        {"SLURM_STEP_ID": str(0xFFFFFFFB)},  # the batch step
    ],
)
def test_a_shell_inside_a_slurm_job_is_no_step(changes: dict[str, str]) -> None:
    assert find_ranks(2, SLURM_STEP | changes) is None
    alone = find_ranks(1, SLURM_STEP | changes)
    assert alone is not None and (alone.source, alone.world_size) == ("single", 1)


def test_several_nodes_without_srun_are_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    find_ranks(1, {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": "0"})
    assert "srun" in capsys.readouterr().err


def test_a_step_of_one_task_starts_its_own_ranks() -> None:
    step = SLURM_STEP | {
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_TASKS_PER_NODE": "1",
        "SLURM_PROCID": "0",
        "SLURM_NODEID": "0",
    }
    assert find_ranks(2, step) is None
    one = find_ranks(1, step)
    assert one is not None and (one.source, one.world_size) == ("slurm", 1)


def test_nothing_said_is_one_rank_here_or_ranks_to_start() -> None:
    assert find_ranks(2, {}) is None
    one = find_ranks(1, {})
    assert one is not None and (one.rank, one.world_size, one.source) == (0, 1, "single")


@pytest.mark.parametrize(
    ("node_list", "first"),
    [
        ("node1", "node1"),
        ("node[01-03,7],gpu5", "node01"),
        ("gpu5,node[01-03]", "gpu5"),
        ("rack[2-4]n[005-006],x", "rack2n005"),
        ("tux[7,9]-ib", "tux7-ib"),
        ("a.b-c.d[010]", "a.b-c.d010"),
    ],
)
def test_first_host(node_list: str, first: str) -> None:
    assert first_host(node_list) == first


@pytest.mark.parametrize("text", ["", "node[", "node[a-b]", "node]1", "[]", "two words"])
def test_what_is_no_node_list_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        first_host(text)


@given(st.text())
def test_first_host_never_returns_brackets_or_commas(text: str) -> None:
    try:
        host = first_host(text)
    except ConfigError:
        return
    assert host and not re.search(r"[\[\],\s]", host)


@given(st.lists(st.tuples(st.integers(1, 99), st.integers(1, 9)), min_size=1))
def test_tasks_per_node(runs: list[tuple[int, int]]) -> None:
    text = ",".join(f"{tasks}(x{nodes})" if nodes > 1 else str(tasks) for tasks, nodes in runs)
    assert expand_tasks_per_node(text) == [tasks for tasks, nodes in runs for _ in range(nodes)]


def test_device_of_a_rank() -> None:
    bound = RankInfo(3, 4, 1, 2, 1, 2, "head", 29500, "slurm")
    assert bound.device_index(1) == 0  # one GPU bound to each task
    assert bound.device_index(8) == 1
    with pytest.raises(ConfigError, match=r"cluster\.devices=1"):
        RankInfo(1, 2, 1, 2, 0, 1, "127.0.0.1", 29500, "spawned").device_index(1)


def test_a_reserved_port_is_free_and_given_once() -> None:
    with reserved_port() as first, reserved_port() as second:
        assert first != second
        assert is_free(first) and is_free(second)


def test_a_port_in_use_is_not_free() -> None:
    with socket.create_server(("", 0)) as server:
        assert not is_free(server.getsockname()[1])
    assert free_port() in SERVICE_PORTS


def test_lightning_sees_the_same_ranks() -> None:
    environment = RankEnvironment(RankInfo(3, 4, 1, 2, 1, 2, "head", 29500, "torchrun"))
    assert environment.creates_processes_externally
    assert (environment.main_address, environment.main_port) == ("head", 29500)
    assert (environment.world_size(), environment.global_rank()) == (4, 3)
    assert (environment.local_rank(), environment.node_rank()) == (1, 1)
    environment.set_world_size(4)
    with pytest.raises(ConfigError, match="every node"):
        environment.set_world_size(3)


def test_the_rank_told_stands_where_lightning_derives_another() -> None:
    """Ranks dealt out to the nodes in turn: 0,2 and 1,3. Lightning derives 2 for rank 1."""
    interleaved = TORCHRUN | {"RANK": "1", "LOCAL_RANK": "0", "GROUP_RANK": "1"}
    ranks = find_ranks(1, interleaved)
    assert ranks is not None and ranks == RankInfo(1, 4, 0, 2, 1, 2, "head", 29500, "torchrun")
    environment = RankEnvironment(ranks)
    environment.set_global_rank(environment.node_rank() * 2 + environment.local_rank())
    assert environment.global_rank() == 1
