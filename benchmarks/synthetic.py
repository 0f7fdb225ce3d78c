"""Parts of a training on their own: the model without data or Lightning, and the data without a model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader

    from pipeline.data.batches import LoadedBatch
    from pipeline.data.index import ShardIndex


@dataclass(frozen=True)
class Training:
    """One copy of a model under DDP."""

    ddp: "DistributedDataParallel"
    loss: Callable[[], "torch.Tensor"]
    """A forward pass and its loss, always on the same pictures."""


def make_training(model: str, batch: int, size: int, wrap: Callable[[Any], "DistributedDataParallel"]) -> Training:
    """A rank's model, pictures of noise and loss, computed as by the train command; after the process group was made.

    Weights are the same on every rank and in every copy; pictures and labels are the rank's own.

    batch: pictures of this rank. size: their side. wrap: makes DDP of the module.
    """
    import torch
    import torch.distributed as dist
    from torch.nn import functional as F

    from pipeline.core.compute import choose_compute
    from pipeline.models import zoo

    compute = choose_compute(accelerator="auto", precision="auto")
    generator = torch.Generator().manual_seed(dist.get_rank())
    images_BCHW = torch.randn((batch, 3, size, size), generator=generator).to(memory_format=compute.memory_format)
    labels_B = torch.randint(0, 1000, (batch,), generator=generator)
    torch.manual_seed(0)
    ddp = wrap(zoo.build(model, 1000, dropout=0.0).to(memory_format=compute.memory_format))

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=compute.precision == "bf16"):
            return F.cross_entropy(ddp(images_BCHW).float(), labels_B)

    return Training(ddp, loss)


def whole_group() -> "dist.ProcessGroup":
    """All ranks in a group of their own, which the meter does not see."""
    import torch.distributed as dist

    group = dist.new_group(list(range(dist.get_world_size())))
    assert isinstance(group, dist.ProcessGroup)
    return group


def first_rank(
    index: "ShardIndex", *, seed: int, global_batch: int, world_size: int = 1, num_workers: int = 0, start_step: int = 0
) -> "DataLoader[LoadedBatch]":
    """What rank 0 of a training reads, to no end; all else is the product's default."""
    from pipeline.config.data import DataConfig
    from pipeline.config.model import InputConfig
    from pipeline.config.training import BatchConfig
    from pipeline.data.loader import Reader, training_loader

    return training_loader(
        index,
        DataConfig(),
        InputConfig(),
        Reader(world_size=world_size, num_workers=num_workers),
        BatchConfig(global_size=global_batch, max_per_rank=global_batch).split(world_size),
        seed=seed,
        start_step=start_step,
        num_steps=10**6,
    )
