"""`prepare verify=true`: everything that is wrong with shards is named in one go, and nothing is touched."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from pipeline.core.errors import ExitCode
from pipeline.core.files import sha256_of_file
from tests.making.pictures import contents_of, picture
from tests.making.shards import samples_of, write_manifest, write_shards, write_tar

pytestmark = pytest.mark.not_quick

REPOSITORY = Path(__file__).resolve().parents[3]
DEADLINE_SECONDS = 120


def verify(root: Path, *overrides: str, code: ExitCode = ExitCode.DONE) -> tuple[list[str], str]:
    """(lines on stdout, text on stderr) of the command."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.prepare", "verify=true", f"out={root}", *overrides],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines(), done.stderr


def wrong(lines: list[str]) -> list[str]:
    return sorted(line.removeprefix("wrong: ") for line in lines if line.startswith("wrong: "))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards", train=(4, 5), val=(3,))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_sound_shards_are_counted_and_left_as_they_are(root: Path, num_workers: int) -> None:
    before = contents_of(root)
    lines, errors = verify(root, f"num_workers={num_workers}")
    assert errors == "" and not wrong(lines)
    assert re.fullmatch(r"train: 9 sound pictures, .* MB, 2 shards, all sound; labels 0 to 3", lines[0])
    assert re.fullmatch(r"val: 3 sound pictures, .* MB, 1 shards, all sound; labels 1 to 3", lines[1])
    assert lines[2].startswith("12 pictures decoded in ")
    assert contents_of(root) == before


def test_everything_that_is_wrong_is_named_at_once(root: Path) -> None:
    """A missing shard, one cut short, one changed, and one whose samples are bad in every way."""
    samples = samples_of(20, 6)
    samples[1]["jpg"] = picture(0)[:200]
    samples[2]["jpg"] = picture(0, encoding="WEBP")
    samples[3]["cls"] = "4"
    samples[4]["cls"] = "dog"
    del samples[5]["cls"]
    write_tar(root / "train-000002.tar", samples)
    for number in (3, 4, 5):
        write_tar(root / f"train-00000{number}.tar", samples_of(30 + number, 1))
    counts = {f"train-{number:06d}.tar": count for number, count in enumerate((4, 5, 6, 1, 1, 1))}
    write_manifest(root, {"train": counts, "val": {"val-000000.tar": 3}})
    (root / "train-000003.tar").unlink()
    os.truncate(root / "train-000004.tar", 700)
    content = bytearray((root / "train-000005.tar").read_bytes())
    content[600] ^= 1
    (root / "train-000005.tar").write_bytes(content)
    write_tar(root / "stray.tar", samples_of(0, 1))

    lines, errors = verify(root, "num_workers=2", code=ExitCode.DATA)
    assert "stray.tar is in no split" in lines[0]
    found = wrong(lines)
    expected = [
        "train-000002.tar: Sample '000000025' of shard train-000002.tar has no label",
        "train-000002.tar: The label of sample '000000024' of shard train-000002.tar is 'dog'",
        "train-000002.tar: holds 4 whole samples and not 6",
        "train-000002.tar: sample '000000021': ",
        "train-000002.tar: sample '000000022': neither JPEG nor PNG but WebP",
        "train-000002.tar: sample '000000023': its label is 4, and there are 4 classes, 0 to 3",
        "train-000003.tar: is missing",
        "train-000004.tar: Shard train-000004.tar is cut short",
        "train-000004.tar: has 700 bytes, and the manifest says 10240",
        "train-000005.tar: has SHA-256 ",
    ]
    flipped = [line for line in found if line.startswith("train-000005.tar: sample")]  # it may decode all the same
    assert len(found) == len(expected) + len(flipped)
    for line, start in zip(found, expected, strict=False):
        assert line.startswith(start), (line, start)
    assert re.search(r"train: \d+ sound pictures, .* 6 shards, 4 not sound", "\n".join(lines))
    assert re.fullmatch(
        rf"error: Not sound: 4 of 7 files of .*, with {len(found)} faults, each named above\. .*\n", errors
    )


def test_the_index_beside_the_shards_is_checked_too(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "pipeline.prepare",
        "source=builtin",
        f"out={out}",
        "num_images=40",
        "num_workers=1",
    ]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=DEADLINE_SECONDS)
    assert not wrong(verify(out)[0])
    index = out / "val.index.npz"
    content = bytearray(index.read_bytes())
    content[len(content) // 2] ^= 1
    index.write_bytes(content)
    lines, _ = verify(out, code=ExitCode.DATA)
    assert [line.split(",")[0] for line in wrong(lines)] == [f"val.index.npz: has SHA-256 {sha256_of_file(index)}"]


def test_one_split_alone(root: Path) -> None:
    (root / "train-000000.tar").unlink()
    lines, _ = verify(root, "split=val", "num_workers=1")
    assert lines[0].startswith("val: 3 sound pictures")


def test_foreign_shards_are_checked_as_far_as_anything_is_known(root: Path) -> None:
    (root / "manifest.json").unlink()
    lines, _ = verify(root, "num_workers=1")
    assert "sizes and hashes are not known" in lines[0]
    assert [line.split(",")[0] for line in lines[1:3]] == ["train: 9 sound pictures", "val: 3 sound pictures"]
    samples = samples_of(0, 2)
    samples[0]["json"] = "{}"
    samples[1]["jpg"] = b""
    write_tar(root / "val-000000.tar", samples)
    lines, _ = verify(root, "split=val", "num_workers=1", code=ExitCode.DATA)
    assert wrong(lines) == ["val-000000.tar: sample '000000001': empty file"]
    (root / "val-000000.tar").write_bytes((root / "val-000000.tar").read_bytes()[:-10240])
    lines, _ = verify(root, "split=val-{000000..000000}.tar", "num_workers=1", code=ExitCode.DATA)
    assert "cut short" in wrong(lines)[0]


@pytest.mark.parametrize("known_by", ["manifest.json", "_info.json", "nothing"])
def test_all_shards_cut_short_are_named_with_their_counts(root: Path, known_by: str) -> None:
    """In the middle of a label, between a picture and its label, and in the first header."""
    write_tar(root / "train-000002.tar", samples_of(9, 2))
    counts = {"train-000000.tar": 4, "train-000001.tar": 5, "train-000002.tar": 2}
    write_manifest(root, {"train": counts, "val": {"val-000000.tar": 3}})
    for name, num_members, num_more in (
        ("train-000000.tar", 5, 512),
        ("train-000001.tar", 9, 0),
        ("train-000002.tar", 0, 100),
    ):
        with tarfile.open(root / name) as tar:
            members = tar.getmembers()
        os.truncate(root / name, members[num_members].offset + num_more)
    if known_by != "manifest.json":
        (root / "manifest.json").unlink()
    if known_by == "_info.json":
        train = {"filenames": list(counts), "shard_lengths": list(counts.values()), "num_samples": 11}
        (root / "_info.json").write_text(json.dumps({"splits": {"train": train}}))
    lines, _ = verify(root, "num_workers=1", code=ExitCode.DATA)
    found = [line for line in wrong(lines) if "is cut short" in line]
    of = ("", "", "") if known_by == "nothing" else (" of 4", " of 5", " of 2")
    for line, name, num_whole, of_how_many in zip(found, counts, (2, 4, 0), of, strict=True):
        assert line.startswith(f"{name}: Shard {name} is cut short: ")
        assert f"Before that it holds {num_whole}{of_how_many} whole samples." in line
    assert any(line.startswith("val: 3 sound pictures") for line in lines)


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (["verify=true", "out=nowhere"], ExitCode.DATA, "out=nowhere is not a directory"),
        (["verify=true", "out={root}", "split=test"], ExitCode.DATA, "train, val"),
        (["verify=true", "out={root}", "source=builtin"], ExitCode.CONFIG, "leave out source=builtin"),
        (["out={root}"], ExitCode.CONFIG, "source is not set"),
        (["verify=true", "out=pipe:touch marker"], ExitCode.DATA, "is not a directory"),
    ],
)
def test_what_cannot_be_verified_is_a_sentence(root: Path, overrides: list[str], code: ExitCode, words: str) -> None:
    arguments = [override.format(root=root) for override in overrides]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.prepare", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    assert done.returncode == code and words in done.stderr and done.stderr.count("\n") == 1
    assert not (REPOSITORY / "marker").exists()


def test_a_split_without_a_sample_is_not_sound(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", samples_of(0, 2))
    write_tar(tmp_path / "val-0.tar", [])
    write_tar(tmp_path / "webp-0.tar", [{"__key__": "0", "webp": b"x"}])
    lines, errors = verify(tmp_path, "num_workers=1", code=ExitCode.DATA)
    assert wrong(lines) == [
        f"{split}-0.tar: the split {split!r} holds no sample with a picture and a label" for split in ("val", "webp")
    ]
    assert "Not sound: 2 of 3 files" in errors


def test_shards_that_prepare_has_not_finished_are_not_called_sound(root: Path) -> None:
    (root / "manifest.json").unlink()
    (root / ".prepare").mkdir()
    _, errors = verify(root, code=ExitCode.DATA)
    assert "unfinished" in errors
