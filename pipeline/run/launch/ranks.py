"""Which rank this process is: by torchrun-style variables, by a Slurm step, or alone.

Nothing here imports torch: the parent that only starts ranks must stay small and single-threaded.
"""

import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

from pipeline.core.errors import ConfigError
from pipeline.run.launch.ports import SERVICE_PORTS, free_port

SPAWNED_MARK = "SQUEEZEWIRE_SPAWNED"
# What `pipeline.lab` promises its ranks, as JSON.
LAB_VARIABLE = "SQUEEZEWIRE_LAB"
RANK_VARIABLES = frozenset(
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
)
"""By which torchrun, and our own launcher, tell a process its place."""
# Slurm numbers its own pseudo-steps (batch shell, interactive shell, extern) downwards from 0xfffffffd; real steps
# count up from 0.
FIRST_SPECIAL_STEP_ID = 0xFFFFFFF0


class LabJson(TypedDict):
    """What `pipeline.lab` promises its ranks, in LAB_VARIABLE."""

    servers: int
    ranks_per_server: int
    placement: str
    """`contiguous` or `interleaved`."""
    server_of_rank: list[int]
    bandwidth_bits_per_second: int | None
    """Bandwidth of each link in each direction; None: unshaped."""
    offloads: bool
    interface: str


def without_ranks(environment: Mapping[str, str], *, keep_slurm: bool = False) -> dict[str, str]:
    """Return an environment for a process that shall not take itself for a rank of whoever starts it.

    Args:
        environment: Of whoever starts it.
        keep_slurm: Leave Slurm's variables, for `srun`.
    """
    return {
        name: value
        for name, value in environment.items()
        if name not in RANK_VARIABLES
        and name not in (LAB_VARIABLE, SPAWNED_MARK)
        and (keep_slurm or not name.startswith("SLURM_"))
    }


@dataclass(frozen=True)
class RankInfo:
    """The place of one process among all ranks of a run."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    num_nodes: int
    master_addr: str
    master_port: int
    source: str
    """Who said so: `torchrun`, `slurm`, `spawned` (our own launcher) or `single`."""

    def __post_init__(self) -> None:
        rules = (
            (0 <= self.rank < self.world_size, f"rank {self.rank} of {self.world_size}"),
            (0 <= self.local_rank < self.local_world_size, f"local rank {self.local_rank} of {self.local_world_size}"),
            (0 <= self.node_rank < self.num_nodes, f"node {self.node_rank} of {self.num_nodes}"),
            (0 < self.master_port < 2**16, f"master port {self.master_port}"),
        )
        for holds, what in rules:
            if not holds:
                raise ConfigError(f"The {self.source} variables describe {what}: start all ranks with one command.")

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def device_index(self, num_visible_devices: int) -> int:
        """Index of this rank's accelerator among the devices torch sees in this process.

        A scheduler that binds one device to each task shows each process a single device 0; otherwise every process
        sees all devices of the node and takes the one of its local rank.

        Args:
            num_visible_devices: Devices torch sees in this process.

        Returns:
            The index, from 0.

        Raises:
            ConfigError: There are more ranks on this node than devices.
        """
        if num_visible_devices == 1 and self.source == "slurm":
            return 0
        if self.local_world_size > num_visible_devices:
            raise ConfigError(
                f"{self.local_world_size} ranks on this machine but {num_visible_devices} visible GPUs:"
                f" set cluster.devices={max(1, num_visible_devices)} (Slurm: --ntasks-per-node),"
                " or cluster.accelerator=cpu."
            )
        return self.local_rank


def find_ranks(devices: int, environment: Mapping[str, str] | None = None) -> RankInfo | None:
    """Read this process's rank from the environment.

    First torchrun-style variables, then the variables of a Slurm step started by `srun`. With neither, one rank is
    this process itself; for `devices` > 1 the answer is None: the ranks are still to be started (`supervise`). A Slurm
    step of a single task also starts its own ranks when `devices` > 1.

    Args:
        devices: Ranks that the configuration asks for on this machine.
        environment: Variables to read; None: `os.environ`.

    Returns:
        The place of this process; None where it has to start the ranks.

    Raises:
        ConfigError: The variables are incomplete or contradict one another.
    """
    environment = os.environ if environment is None else environment
    if "RANK" in environment:
        return _from_torchrun(environment)
    if _inside_slurm_step(environment):
        ranks = _from_slurm(environment)
        if ranks.world_size > 1 or devices == 1:
            return ranks
    elif _number(environment.get("SLURM_JOB_NUM_NODES")) > 1 and "SLURM_JOB_ID" in environment:
        print(
            f"warning: this job holds {environment['SLURM_JOB_NUM_NODES']} nodes, but the command was not started by"
            " srun: only this node works. Start it with `srun`, as slurm/train.sh does.",
            file=sys.stderr,
        )
    if devices > 1:
        return None
    return RankInfo(0, 1, 0, 1, 0, 1, "127.0.0.1", free_port(), "single")


def _from_torchrun(environment: Mapping[str, str]) -> RankInfo:
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        raise ConfigError(
            f"RANK is set but {', '.join(missing)} is not: set all of {', '.join(needed)}, or unset RANK to let"
            " cluster.devices start the ranks."
        )
    rank, local_rank = _integer(environment, "RANK"), _integer(environment, "LOCAL_RANK")
    world_size = _integer(environment, "WORLD_SIZE")
    if "LOCAL_WORLD_SIZE" not in environment and rank != local_rank:
        raise ConfigError(
            f"RANK={rank} and LOCAL_RANK={local_rank} mean several machines: set LOCAL_WORLD_SIZE and GROUP_RANK too."
        )
    local_world_size = _integer(environment, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environment else world_size
    node_rank = _integer(environment, "GROUP_RANK") if "GROUP_RANK" in environment else 0
    return RankInfo(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        node_rank=node_rank,
        num_nodes=max(node_rank + 1, -(-world_size // max(1, local_world_size))),
        master_addr=environment["MASTER_ADDR"].strip("[]"),  # as an IPv6 address stands in a URL
        master_port=_integer(environment, "MASTER_PORT"),
        source="spawned" if SPAWNED_MARK in environment else "torchrun",
    )


def _inside_slurm_step(environment: Mapping[str, str]) -> bool:
    """Whether `srun` started this process. A batch script and an interactive shell also carry SLURM_PROCID."""
    step = environment.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in environment and step.isdigit() and int(step) < FIRST_SPECIAL_STEP_ID


def _from_slurm(environment: Mapping[str, str]) -> RankInfo:
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    nodes = "SLURM_STEP_NUM_NODES" if "SLURM_STEP_NUM_NODES" in environment else "SLURM_NNODES"
    world_size = _integer(environment, tasks)
    node_rank = _integer(environment, "SLURM_NODEID")
    num_nodes = _integer(environment, nodes) if nodes in environment else node_rank + 1
    tasks_per_node = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE")
    counts = expand_tasks_per_node(tasks_per_node) if tasks_per_node else []
    node_list = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not node_list and num_nodes > 1 and not environment.get("MASTER_ADDR"):
        raise ConfigError("SLURM_STEP_NODELIST is not set: set MASTER_ADDR to the host of rank 0, or start with srun.")
    # On one node nobody else has to find it; and that node's name in Slurm need not be one of the network.
    first = "127.0.0.1" if num_nodes == 1 else first_host(node_list or "")
    return RankInfo(
        rank=_integer(environment, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_integer(environment, "SLURM_LOCALID"),
        local_world_size=counts[node_rank] if node_rank < len(counts) else -(-world_size // max(1, num_nodes)),
        node_rank=node_rank,
        num_nodes=num_nodes,
        master_addr=environment.get("MASTER_ADDR", "").strip("[]") or first,
        master_port=_integer(environment, "MASTER_PORT") if "MASTER_PORT" in environment else _slurm_port(environment),
        source="slurm",
    )


def _slurm_port(environment: Mapping[str, str]) -> int:
    """Return a port every rank computes alike, and which two steps or neighbouring jobs of a node do not share."""
    job, step = _integer(environment, "SLURM_JOB_ID"), _integer(environment, "SLURM_STEP_ID")
    return SERVICE_PORTS.start + (job + 7919 * step) % len(SERVICE_PORTS)


def first_host(node_list: str) -> str:
    """Return the first host of a Slurm node list: `gpu[03-05,9],cpu1` -> `gpu03`; zero padding stays.

    Args:
        node_list: The list as Slurm writes it.

    Returns:
        A host name.

    Raises:
        ConfigError: This is not a node list.
    """
    outside_brackets = re.match(r"(?:[^,\[\]]|\[[^\[\]]*\])+(?=,|$)", node_list.strip())
    first = re.sub(r"\[(\d+)[^\[\]]*\]", r"\1", outside_brackets.group()) if outside_brackets else ""
    if not first or re.search(r"[\[\]\s]", first):
        raise ConfigError(f"{node_list!r} is not a Slurm node list: set MASTER_ADDR to the host of rank 0.")
    return first


def expand_tasks_per_node(text: str) -> list[int]:
    """Expand Slurm's compressed counts: `2(x3),1` -> [2, 2, 2, 1].

    Args:
        text: The counts as Slurm writes them.

    Returns:
        Tasks of each node.

    Raises:
        ConfigError: The text is not of that form.
    """
    counts: list[int] = []
    for entry in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry.strip())
        if match is None:
            raise ConfigError(f"SLURM_TASKS_PER_NODE={text!r} is not of the form 2(x3),1: start with srun.")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def lab_conditions(environment: Mapping[str, str] | None = None) -> LabJson | None:
    """Return what `pipeline.lab` promises this rank; None outside of a lab."""
    promised = (os.environ if environment is None else environment).get(LAB_VARIABLE)
    return json.loads(promised) if promised else None


def _integer(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not value.isdigit():
        raise ConfigError(f"{name}={value!r} is not a whole number: start all ranks with one command.")
    return int(value)


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0
