"""Where and in which arithmetic a rank computes: device, precision, threads, memory."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.core.errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Compute:
    """Where and in which arithmetic a rank computes."""

    accelerator: str
    """`cpu` or `gpu`, as Lightning names them."""
    precision: str
    """`fp32` or `bf16` (autocast: parameters and gradients stay fp32)."""
    channels_last: bool
    reason: str
    """One clause for the line printed at start."""

    @property
    def lightning_precision(self) -> str:
        """Lightning's name of the precision."""
        return "bf16-mixed" if self.precision == "bf16" else "32-true"

    @property
    def backend(self) -> str:
        """The process group's backend."""
        return "nccl" if self.accelerator == "gpu" else "gloo"

    @property
    def memory_format(self) -> "torch.memory_format":
        """Of weights and activations."""
        import torch

        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def arithmetic(self) -> str:
        """What was chosen."""
        layout = "channels_last" if self.channels_last else "contiguous (NCHW)"
        return f"{self.precision} on {self.accelerator.upper()}, {layout}"

    @property
    def sentence(self) -> str:
        """What was chosen and why."""
        return f"{self.arithmetic}: {self.reason}"


def choose_accelerator(asked: str, *, key: str = "cluster.accelerator") -> str:
    """Resolve `auto`, `cpu` or `gpu` to `gpu` where asked for or seen, else `cpu`.

    Args:
        asked: What the configuration says.
        key: Where it says so.

    Raises:
        ConfigError: a GPU is asked for and torch sees none.
    """
    import torch

    if asked == "gpu" and not torch.cuda.is_available():
        raise ConfigError(f"{key}=gpu, but torch sees no GPU: check the driver, or use cpu.")
    if asked == "auto":
        return "gpu" if torch.cuda.is_available() else "cpu"
    return asked


def choose_compute(*, accelerator: str, precision: str, memory_format: str = "auto") -> Compute:
    """Resolve each `auto` by what the hardware gains from.

    Args:
        accelerator: `auto`, `cpu` or `gpu`.
        precision: `auto`, `fp32` or `bf16`.
        memory_format: `auto`, `channels_last` or `contiguous`.

    Raises:
        ConfigError: a GPU is asked for and torch sees none.
    """
    import torch

    accelerator = choose_accelerator(accelerator)
    if precision != "auto":
        reason = "as trainer.precision asks"
    elif accelerator == "gpu":
        gains = torch.cuda.is_bf16_supported(including_emulation=False)
        precision, reason = ("bf16", "the GPU computes in it") if gains else ("fp32", "this GPU has no bf16 units")
    elif torch.cpu._is_amx_tile_supported():  # pyright: ignore[reportPrivateUsage] # torch 2.14 has no public name
        precision, reason = "bf16", "the CPU has AMX"
    elif torch.cpu._is_avx512_bf16_supported():  # pyright: ignore[reportPrivateUsage] # as above
        precision, reason = "bf16", "the CPU has AVX512-BF16"
    else:
        precision, reason = "fp32", "this CPU gains nothing from bf16"
    formats = {"auto": precision == "bf16" or accelerator == "gpu", "channels_last": True, "contiguous": False}
    return Compute(accelerator, precision, formats[memory_format], reason)


def choose_num_threads(
    configured: int | None, environment: Mapping[str, str], num_cores: int, local_world_size: int
) -> int:
    """Compute threads of a rank on the CPU.

    As configured; else as OMP_NUM_THREADS or Slurm (cores of a task) say; else its share of the `num_cores` this
    process may use.
    """
    for value in (configured, environment.get("OMP_NUM_THREADS"), environment.get("SLURM_CPUS_PER_TASK")):
        if value is not None and str(value).isdigit() and int(value) > 0:
            return int(value)
    return max(1, num_cores // local_world_size)


def set_threads(configured: int | None, local_world_size: int) -> int:
    """Tell torch how many threads a rank computes with, and return that number: see `choose_num_threads`."""
    import torch

    num_cores = len(os.sched_getaffinity(0))
    num_threads = choose_num_threads(configured, os.environ, num_cores, local_world_size)
    torch.set_num_threads(num_threads)
    os.environ["OMP_NUM_THREADS"] = str(num_threads)  # where it is missing, Lightning sets torch's threads anew
    return num_threads


def keep_freed_memory() -> bool:
    """Let glibc's allocator keep what a step frees, because the next step needs it again.

    By default glibc fetches every block above 32 MiB anew from the kernel and gives it back when it is freed, so that
    every step faults its larger activations in, page by page. The peak stays the same; it is held until the end.
    mallopt(3): M_MMAP_MAX=0 takes all blocks from the heap, M_TRIM_THRESHOLD=-1 never shrinks it.

    Returns whether the allocator listened; other C libraries have no such switch.
    """
    import ctypes

    m_trim_threshold, m_mmap_max = -1, -4  # <malloc.h>
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(m_mmap_max, 0)) and bool(mallopt(m_trim_threshold, -1))


def has_peers() -> bool:
    """Whether this process exchanges anything with other ranks: it is in a process group, and not alone there."""
    import torch.distributed as dist

    return dist.is_initialized() and dist.get_world_size() > 1
