"""Views are pure, are what torchvision would cut, and what cannot be decoded is an error with a reason."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from pipeline.config.data import AugmentConfig
from pipeline.config.model import InputConfig
from pipeline.data.pictures import MAX_PIXELS
from pipeline.data.pixels import (
    SampleError,
    decode,
    eval_view,
    picture_size,
    random_resized_box,
    train_draws,
    train_view,
)
from tests.making import pictures
from tests.unit.data.draws import draw_of


def smooth_pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.asarray(pictures.blobs((max(1, height // 16), max(1, width // 16)), (height, width), seed))


def encoded(
    height: int = 120, width: int = 160, *, mode: str = "RGB", format: str = "JPEG", seed: int = 0, **options: Any
) -> bytes:
    return pictures.encoded(Image.fromarray(smooth_pixels(height, width, seed)).convert(mode), format, **options)


def pillow_pixels(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def apart(one: np.ndarray, other: np.ndarray) -> int:
    """Largest difference of any channel of any pixel."""
    return int(np.abs(one.astype(np.int16) - other.astype(np.int16)).max())


# Decoding


@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 40}, {"optimize": True}]
)
@pytest.mark.parametrize("size", [(120, 160), (121, 83), (8, 8), (1, 1), (1, 50)])
def test_jpegs_decode_as_in_pillow(size: tuple[int, int], options: dict[str, Any]) -> None:
    content = encoded(*size, **options)
    pixels = decode(content)
    assert pixels.dtype == np.uint8 and pixels.shape == (*size, 3) and picture_size(content) == size
    assert apart(pixels, pillow_pixels(content)) <= 1


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGB", "PNG"),
        ("RGBA", "PNG"),
        ("L", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("1", "PNG"),
    ],
)
def test_every_kind_of_picture_becomes_rgb(mode: str, format: str) -> None:
    content = encoded(mode=mode, format=format)
    pixels = decode(content)
    assert pixels.shape == (120, 160, 3) and picture_size(content) == (120, 160)
    assert apart(pixels, pillow_pixels(content)) <= 1


def test_a_palette_with_transparency_is_read_without_a_warning() -> None:
    assert decode(encoded(mode="P", format="PNG", transparency=b"\x00\x80")).shape == (120, 160, 3)


def test_exif_orientation_is_not_applied() -> None:
    """As in torchvision, timm and webdataset, whose published numbers people compare with."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert np.array_equal(decode(encoded(exif=exif)), decode(encoded()))


def test_stray_bytes_do_no_harm() -> None:
    content = encoded()
    assert np.array_equal(decode(content + b"trailing"), decode(content))
    before_end = content[:-2] + b"\x00\x01\x02" + content[-2:]
    assert apart(decode(before_end), decode(content)) <= 1


BAD = {
    "empty": b"",
    "garbage": np.random.default_rng(0).bytes(3000),
    "text": b"<html>404 not found</html>",
    "only the start of a JPEG": b"\xff\xd8\xff",
    "JPEG header alone": encoded()[:300],
    "JPEG cut in half": encoded(400, 400)[: len(encoded(400, 400)) // 2],
    "JPEG cut at nine tenths": encoded(400, 400)[: len(encoded(400, 400)) * 9 // 10],
    "PNG cut in half": encoded(format="PNG")[: len(encoded(format="PNG")) // 2],
    "GIF": encoded(format="GIF"),
    "TIFF": encoded(format="TIFF"),
    "PNG bomb": pictures.png_claiming(20_000, 20_000),
    "PNG just over the limit": pictures.png_claiming(10_000, MAX_PIXELS // 10_000 + 1),
    "JPEG bomb": pictures.jpeg_claiming(encoded(), 20_000, 10_000),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_decoded_is_refused_with_a_reason(name: str) -> None:
    views = (
        decode,
        lambda content: eval_view(content, InputConfig()),
        lambda content: train_view(content, InputConfig(), AugmentConfig(), draw_of()),
    )
    for view in views:
        with pytest.raises(SampleError) as caught:
            view(BAD[name])
        assert str(caught.value)


@pytest.mark.not_quick
def test_a_bomb_is_refused_before_its_memory_is_taken(tmp_path: Path) -> None:
    """In a process of its own, whose peak nothing else has raised."""
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from pipeline.data.pixels import SampleError, decode\n"
        "decode(Path(sys.argv[2]).read_bytes())\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        "    decode(Path(sys.argv[1]).read_bytes())\n"
        "except SampleError:\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    for name in ("JPEG bomb", "PNG bomb"):
        (tmp_path / "bomb").write_bytes(BAD[name])
        (tmp_path / "harmless").write_bytes(encoded())
        command = [sys.executable, "-c", program, str(tmp_path / "bomb"), str(tmp_path / "harmless")]
        printed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        assert int(printed) < 32 * 1024  # KiB; the pixels would take 600 MB and more


@given(seed=st.integers(0, 2**32), num_damaged=st.integers(1, 8))
def test_damage_anywhere_decodes_or_is_a_sample_error(seed: int, num_damaged: int) -> None:
    generator = np.random.default_rng(seed)
    for content in (encoded(40, 40), encoded(40, 40, format="PNG")):
        damaged = bytearray(content)
        for place in generator.integers(0, len(content), num_damaged):
            damaged[place] = generator.integers(256)
        try:
            height, width = picture_size(bytes(damaged))
            if height * width < 10**6:
                assert decode(bytes(damaged)).shape == (height, width, 3)
        except SampleError as error:
            assert str(error)


# Evaluation


@pytest.mark.parametrize("source", [(375, 500), (500, 375), (256, 256), (90, 120), (1000, 301)])
@pytest.mark.parametrize("mode", ["short", "warp"])
@pytest.mark.parametrize("size", [224, 227])
def test_evaluation_views_are_resize_then_centre_crop(source: tuple[int, int], mode: str, size: int) -> None:
    """Only the crop is computed here, and yet it equals the crop of the whole resized picture."""
    content = encoded(*source)
    config = InputConfig(size=size, resize_side=256, resize_mode=mode)
    image = Image.fromarray(decode(content))
    resize_to = 256 if mode == "short" else [256, 256]
    resized = tv.resize(image, resize_to, InterpolationMode.BILINEAR)  # type: ignore[arg-type]
    expected = np.asarray(tv.center_crop(resized, [size, size]))  # type: ignore[arg-type]
    view = eval_view(content, config)
    assert view.dtype == np.uint8 and view.shape == (size, size, 3) and view.flags.c_contiguous
    assert apart(view, expected) <= 1


def test_without_resizing_the_centre_is_cut_out_untouched() -> None:
    content = encoded(40, 50)
    config = InputConfig(size=32, resize_mode="none")
    assert np.array_equal(eval_view(content, config), decode(content)[4:36, 9:41])


@pytest.mark.parametrize("mode", ["short", "warp", "none"])
@pytest.mark.parametrize("source", [(1, 1), (1, 300), (300, 1), (5, 7), (31, 33)])
@pytest.mark.parametrize("crop", ["random_resized", "random", "pad_random", "center"])
def test_the_smallest_pictures_still_give_full_views(mode: str, source: tuple[int, int], crop: str) -> None:
    content, config = encoded(*source), InputConfig(size=32, resize_side=40, resize_mode=mode)
    assert eval_view(content, config).shape == (32, 32, 3)
    for sample_id in range(10):
        view = train_view(content, config, AugmentConfig(crop=crop), draw_of(sample_id=sample_id))
        assert view.shape == (32, 32, 3)


# Training


@pytest.mark.parametrize("crop", ["random_resized", "random", "pad_random", "center"])
def test_a_view_depends_on_seed_epoch_and_sample_alone(crop: str) -> None:
    content, config, augment = encoded(), InputConfig(size=64, resize_side=80), AugmentConfig(crop=crop)

    def view(seed: int = 1, epoch: int = 2, sample_id: int = 3) -> bytes:
        return train_view(content, config, augment, draw_of(seed, epoch, sample_id)).tobytes()

    first = view()
    np.random.default_rng().random()
    torch.rand(3)
    assert view() == first
    ways = {first, *(view(seed=s) for s in range(4, 12)), *(view(epoch=e) for e in range(4, 12))}
    ways |= {view(sample_id=i) for i in range(4, 12)}
    assert len(ways) == 2 if crop == "center" else len(ways) > 15


@given(seed=st.integers(0, 2**63), places=st.lists(st.tuples(st.integers(0, 2**63), st.integers(0, 2**63))))
def test_a_batch_draws_what_each_of_its_pictures_would_alone(seed: int, places: list[tuple[int, int]]) -> None:
    assert train_draws(seed, places) == [draw_of(seed, *place) for place in places]


def test_views_stay_what_they_were_in_earlier_versions() -> None:
    """Of a resumed run, too. The crop of a picture whose pixels are their own coordinates tells where it was cut."""
    rows, columns = np.indices((200, 250), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.stack([rows, columns, rows], axis=2)).save(buffer, "PNG")
    augment = AugmentConfig(crop="random")
    config = InputConfig(size=16, resize_side=200, resize_mode="none")
    corners = []
    for sample_id in range(3):
        view = train_view(buffer.getvalue(), config, augment, draw_of(7, 1, sample_id))
        corners.append(view[0, 0, :2].tolist())
    assert corners == [[156, 218], [145, 142], [45, 171]]


def test_the_largest_seed_epoch_and_sample_are_fine() -> None:
    big = 2**63 - 1
    assert train_view(encoded(), InputConfig(), AugmentConfig(), draw_of(big, big, big)).shape == (
        224,
        224,
        3,
    )


def test_half_of_the_views_are_mirrored() -> None:
    content = encoded(32, 32)
    config, augment = InputConfig(size=32, resize_mode="none"), AugmentConfig(crop="center")
    plain = decode(content)
    num_mirrored = 0
    for sample_id in range(400):
        view = train_view(content, config, augment, draw_of(sample_id=sample_id))
        mirrored = np.array_equal(view, plain[:, ::-1])
        assert mirrored or np.array_equal(view, plain)
        num_mirrored += mirrored
    assert 150 < num_mirrored < 250
    never = AugmentConfig(crop="center", flip=False)
    views = [train_view(content, config, never, draw_of(sample_id=i)) for i in range(20)]
    assert all(np.array_equal(view, plain) for view in views)


@given(
    height=st.integers(1, 2000),
    width=st.integers(1, 2000),
    low=st.floats(0.01, 1),
    seed=st.integers(0, 2**32),
    ratio=st.sampled_from([(0.75, 4 / 3), (1.0, 1.0), (0.1, 0.2), (3.0, 9.0)]),
)
def test_random_resized_crops_lie_inside_and_have_the_asked_shape(
    height: int, width: int, low: float, seed: int, ratio: tuple[float, float]
) -> None:
    augment = AugmentConfig(scale=(low, 1.0), ratio=ratio)
    box = random_resized_box((height, width), augment, np.random.default_rng(seed).random(40).tolist())
    assert box.top >= 0 and box.left >= 0 and box.height >= 1 and box.width >= 1
    assert box.top + box.height <= height and box.left + box.width <= width
    if min(box.height, box.width) > 50:
        assert ratio[0] * 0.95 <= box.width / box.height <= ratio[1] * 1.05


def test_random_resized_crops_are_drawn_as_torchvisions() -> None:
    """Same distribution: means and quantiles over 4,000 draws, against torchvision's own generator."""
    from torchvision.transforms import RandomResizedCrop

    height, width, num_draws = 375, 500, 4000
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [0.75, 4 / 3]) for _ in range(num_draws)])
    generator = np.random.default_rng(0)
    boxes = [
        random_resized_box((height, width), AugmentConfig(), generator.random(40).tolist()) for _ in range(num_draws)
    ]
    ours = np.array([(box.top, box.left, box.height, box.width) for box in boxes])
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert np.abs(np.quantile(ours, quantile, axis=0) - np.quantile(theirs, quantile, axis=0)).max() < 20
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 8


def test_decoding_at_reduced_size_shows_the_same_picture() -> None:
    """A crop at least twice as large as asked for is shrunk by libjpeg first: nearly the same pixels."""
    content = jpeg_of(
        np.asarray(Image.fromarray(smooth_pixels(160, 208)).resize((1300, 1000), Image.Resampling.BICUBIC))
    )
    never_reduced, config = as_png(content), InputConfig(size=96)
    for sample_id in range(12):
        augment = AugmentConfig(scale=(0.3, 1.0), flip=False)
        view = train_view(content, config, augment, draw_of(sample_id=sample_id))
        whole = train_view(never_reduced, config, augment, draw_of(sample_id=sample_id))
        distance = np.abs(view.astype(int) - whole.astype(int)).mean()
        shifted = np.abs(view[1:].astype(int) - whole[:-1].astype(int)).mean()
        assert distance < 1 and shifted > 4 * distance


def jpeg_of(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def as_png(content: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(decode(content)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def test_padded_crops_are_shifts_of_the_picture_over_black() -> None:
    content = encoded(32, 32)
    config, augment = InputConfig(size=32, resize_mode="none"), AugmentConfig(crop="pad_random", pad=4, flip=False)
    padded = np.pad(decode(content), ((4, 4), (4, 4), (0, 0)))
    shifts = {padded[top : top + 32, left : left + 32].tobytes(): (top, left) for top in range(9) for left in range(9)}
    views = [train_view(content, config, augment, draw_of(sample_id=i)).tobytes() for i in range(600)]
    assert {shifts[view] for view in views} == set(shifts.values())  # every shift occurs, and nothing else


def test_random_crops_come_from_the_resized_picture() -> None:
    content = encoded(150, 200)
    config = InputConfig(size=32, resize_side=60, resize_mode="short")
    resized = np.asarray(Image.fromarray(decode(content)).resize((80, 60), Image.Resampling.BILINEAR))
    windows = np.lib.stride_tricks.sliding_window_view(resized, (32, 32), axis=(0, 1)).transpose(0, 1, 3, 4, 2)
    augment = AugmentConfig(crop="random", flip=False)
    for sample_id in range(20):
        view = train_view(content, config, augment, draw_of(sample_id=sample_id))
        distance = np.abs(windows.astype(np.int16) - view.astype(np.int16)).max(axis=(2, 3, 4))
        assert distance.min() <= 1


@pytest.mark.not_quick
def test_pixels_need_no_torch() -> None:
    program = "import sys, pipeline.data.pixels; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], timeout=120, check=True)
