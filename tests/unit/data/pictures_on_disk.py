"""Small real pictures, folders and archives of them, and what lies in finished shards."""

import io
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image


class StoredSample(NamedTuple):
    """One sample as it lies in a shard."""

    key: str
    jpeg: bytes
    label: int


def picture(seed: int, *, height: int = 24, width: int = 32, encoding: str = "JPEG", mode: str = "RGB") -> bytes:
    """An encoded picture of random pixels."""
    pixels_HWC = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).convert(mode).save(buffer, encoding)
    return buffer.getvalue()


def pictures(counts: dict[str, int], *, height: int = 24, width: int = 32) -> dict[str, bytes]:
    """`<class>/<number>.jpg` to content."""
    return {
        f"{name}/{number:04d}.jpg": picture(1000 * label + number, height=height, width=width)
        for label, (name, count) in enumerate(counts.items())
        for number in range(count)
    }


def write_files(root: Path, files: dict[str, bytes]) -> Path:
    """The files below `root`, which is returned."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    """A tar of the files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # pyright: ignore[reportCallIssue, reportArgumentType]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def stored_samples(root: Path, split: str) -> list[StoredSample]:
    """Every sample of a split's shards in order, read by Python's own tarfile."""
    members: dict[str, bytes] = {}
    for path in sorted(root.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None and member.name not in members
                members[member.name] = file.read()
    keys = [name.removesuffix(".jpg") for name in members if name.endswith(".jpg")]
    assert len(members) == 2 * len(keys)
    return [StoredSample(key, members[f"{key}.jpg"], int(members[f"{key}.cls"])) for key in keys]


def contents_of(root: Path) -> dict[str, bytes]:
    """Every file below `root` by its relative name."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
