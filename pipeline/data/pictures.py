"""Is this file a picture, and is it the JPEG that a shard should hold?"""

import io
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from pipeline.core.errors import DataError

MAX_PIXELS = 89_478_485
"""Larger pictures are refused from their header, before a byte is decoded (Pillow's own limit: a 256 MiB bitmap)."""
MAX_JPEG_SIDE = 65_500
"""Pixels, by libjpeg."""
MAX_PASSED_PIXELS = 1_500_000_000
"""Pixels times scans of a JPEG, which takes some seconds: the largest pictures may have 16 scans. 10 are usual."""
MIN_SCAN_BYTES = 10
"""Marker and header of a scan."""
SQUARE_TO_JPEG_DRAFT = 2
"""libjpeg may shrink while decoding, down to this many times the size asked for; Pillow does the rest."""


T = TypeVar("T")

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_START_OF_SCAN = 0xDA
_SCAN = b"\xff\xda"
_END_OF_JPEG = b"\xff\xd9"
_SEQUENTIAL_FRAMES = (b"\xff\xc0", b"\xff\xc1", b"\xff\xc9")
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
"""One that ends the data of a scan, and has a length, but for the end of the picture."""
_JPEG_PROCESSES = {
    0xC3: "lossless",
    0xCB: "lossless",
    0xCF: "lossless",
    0xF7: "near-lossless (JPEG-LS)",
} | dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE), "hierarchical")
"""By the marker of the frame."""
_OTHER_FORMATS = (
    (0, b"GIF8", "GIF"),
    (8, b"WEBP", "WebP"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftypavis", "AVIF"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftyphev", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftypmsf1", "HEIF"),
    (4, b"ftyp", "a video (MP4 or its like)"),
    (4, b"jP  ", "JPEG 2000"),
    (4, b"JXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 codestream"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "BigTIFF"),
    (0, b"MM\0+", "BigTIFF"),
    (0, b"II\xbc\1", "JPEG XR"),
    (0, b"BM", "BMP"),
    (0, b"8BPS", "a Photoshop document"),
    (0, b"%PDF", "PDF"),
    (0, b"\0\5\x16\7", "the side file of macOS (AppleDouble)"),
    (0, b"\x89HDF", "HDF5"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"PK\3\4", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"<", "a web page or XML"),
    (0, b"version https://git-lfs", "a Git LFS pointer"),
)
"""(offset, bytes there, name) of what is found under a JPEG's name now and then."""


class BadImageError(DataError):
    """A picture that cannot be decoded, with the reason."""


def not_a_picture(content: bytes) -> str:
    """Why `content`, which Pillow knows neither as JPEG nor as PNG, is refused: what it is, where that shows."""
    if not content:
        return "empty file"
    if content.startswith((_PNG, _JPEG)):
        return f"a {'PNG' if content.startswith(_PNG) else 'JPEG'} with a damaged header"
    found = (name for offset, mark, name in _OTHER_FORMATS if content.startswith(mark, offset))
    return f"neither JPEG nor PNG but {name}" if (name := next(found, None)) else "neither JPEG nor PNG"


def kind_of_jpeg(content: bytes) -> str | None:
    """A clause on a JPEG of a process that libjpeg does not decode; None for others, and for what is no JPEG."""
    start = 2
    while content.startswith(_JPEG) and start + 4 <= len(content) and content[start] == 0xFF:
        marker = content[start + 1]
        if marker in _JPEG_PROCESSES:
            return f"a {_JPEG_PROCESSES[marker]} JPEG, which is not read"
        if marker == _START_OF_SCAN:
            break
        start += 2 + int.from_bytes(content[start + 2 : start + 4], "big")
    return None


def too_many_scans(content: bytes, num_pixels: int) -> str:
    """Say in a clause that a JPEG would be decoded over and over; empty if it would not.

    One of several scans, as progressive ones are, is passed over once for each, of which some ten bytes may be all that
    there is: a file of a megabyte could take hours.

    Args:
        content: Of the picture.
        num_pixels: By its header.
    """
    most = max(1, MAX_PASSED_PIXELS // max(1, num_pixels))
    if len(content) // MIN_SCAN_BYTES <= most or _is_one_scan(content) or content.count(_SCAN) <= most:
        return ""
    num_scans, place = 0, 2
    while (found := _MARKER.search(content, place)) and found[0] != _END_OF_JPEG:
        num_scans += found[0] == _SCAN
        place = found.end() + int.from_bytes(content[found.end() : found.end() + 2], "big")
    return f"{num_scans:,} scans of {num_pixels:,} pixels are more than are read" if num_scans > most else ""


def _is_one_scan(content: bytes) -> bool:
    """Whether it is sequential, with all components in its first scan: libjpeg then reads no other."""
    components, start = b"", 2
    while (marker := content[start : start + 2])[:1] == b"\xff":
        if marker in _SEQUENTIAL_FRAMES:
            components = content[start + 9 : start + 10]
        elif marker == _SCAN:
            return components == content[start + 4 : start + 5]
        start += 2 + int.from_bytes(content[start + 2 : start + 4], "big")
    return False


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture as RGB. Grey of 16 bits is scaled to 8, where Pillow's own conversion would cut it off to white."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def with_picture(content: bytes, use: Callable[[Image.Image], T]) -> T:
    """`use` of the picture, of which only the header is read by then.

    What Pillow refuses is tried again without what shows nothing: texts, colour profiles and times of a PNG, which may
    be larger than Pillow takes, or damaged.

    Raises:
        OSError, SyntaxError, ValueError: Pillow's complaints, and what `use` raises.
    """
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
            return use(image)
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, DataError) or (bare := _bare_png(content)) is None:
            raise
    with Image.open(io.BytesIO(bare), formats=("PNG",)) as image:
        return use(image)


def _bare_png(content: bytes) -> bytes | None:
    """A PNG without its ancillary chunks but transparency, the rest as it is; None if it is none or has none."""
    if not content.startswith(_PNG):
        return None
    kept, start = [_PNG], len(_PNG)
    while start + 8 <= len(content):
        kind = content[start + 4 : start + 8]
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        is_critical = not kind[0] & 0x20  # a capital letter
        crc = zlib.crc32(content[start + 4 : end - 4]).to_bytes(4, "big")
        if is_critical or (kind == b"tRNS" and content[end - 4 : end] == crc):
            kept.append(content[start:end])
        start = end
    bare = b"".join(kept)
    return bare if len(bare) < len(content) else None


def check_picture(content: bytes) -> None:
    """Decode a picture as far as it takes to know whether training can use it: every byte, at an eighth of the size.

    Raises:
        BadImageError: empty, neither JPEG nor PNG, cut short, or more than MAX_PIXELS.
    """
    with _judged(content):
        with_picture(content, lambda image: _load_if_doubtful(_of_allowed_size(image, content), content))


@dataclass(frozen=True)
class Encoding:
    """What happens to a picture on its way into a shard."""

    short_side: int | None = None
    """Pixels that the shorter side is reduced to. Null, or a picture that is no larger: the bytes stay as they are."""
    jpeg_quality: int = 90
    """Used where a picture must be encoded: it was reduced, or it was no JPEG."""
    check: str = "pixels"
    """How a picture that stays as it is gets judged. `pixels`: decoded to its last byte. `ends`: a JPEG with a header
    that can be read and an end mark where the file ends passes for whole; all else is decoded."""


def shard_jpeg(content: bytes, encoding: Encoding) -> bytes:
    """The JPEG for the shard: `content` itself if it is one and small enough, else its pixels encoded again as RGB.

    Every picture is decoded in full, unless `encoding` asks for less, because a file cut short has a perfect header.

    Raises:
        BadImageError: empty, not a picture, cut short, or more than MAX_PIXELS.
    """
    with _judged(content):
        if _may_stay(content, encoding) and (_has_ends(content, encoding) or _decodes_strictly(content)):
            return content
        return with_picture(
            content, lambda image: _kept_or_encoded(_of_allowed_size(image, content), content, encoding)
        )


def _kept_or_encoded(image: Image.Image, content: bytes, encoding: Encoding) -> bytes:
    is_small_enough = encoding.short_side is None or min(image.size) <= encoding.short_side
    if image.format != "JPEG" or not is_small_enough:
        return _encoded_again(image, encoding)
    _load_if_doubtful(image, content)
    return content


@contextmanager
def _judged(content: bytes) -> Iterator[None]:
    """Whatever Pillow raises for a broken file becomes `BadImageError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata and the like: a picture is judged by its pixels alone
            yield
    except UnidentifiedImageError:
        raise BadImageError(not_a_picture(content)) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, BadImageError):
            raise
        raise BadImageError(kind_of_jpeg(content) or str(error)) from error


def _of_allowed_size(image: Image.Image, content: bytes) -> Image.Image:
    """The picture, if it has no more than MAX_PIXELS by its header, and is not passed over again and again."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImageError(f"{width} x {height} pixels are more than {MAX_PIXELS}")
    if image.format != "PNG" and (wrong := too_many_scans(content, width * height)):
        raise BadImageError(wrong)
    return image


def _may_stay(content: bytes, encoding: Encoding) -> bool:
    """Whether this is a JPEG small enough to be kept, from its header alone; Pillow judges what seems not to be."""
    try:
        header = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return False
    height, width = int(header[0]), int(header[1])
    is_small_enough = encoding.short_side is None or min(height, width) <= encoding.short_side
    return height * width <= MAX_PIXELS and is_small_enough and not too_many_scans(content, height * width)


def _has_ends(content: bytes, encoding: Encoding) -> bool:
    return encoding.check == "ends" and content.endswith(_END_OF_JPEG)


def _load_if_doubtful(image: Image.Image, content: bytes) -> None:
    """Raise what Pillow raises at a real hole. libjpeg complains of stray bytes too, which do no harm."""
    if image.format != "JPEG" or not _decodes_strictly(content):
        image.load()


def _decodes_strictly(content: bytes) -> bool:
    """Whether libjpeg-turbo decodes the file without a complaint (at an eighth of its size, which reads every byte)."""
    try:
        # `strict` turns libjpeg's warnings into errors.
        simplejpeg.decode_jpeg(content, colorspace="GRAY", fastdct=True, min_height=1, min_width=1, min_factor=8)
    except ValueError:
        return False
    return True


def _encoded_again(image: Image.Image, encoding: Encoding) -> bytes:
    """The picture as an RGB JPEG, its shorter side at most `short_side`, without metadata."""
    width, height = image.size
    size = (width, height)
    if encoding.short_side is not None and min(size) > encoding.short_side:
        scale = encoding.short_side / min(size)
        size = (max(encoding.short_side, round(width * scale)), max(encoding.short_side, round(height * scale)))
        image.draft("RGB", (size[0] * SQUARE_TO_JPEG_DRAFT, size[1] * SQUARE_TO_JPEG_DRAFT))
    if max(size) > MAX_JPEG_SIDE:
        raise BadImageError(f"{size[0]} x {size[1]} pixels, and the JPEG made of it may have {MAX_JPEG_SIDE} a side")
    image = as_rgb(image)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=encoding.jpeg_quality)
    return buffer.getvalue()
