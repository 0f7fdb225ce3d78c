"""The built-in picture set: learnable, made on the spot, and as heavy to read as ImageNet.

A picture is a pure function of (seed, split, index). Its class is a texture (`textures.py`); its colours, their
contrast, the lighting, the clutter before it and the sensor noise are drawn at random. The noise is also what gives the
files ImageNet's weight: about 106 KB on average, at ImageNet's usual sizes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg

from pipeline.data.prepare.labelling import check_classes
from pipeline.data.prepare.sources import PictureSource, SourceImage, chosen
from pipeline.data.prepare.textures import TEXTURES, Plane, draw

CLASSES = tuple(TEXTURES)
SPLITS = ("train", "val")
VERSION = 1
"""Raised whenever the same seed would give other pictures."""
SIZES = ((375, 500), (333, 500), (500, 375), (400, 500), (300, 400), (480, 640))
"""(height, width) in pixels, and how often each occurs: the common ones of ImageNet."""
SIZE_SHARES = (0.45, 0.15, 0.15, 0.10, 0.10, 0.05)
SHARE_CORRECTION = 0.25  # 1 makes the mean brightness of all pictures the same, but betrays the share by the ground's
JPEG_QUALITY = 91
EXPECTED_BYTES = 106_000
"""What a file is planned with before it exists."""
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""ITU-R BT.601 weights of red, green and blue."""


@dataclass(frozen=True)
class BuiltinPictures:
    """The set of one seed."""

    seed: int
    num_classes: int
    num_images: int = 2000
    """Training pictures; a quarter as many validation pictures come beside them."""

    def label(self, index: int) -> int:
        """Classes take turns, so that every split is balanced."""
        return index % self.num_classes

    def jpeg(self, split: str, index: int) -> bytes:
        """The file of picture `index` of `split`."""
        pixels_HWC = self.pixels(split, index)
        return simplejpeg.encode_jpeg(pixels_HWC, quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="420")

    def pixels(self, split: str, index: int) -> npt.NDArray[np.uint8]:
        """Pixels of a picture before compression, `(H, W, 3)`, RGB."""
        rng = np.random.default_rng([self.seed, SPLITS.index(split), index])
        height, width = SIZES[rng.choice(len(SIZES), p=SIZE_SHARES)]
        coverage_HW = draw(CLASSES[self.label(index)], height, width, rng)
        ground, figure = _two_colours(float(coverage_HW.mean()), rng)
        pixels_HWC = coverage_HW[:, :, None] * (figure - ground) + ground
        _light(pixels_HWC, rng)
        _clutter(pixels_HWC, rng)
        noise_HW = rng.standard_normal((height, width), dtype=np.float32) * np.float32(rng.uniform(13, 30))
        pixels_HWC += noise_HW[:, :, None]
        return np.clip(pixels_HWC, 0, 255, out=pixels_HWC).astype(np.uint8)


def _two_colours(share: float, rng: np.random.Generator) -> tuple[Plane, Plane]:
    """The ground's colour and the figure's: random tints, the figure clearly the brighter.

    share: of the picture that the figure covers. Without the correction by it a picture's mean brightness tells the
    share, and with that its class: enough for a linear model to reach one half.
    """
    middle, difference = rng.uniform(118, 138), rng.uniform(120, 150)
    middle -= SHARE_CORRECTION * difference * (share - 0.5)
    colours = []
    for brightness in (middle - difference / 2, middle + difference / 2):
        tint = rng.uniform(-30, 30, 3).astype(np.float32)
        colours.append(tint - LUMA @ tint + np.float32(brightness))
    return colours[0], colours[1]


def _light(pixels_HWC: Plane, rng: np.random.Generator) -> None:
    """Brighten one side and darken the opposite one, in place."""
    height, width, _ = pixels_HWC.shape
    slope_y, slope_x = rng.uniform(-0.10, 0.10, 2)
    rows_H = np.linspace(1 - slope_y, 1 + slope_y, height, dtype=np.float32)
    columns_W = np.linspace(1 - slope_x, 1 + slope_x, width, dtype=np.float32)
    pixels_HWC *= (rows_H[:, None] * columns_W)[:, :, None]


def _clutter(pixels_HWC: Plane, rng: np.random.Generator) -> None:
    """Cover up to two rectangles or ellipses with plain colours, in place."""
    height, width, _ = pixels_HWC.shape
    for _ in range(rng.integers(0, 3)):
        half_height, half_width = (rng.uniform(0.04, 0.12, 2) * (height, width)).astype(int)
        top, left = rng.integers(0, (height - 2 * half_height, width - 2 * half_width))
        window_HWC = pixels_HWC[top : top + 2 * half_height, left : left + 2 * half_width]
        colour = rng.uniform(0, 255, 3).astype(np.float32)
        if rng.random() < 0.5:
            window_HWC[:] = colour
        else:
            y_H1 = np.linspace(-1, 1, 2 * half_height, dtype=np.float32)[:, None]
            x_1W = np.linspace(-1, 1, 2 * half_width, dtype=np.float32)[None, :]
            window_HWC[y_H1**2 + x_1W**2 < 1] = colour


@dataclass(frozen=True)
class BuiltinReader:
    """Makes the picture that a `SourceImage` stands for. Its name begins with its split."""

    pictures: BuiltinPictures

    def __call__(self, image: SourceImage) -> bytes:
        """Make the file of one picture."""
        return self.pictures.jpeg(image.name.partition("/")[0], image.offset)


def open_builtin(pictures: BuiltinPictures, split: str | None, classes: tuple[str, ...] | None) -> PictureSource:
    """The generator as a source.

    Raises:
        DataError: `split` is not one of its splits, or `classes` lacks one of its classes.
    """
    root = Path("builtin")
    names = CLASSES[: pictures.num_classes]
    num_images = {"train": pictures.num_images, "val": pictures.num_images // 4}
    splits = {
        name: [
            SourceImage(f"{name}/{index:06d}", names[pictures.label(index)], "", index, EXPECTED_BYTES)
            for index in range(num_images[name])
        ]
        for name in SPLITS
    }
    return PictureSource(
        kind="builtin",
        classes=check_classes(f"source={root}", set(names), classes),
        splits=chosen(root, splits, split),
        read=BuiltinReader(pictures),
        extra={"generator_version": VERSION},
    )
