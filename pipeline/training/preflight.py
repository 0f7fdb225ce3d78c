"""What can be known to be wrong before any rank starts, mostly without torch: said once, by one process."""

import contextlib
import json
import os
from pathlib import Path

from pipeline.config.evaluate import EvaluateConfig
from pipeline.config.training import TrainConfig
from pipeline.core.files import read_regular
from pipeline.core.processes import apart
from pipeline.data.root import check_root
from pipeline.data.shards.manifest import MANIFEST_NAME, Manifest, NoSplitError
from pipeline.models import zoo
from pipeline.models.external import is_external
from pipeline.models.trial import try_apart
from pipeline.run.directory import RunDirectory
from pipeline.run.launch.limits import check_pictures
from pipeline.run.record.tracking import ID_FILE
from pipeline.run.record.wandb_variables import check_variables

LARGEST_SIDECAR_BYTES = 1 << 20


def check_before_ranks(config: TrainConfig) -> None:
    """Raise the user error that every rank of this run would raise.

    Raises:
        ConfigError: run name, W&B's variables, model, metaparameters, a global batch that the ranks cannot share, or
            pictures that the model cannot take or that fit into no memory; weights to begin with, or modules to freeze,
            that are not this model's; a network of others that cannot be built, or cannot be trained.
        DataError: no shards at data.root, or not the splits wanted.
        CheckpointError: no weights where the run is to begin with some, or damaged ones.
    """
    run = RunDirectory(config.run_root, config.name)
    check_variables(config.tracking, run.path / ID_FILE, os.environ)
    num_ranks = config.cluster.devices
    check_model(config, num_ranks)
    side = max(config.input.size, config.input.resize_side, config.input.size + 2 * config.data.augment.pad)
    for key, num_pictures in (
        ("batch.max_per_rank", config.batch.split(num_ranks).per_rank),
        ("trainer.evaluation_batch_per_rank", config.trainer.evaluation_batch_per_rank),
    ):
        check_pictures(key, num_pictures, side, num_ranks=num_ranks)
    num_classes = check_root(config.data, config.data.train_split)
    every = config.trainer.validate_every_steps
    if every != 0:
        with contextlib.suppress(*() if every else (NoSplitError,)):  # without one it trains and says so
            check_root(config.data, config.data.val_split)
    per_rank = config.batch.split(num_ranks).per_rank
    try_apart(config.model, config.model.num_classes or num_classes, side=config.input.size, per_rank=per_rank)
    if config.init.checkpoint is not None or config.init.freeze:
        is_fresh = not any(run.checkpoints.glob("*.ckpt"))
        apart(lambda: _check_beginning(config, is_fresh=is_fresh))


def _check_beginning(config: TrainConfig, *, is_fresh: bool) -> None:
    """Begin as a rank would, as far as the number of classes is known before the shards are opened."""
    from pipeline.training.begin import begin_from, freeze

    assert config.data.root is not None
    root, num_classes, classes = Path(config.data.root), config.model.num_classes, None
    if (root / MANIFEST_NAME).is_file():
        classes = Manifest.load(root).classes
        num_classes = num_classes or len(classes)
    told = config.model
    model = zoo.build(told.name, num_classes or 2, allow_code=told.allow_code, **told.metaparameters)
    if config.init.checkpoint is not None and is_fresh and num_classes is not None:
        begin_from(config, model, num_classes, classes)
    freeze(model, config.init.freeze, num_classes or 2)


def check_model(config: TrainConfig, num_ranks: int) -> None:
    """Refuse a model that does not exist, or that cannot train on its pictures in the batches that each rank gets.

    Raises:
        ConfigError: the model, its metaparameters, the size of the pictures, or the batch.
    """
    zoo.check_pictures(config.model, config.input.size, per_rank=config.batch.split(num_ranks).per_rank)


def check_evaluation(config: EvaluateConfig, split: str) -> None:
    """Raise the user error that every rank of this evaluation would raise.

    Raises:
        ConfigError: the model or its metaparameters. What its pictures are, the weights say.
        DataError: no shards at data.root, or not the split.
        CheckpointError: of a network of others, the weights.
    """
    if config.model.name:  # else the checkpoint says which it is
        zoo.check(config.model.name, config.model.metaparameters)
    check_root(config.data, split)
    if is_external(config.model.name or _model_beside(Path(config.checkpoint))):
        apart(lambda: _load(config))


def _model_beside(checkpoint: Path) -> str:
    """Return the model that the files beside a checkpoint, or in a run, say it is of; empty: they do not."""
    folders = (checkpoint, checkpoint / "checkpoints")
    sidecars = [path for folder in folders for path in folder.glob("*.ckpt.json")]
    for sidecar in (*sidecars, checkpoint.parent / f"{checkpoint.name}.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return str(json.loads(read_regular(sidecar, LARGEST_SIDECAR_BYTES))["model"])
    return ""


def _load(config: EvaluateConfig) -> None:
    """Build the network and load its weights, as each rank will."""
    from pipeline.training.trained import load_trained

    load_trained(Path(config.checkpoint), config.model, size=config.data.size)
