"""Others read our shards: webdataset itself, and timm's reader of WebDataset."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config.prepare import PrepareConfig
from pipeline.data.shards.manifest import Manifest
from pipeline.prepare import prepare
from tests.making.pictures import stored_samples

pytestmark = pytest.mark.not_quick

DEADLINE_SECONDS = 120
READER = Path(__file__).with_name("read_as_a_peer.py")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several training shards and one or more for validation."""
    out = tmp_path_factory.mktemp("shards")
    prepare(PrepareConfig(source="builtin", out=str(out), num_images=40, shard_bytes=1_100_000, num_workers=1))
    assert len(Manifest.load(out).split("train").shards) >= 3
    return out


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("peer", ["webdataset", "timm"])
def test_a_peer_reads_every_sample_once(shards: Path, peer: str, split: str) -> None:
    """In a process of its own: webdataset 1.0.2 leaves the last tar open, a ResourceWarning (November 2026)."""
    done = subprocess.run(
        [sys.executable, str(READER), peer, str(shards), split],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = []
    for sample in stored_samples(shards, split):
        pixels_HWC = np.asarray(Image.open(io.BytesIO(sample.jpeg)), dtype=np.int64)
        expected.append([list(pixels_HWC.shape), int(pixels_HWC.sum()), sample.label])
    assert sorted(map(json.loads, done.stdout.splitlines())) == sorted(expected)
    assert len(expected) == Manifest.load(shards).split(split).num_samples
