"""What can be known to be wrong before any rank starts, and before torch is imported: said once, by one process."""

from pipeline.config.training import TrainConfig
from pipeline.data.root import check_root
from pipeline.models import zoo
from pipeline.run.directory import validate_name


def check_before_ranks(config: TrainConfig) -> None:
    """Raise the user error that every rank of this run would raise.

    Raises:
        ConfigError: run name, model, metaparameters, or a global batch that the ranks cannot share.
        DataError: no shards at data.root, or not the splits wanted.
    """
    validate_name(config.name)
    zoo.check(config.model.name, config.model.metaparameters)
    config.batch.check(config.cluster.devices)
    check_root(config.data, config.data.train_split)
    if config.trainer.validate_every_steps != 0:
        check_root(config.data, config.data.val_split)
