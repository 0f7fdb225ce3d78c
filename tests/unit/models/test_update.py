"""A device has the newest model, or goes on with the one it has, whatever a real server does."""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.models.sqz.delta import base_sha256, make_delta
from pipeline.models.sqz.encoder import encode, make_grid, pack
from pipeline.models.sqz.update import MODEL, OFFER, Update, UpdateError, update
from tests.shard_server import Rule, ShardServer, serving

pytestmark = pytest.mark.not_quick

SECONDS, STALL = 20.0, 0.5


def package(symbols: np.ndarray) -> bytes:
    grids = {"layer": make_grid(np.arange(-40, 41), 0.01)}
    return encode(pack({"model": "m", "classes": ["ant", "bee"]}, {"layer": symbols}, grids, [(1, 2.5)])).content


SYMBOLS = np.random.default_rng(0).integers(-30, 31, (64, 32, 3, 3)).astype(np.int32)
OLD = package(SYMBOLS)
NEW = package(SYMBOLS + (np.random.default_rng(1).random(SYMBOLS.shape) < 0.02))
DELTA = make_delta(OLD, NEW)


class Publisher:
    """What `export` left for devices, on a server."""

    def __init__(self, root: Path, server: ShardServer) -> None:
        self.root, self.server = root, server

    def offer(self, package: bytes, delta: bytes | None = None, **changes: object) -> None:
        contents = {"package": ("model.sqz", package), "delta": ("model.sqd", delta)}
        files = {}
        for kind, (file, content) in contents.items():
            if content is not None:
                (self.root / file).write_bytes(content)
                sha256 = hashlib.sha256(content).hexdigest()
                files[kind] = {"file": file, "num_bytes": len(content), "sha256": sha256}
        if delta is not None:
            files["delta"]["base_sha256"] = base_sha256(delta)
        files["package"].update(changes)
        (self.root / OFFER).write_text(json.dumps({"schema": 1, "files": files}))

    def update(self, device: Path, *, seconds: float = SECONDS) -> Update:
        return update(self.server.url, device, seconds=seconds, stall=STALL)


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[Publisher]:
    (tmp_path / "published").mkdir()
    with serving(tmp_path / "published", tmp_path / "log") as server:
        yield Publisher(tmp_path / "published", server)


@pytest.fixture
def device(tmp_path: Path) -> Path:
    return tmp_path / "device"


def has(device: Path, content: bytes) -> bool:
    """The model and nothing else."""
    return (device / MODEL).read_bytes() == content and [*device.iterdir()] == [device / MODEL]


def test_the_whole_first_then_deltas_then_nothing(publisher: Publisher, device: Path) -> None:
    publisher.offer(OLD)
    assert publisher.update(device) == Update("model.sqz", len(OLD)) and has(device, OLD)
    publisher.offer(NEW, DELTA)
    assert publisher.update(device) == Update("model.sqd", len(DELTA)) and has(device, NEW)
    assert len(DELTA) < len(NEW) / 4
    assert publisher.update(device) == Update(None, 0)
    assert publisher.server.sent_bytes(r"model\.sq") == len(OLD) + len(DELTA)


def test_a_delta_for_another_package_is_not_asked_for(publisher: Publisher, device: Path) -> None:
    device.mkdir()
    (device / MODEL).write_bytes(b"of somebody else")
    publisher.offer(NEW, DELTA)
    assert publisher.update(device) == Update("model.sqz", len(NEW)) and has(device, NEW)
    assert not publisher.server.requests(r"model\.sqd")


@pytest.mark.parametrize("fault", ["reset", "short", "stall", "status"])
def test_a_transfer_that_is_cut_goes_on_where_it_ended(fault: str, publisher: Publisher, device: Path) -> None:
    publisher.offer(NEW)
    publisher.server.set_rules(Rule(fault, path=r"model\.sqz", times=3, after_bytes=3000))
    assert publisher.update(device).file == "model.sqz" and has(device, NEW)
    asked = publisher.server.requests(r"model\.sqz")
    assert [request.fault for request in asked] == [fault] * 3 + [None]
    if fault != "status":
        assert [request.asked_range for request in asked] == [None, "bytes=3000-", "bytes=6000-", "bytes=9000-"]
    assert publisher.server.sent_bytes(r"model\.sqz") == len(NEW)


def test_what_came_before_the_time_was_over_is_kept(publisher: Publisher, device: Path) -> None:
    publisher.offer(OLD)
    publisher.update(device)
    publisher.offer(NEW)
    publisher.server.set_rules(Rule("stall", path=r"model\.sqz", after_bytes=5000, times=1), Rule("status", path="sqz"))
    begin = time.monotonic()
    with pytest.raises(UpdateError, match="5,000 bytes have come, and are kept"):
        publisher.update(device, seconds=1.5)
    assert time.monotonic() - begin < SECONDS and (device / MODEL).read_bytes() == OLD
    publisher.server.set_rules()
    assert publisher.update(device) == Update("model.sqz", len(NEW) - 5000) and has(device, NEW)


def test_a_server_without_ranges_begins_again(publisher: Publisher, device: Path) -> None:
    publisher.offer(NEW)
    cut = Rule("short", path=r"model\.sqz", times=1, after_bytes=4000)
    publisher.server.set_rules(cut, Rule("no_ranges", path=r"model\.sqz"))
    assert publisher.update(device).file == "model.sqz" and has(device, NEW)
    assert publisher.server.sent_bytes(r"model\.sqz") == len(NEW) + 4000


def damaged(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("package", "delta", "changes", "said"),
    [
        (NEW, None, {"sha256": hashlib.sha256(b"").hexdigest()}, "its size or SHA-256 is another"),
        (damaged(NEW), None, {}, "cannot be decoded"),
        (NEW, damaged(DELTA), {}, "cannot be applied"),
        (OLD[:-4], DELTA, {}, "what was made is not the package"),
        (NEW, None, {"num_bytes": len(NEW) + 1}, "its size or SHA-256 is another"),
        (NEW, None, {"file": "../model.sqz"}, "cannot be"),
        (NEW, None, {"file": "gone.sqz"}, "404"),
        (NEW, None, {"num_bytes": 1 << 40}, "cannot be"),
        (NEW, None, {"sha256": "../../x"}, "cannot be"),
        (NEW, None, {"colour": "red"}, "latest.json is none"),
    ],
)
def test_what_is_wrong_does_not_take_the_models_place(
    package: bytes, delta: bytes | None, changes: dict[str, object], said: str, publisher: Publisher, device: Path
) -> None:
    publisher.offer(OLD)
    publisher.update(device)
    publisher.offer(package, delta, **changes)
    with pytest.raises(UpdateError, match=said):
        publisher.update(device)
    assert (device / MODEL).read_bytes() == OLD
    publisher.offer(NEW)
    assert publisher.update(device).file == "model.sqz" and (device / MODEL).read_bytes() == NEW


def test_a_device_needs_no_torch(publisher: Publisher, device: Path) -> None:
    publisher.offer(NEW)
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "pipeline.models.sqz.update",
        publisher.server.url,
        str(device),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"Updated by model.sqz: {len(NEW):,} bytes.\n" and "torch" not in done.stderr
    publisher.server.set_rules(Rule("status", path=OFFER, status=404))
    refused = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert refused.returncode == 3 and "The older model stays in use." in refused.stderr and has(device, NEW)
