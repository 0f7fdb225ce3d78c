"""From the bytes of a picture to a square of uint8 RGB pixels.

A training view is a pure function of (picture, configuration, seed, epoch, sample id); an evaluation view of (picture,
configuration). EXIF orientation is not applied, as in the pipelines that published ImageNet results.

Decoding is simplejpeg's (libjpeg-turbo); Pillow takes what that refuses: PNG, CMYK, JPEGs with stray bytes. For
training, libjpeg may shrink by 2, 4 or 8 while decoding as long as the crop keeps more pixels than are asked for;
evaluation decodes at full size. Resizing is Pillow's antialiased bilinear filter on just the region that is needed.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipeline.config.data import AugmentConfig
from pipeline.config.model import InputConfig
from pipeline.data.jpeg_rows import upper_rows
from pipeline.data.pictures import MAX_PIXELS, as_rgb, kind_of_jpeg, not_a_picture, too_many_scans, with_picture

if TYPE_CHECKING:
    import torch
    from PIL import Image

T = TypeVar("T")

Pixels = NDArray[np.uint8]
"""uint8 of shape (height, width, 3): RGB."""

Offset = Callable[[int, int], int]
"""(pixels left over, axis) -> where the crop starts."""

Draw = Sequence[float]
"""Numbers in [0, 1), of which a view takes those that its augmentation needs."""

NUM_CROP_TRIES = 10
_NUM_DRAWN = 4 * NUM_CROP_TRIES + 3
_REDUCTIONS = (8, 4, 2)  # libjpeg's other scales, eighths, cost more than they save
_DOMAIN = 0x70697865_6C730001  # keeps the stream of the pixels apart from others of the same seed


class SampleError(Exception):
    """A picture that cannot be decoded, with the reason. Counted and replaced, so never shown as it is."""


@dataclass(frozen=True)
class Box:
    """A rectangle of a picture in pixels, fractions allowed; (0, 0) is the corner of the first pixel."""

    top: float
    left: float
    height: float
    width: float

    def divided(self, by: int) -> "Box":
        """The same rectangle in a picture shrunk by `by`."""
        return Box(self.top / by, self.left / by, self.height / by, self.width / by)


def picture_size(content: bytes) -> tuple[int, int]:
    """(height, width) from the header alone.

    Raises:
        SampleError: not a picture, or more than MAX_PIXELS.
    """
    height, width = _header(content)
    if height * width > MAX_PIXELS:
        raise SampleError(f"{width} x {height} pixels are more than {MAX_PIXELS}")
    if content.startswith(b"\xff\xd8") and (wrong := too_many_scans(content, height * width)):
        raise SampleError(wrong)
    return height, width


def decode(content: bytes) -> Pixels:
    """All pixels as RGB.

    Raises:
        SampleError: not a picture, cut short, or more than MAX_PIXELS.
    """
    return _decode(content, picture_size(content), reduction=1)[0]


def eval_view(content: bytes, config: InputConfig) -> Pixels:
    """Resize as `config.resize_mode` says, then the centre crop: shape (size, size, 3).

    Sizes and offsets are rounded as torchvision's Resize and CenterCrop round them.

    Raises:
        SampleError: as `decode`.
    """
    source = picture_size(content)
    return _flat_view(content, source, _resized_size(source, config), _center_offset, config.size)


def train_draws(seed: int, epochs_and_ids: Sequence[tuple[int, int]]) -> list[Draw]:
    """The random numbers of each (epoch, sample id): they depend on these and the seed, and on nothing else.

    53 bits of Philox's raw words, whose stream NumPy promises to keep (NEP 19). Philox is a function of a counter and a
    key, made for streams that are addressed instead of advanced. Drawn for a batch at once, because between
    pictures, each of which takes the processor's caches for itself, the same Python takes longer.
    """
    words = np.empty((len(epochs_and_ids), _NUM_DRAWN), np.uint64)
    key = np.array([seed, _DOMAIN], np.uint64)
    for row, (epoch, sample_id) in zip(words, epochs_and_ids, strict=True):
        counter = np.array([0, 0, epoch, sample_id], np.uint64)
        row[:] = np.random.Philox(counter=counter, key=key).random_raw(_NUM_DRAWN)
    return ((words >> np.uint64(11)).astype(np.float64) * np.float64(2.0**-53)).tolist()


def train_view(
    content: bytes,
    config: InputConfig,
    augment: AugmentConfig,
    draw: Draw,
    *,
    is_checked: bool = False,
) -> Pixels:
    """A random crop, perhaps mirrored: shape (size, size, 3).

    Args:
        content: a JPEG or PNG.
        config: gives the crop's side, and for the crops of fixed scale the resizing.
        augment: which crop, and whether to mirror.
        draw: the random numbers of this view, one of `train_draws`.
        is_checked: it was decoded to its end before, as `prepare` does; then what lies below the crop is left alone.
            The pixels are the same.

    Raises:
        SampleError: as `decode`.
    """
    source = picture_size(content)
    if augment.crop == "random_resized":
        box = random_resized_box(source, augment, draw[2:])
        pixels = _cut_reduced(content, source, box, config.size, is_checked=is_checked)
    elif augment.crop == "pad_random":
        pixels = _padded_view(content, source, config, augment.pad, draw)
    else:

        def offset(space: int, axis: int) -> int:
            return _center_offset(space, axis) if augment.crop == "center" else _integer(draw[axis], space + 1)

        pixels = _flat_view(content, source, _resized_size(source, config), offset, config.size)
    return _mirrored(pixels) if augment.flip and draw[-1] < 0.5 else pixels


def random_resized_box(source: tuple[int, int], augment: AugmentConfig, draw: Draw) -> Box:
    """The crop of torchvision's RandomResizedCrop: area uniform in `scale`, log of width / height uniform in `ratio`.

    A rectangle that does not fit is drawn again, ten times at most; then the largest centred one of an allowed ratio.

    Args:
        source: (height, width).
        augment: Bounds of the crop's area and ratio.
        draw: At least 40 numbers in [0, 1).
    """
    height, width = source
    low, high = augment.scale
    log_low, log_high = math.log(augment.ratio[0]), math.log(augment.ratio[1])
    for attempt in range(NUM_CROP_TRIES):
        for_area, for_ratio, for_top, for_left = draw[4 * attempt : 4 * attempt + 4]
        area = height * width * (low + (high - low) * for_area)
        ratio = math.exp(log_low + (log_high - log_low) * for_ratio)
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = _integer(for_top, height - crop_height + 1), _integer(for_left, width - crop_width + 1)
            return Box(top, left, crop_height, crop_width)
    ratio = min(max(width / height, augment.ratio[0]), augment.ratio[1])
    crop_width, crop_height = min(width, round(height * ratio)), min(height, round(width / ratio))
    crop_width, crop_height = max(1, crop_width), max(1, crop_height)
    return Box((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


def _integer(uniform: float, count: int) -> int:
    """0 .. count - 1, equally likely."""
    return int(uniform * count)


def _center_offset(space: int, axis: int) -> int:
    del axis
    return round(space / 2.0)


def _resized_size(source: tuple[int, int], config: InputConfig, pad: int = 0) -> tuple[int, int]:
    """(height, width) after resizing, before the crop. Never too small for it: tiny pictures are enlarged."""
    height, width = source
    if config.resize_mode == "warp":
        return config.resize_side, config.resize_side
    short = config.resize_side if config.resize_mode == "short" else max(min(source), config.size - 2 * pad)
    if height <= width:
        return short, int(short * width / height)
    return int(short * height / width), short


def _flat_view(content: bytes, source: tuple[int, int], resized: tuple[int, int], offset: Offset, size: int) -> Pixels:
    """Crop `size` out of the picture resized to `resized`, at `offset(space, axis)`. Only the crop is computed."""
    top, left = (offset(resized[axis] - size, axis) for axis in (0, 1))
    per_row, per_column = source[0] / resized[0], source[1] / resized[1]
    box = Box(top * per_row, left * per_column, size * per_row, size * per_column)
    return _resize(_decode(content, source, 1)[0], box, (size, size), exact_edges=False)


def _padded_view(content: bytes, source: tuple[int, int], config: InputConfig, pad: int, draw: Draw) -> Pixels:
    """Resize, add `pad` black pixels on each side, crop at random."""
    size = config.size
    height, width = _resized_size(source, config, pad)
    top, left = (
        _integer(draw[0], height + 2 * pad - size + 1) - pad,
        _integer(draw[1], width + 2 * pad - size + 1) - pad,
    )
    pixels, canvas = _decode(content, source, 1)[0], np.zeros((size, size, 3), np.uint8)
    # Only what is shown is computed: resized whole, a strip of 1 x 65,000 pixels would take gigabytes.
    first_row, end_row = max(0, top), min(height, top + size)
    first_column, end_column = max(0, left), min(width, left + size)
    if first_row < end_row and first_column < end_column:
        per_row, per_column = source[0] / height, source[1] / width
        box = Box(
            first_row * per_row,
            first_column * per_column,
            (end_row - first_row) * per_row,
            (end_column - first_column) * per_column,
        )
        out = (end_row - first_row, end_column - first_column)
        place = (slice(first_row - top, end_row - top), slice(first_column - left, end_column - left))
        canvas[place] = _resize(pixels, box, out, exact_edges=False)
    return canvas


def _cut_reduced(content: bytes, source: tuple[int, int], box: Box, size: int, *, is_checked: bool) -> Pixels:
    """`box`, of whole pixels, resized to (size, size). No more is decoded than that needs, nothing seen beside it."""
    wanted = next((by for by in _REDUCTIONS if min(box.height, box.width) >= size * by), 1)
    pixels = upper_rows(content, source, int(box.top + box.height), wanted) if is_checked else None
    reduction = wanted
    if pixels is None:
        pixels, reduction = _decode(content, source, wanted)
    if reduction == 1:
        return _resize_whole(pixels, box, size)
    return _resize(pixels, box.divided(reduction), (size, size), exact_edges=True)


def _resize_whole(pixels: Pixels, box: Box, size: int) -> Pixels:
    """`box`, of whole pixels, as (size, size): the filter of `_resize` in torch's arithmetic.

    Several times as fast as Pillow's, with a coarser fixed point: some values differ by one of 255.
    """
    from torch.nn import functional as F

    top, left = int(box.top), int(box.left)
    region_HWC = pixels[top : top + int(box.height), left : left + int(box.width)]
    resized_1CHW = F.interpolate(_for_torch(region_HWC), (size, size), mode="bilinear", antialias=True)
    return resized_1CHW[0].permute(1, 2, 0).numpy()


def _mirrored(pixels: Pixels) -> Pixels:
    """Left to right, by torch, which has a kernel for pixels of three bytes."""
    return _for_torch(pixels).flip(-1)[0].permute(1, 2, 0).numpy()


def _for_torch(pixels_HWC: Pixels) -> "torch.Tensor":
    """As (1, 3, height, width), channels_last, of the same memory."""
    import torch

    if not pixels_HWC.flags.writeable:
        pixels_HWC = pixels_HWC.copy()  # torch warns of what it must not write to
    return torch.from_numpy(pixels_HWC)[None].permute(0, 3, 1, 2)


def _resize(pixels: Pixels, box: Box, out: tuple[int, int], *, exact_edges: bool) -> Pixels:
    """`box` of `pixels` as (height, width) = `out`, bilinear, antialiased when shrinking.

    Args:
        pixels: The picture.
        box: The rectangle to resize.
        out: (height, width) of the result.
        exact_edges: The filter sees nothing outside the box (crop, then resize); else what a resize of the whole
            picture followed by a crop would show.
    """
    from PIL import Image

    def bounds(start: float, extent: float, target: int, limit: int) -> tuple[int, int]:
        # The filter reaches one target pixel to each side, or one source pixel when enlarging.
        margin = 0 if exact_edges else math.ceil(max(1.0, extent / target)) + 1
        return max(0, math.floor(start) - margin), min(limit, math.ceil(start + extent) + margin)

    first_row, end_row = bounds(box.top, box.height, out[0], pixels.shape[0])
    first_column, end_column = bounds(box.left, box.width, out[1], pixels.shape[1])
    is_whole = box.top % 1 == 0 and box.left % 1 == 0
    if is_whole and (box.height, box.width) == out:
        top, left = int(box.top), int(box.left)
        return np.ascontiguousarray(pixels[top : top + out[0], left : left + out[1]])
    top, left = box.top - first_row, box.left - first_column
    region = Image.fromarray(pixels[first_row:end_row, first_column:end_column])
    edges = (left, top, min(left + box.width, region.width), min(top + box.height, region.height))
    return np.asarray(region.resize((out[1], out[0]), Image.Resampling.BILINEAR, box=edges))


def _header(content: bytes) -> tuple[int, int]:
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(content)
        return int(height), int(width)
    except ValueError:
        return _by_pillow(content, lambda image: (image.height, image.width))


def _decode(content: bytes, source: tuple[int, int], reduction: int) -> tuple[Pixels, int]:
    """The whole picture as RGB, and by how much it was shrunk: `reduction`, or 1 where only Pillow can read it.

    libjpeg's warnings are errors here, because a file cut short is only a warning to it. Pillow then tells stray bytes,
    which do no harm, from a real hole.
    """
    height, width = source
    try:
        pixels = simplejpeg.decode_jpeg(
            content, min_height=-(-height // reduction), min_width=-(-width // reduction), min_factor=reduction
        )
        return pixels, reduction
    except ValueError:
        return _by_pillow(content, lambda image: np.asarray(as_rgb(image))), 1


def _by_pillow(content: bytes, use: Callable[["Image.Image"], T]) -> T:
    """`use` of Pillow's lazily decoded picture; whatever a broken file makes Pillow raise becomes SampleError."""
    from PIL import UnidentifiedImageError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata: judged by the pixels alone
        try:
            return with_picture(content, use)
        except UnidentifiedImageError:
            raise SampleError(not_a_picture(content)) from None
        except MemoryError:
            raise
        except Exception as error:
            raise SampleError(kind_of_jpeg(content) or str(error) or type(error).__name__) from error
