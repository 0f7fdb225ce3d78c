"""What can be known to be wrong before any rank starts, and before torch is imported: said once, by one process."""

import os

from pipeline.config.training import TrainConfig
from pipeline.data.root import check_root
from pipeline.models import zoo
from pipeline.run.directory import RunDirectory
from pipeline.run.launch.limits import check_pictures
from pipeline.run.record.tracking import ID_FILE
from pipeline.run.record.wandb_variables import check_variables


def check_before_ranks(config: TrainConfig) -> None:
    """Raise the user error that every rank of this run would raise.

    Raises:
        ConfigError: run name, W&B's variables, model, metaparameters, a global batch that the ranks cannot share, or
            pictures that fit into no memory.
        DataError: no shards at data.root, or not the splits wanted.
    """
    run = RunDirectory(config.run_root, config.name)
    check_variables(config.tracking, run.path / ID_FILE, os.environ)
    zoo.check(config.model.name, config.model.metaparameters)
    num_ranks = config.cluster.devices
    side = max(config.input.size, config.input.resize_side, config.input.size + 2 * config.data.augment.pad)
    for key, num_pictures in (
        ("batch.max_per_rank", config.batch.split(num_ranks).per_rank),
        ("trainer.evaluation_batch_per_rank", config.trainer.evaluation_batch_per_rank),
    ):
        check_pictures(key, num_pictures, side, num_ranks=num_ranks)
    check_root(config.data, config.data.train_split)
    if config.trainer.validate_every_steps != 0:
        check_root(config.data, config.data.val_split)
