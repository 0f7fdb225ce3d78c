"""The command as people run it: what it says, what it leaves, and that a kill costs nothing but time."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipeline.core.errors import ExitCode
from pipeline.data.shards.manifest import Manifest
from tests.making.pictures import contents_of, picture, pictures, stored_samples, tar_of, write_files
from tests.waiting import wait_until

pytestmark = pytest.mark.not_quick

REPOSITORY = Path(__file__).resolve().parents[3]
DEADLINE_SECONDS = 120


def prepare(*overrides: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline.prepare", *overrides],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )


def refused(*overrides: str, code: ExitCode = ExitCode.DATA) -> str:
    """The one sentence that a refused command ends with."""
    done = prepare(*overrides)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr


@pytest.fixture(scope="module")
def animals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders."""
    return write_files(tmp_path_factory.mktemp("source") / "animals", pictures({"cat": 5, "dog": 4}))


def test_from_folders_to_shards_and_nothing_to_do_the_second_time(animals: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = prepare(f"source={animals}", f"out={out}", "num_workers=1")
    assert done.returncode == 0 and done.stderr == ""
    assert "folders (recognised), 2 classes, images: train 9." in done.stdout
    assert "9 images written" in done.stdout
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.iterdir()}
    again = prepare(f"source={animals}", f"out={out}", "num_workers=1")
    assert again.returncode == 0
    assert again.stdout == f"Finished already: train in {out}. {animals} was not looked at again.\n"
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.iterdir()} == before


def test_the_builtin_set_by_two_workers(tmp_path: Path) -> None:
    done = prepare("source=builtin", f"out={tmp_path}", "num_images=40", "shard_bytes=1500000", "num_workers=2")
    assert done.returncode == 0 and done.stderr == ""
    manifest = Manifest.load(tmp_path)
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"train": 40, "val": 10}
    assert sorted({sample.label for sample in stored_samples(tmp_path, "val")}) == list(range(10))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [
            *("_info.json", "manifest.json", "train.index.npz", "val.index.npz"),
            *(shard.name for split in manifest.splits.values() for shard in split.shards),
        ]
    )


def test_a_tar_with_train_and_test(tmp_path: Path) -> None:
    files = {
        f"{split}/{name}": content
        for split in ("train", "test")
        for name, content in pictures({"a": 2, "b": 2}).items()
    }
    (tmp_path / "set.tar").write_bytes(tar_of(files))
    done = prepare(f"source={tmp_path / 'set.tar'}", f"out={tmp_path / 'out'}", "num_workers=1")
    assert done.returncode == 0
    assert "train 4, val 4" in done.stdout and "test/ becomes the split 'val'" in done.stdout
    assert set(Manifest.load(tmp_path / "out").splits) == {"train", "val"}


def test_killed_and_run_again_the_bytes_are_those_of_a_run_in_peace(tmp_path: Path) -> None:
    arguments = ["source=builtin", "num_images=160", "shard_bytes=1000000", "num_workers=2"]
    assert prepare(*arguments, f"out={tmp_path / 'whole'}").returncode == 0
    out = tmp_path / "out"
    command = [sys.executable, "-m", "pipeline.prepare", *arguments, f"out={out}"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_until(lambda: len(list(out.glob("*.tar"))) >= 3)
        process.send_signal(signal.SIGKILL)
        process.wait(DEADLINE_SECONDS)
        wait_until(lambda: not members_of_session(process.pid))  # the workers notice and leave
    finally:
        for pid in members_of_session(process.pid):
            os.kill(pid, signal.SIGKILL)
    assert not (out / "manifest.json").exists()
    again = prepare(*arguments, f"out={out}")
    assert again.returncode == 0
    assert "shards of an earlier attempt were whole and kept" in again.stdout
    assert contents_of(out) == contents_of(tmp_path / "whole")


def members_of_session(session: int) -> list[int]:
    """Living processes whose session is `session`."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue  # it ended meanwhile
        if int(its_session) == session and state not in "ZX":
            pids.append(int(path.parent.name))
    return pids


def test_refusals_are_one_sentence(animals: Path, tmp_path: Path) -> None:
    out = f"out={tmp_path / 'out'}"
    assert "source=nowhere does not exist" in refused("source=nowhere", out)
    assert "Did you mean 'folders'?" in refused(f"source={animals}", out, "kind=folder", code=ExitCode.CONFIG)
    assert "Did you mean 'source'?" in refused(f"sources={animals}", out, code=ExitCode.CONFIG)
    (tmp_path / "classes.txt").write_text("dog\n")
    assert "not among the 1 known" in refused(f"source={animals}", out, f"classes={tmp_path / 'classes.txt'}")
    assert not list((tmp_path / "out").iterdir())


def test_other_settings_do_not_overwrite_what_is_there(animals: Path, tmp_path: Path) -> None:
    assert prepare(f"source={animals}", f"out={tmp_path}", "num_workers=1").returncode == 0
    before = contents_of(tmp_path)
    assert "seed was 0 and is 1" in refused(f"source={animals}", f"out={tmp_path}", "seed=1")
    assert contents_of(tmp_path) == before


def test_a_source_of_the_same_name_elsewhere_is_not_called_finished(tmp_path: Path) -> None:
    first = write_files(tmp_path / "v1" / "animals", pictures({"cat": 5, "dog": 4}))
    second = write_files(tmp_path / "v2" / "animals", pictures({"cat": 3, "dog": 4}))
    out, tar = tmp_path / "out", tmp_path / "out" / "train-000000.tar"
    assert prepare(f"source={first}", f"out={out}", "num_workers=1").returncode == 0
    before = contents_of(out)
    refusal = f"out={out} holds the split 'train' made from a source= of this name that lay elsewhere"
    assert refusal in refused(f"source={second}", f"out={out}")
    assert contents_of(out) == before
    assert str(tmp_path).encode() not in b"".join(before.values())
    # Another way to the same place is the same place; other splits may come from elsewhere.
    (tmp_path / "link").symlink_to(first.parent)
    assert "Finished already" in prepare(f"source={tmp_path / 'link' / 'animals'}", f"out={out}").stdout
    assert prepare(f"source={second}", f"out={out}", "split=val", "num_workers=1").returncode == 0
    assert {name: split.num_samples for name, split in Manifest.load(out).splits.items()} == {"train": 9, "val": 7}
    # Nor may the rest of a damaged split.
    tar.rename(tmp_path / "away")
    assert refusal in refused(f"source={second}", f"out={out}", "split=train")
    # Shards of an earlier version, or copied without that file, are accepted.
    (tmp_path / "away").rename(tar)
    (out / ".sources.json").unlink()
    again = prepare(f"source={second}", f"out={out}", "split=train")
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout == f"Finished already: train in {out}. {second} was not looked at again.\n"


def test_the_same_pictures_from_another_place_are_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for place in ("v1", "v2"):
        source = write_files(tmp_path / place / "animals", pictures({"cat": 5, "dog": 4}))
        assert prepare(f"source={source}", f"out={tmp_path / place / 'out'}", "num_workers=1").returncode == 0
        contents.append(contents_of(tmp_path / place / "out"))
    assert contents[0].pop(".sources.json") != contents[1].pop(".sources.json")
    assert contents[0] == contents[1] and "manifest.json" in contents[0]


def test_a_bad_picture_is_named_and_can_be_left_out(tmp_path: Path) -> None:
    files = {**pictures({"cat": 5, "dog": 4}), "dog/0001.jpg": picture(1)[:300]}
    source = write_files(tmp_path / "animals", files)
    out = f"out={tmp_path / 'out'}"
    assert "dog/0001.jpg" in refused(f"source={source}", out, "num_workers=1")
    done = prepare(f"source={source}", out, "num_workers=1", "max_bad_fraction=0.12")
    assert done.returncode == 0 and "left out: dog/0001.jpg" in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small tmpfs")
def test_a_full_disk_leaves_nothing_half_made(tmp_path: Path) -> None:
    """Seen before work starts where the sizes are known; and in the middle, where files grow."""
    out = tmp_path / "out"
    out.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(out)], capture_output=True, text=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"needs root that may mount a tmpfs: {mount.stderr.strip()}")
    try:
        assert "has room for" in refused("source=builtin", f"out={out}", "num_images=100")
        assert not list(out.iterdir())
        # A flat PNG is small, and as a JPEG of high quality it is larger than planned with.
        source = write_files(tmp_path / "flat", flat_pngs())
        message = refused(f"source={source}", f"out={out}", "num_workers=1", "jpeg_quality=95", "shard_bytes=1000")
        assert "No space left on device" in message
        assert not (out / "manifest.json").exists() and not list(out.rglob("*.tmp.*"))
    finally:
        subprocess.run(["umount", str(out)], check=True, timeout=DEADLINE_SECONDS)


def flat_pngs() -> dict[str, bytes]:
    """PNGs that are much smaller than the JPEGs made of them."""
    buffer = io.BytesIO()
    Image.new("RGB", (2500, 2500), (200, 10, 60)).save(buffer, "PNG", optimize=True)
    return {f"{name}/{number}.png": buffer.getvalue() for name in ("a", "b") for number in range(25)}


def test_a_read_only_directory(animals: Path, tmp_path: Path) -> None:
    message = refused(f"source={animals}", "out=/proc/squeezewire", "num_workers=1")
    assert "out=/proc/squeezewire cannot be written" in message
