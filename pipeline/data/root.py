"""Are there shards at `data.root`? Looked at before ranks are started, without opening any of them."""

from pathlib import Path

from pipeline.config.data import DataConfig
from pipeline.core.errors import DataError
from pipeline.data.remote.cache import CacheSettings
from pipeline.data.remote.opening import is_url
from pipeline.data.remote.shards import check_remote
from pipeline.data.shards.foreign import find_split
from pipeline.data.shards.manifest import MANIFEST_NAME, Manifest


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
