"""The upper rows of a JPEG are those of the whole picture, bit for bit, or None."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.config.data import AugmentConfig
from pipeline.config.model import InputConfig
from pipeline.data import pixels
from pipeline.data.jpeg_rows import upper_rows
from pipeline.data.pixels import SampleError, decode, train_view
from tests.making.pictures import blobs, encoded
from tests.unit.data.draws import draw_of

SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")


def photograph(height: int, width: int, seed: int = 0, **options: Any) -> bytes:
    """Blobs with some noise on them."""
    random = np.random.default_rng(seed)
    blobs_HWC = np.asarray(blobs((height // 16 + 1, width // 16 + 1), (height, width), random), np.int16)
    noisy_HWC = np.clip(blobs_HWC + random.integers(-20, 20, blobs_HWC.shape), 0, 255).astype(np.uint8)
    return encoded(Image.fromarray(noisy_HWC).convert(options.pop("mode", "RGB")), **options)


@given(
    height=st.integers(40, 150),
    width=st.integers(8, 60),
    share=st.floats(0.01, 0.8),
    options=st.sampled_from(
        [
            *({"subsampling": kind} for kind in SUBSAMPLINGS),
            {"mode": "L"},
            {"restart_marker_rows": 1},
            {"optimize": True},
        ]
    ),
    reduction=st.sampled_from((1, 2, 4, 8)),
)
def test_rows_are_those_of_the_whole_picture(
    height: int, width: int, share: float, options: dict[str, Any], reduction: int
) -> None:
    content = photograph(height, width, height, quality=90, **options)
    num_rows = max(1, int(share * height))
    found = upper_rows(content, (height, width), num_rows, reduction)
    if found is None:
        assert num_rows + 1 + 16 * (1 + (reduction > 1)) > height
        return
    whole, reduced_by = pixels._decode(content, (height, width), reduction)
    assert reduced_by == reduction and len(found) <= len(whole)
    rows = num_rows // reduction
    assert len(found) >= rows and np.array_equal(found[:rows], whole[:rows])
    if reduction == 1:
        assert len(found) < height, "nothing was left out"


@pytest.mark.parametrize(
    "content",
    [
        photograph(300, 200, progressive=True),
        photograph(300, 200, mode="CMYK"),
        photograph(300, 200)[:-2],
        photograph(300, 200) + b"stray",
        photograph(300, 200)[:150],
        photograph(300, 200)[:150] + b"\xff\xd9",
        photograph(300, 200)[:2000] + b"\xff\xd9",
        b"\xff\xd8\xff\xd9",
        b"",
    ],
    ids=[
        "progressive",
        "CMYK",
        "no end",
        "stray bytes",
        "header cut",
        "header cut, end",
        "rows cut",
        "empty",
        "nothing",
    ],
)
def test_all_else_is_left_to_the_whole_decoder(content: bytes) -> None:
    assert upper_rows(content, (300, 200), 150) is None


def test_a_view_is_the_same_whether_the_rest_was_decoded_or_not() -> None:
    for sample_id in range(12):
        content = photograph(300 + 20 * (sample_id % 5), 400, sample_id, subsampling=SUBSAMPLINGS[sample_id % 3])
        views = [
            train_view(
                content,
                InputConfig(size=32 * (1 + sample_id % 4)),
                AugmentConfig(),
                draw_of(1, 2, sample_id),
                is_checked=is_checked,
            )
            for is_checked in (False, True)
        ]
        assert np.array_equal(views[0], views[1])


@pytest.mark.parametrize("is_checked", [False, True])
def test_a_picture_cut_short_is_refused_for_what_is_missing_below_the_crop_too(is_checked: bool) -> None:
    content = photograph(300, 200)[:-1000]
    with pytest.raises(SampleError):
        decode(content)
    for sample_id in range(10):
        with pytest.raises(SampleError):
            train_view(
                content,
                InputConfig(size=32),
                AugmentConfig(),
                draw_of(sample_id=sample_id),
                is_checked=is_checked,
            )


@pytest.mark.not_quick
def test_pixels_do_not_depend_on_what_the_processor_can_do(tmp_path: Path) -> None:
    """libjpeg-turbo and torch choose among several implementations; the plainest gives what the fastest gives."""
    path = tmp_path / "photograph.jpg"
    path.write_bytes(photograph(300, 400))
    program = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "import pathlib\n"
        f"from {__name__} import hash_of_views\n"
        f"print(hash_of_views(pathlib.Path({str(path)!r}).read_bytes()))\n"
    )
    plainest = {"ATEN_CPU_CAPABILITY": "default", "JSIMD_FORCENONE": "1"}
    found = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **plainest},
        timeout=120,
        check=True,
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == hash_of_views(path.read_bytes())


def hash_of_views(content: bytes) -> str:
    """Of twenty training views."""
    sha = hashlib.sha256()
    for sample_id in range(20):
        sha.update(train_view(content, InputConfig(), AugmentConfig(), draw_of(sample_id=sample_id)).tobytes())
    return sha.hexdigest()
