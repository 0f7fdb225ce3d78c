"""Small real pictures, folders and archives of them, and what lies in finished shards."""

import io
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image


class StoredSample(NamedTuple):
    """One sample as it lies in a shard."""

    key: str
    jpeg: bytes
    label: int


def encoded(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    """The file that Pillow writes."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(seed: int, *, height: int = 24, width: int = 32, encoding: str = "JPEG", mode: str = "RGB") -> bytes:
    """An encoded picture of random pixels."""
    pixels_HWC = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels_HWC).convert(mode), encoding)


def coloured(seed: int, label: int) -> bytes:
    """A JPEG of random pixels around a colour of its class, of four."""
    colour = np.array([(200, 60, 60), (60, 200, 60), (60, 60, 200), (200, 200, 60)][label])
    noise_HWC = np.random.default_rng(seed).integers(-50, 50, (40, 48, 3))
    return encoded(Image.fromarray(np.clip(colour + noise_HWC, 0, 255).astype(np.uint8)))


def blobs(grid: tuple[int, int], size: tuple[int, int], seed: int | np.random.Generator) -> Image.Image:
    """Blobs and edges like a photograph's: random pixels would make every comparison one of JPEG noise.

    Args:
        grid: Rows and columns of random colours.
        size: Height and width in pixels over which they are spread.
        seed: Of the colours.
    """
    small_HWC = np.random.default_rng(seed).integers(0, 256, (*grid, 3), dtype=np.uint8)
    height, width = size
    return Image.fromarray(small_HWC).resize((width, height), Image.Resampling.BICUBIC)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def jpeg_claiming(jpeg: bytes, width: int, height: int) -> bytes:
    """The JPEG with another size in its header."""
    place = jpeg.index(b"\xff\xc0") + 5  # start of frame: length, precision, height, width
    return jpeg[:place] + struct.pack(">HH", height, width) + jpeg[place + 4 :]


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
