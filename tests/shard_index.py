"""The index that `prepare` leaves beside the shards, for shards that a test wrote by itself."""

from pathlib import Path

from pipeline.core.files import sha256_of_file, write_atomic
from pipeline.data.shards.manifest import Manifest
from pipeline.data.shards.scan import scanned_table
from pipeline.data.shards.table import INDEX_KEY, index_name, shards_of


def add_index(root: Path, *splits: str) -> Path:
    """Write it and describe it in the manifest. Returns `root`."""
    manifest = Manifest.load(root)
    for split in splits:
        path = root / index_name(split)
        write_atomic(path, scanned_table(root, shards_of(manifest, split)).save)
        described = {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        manifest.split(split).extra[INDEX_KEY] = described
    manifest.save(root)
    return root
