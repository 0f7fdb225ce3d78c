"""Pictures that do not decode: replaced in training within a budget, refused in validation."""

import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from pipeline.core.errors import DataError
from pipeline.data.index import ShardIndex
from pipeline.data.quarantine import Quarantine


class BadSamples(pl.Callback):
    """Names pictures that do not decode, once each over all ranks, and stops the run beyond the budget."""

    def __init__(self, index: ShardIndex, max_bad_fraction: float, path: Path) -> None:
        self.quarantine = Quarantine(index, max_bad_fraction, path)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Raises DataError beyond the budget; the other ranks end with this one."""
        del trainer, pl_module, batch_idx
        for sample in self.quarantine.add(batch.bad):
            print(f"warning: another picture takes the place of {sample.reason}", file=sys.stderr, flush=True)

    def sentence(self) -> str:
        """How many pictures were replaced in this run, and where they are named; empty if none were."""
        quarantine = self.quarantine
        if not (number := quarantine.refresh()):
            return ""
        return f"  quarantine  {number} of {quarantine.index.num_samples:,} pictures were replaced: {quarantine.path}\n"

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A validation result that leaves pictures out is refused: it would not be this split's."""
        del trainer, pl_module, outputs, batch_idx, dataloader_idx
        if batch.bad:
            raise DataError(
                f"Validation cannot use {'; '.join(sample.reason for sample in batch.bad[:5])}: a result without it"
                " would be another split's. Prepare the shards again into an empty out=, without it."
            )
