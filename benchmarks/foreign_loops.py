"""Training loops of others, for `foreign_programs`: torch's own, Lightning's, timm's, Accelerate's, transformers'.

    torchrun --nproc-per-node=2 benchmarks/foreign_loops.py NAME

Each is written as the library's own documentation has it, on random data; nothing here knows of the meter.
"""

# As the libraries' pages have it, some of them installed elsewhere:
# pyright: reportMissingImports=false, reportPrivateImportUsage=false, reportArgumentType=false
# pyright: reportPossiblyUnboundVariable=false

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

NUM_STEPS = 24
SGD = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)


def resnet() -> nn.Module:
    import torchvision

    return torchvision.models.resnet18(num_classes=10)


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(128, 64))


def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32)


def steps(model: nn.Module, optimizer: Any, batch: Callable[[], torch.Tensor] = images) -> None:
    for _ in range(NUM_STEPS):
        model(batch()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def ddp() -> None:
    dist.init_process_group("gloo")
    model = DistributedDataParallel(resnet())
    steps(model, SGD(model.parameters()))
    dist.destroy_process_group()


def ddp_unused_no_sync() -> None:
    dist.init_process_group("gloo")
    model = resnet()
    model.add_module("auxiliary", nn.Linear(64, 10))
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = SGD(wrapped.parameters())
    for step in range(2 * NUM_STEPS):
        if step % 2 == 0:
            with wrapped.no_sync():
                wrapped(images()).square().mean().backward()
            continue
        wrapped(images()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def ddp_powersgd() -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    dist.init_process_group("gloo")
    model = DistributedDataParallel(resnet(), bucket_cap_mb=1000)  # one bucket: torch's hook mixes several up on gloo
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    steps(model, SGD(model.parameters()))
    dist.destroy_process_group()


def ddp_bf16_hook() -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    dist.init_process_group("gloo")
    model = DistributedDataParallel(resnet())
    model.register_comm_hook(None, default_hooks.bf16_compress_hook)
    steps(model, SGD(model.parameters()))
    dist.destroy_process_group()


def ddp_zero() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    dist.init_process_group("gloo")
    model = DistributedDataParallel(resnet())
    steps(model, ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.Adam, lr=0.001))
    dist.destroy_process_group()


def by_hand() -> None:
    """Gradients averaged after the backward pass, one by one; the program just ends."""
    dist.init_process_group("gloo")
    model = resnet()
    optimizer = SGD(model.parameters())
    for _ in range(NUM_STEPS):
        model(images()).square().mean().backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad, op=dist.ReduceOp.SUM)
        optimizer.step()
        optimizer.zero_grad()


def fsdp2_on_two_levels() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    model = transformer()
    for layer in model[0].layers:  # pyright: ignore
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    steps(model, torch.optim.AdamW(model.parameters()), lambda: torch.randn(2, 16, 128))
    dist.destroy_process_group()


def lightning() -> None:
    import pytorch_lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = resnet()

        def training_step(self, batch: Any) -> torch.Tensor:
            loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
            self.log("loss", loss, sync_dist=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return SGD(self.parameters())

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", devices=dist_size(), strategy="ddp", max_steps=NUM_STEPS, **quiet)
    trainer.fit(Module(), DataLoader(data(), batch_size=4))


def timm_loop() -> None:
    import timm
    import timm.utils
    from timm.optim import create_optimizer_v2

    dist.init_process_group("gloo")
    model = DistributedDataParallel(timm.create_model("mobilenetv3_small_050", num_classes=10))
    optimizer = create_optimizer_v2(model, opt="adamw", lr=0.001)
    for step in range(NUM_STEPS):
        loss = model(images()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 8 == 7:
            timm.utils.reduce_tensor(loss.detach(), dist.get_world_size())
    timm.utils.distribute_bn(model, dist.get_world_size(), reduce=True)
    dist.destroy_process_group()


def accelerate_loop() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = resnet()
    model, optimizer, loader = accelerator.prepare(model, SGD(model.parameters()), DataLoader(data(2), batch_size=4))
    for pictures, labels in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(pictures), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.gather(loss.detach().reshape(1))
    accelerator.end_training()


def transformers_trainer() -> None:
    import tempfile

    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    small = BertConfig(
        vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    rows = [
        {"input_ids": torch.randint(0, 500, (16,)), "labels": torch.randint(0, 2, ())} for _ in range(NUM_STEPS * 8)
    ]
    with tempfile.TemporaryDirectory() as out:
        told = TrainingArguments(
            out, max_steps=NUM_STEPS, per_device_train_batch_size=4, use_cpu=True, report_to=[], save_strategy="no"
        )
        Trainer(BertForSequenceClassification(small), told, train_dataset=rows).train()  # pyright: ignore


def data(times: int = 1) -> TensorDataset:
    num_pictures = times * NUM_STEPS * 4 * dist_size()
    return TensorDataset(torch.randn(num_pictures, 3, 32, 32), torch.randint(0, 10, (num_pictures,)))


def dist_size() -> int:
    return int(os.environ["WORLD_SIZE"])


LOOPS = {
    loop.__name__: loop
    for loop in (
        ddp,
        ddp_unused_no_sync,
        ddp_bf16_hook,
        ddp_powersgd,
        ddp_zero,
        by_hand,
        fsdp2_on_two_levels,
        lightning,
        timm_loop,
        accelerate_loop,
        transformers_trainer,
    )
}

if __name__ == "__main__":
    torch.manual_seed(0)
    LOOPS[sys.argv[1]]()
