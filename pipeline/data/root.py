"""Are there shards at `data.root`? Looked at before ranks are started, without opening any of them."""

from pathlib import Path

from pipeline.config.data import DataConfig
from pipeline.data.local import shards_there
from pipeline.data.remote.cache import CacheSettings
from pipeline.data.remote.opening import is_url
from pipeline.data.remote.shards import check_remote


def check_root(data: DataConfig, split: str) -> int | None:
    """Raise the `DataError` that opening `split` at `data.root` would raise without reading a shard.

    In a directory: every shard is there with its size. At a URL: the same, as far as the server tells.

    Returns:
        The number of classes, where a manifest lies in the directory.
    """
    root = data.root
    assert root is not None
    if is_url(root):
        check_remote(root, split, CacheSettings.of(data))
        return None
    manifest, _, _ = shards_there(Path(root), split)
    return None if manifest is None else len(manifest.classes)
