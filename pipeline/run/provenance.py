"""What a run was made of: code, packages, machine. Written once per attempt, as environment.json."""

import functools
import hashlib
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

from pipeline.run.launch.ranks import LabJson, RankInfo, lab_conditions

CODE_ROOT = Path(__file__).resolve().parents[2]
GIT_SECONDS = 10.0
PACKAGES = (
    "torch",
    "torchvision",
    "pytorch-lightning",
    "webdataset",
    "wandb",
    "hydra-core",
    "omegaconf",
    "simplejpeg",
    "pillow",
    "numpy",
    "torchmetrics",
    "timm",
)
# What decides which kernels oneDNN picks: bf16 gains from the first two, int8 and fp32 from the rest.
CPU_FLAGS = ("amx_bf16", "avx512_bf16", "amx_int8", "avx512_vnni", "avx512f", "avx2", "f16c")


class GitJson(TypedDict):
    """The code's commit. Without a checkout all but `reason` are None."""

    commit: str | None
    dirty: bool | None
    diff_sha256: str | None
    reason: str | None
    """Why nothing is known."""


class CpuJson(TypedDict):
    """The processor of this machine."""

    model: str
    num_cores: int | None
    """Cores this process may use."""
    flags: list[str]
    """Those of CPU_FLAGS that it has."""


class EnvironmentJson(TypedDict):
    """environment.json, to which a command adds what it alone knows."""

    schema: int
    git: GitJson
    python: str
    executable_prefix: str
    packages: dict[str, str | None]
    platform: str
    hosts: list[str]
    ranks: dict[str, Any]
    """`RankInfo` of rank 0."""
    lab: LabJson | None
    cpu: CpuJson
    num_threads_per_rank: int
    devices: list[str]
    cuda: str | None


def describe(ranks: RankInfo, *, hosts: Sequence[str] | None = None, num_threads: int | None = None) -> EnvironmentJson:
    """Describe code, packages and machine. Of the environment's variables only the lab's is read: others hold secrets.

    Args:
        ranks: Place of this process.
        hosts: Host name of every rank; None: this host alone.
        num_threads: Compute threads per rank; None: torch's.

    Returns:
        Plain values for environment.json.
    """
    import torch

    return {
        "schema": 1,
        "git": describe_git(CODE_ROOT),
        "python": platform.python_version(),
        "executable_prefix": Path(sys.prefix).name,
        "packages": {name: package_version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "hosts": list(hosts) if hosts is not None else [socket.gethostname()],
        "ranks": asdict(ranks),
        "lab": lab_conditions(),
        "cpu": describe_cpu(),
        "num_threads_per_rank": torch.get_num_threads() if num_threads is None else num_threads,
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of Python, of squeezewire and of those packages that matter and are installed."""
    installed = {name: package_version(name) for name in ("squeezewire", *PACKAGES)}
    return {"python": platform.python_version(), **{name: v for name, v in installed.items() if v is not None}}


def package_version(name: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_cpu() -> CpuJson:
    """Describe the processor: model, cores this process may use, and the instruction sets that matter here."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass  # not Linux
    present = set(fields.get("flags", fields.get("Features", "")).split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "num_cores": cores,
        "flags": [flag for flag in CPU_FLAGS if flag in present],
    }


def describe_git(root: Path) -> GitJson:
    """Describe the commit of the checkout at `root`, and hash what differs from it.

    The hash covers the diff of tracked files and the names and contents of untracked ones, so equal hashes mean equal
    code.
    """
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel").decode().strip()) != root:
            return _no_git("the code is not the root of a git checkout")
        commit = _git(root, "rev-parse", "HEAD").decode().strip()
        diff = _git(root, "diff", "--binary", "--no-ext-diff", "HEAD")
        untracked = _git(root, "ls-files", "--others", "--exclude-standard", "-z")
    except FileNotFoundError:
        return _no_git("git is not installed")
    except subprocess.TimeoutExpired:
        return _no_git(f"git took longer than {GIT_SECONDS:.0f} s")
    except subprocess.CalledProcessError as error:
        return _no_git(error.stderr.decode(errors="replace").strip().partition("\n")[0] or "git failed")
    names = [name for name in untracked.split(b"\0") if name]
    if not diff and not names:
        return {"commit": commit, "dirty": False, "diff_sha256": None, "reason": None}
    digest = hashlib.sha256(diff)
    for name in sorted(names):
        path = root / os.fsdecode(name)
        digest.update(b"\0" + name + b"\0")
        if path.is_file():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return {"commit": commit, "dirty": True, "diff_sha256": digest.hexdigest(), "reason": None}


def _git(root: Path, *arguments: str) -> bytes:
    # GIT_OPTIONAL_LOCKS: reading must not write the index, which a read-only checkout or another git would resent.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, check=True, timeout=GIT_SECONDS, env=environment).stdout


def _no_git(reason: str) -> GitJson:
    return {"commit": None, "dirty": None, "diff_sha256": None, "reason": reason}
