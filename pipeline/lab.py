"""A cluster on one Linux machine: servers as network namespaces with shaped links, and any command on every rank.

    python -m pipeline.lab servers=3 bandwidth=1gbit -- python -m pipeline.train experiment=demo batch.global_size=30

What follows `--` is run once per rank with torchrun-style variables; `python` is this interpreter. Its exit code is
this command's. Left in `<run_root>/<name>/`: lab.json, with what each server's interface counted.
"""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pipeline.config.lab import LabConfig
from pipeline.core.cli import run_command, split_arguments
from pipeline.core.schemas.lab import LabInterfaceJson, LabJson
from pipeline.core.typed import require

SCHEMA = 1


def lab(config: LabConfig, command: Sequence[str]) -> int:
    """Build the cluster, run `command` on every rank, write lab.json. Returns the exit code of the ranks."""
    from pipeline.core.files import write_json_atomic
    from pipeline.core.terminal import Terminal
    from pipeline.reporting.tables import lab_table
    from pipeline.run.directory import validate_name
    from pipeline.run.lab.cluster import Layout, open_lab
    from pipeline.run.launch.limits import check_count
    from pipeline.run.launch.supervisor import supervise_commands

    require(bool(command), "No command: give it after `--`, as in `-- python -m pipeline.train name=x data.root=y`.")
    validate_name(config.name)
    check_count("servers x ranks_per_server", config.servers * config.ranks_per_server)
    check_count("num_threads", config.num_threads, in_memory=False)
    layout = Layout(
        servers=config.servers,
        ranks_per_server=config.ranks_per_server,
        placement=config.placement,
        bandwidth_bits_per_second=config.bandwidth_bits_per_second,
        offloads=config.offloads,
    )
    with open_lab(layout) as cluster:
        started = time.monotonic()
        exit_code = supervise_commands(cluster.commands(command, os.environ, config.num_threads))
        seconds = time.monotonic() - started
        interfaces = [LabInterfaceJson(**asdict(counters)) for counters in cluster.counters()]

    record: LabJson = {
        "schema": SCHEMA,
        "servers": layout.servers,
        "ranks_per_server": layout.ranks_per_server,
        "placement": layout.placement,
        "server_of_rank": layout.server_of_rank,
        "bandwidth_bits_per_second": layout.bandwidth_bits_per_second,
        "offloads": layout.offloads,
        "command": list(command),
        "exit_code": exit_code,
        "seconds": seconds,
        "interfaces": interfaces,
    }
    path = Path(config.run_root) / config.name / "lab.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, record)
    Terminal().print(lab_table(record).to_rich())
    print(f"Lab: {path}")
    return exit_code


if __name__ == "__main__":
    own_arguments, rank_command = split_arguments(sys.argv[1:])
    run_command("lab", LabConfig, lambda config: lab(config, rank_command), argv=own_arguments)
