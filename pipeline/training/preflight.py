"""What can be known to be wrong before any rank starts, and before torch is imported: said once, by one process."""

from pathlib import Path

from pipeline.config.training import DataConfig, TrainConfig
from pipeline.core.errors import DataError
from pipeline.data.remote.cache import CacheSettings
from pipeline.data.remote.shards import check_remote
from pipeline.data.remote.store import is_url
from pipeline.data.shards.foreign import find_split
from pipeline.data.shards.manifest import MANIFEST_NAME, Manifest
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
    config.batch.split(config.cluster.devices)
    check_root(config.data, config.data.train_split)
    if config.trainer.validate_every_steps != 0:
        check_root(config.data, config.data.val_split)


def check_root(data: DataConfig, split: str) -> None:
    """Raise `DataError` unless there are shards of `split` at `data.root`.

    In a directory: a manifest that has it, or shards of that name. At a URL: every shard, as far as the server tells.
    """
    root = data.root
    assert root is not None
    if is_url(root):
        check_remote(root, split, CacheSettings.of(data))
        return
    path = Path(root)
    if not path.is_dir():
        raise DataError(
            f"data.root={root} is not a directory: make shards there with `python -m pipeline.prepare source=builtin"
            f" out={root}` (or from your pictures), or give the directory that holds them."
        )
    if (path / MANIFEST_NAME).exists():
        Manifest.load(path).split(split)
    elif not any(path.glob("*.tar")):
        raise DataError(f"data.root={root} holds no shards (*.tar): give the directory that `prepare` wrote.")
    else:
        find_split(path, split)
