"""A cluster on one Linux machine: servers as network namespaces with shaped links, and any command on every rank.

    python -m pipeline.lab servers=3 bandwidth=1gbit -- python -m pipeline.train name=first data.root=shards/builtin

What follows `--` is run once per rank with torchrun-style variables; `python` is this interpreter. Its exit code is
this command's. Left in `<run_root>/<name>/`: lab.json, with what each server's interface counted.
"""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.training import one_of, require
from pipeline.core.cli import run_command

if TYPE_CHECKING:
    from pipeline.run.lab.cluster import Layout

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class LabConfig:
    """Run the command that follows `--` on every rank of a cluster made of network namespaces.

    Needs iproute2 and ethtool, and root or a kernel that lets ordinary users make user namespaces. The ranks reach one
    another and nothing else; processors, memory and disks are the machine's own, shared by all.
    """

    name: str = "lab"
    """The directory of lab.json under run_root. It may be that of the training."""
    run_root: str = "runs"
    servers: int = 2
    ranks_per_server: int = 1
    bandwidth: str | None = None
    """Of each server's link, in each direction: 1gbit, 100mbit, 2.5gbit. Null: as fast as the machine."""
    placement: str = "contiguous"
    """Of 4 ranks on 2 servers: `contiguous` 0,1 and 2,3; `interleaved` 0,2 and 1,3."""
    offloads: bool = False
    """True leaves TSO, GSO and GRO on: faster, but interfaces then count packets before segmentation, with one header
    for many frames."""
    num_threads: int | None = None
    """Compute threads per rank. Null: OMP_NUM_THREADS, else the cores divided by all ranks."""

    def __post_init__(self) -> None:
        from pipeline.run.lab import cluster as netlab

        one_of("placement", self.placement, netlab.PLACEMENTS)
        require(
            1 <= self.servers <= netlab.MAX_SERVERS,
            f"servers={self.servers} must be from 1 to {netlab.MAX_SERVERS}.",
        )
        require(self.ranks_per_server >= 1, f"ranks_per_server={self.ranks_per_server} must be at least 1.")
        require(self.num_threads is None or self.num_threads >= 1, f"num_threads={self.num_threads} must be positive.")
        if self.bandwidth is not None:
            netlab.bits_per_second(self.bandwidth)

    @property
    def layout(self) -> "Layout":
        """Servers, ranks and links."""
        from pipeline.run.lab.cluster import Layout, bits_per_second

        return Layout(
            servers=self.servers,
            ranks_per_server=self.ranks_per_server,
            placement=self.placement,
            bandwidth_bits_per_second=None if self.bandwidth is None else bits_per_second(self.bandwidth),
            offloads=self.offloads,
        )


def lab(config: LabConfig, command: Sequence[str]) -> int:
    """Build the cluster, run `command` on every rank, write lab.json. Returns the exit code of the ranks."""
    from rich.console import Console

    from pipeline.core.files import write_json_atomic
    from pipeline.report.tables import lab_table
    from pipeline.run.directory import validate_name
    from pipeline.run.lab.cluster import open_lab
    from pipeline.run.launch.supervisor import supervise_commands

    require(bool(command), "No command: give it after `--`, as in `-- python -m pipeline.train name=x data.root=y`.")
    validate_name(config.name)
    with open_lab(config.layout) as cluster:
        started = time.monotonic()
        exit_code = supervise_commands(cluster.commands(command, os.environ, config.num_threads))
        seconds = time.monotonic() - started
        interfaces = [asdict(counters) for counters in cluster.counters()]

    promise = {key: value for key, value in config.layout.promise().items() if key != "interface"}
    ran = {"command": list(command), "exit_code": exit_code, "seconds": seconds, "interfaces": interfaces}
    record = {"schema": SCHEMA, **promise, **ran}
    path = Path(config.run_root) / config.name / "lab.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, record)
    Console().print(lab_table(record).to_rich())
    print(f"Lab: {path}")
    return exit_code


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(this command's own, the command after the first `--`)."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    return list(arguments[:end]), list(arguments[end + 1 :])


if __name__ == "__main__":
    own_arguments, rank_command = split_arguments(sys.argv[1:])
    run_command("lab", LabConfig, lambda config: lab(config, rank_command), argv=own_arguments)
