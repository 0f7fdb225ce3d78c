"""Every odd picture in a shard is either RGB or quarantined with a reason that names it, and takes no memory for it.

Through the index and the datasets, as training and evaluation read them.
"""

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.config.data import AugmentConfig
from pipeline.config.model import InputConfig
from pipeline.data.batches import EvalSamples, LoadedBatch, TrainItem, TrainSamples
from pipeline.data.index import ShardIndex
from pipeline.data.pictures import MAX_PASSED_PIXELS, BadImageError, Encoding, check_picture, shard_jpeg, too_many_scans
from pipeline.data.pixels import SampleError, decode
from tests.making.pictures import blobs, encoded, jpeg_claiming, png_claiming
from tests.making.shards import CLASSES, write_manifest, write_tar

HEIGHT, WIDTH = 40, 56
INPUT = InputConfig(size=24, resize_side=28)
CROPS = ("random_resized", "random", "pad_random", "center")
# 16 x 8 grey pixels of value 16 x + y, arithmetic-coded (SOF9) at quality 95 by libjpeg-turbo 2.1.5.
ARITHMETIC = bytes.fromhex(
    "ffd8ffe000104a46494600010100000100010000ffdb0043000201010101010201010102020202020403020202020504040304060506060605060606"
    "070908060709070606080b08090a0a0a0a0a06080b0c0b0a0c090a0a0affc9000b080008001001011100ffcc000600101005ffda0008010100003f00"
    "ff00ec99f07e65cacd4d6aab9a716c432fe644b380ffd9"
)  # fmt: skip


def smooth(height: int = HEIGHT, width: int = WIDTH, mode: str = "RGB") -> Image.Image:
    return blobs((5, 5), (height, width), seed=height + width).convert(mode)


def as_ycck(cmyk: bytes) -> bytes:
    """A CMYK JPEG whose Adobe marker says that the first three components are luma and chroma."""
    place = cmyk.index(b"Adobe") + 11
    assert cmyk[place] == 0
    return cmyk[:place] + b"\2" + cmyk[place + 1 :]


def rgb_of_ycck(cmyk: bytes) -> np.ndarray:
    """What `as_ycck` shows, by JFIF's formula for the colours and Adobe's inverted ink."""
    with Image.open(io.BytesIO(cmyk)) as image:
        stored = 255.0 - np.asarray(image)  # Pillow has inverted what the file holds
    luma, blue, red = stored[..., 0], stored[..., 1] - 128, stored[..., 2] - 128
    rgb = np.stack([luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue], axis=2)
    # libjpeg makes ink of it, 255 - RGB, which is inverted once more: the ink is RGB itself.
    return (255 - rgb.clip(0, 255)) * stored[..., 3:] / 255


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(smooth(), exif=exif)


PLAIN, CMYK = encoded(smooth()), encoded(smooth(mode="CMYK"), quality=95)
FRAMES = [smooth().rotate(90), smooth().rotate(180)]
GREY = np.add.outer(np.arange(8), 16 * np.arange(16))[..., None]
STORED = np.asarray(smooth())


def png_with(kind: bytes, content: bytes, *, is_sound: bool = True, is_last: bool = False) -> bytes:
    """A PNG with a chunk more, before its pixels or after them."""
    png = encoded(smooth(), "PNG")
    crc = zlib.crc32(kind + content) ^ (not is_sound)
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)
    place = len(png) - 12 if is_last else 33
    return png[:place] + chunk + png[place:]


def much_text() -> bytes:
    """More than 64 MiB of it, packed."""
    info = PngInfo()
    for number in range(80):
        info.add_text(f"k{number}", "y" * 900_000, zip=True)
    return encoded(smooth(), "PNG", pnginfo=info)


ANCILLARY = {
    "PNG with a large colour profile": encoded(smooth(), "PNG", icc_profile=bytes(2_000_000)),
    "PNG with a large text": png_with(b"zTXt", b"parameters\0\0" + zlib.compress(b"x " * 800_000)),
    "PNG with much text": much_text(),
    "PNG with a damaged text": png_with(b"tEXt", b"a\0b", is_sound=False),
    "PNG with a damaged text at its end": png_with(b"tEXt", b"a\0b", is_sound=False, is_last=True),
    "PNG with a damaged time": png_with(b"tIME", b"\0\0\0\0\0\0\0", is_sound=False),
    "PNG with a colour profile that is none": png_with(b"iCCP", b"x\0\0not compressed"),
}
"""Sound but for what shows nothing."""

ACCEPTED: dict[str, tuple[bytes, np.ndarray, int]] = {
    "progressive": (encoded(smooth(), progressive=True), STORED, 40),
    "greyscale": (encoded(smooth(mode="L"), quality=95), np.asarray(smooth(mode="L"))[..., None], 12),
    "CMYK": (CMYK, STORED, 16),
    "YCCK": (as_ycck(CMYK), rgb_of_ycck(CMYK), 3),
    "arithmetic": (ARITHMETIC, GREY, 4),
    "stray bytes": (PLAIN + b"left over", decode(PLAIN), 0),
    "rotated by EXIF": (rotated(), decode(PLAIN), 0),  # not applied, as in torchvision's and timm's loaders
    "several pictures in one (MPO)": (encoded(smooth(), "MPO", save_all=True, append_images=FRAMES), STORED, 40),
    "PNG named jpg": (encoded(smooth(), "PNG"), STORED, 0),
    "animated PNG": (encoded(smooth(), "PNG", save_all=True, append_images=FRAMES), STORED, 0),
    "PNG with a palette": (encoded(smooth(mode="P"), "PNG"), np.asarray(smooth(mode="P").convert("RGB")), 0),
    "PNG with alpha": (encoded(smooth(mode="RGBA"), "PNG"), STORED, 0),
    "PNG of 16 bits": (
        encoded(Image.fromarray(np.asarray(smooth(mode="L")).astype(np.uint16) * 257), "PNG"),
        np.asarray(smooth(mode="L"))[..., None],
        1,
    ),
    **{name: (content, STORED, 0) for name, content in ANCILLARY.items()},
    "one pixel": (encoded(smooth(1, 1)), np.asarray(smooth(1, 1)), 8),
    "one row": (encoded(smooth(1, 3000)), np.asarray(smooth(1, 3000)), 60),
    "one column": (encoded(smooth(3000, 1)), np.asarray(smooth(3000, 1)), 60),
}
"""Content, the pixels it shows, and how far a channel may be from them: JPEG is lossy."""


def damaged_pixels() -> bytes:
    """A PNG with one bit of its pixels flipped, and with a colour profile that is too large besides."""
    png = bytearray(ANCILLARY["PNG with a large colour profile"])
    png[png.index(b"IDAT") + 100] ^= 1
    return bytes(png)


def many_scans() -> bytes:
    """Some 500 KB of which each 24 bytes make libjpeg go once more over a picture of 16 million pixels."""
    jpeg = encoded(Image.new("L", (4000, 4000)), progressive=True)
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return jpeg[:-2] + scan * 200 + jpeg[-2:]


REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty file"),
    "garbage": (np.random.default_rng(0).bytes(4000), "neither JPEG nor PNG"),
    "cut short": (PLAIN[:-300], "truncated"),
    "header alone": (PLAIN[:200], "Truncated"),
    "PNG cut short": (encoded(smooth(), "PNG")[:-900], "truncated"),
    "arithmetic and cut short": (ARITHMETIC[:120], "broken"),
    "WebP": (encoded(smooth(), "WEBP"), "but WebP"),
    "animated WebP": (encoded(smooth(), "WEBP", save_all=True, append_images=FRAMES), "but WebP"),
    "GIF": (encoded(smooth(), "GIF", save_all=True, append_images=FRAMES), "but GIF"),
    "TIFF": (encoded(smooth(), "TIFF"), "but TIFF"),
    "BMP": (encoded(smooth(), "BMP"), "but BMP"),
    "JPEG 2000": (encoded(smooth(), "JPEG2000"), "but JPEG 2000"),
    "PNG without a header": (encoded(smooth(), "PNG")[:8] + bytes(40), "a PNG with a damaged header"),
    "damaged pixels": (damaged_pixels(), "broken data stream"),
    "lossless JPEG": (PLAIN.replace(b"\xff\xc0", b"\xff\xc3", 1), "a lossless JPEG, which is not read"),
    "HEIC": (b"\0\0\0\x18ftypheic" + bytes(40), "but HEIC"),
    "AppleDouble": (b"\0\5\x16\7" + bytes(100), "but the side file of macOS"),
    "web page": (b"<html>404</html>", "but a web page or XML"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "but a Git LFS pointer"),
    "JPEG bomb": (jpeg_claiming(PLAIN, 20_000, 10_000), " pixels"),
    "PNG bomb": (png_claiming(20_000, 20_000), " pixels"),
    "progressive JPEG of many scans": (many_scans(), "206 scans of 16,000,000 pixels"),
}


def test_scans_are_counted_where_a_decoder_finds_them() -> None:
    jpeg = encoded(smooth(), progressive=True)
    num_scans = jpeg.count(b"\xff\xda")
    assert num_scans > 5
    thumbnail = b"\xff\xe1" + (2 + 4 * 50).to_bytes(2) + b"\xff\xda\0\2" * 50
    for content in (jpeg, jpeg[:2] + thumbnail + jpeg[2:], jpeg + b"\xff\xda" * 50):
        assert not too_many_scans(content, MAX_PASSED_PIXELS // num_scans)
        assert f"{num_scans} scans" in too_many_scans(content, MAX_PASSED_PIXELS // (num_scans - 1))


def shard_with(root: Path, content: bytes) -> ShardIndex:
    """Four pictures, the third of them `content` under a JPEG's name."""
    root.mkdir(exist_ok=True)
    samples: list[dict[str, str | bytes]] = [
        {"__key__": f"n0{number}/{number:06d}", "jpg": encoded(smooth(30 + number, 40)), "cls": str(number)}
        for number in range(len(CLASSES))
    ]
    samples[2]["jpg"] = content
    write_tar(root / "train-000000.tar", samples)
    write_manifest(root, {"train": {"train-000000.tar": len(samples)}})
    return ShardIndex.open(root, "train")


def trained_on(index: ShardIndex, crop: str) -> LoadedBatch:
    samples = TrainSamples(index, INPUT, AugmentConfig(crop=crop), seed=0)
    return samples.__getitems__([TrainItem(number, 0) for number in range(4)])


def apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(np.float64) - other).max())


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_shows_a_picture_is_used_as_rgb(tmp_path: Path, name: str) -> None:
    content, expected, tolerance = ACCEPTED[name]
    index = shard_with(tmp_path / "shards", content)
    assert index.read(2) == content
    pixels = decode(content)
    assert pixels.dtype == np.uint8 and pixels.shape == (*expected.shape[:2], 3)
    assert apart(pixels, expected) <= tolerance
    check_picture(content)
    for crop in CROPS:
        assert trained_on(index, crop).bad == ()
    evaluated = EvalSamples(index, INPUT).__getitems__([0, 1, 2, 3])
    assert evaluated.bad == () and evaluated.sample_ids_B.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", REFUSED)
def test_what_shows_none_is_quarantined_by_shard_and_key(tmp_path: Path, name: str) -> None:
    content, reason = REFUSED[name]
    index = shard_with(tmp_path / "shards", content)
    assert index.read(2) == content
    with pytest.raises(BadImageError, match=reason):
        check_picture(content)
    batches = [trained_on(index, crop) for crop in CROPS] + [EvalSamples(index, INPUT).__getitems__([0, 1, 2, 3])]
    for batch in batches:
        assert {bad.sample_id for bad in batch.bad} == {2} and len(batch.labels_B) == 4
        for bad in batch.bad:
            assert (bad.shard, bad.key) == ("train-000000.tar", "n02/000002")
            assert bad.cause and reason in bad.reason and "'n02/000002' of shard train-000000.tar" in bad.reason


def test_a_png_longer_than_a_jpeg_may_be_is_refused_by_its_size() -> None:
    strip = encoded(Image.new("RGB", (70_000, 4)), "PNG")
    with pytest.raises(BadImageError, match=r"70000 x 4 pixels, and the JPEG made of it may have 65500 a side"):
        shard_jpeg(strip, Encoding())
    assert decode(strip).shape == (4, 70_000, 3)


@pytest.mark.parametrize("name", ANCILLARY)
@pytest.mark.parametrize("encoding", [Encoding(), Encoding(short_side=20)])
def test_what_shows_nothing_changes_nothing_in_the_shard(name: str, encoding: Encoding) -> None:
    assert shard_jpeg(ANCILLARY[name], encoding) == shard_jpeg(encoded(smooth(), "PNG"), encoding)


@given(
    seed=st.integers(0, 2**32), num_damaged=st.integers(1, 6), which=st.sampled_from(["PLAIN", "CMYK", "PNG", "SCANS"])
)
def test_a_check_of_shards_judges_damage_as_training_does(seed: int, num_damaged: int, which: str) -> None:
    contents = {"PLAIN": PLAIN, "CMYK": CMYK, "PNG": ACCEPTED["PNG named jpg"][0], "SCANS": ACCEPTED["progressive"][0]}
    generator, damaged = np.random.default_rng(seed), bytearray(contents[which])
    for place in generator.integers(0, len(damaged), num_damaged):
        damaged[place] = generator.integers(256)
    content = bytes(damaged)

    def verdict(judge: Callable[[bytes], object]) -> bool:
        try:
            judge(content)
        except (BadImageError, SampleError):
            return False
        return True

    assert verdict(check_picture) == verdict(decode)


MEASURE = """
import resource, sys
from pipeline.config.data import AugmentConfig
from pipeline.config.model import InputConfig
from pipeline.data.batches import EvalSamples, TrainItem, TrainSamples
from pipeline.data.pictures import check_picture
from pipeline.data.index import ShardIndex

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def num_bad(root, number):
    index, config, bad = ShardIndex.open(root, "train"), InputConfig(), set()
    for crop in ("random_resized", "random", "pad_random", "center"):
        loaded = TrainSamples(index, config, AugmentConfig(crop=crop), 0).__getitems__([TrainItem(number, 0)])
        bad |= {sample.sample_id for sample in loaded.bad}
    bad |= {sample.sample_id for sample in EvalSamples(index, config).__getitems__([number]).bad}
    try:
        check_picture(index.read(number))
    except ValueError:
        bad.add(number)
    return len(bad)

assert num_bad(sys.argv[1], 0) == 0
before = peak()
for root in sys.argv[1:]:
    print(num_bad(root, 2))
print((peak() - before) * 1024)
"""


@pytest.mark.not_quick
def test_no_picture_takes_more_memory_than_its_pixels(tmp_path: Path) -> None:
    """Measured in a process of its own, after a picture of ordinary size: two bombs, and strips that would be gigabytes
    if they were resized whole."""
    contents = [
        REFUSED["JPEG bomb"][0],
        REFUSED["PNG bomb"][0],
        encoded(smooth(1, 65_000)),
        encoded(smooth(65_000, 1)),
    ]
    roots = [str(shard_with(tmp_path / str(n), content).root) for n, content in enumerate(contents)]
    command = [sys.executable, "-c", MEASURE, *roots]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    *num_bad, grown_bytes = map(int, printed.split())
    assert num_bad == [1, 1, 0, 0]
    assert grown_bytes < 32 * 2**20
