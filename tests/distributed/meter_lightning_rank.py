"""One rank of Lightning's Trainer with MeteredDDPStrategy: an unbroken run, and one broken by a checkpoint."""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pipeline.comm.collectives import CollectiveMeter
from pipeline.comm.ddp import gradient_bytes_by_parameter, rebuild_buckets
from pipeline.comm.ledger.document import Conditions
from pipeline.comm.ledger.ledger import Ledger
from pipeline.training.lightning import MeteredDDPStrategy
from tests.distributed.meter_ranks import leave, unreconciled

NUM_STEPS = 6
ACCUMULATE = 2
VALIDATE_AFTER = 3
CONDITIONS = Conditions(run="test", model="small", hook="none", global_batch=6)


class Positions(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples that are a function of their position in the run and of the rank."""

    def __init__(self, first: int, size: int) -> None:
        self.first, self.size = first, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(100 * (self.first + index) + int(os.environ["RANK"]))
        return torch.randn(3, 8, 8, generator=generator), torch.randint(0, 10, (), generator=generator)


class Small(pl.LightningModule):
    """A net with BatchNorm and several buckets, trained by SGD with momentum."""

    def __init__(self, ledger: Callable[[], Ledger], before_training: Callable[["Small"], None]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.model = nn.Sequential(
            nn.Conv2d(3, 41, 3),
            nn.BatchNorm2d(41),
            nn.ReLU(),
            nn.Conv2d(41, 311, 3),
            nn.Flatten(),
            nn.Linear(4976, 211),
        )
        self.ledger = ledger
        self.before_training = before_training
        self.rows: list[dict[str, float]] = []

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self.model(images_BCHW)

    def on_train_start(self) -> None:
        self.before_training(self)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % ACCUMULATE == 0:
            with self.trainer.strategy.meter.origin("metrics"):  # type: ignore[attr-defined]
                dist.all_reduce(torch.zeros(3))
            self.rows.append(self.ledger().commit_step().metrics())

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        self.model(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def fit(
    first_step: int,
    num_steps: int,
    *,
    metered: bool = True,
    state: dict[str, Any] | None = None,
    save: Path | None = None,
) -> dict[str, Any]:
    """Train from `first_step`; returns the rows, the ledger and a digest, and the state if `save` is given."""
    meter = CollectiveMeter(enabled=metered)
    strategy = MeteredDDPStrategy(
        meter=meter,
        bucket_megabytes=1,
        name_prefix="model.",
        cluster_environment=TorchElasticEnvironment(),
        process_group_backend="gloo",
    )
    ledgers: list[Ledger] = []

    def before_training(module: Small) -> None:
        ledgers.append(unreconciled(meter, gradient_bytes_by_parameter(module, "model.")))
        if state is not None:
            module.load_state_dict(state["model"])
            module.trainer.optimizers[0].load_state_dict(state["optimizer"])
            ledgers[0].load_state_dict(state["ledger"], state["previous"])
        ddp = module.trainer.strategy.model
        assert isinstance(ddp, nn.parallel.DistributedDataParallel)
        images_BCHW, labels_B = torch.ones(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
        rebuild_buckets(ddp, lambda: nn.functional.cross_entropy(ddp(images_BCHW), labels_B), meter)

    module = Small(lambda: ledgers[0], before_training)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=dist_size(),
        strategy=strategy,
        max_steps=num_steps,
        accumulate_grad_batches=ACCUMULATE,
        val_check_interval=VALIDATE_AFTER * ACCUMULATE,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    size = 2 * ACCUMULATE * num_steps
    train = DataLoader(Positions(2 * ACCUMULATE * first_step, size), batch_size=2)
    trainer.fit(module, train, DataLoader(Positions(9_000, 4), batch_size=2))
    ledger = ledgers[0]
    result = {"rows": module.rows, "digest": digest(module)}
    if save is not None:
        trainer.save_checkpoint(save)
        result["state"] = {
            "model": {name: tensor.clone() for name, tensor in module.state_dict().items()},
            "optimizer": trainer.optimizers[0].state_dict(),
            "ledger": ledger.state_dict(),
            "previous": ledger.to_json(CONDITIONS, ended=True),
        }
    result["json"] = ledger.to_json(CONDITIONS, ended=True)
    return result


def digest(module: nn.Module) -> str:
    whole = hashlib.sha256()
    for parameter in module.parameters():
        whole.update(parameter.detach().numpy().tobytes())
    return whole.hexdigest()


def dist_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def main(out: Path) -> None:
    rank = os.environ["RANK"]
    whole = fit(0, NUM_STEPS)
    plain = fit(0, NUM_STEPS, metered=False)
    first = fit(0, VALIDATE_AFTER, save=out / "lightning.ckpt")
    resumed = fit(VALIDATE_AFTER, NUM_STEPS - VALIDATE_AFTER, state=first.pop("state"))
    results = {"whole": whole, "plain": plain, "first": first, "resumed": resumed}
    (out / f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(Path(sys.argv[1]))
