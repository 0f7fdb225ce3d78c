"""Where a rank is: hosts told apart by machine and boot, whatever a launcher calls its nodes."""

import os
import platform
import socket
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from pipeline.comm.ledger.traffic import Placement
from pipeline.core.files import sha256_of_file
from pipeline.run.launch.ranks import lab_conditions

MACHINE, BOOT = Path("/etc/machine-id"), Path("/proc/sys/kernel/random/boot_id")


class Hello(TypedDict):
    """What a rank says of itself when it joins."""

    host: str
    """The machine and its boot; the same for all containers of one kernel that share a machine's id."""
    hostname: str
    launcher: str
    """What started it there: torchrun's group or Slurm's node, else the process's parent."""
    script: str
    """Name and content of the program, as far as it is a file."""
    torch: str


def hello() -> Hello:
    """Return what this rank says of itself."""
    import torch

    agent = os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID") or f"process {os.getppid()}"
    return {
        "host": host_id(),
        "hostname": socket.gethostname(),
        "launcher": agent,
        "script": _script(),
        "torch": torch.__version__,
    }


def host_id() -> str:
    """Return what tells this host apart from all others: the id of the machine and of its boot."""
    parts = [path.read_text().strip() for path in (MACHINE, BOOT) if path.is_file()]
    return " ".join(parts) or platform.node()


def _script() -> str:
    path = Path(getattr(sys.modules.get("__main__"), "__file__", None) or "")
    return f"{path.name} {sha256_of_file(path)[:12]}" if path.is_file() else "no file"


def place(hellos: Sequence[Hello | None], placement: str) -> tuple[Placement, list[str]]:
    """Return the servers of the ranks, and sentences on what is worth knowing about them.

    Args:
        hellos: What each rank said; None: it said nothing in time.
        placement: `host` or `rank`, as in `Settings`.
    """
    num_ranks, said = len(hellos), [one for one in hellos if one is not None]
    notes = [*_silent(hellos), *_differing(hellos)]
    lab = lab_conditions()
    if lab is not None:
        return Placement(tuple(lab["server_of_rank"]), measured=True), notes
    if placement == "rank" or len(said) < num_ranks or num_ranks == 1:
        return Placement.assumed(num_ranks), notes
    launchers: dict[str, set[str]] = defaultdict(set)
    for one in said:
        launchers[one["host"]].add(one["launcher"])
    if len(launchers) == 1:
        several = len(next(iter(launchers.values())))
        by = f", though {several} launchers started them" if several > 1 and _has_agents() else ""
        notes.append(
            f"All {num_ranks} ranks sit on one host: one server{by}, and nothing leaves it. placement=rank takes each"
            " rank as a server of its own."
        )
    return Placement.of_hosts([one["host"] for one in said]), notes


def _has_agents() -> bool:
    return "GROUP_RANK" in os.environ or "SLURM_NODEID" in os.environ


def _silent(hellos: Sequence[Hello | None]) -> list[str]:
    silent = [rank for rank, one in enumerate(hellos) if one is None]
    if not silent:
        return []
    return [
        f"{_ranks(silent)} of {len(hellos)} ranks did not report: start all of them under pipeline.meter. Without them"
        " nothing is compared."
    ]


def _differing(hellos: Sequence[Hello | None]) -> list[str]:
    """Tell ranks that are not the same program, or run it with another torch."""
    told: list[str] = []
    for key, what, remedy in (
        ("script", "different programs", "what one rank issued does not stand for the others"),
        ("torch", "different versions of torch", "install the same everywhere"),
    ):
        ranks: dict[str, list[int]] = defaultdict(list)
        for rank, one in enumerate(hellos):
            if one is not None:
                ranks[str(one[key])].append(rank)
        if len(ranks) > 1:
            found = "; ".join(f"{_ranks(some)}: {value}" for value, some in ranks.items())
            told.append(f"The ranks run {what} ({found}): {remedy}.")
    return told


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:8]))}{', ...' if len(ranks) > 8 else ''}"
