"""What is decided once, before the first step: devices, precision, and how many steps mean what."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config.training import BatchConfig, ClusterConfig, CommConfig, TrainConfig, TrainerConfig
from pipeline.core.errors import ConfigError, DataError
from pipeline.data.order import steps_per_epoch

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


def choose_accelerator(cluster: ClusterConfig) -> str:
    """`gpu` where asked for or seen, else `cpu`. Raises ConfigError when a GPU is asked for and none is seen."""
    import torch

    if cluster.accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("cluster.accelerator=gpu, but torch sees no GPU: check the driver, or use cpu.")
    if cluster.accelerator == "auto":
        return "gpu" if torch.cuda.is_available() else "cpu"
    return cluster.accelerator


def choose_compute(trainer: TrainerConfig, cluster: ClusterConfig) -> Compute:
    """Resolve `auto` by what the hardware gains from."""
    import torch

    accelerator = choose_accelerator(cluster)
    if trainer.precision != "auto":
        precision, reason = trainer.precision, "as trainer.precision asks"
    elif accelerator == "gpu":
        gains = torch.cuda.is_bf16_supported(including_emulation=False)
        precision, reason = ("bf16", "the GPU computes in it") if gains else ("fp32", "this GPU has no bf16 units")
    elif torch.cpu._is_amx_tile_supported():
        precision, reason = "bf16", "the CPU has AMX"
    elif torch.cpu._is_avx512_bf16_supported():
        precision, reason = "bf16", "the CPU has AVX512-BF16"
    else:
        precision, reason = "fp32", "this CPU gains nothing from bf16"
    formats = {"auto": precision == "bf16" or accelerator == "gpu", "channels_last": True, "contiguous": False}
    return Compute(accelerator, precision, formats[trainer.memory_format], reason)


@dataclass(frozen=True)
class Plan:
    """Steps of a run. Steps count optimiser steps; an epoch is a number of whole global batches."""

    num_samples: int
    global_batch: int
    world_size: int
    num_steps: int
    steps_per_epoch: int
    validate_every_steps: int
    """0: never."""
    checkpoint_every_steps: int
    """0: never."""

    @property
    def dropped_per_epoch(self) -> int:
        """Samples left out of each epoch because they do not fill a global batch (others each time)."""
        return max(0, self.num_samples - self.steps_per_epoch * self.global_batch)

    @property
    def repeated_per_epoch(self) -> int:
        """Samples shown a second time in each epoch to fill its last global batch (others each time)."""
        return max(0, self.steps_per_epoch * self.global_batch - self.num_samples)

    @property
    def epoch_sentence(self) -> str:
        """What an epoch is and what becomes of its tail."""
        if self.repeated_per_epoch:
            tail = f"{self.repeated_per_epoch} of them shown twice in each epoch (data.tail=pad)"
        else:
            tail = f"{self.dropped_per_epoch} left out of each epoch" + (
                " (data.tail=drop)" if self.dropped_per_epoch else ""
            )
        return f"{self.steps_per_epoch} an epoch of {self.num_samples:,} pictures, {tail}"

    def validation_due(self, committed_steps: int) -> bool:
        """Whether the weights after `committed_steps` steps are validated: at the interval and at the end."""
        return self._due(committed_steps, self.validate_every_steps)

    def checkpoint_due(self, committed_steps: int) -> bool:
        """Whether the state after `committed_steps` steps is saved: at the interval and at the end."""
        return self._due(committed_steps, self.checkpoint_every_steps)

    def _due(self, committed_steps: int, every: int) -> bool:
        return every > 0 and (committed_steps % every == 0 or committed_steps == self.num_steps)


def make_plan(
    trainer: TrainerConfig,
    batch: BatchConfig,
    num_samples: int,
    world_size: int,
    *,
    validate: bool,
    tail: str = "drop",
) -> Plan:
    """Turn epochs into steps and fill the intervals left null.

    Args:
        tail: data.tail.

    Raises:
        DataError: fewer samples than one global batch. Padded, it would show a picture twice, the same pixels both
            times.
    """
    if num_samples < batch.global_size:
        largest = num_samples // world_size * world_size
        remedy = f"lower batch.global_size to at most {largest}" if largest else f"{world_size} ranks are too many"
        raise DataError(
            f"The training split has {num_samples} samples, fewer than one global batch of {batch.global_size}:"
            f" {remedy}."
        )
    epoch = steps_per_epoch(num_samples, batch.global_size, tail)
    limits = []
    if trainer.max_steps is not None:
        limits.append(trainer.max_steps)
    if trainer.max_epochs is not None:
        limits.append(max(1, math.floor(trainer.max_epochs * epoch)))
    validate_every = epoch if trainer.validate_every_steps is None else trainer.validate_every_steps
    checkpoint_every = epoch if trainer.checkpoint_every_steps is None else trainer.checkpoint_every_steps
    return Plan(
        num_samples=num_samples,
        global_batch=batch.global_size,
        world_size=world_size,
        num_steps=min(limits),
        steps_per_epoch=epoch,
        validate_every_steps=validate_every if validate else 0,
        checkpoint_every_steps=checkpoint_every,
    )


def require_compression(comm: CommConfig, plan: Plan, compute: Compute) -> None:
    """Refuse a compression that would never begin, or that torch's hook cannot do here.

    Raises:
        ConfigError: as said.
    """
    import torch

    if comm.hook != "powersgd":
        return
    if comm.powersgd_start_step >= plan.num_steps:
        raise ConfigError(
            f"comm.powersgd_start_step={comm.powersgd_start_step}, but the run has {plan.num_steps} steps, so that none"
            f" would be compressed: lower it, or set comm.hook=none."
        )
    if compute.accelerator == "cpu" and torch.cuda.is_available():
        raise ConfigError(
            "comm.hook=powersgd on the CPU of a machine with a GPU: torch's hook would synchronise the GPU and fail."
            " Hide it (CUDA_VISIBLE_DEVICES=), or choose another hook."
        )


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


def set_threads(cluster: ClusterConfig, local_world_size: int) -> int:
    """Tell torch; returns the number of threads."""
    import torch

    num_cores = len(os.sched_getaffinity(0))
    num_threads = choose_num_threads(cluster.num_threads, os.environ, num_cores, local_world_size)
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


BEFORE_IT_WAS_A_FIELD = {"data.shuffle_groups": 1, "data.tail": "drop"}
"""What checkpoints of versions without these fields were made with."""


def must_match(config: TrainConfig, shards_hash: str) -> dict[str, object]:
    """The fields a checkpoint carries and a resumed run must not change.

    `shards_hash`: of the training split's index.
    """
    return {
        "model.name": config.model.name,
        "seed": config.seed,
        "batch.global_size": config.batch.global_size,
        "data.shuffle_block": config.data.shuffle_block,
        "data.shuffle_groups": config.data.shuffle_groups,
        "data.tail": config.data.tail,
        "data.shards_sha256": shards_hash,
    }
