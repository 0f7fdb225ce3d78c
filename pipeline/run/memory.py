"""Whether a training can fit into the memory there is, said before it starts."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.core.units import format_bytes

_CGROUPS = Path("/sys/fs/cgroup")
_GPU_SECONDS = 120.0
# In a process of its own: asking makes a context on each GPU, which would stay there while the ranks run.
_FREE_OF_GPUS = "import torch; print(*(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())))"


@dataclass(frozen=True)
class Available:
    """Memory that the ranks of one machine may take."""

    num_bytes: int
    source: str
    """Where the number comes from, for the message."""
    per_rank: bool = False
    """Each rank has as much to itself: a GPU."""


def refusal(training_memory_bytes: int, num_ranks: int, available: Available | None) -> str:
    """Say why the ranks of one machine cannot hold the training. Pure.

    Args:
        training_memory_bytes: What one rank certainly needs.
        num_ranks: Ranks of the machine.
        available: Memory there is; None where nothing is known.

    Returns:
        A sentence, empty where the training may fit.
    """
    if available is None:
        return ""
    needed = training_memory_bytes if available.per_rank else training_memory_bytes * num_ranks
    if needed <= available.num_bytes:
        return ""
    whose = "A rank needs" if available.per_rank else f"The {num_ranks} ranks of a machine need"
    return (
        f"{whose} at least {format_bytes(needed)} for weights, gradients, momentum and activations, but"
        f" {format_bytes(available.num_bytes)} are available ({available.source}): lower batch.global_size or"
        " batch.max_per_rank, or use more machines. It was not started."
    )


def available_memory(accelerator: str) -> Available | None:
    """Return this machine's memory: of the GPU with least free, or what kernel and cgroup leave to the CPU's ranks."""
    if accelerator == "gpu":
        return _free_of_gpus()
    system = Available(psutil.virtual_memory().available, "MemAvailable")
    cgroup = cgroup_available(_CGROUPS, Path("/proc/self/cgroup"))
    return system if cgroup is None else min(system, cgroup, key=lambda memory: memory.num_bytes)


def _free_of_gpus() -> Available | None:
    command = [sys.executable, "-c", _FREE_OF_GPUS]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=_GPU_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    free = [int(word) for word in told.stdout.split()] if told.returncode == 0 else []
    return Available(min(free), "the GPU with least free memory", per_rank=True) if free else None


def cgroup_available(root: Path, membership: Path) -> Available | None:
    """Return what the tightest memory limit of a process's cgroup and its ancestors leaves.

    Pages of files count as free: they can be dropped.

    Args:
        root: Where cgroups are mounted.
        membership: The process's file of memberships, such as /proc/self/cgroup.

    Returns:
        Bytes, and where they come from; None without a limit.
    """
    left = []
    for controllers, path in _memberships(membership):
        if controllers == "":
            mount, limit, used, cache = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        relative = Path(path.lstrip("/"))
        for group in (mount / relative, *(mount / parent for parent in relative.parents)):
            left += _left_in(group, limit, used, cache)
    return Available(max(0, min(left)), "the cgroup's limit") if left else None


def _memberships(file: Path) -> list[tuple[str, str]]:
    """Return (controllers, path) of each line `id:controllers:path`."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return []
    return [(controllers, path) for _, controllers, path in (line.split(":", 2) for line in lines)]


def _left_in(group: Path, limit: str, used: str, cache: str) -> list[int]:
    """Return the bytes below this cgroup's own limit, if it has one."""
    try:
        most = (group / limit).read_text().strip()
        if not most.isdigit() or int(most) >= 2**60:  # `max`, or version 1's way to say so
            return []
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return [int(most) - int((group / used).read_text()) + int(statistics.get(cache, 0))]
    except OSError:
        return []
