"""Shards are the same bytes however they come about, and whole or absent whatever happens."""

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import DataError
from pipeline.data.index import ShardIndex
from pipeline.data.pictures import BadImageError, Encoding, shard_jpeg
from pipeline.data.prepare.labelling import Asked
from pipeline.data.prepare.plan import PlannedShard, key_stem, plan_shards, shuffled, tar_bytes
from pipeline.data.prepare.request import exclusive, plan_splits
from pipeline.data.prepare.sources import PictureSource, SourceImage, open_folders
from pipeline.data.prepare.writer import ShardWriter, WrittenShard, write_splits
from pipeline.data.shards.manifest import Manifest, Split
from tests.making.pictures import contents_of, picture, pictures, stored_samples, write_files
from tests.making.shards import add_index

COUNTS = {"cat": 13, "dog": 8}
SHARD_BYTES = 12_000


def write(
    source: PictureSource,
    out: Path,
    *,
    num_workers: int = 1,
    max_bad_fraction: float = 0.0,
    encoding: Encoding | None = None,
    seed: int = 0,
) -> tuple[Manifest, list[WrittenShard]]:
    """What `prepare` does, without its words."""
    encoding = encoding or Encoding()
    out.mkdir(exist_ok=True)
    manifest = Manifest.load(out) if (out / "manifest.json").exists() else None
    plans = plan_splits(
        source,
        out,
        manifest,
        seed=seed,
        shard_bytes=SHARD_BYTES,
        encoding=encoding,
        request={"seed": seed},
        is_whole_source=True,
    )
    done: list[int] = []
    manifest, results = write_splits(
        plans,
        ShardWriter(out, source.read, encoding),
        source.classes,
        manifest,
        num_workers=num_workers,
        max_bad_fraction=max_bad_fraction,
        report=done.append,
    )
    assert done == sorted(done)
    return manifest, results


@pytest.fixture
def source(tmp_path: Path) -> PictureSource:
    return open_folders(write_files(tmp_path / "animals", pictures(COUNTS)), Asked("source=animals"))


def with_broken(source: PictureSource, tmp_path: Path, content: bytes) -> PictureSource:
    """`source` with cat/0003.jpg replaced."""
    (tmp_path / "animals/cat/0003.jpg").write_bytes(content)
    return open_folders(tmp_path / "animals", Asked("source=animals"))


def test_every_picture_once_with_its_label_and_its_own_bytes(source: PictureSource, tmp_path: Path) -> None:
    manifest, _ = write(source, tmp_path / "out")
    samples = stored_samples(tmp_path / "out", "train")
    expected = sorted((content, ["cat", "dog"].index(name[:3])) for name, content in pictures(COUNTS).items())
    assert sorted((sample.jpeg, sample.label) for sample in samples) == expected
    assert manifest.classes == ("cat", "dog")
    assert [sample.key[:9] for sample in samples] == [f"{position:09d}" for position in range(21)]
    assert {sample.key[10:] for sample in samples} == {
        n.replace("/", "_").removesuffix(".jpg") for n in pictures(COUNTS)
    }


def test_the_manifest_tells_the_truth(source: PictureSource, tmp_path: Path) -> None:
    manifest, _ = write(source, tmp_path / "out")
    shards = manifest.split("train").shards
    assert len(shards) > 2
    for shard in shards:
        content = (tmp_path / "out" / shard.name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard.bytes, shard.sha256)
    assert manifest.split("train").num_samples == 21
    assert Manifest.load(tmp_path / "out") == manifest
    add_index(tmp_path / "out", "train")  # it is there already, and tells the truth too
    assert Manifest.load(tmp_path / "out") == manifest
    names = ["_info.json", "manifest.json", *(shard.name for shard in shards), "train.index.npz"]
    assert sorted(contents_of(tmp_path / "out")) == names


@pytest.mark.parametrize("encoding", [Encoding(), Encoding(short_side=12, jpeg_quality=80)])
def test_the_number_of_workers_leaves_no_trace(source: PictureSource, tmp_path: Path, encoding: Encoding) -> None:
    for num_workers in (1, 3):
        write(source, tmp_path / str(num_workers), num_workers=num_workers, encoding=encoding)
    assert contents_of(tmp_path / "1") == contents_of(tmp_path / "3")


def test_the_order_is_random_and_fixed_by_the_seed(source: PictureSource) -> None:
    images = list(source.splits["train"])
    order = shuffled(images, 0, "train")
    assert order == shuffled(reversed(images), 0, "train")
    assert sorted(order, key=lambda image: image.name) == images != order
    assert order != shuffled(images, 1, "train") != shuffled(images, 1, "val")


def test_a_shard_finished_before_is_kept_and_one_under_way_is_not_there(source: PictureSource, tmp_path: Path) -> None:
    """An attempt that stops after two shards and within the third."""
    write(source, tmp_path / "whole")
    out = tmp_path / "out"
    num_read = 0

    def read(image: SourceImage) -> bytes:
        nonlocal num_read
        num_read += 1
        if num_read == 12:
            raise KeyboardInterrupt
        return source.read(image)

    with pytest.raises(KeyboardInterrupt):
        write(dataclasses.replace(source, read=read), out)
    finished = sorted(path.name for path in out.glob("*.tar"))
    assert finished and not (out / "manifest.json").exists() and not list(out.glob("*.tmp.*"))
    inodes = {name: (out / name).stat().st_ino for name in finished}
    _, results = write(source, out)
    assert [result.shard.name for result in results if result.is_kept] == finished
    assert {name: (out / name).stat().st_ino for name in finished} == inodes
    assert contents_of(out) == contents_of(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["flipped byte", "cut", "record gone", "record broken", "source changed"])
def test_a_finished_shard_is_only_kept_if_it_is_what_it_was(source: PictureSource, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    write(source, tmp_path / "whole")
    stop_after_first_shard(source, out)
    tar, record = out / "train-000000.tar", out / ".prepare/train-000000.tar.json"
    if damage == "flipped byte":
        content = bytearray(tar.read_bytes())
        content[700] ^= 1
        tar.write_bytes(content)
    elif damage == "cut":
        os.truncate(tar, 5000)
    elif damage == "record gone":
        record.unlink()
    elif damage == "record broken":
        record.write_text("{")
    else:
        for image in source.splits["train"]:
            os.utime(image.path, (1, 1))
        source = open_folders(tmp_path / "animals", Asked("source=animals"))
    _, results = write(source, out)
    assert not any(result.is_kept for result in results)
    assert contents_of(out) == contents_of(tmp_path / "whole")


def stop_after_first_shard(source: PictureSource, out: Path) -> None:
    """An attempt that ends with one finished shard."""

    def read(image: SourceImage) -> bytes:
        if (out / "train-000000.tar").exists():
            raise KeyboardInterrupt
        return source.read(image)

    with pytest.raises(KeyboardInterrupt):
        write(dataclasses.replace(source, read=read), out)


def test_leftovers_of_a_dead_process_are_removed(source: PictureSource, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_after_first_shard(source, out)
    # A killed worker may be a zombie for a while: that its pid exists proves nothing.
    (out / f"train-000001.tar.tmp.{os.getpid()}").write_bytes(b"half")
    (out / "train-000099.tar").write_bytes(b"of a longer plan")
    (out / ".prepare/train-000099.tar.json").write_text("{}")
    write(source, out)
    assert not list(out.glob("*.tmp.*")) and not (out / "train-000099.tar").exists()


def test_foreign_tars_are_not_touched(source: PictureSource, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/train-000000.tar").write_bytes(b"somebody else's")
    with pytest.raises(DataError, match=r"train-000000\.tar, which is not of this run"):
        write(source, tmp_path / "out")
    assert contents_of(tmp_path / "out") == {"train-000000.tar": b"somebody else's"}


BROKEN = {
    "empty": (b"", "empty file"),
    "garbage": (b"this is no picture" * 50, "neither JPEG nor PNG"),
    "cut": (picture(3, height=64, width=64)[:2000], "truncated"),
    "gif": (picture(3, encoding="GIF"), "neither JPEG nor PNG"),
}


@pytest.mark.parametrize(("content", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_bad_picture_is_named_and_fatal_unless_allowed(
    source: PictureSource, tmp_path: Path, content: bytes, reason: str
) -> None:
    source = with_broken(source, tmp_path, content)
    out = tmp_path / "out"
    with pytest.raises(DataError, match=rf"At least 1 of the 21 .*cat/0003\.jpg: .*{reason}.*max_bad_fraction=0\.05"):
        write(source, out)
    assert not (out / "manifest.json").exists()
    manifest, _ = write(source, out, max_bad_fraction=0.05)
    split = manifest.split("train")
    assert (split.num_samples, split.extra["num_bad"]) == (20, 1)
    (bad,) = manifest.to_json()["splits"]["train"].get("bad", [])
    assert bad["name"] == "cat/0003.jpg" and re.search(reason, bad["reason"])
    assert len(stored_samples(out, "train")) == 20


def test_as_many_may_be_bad_as_the_number_says_that_is_written(tmp_path: Path) -> None:
    """0.29 * 100 is 28.999999999999996."""
    files = {f"cat/{number:04d}.jpg": b"" if number < 29 else picture(number) for number in range(100)}
    source = open_folders(write_files(tmp_path / "animals", files), Asked("source=animals"))
    with pytest.raises(DataError, match="At least 29 of the 100"):
        write(source, tmp_path / "out", max_bad_fraction=0.28)
    manifest, _ = write(source, tmp_path / "out", max_bad_fraction=0.29)
    assert manifest.split("train").num_samples == 71


@pytest.mark.not_quick
def test_bad_pictures_stop_worker_processes_too(source: PictureSource, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cat/0003\.jpg: empty file"):
        write(with_broken(source, tmp_path, b""), tmp_path / "out", num_workers=2)
    assert not list((tmp_path / "out").glob("*.tmp.*"))


def test_a_picture_that_vanishes_is_a_bad_one(source: PictureSource, tmp_path: Path) -> None:
    (tmp_path / "animals/cat/0003.jpg").unlink()
    with pytest.raises(DataError, match=r"cat/0003\.jpg: cannot be read"):
        write(source, tmp_path / "out")


def test_nothing_left_to_write(tmp_path: Path) -> None:
    source = open_folders(
        write_files(tmp_path / "animals", {"cat/1.jpg": b"", "dog/1.jpg": b""}), Asked("source=animals")
    )
    with pytest.raises(DataError, match="No picture of the split 'train' can be decoded"):
        write(source, tmp_path / "out", max_bad_fraction=1.0)


def test_pictures_keep_their_bytes_if_they_are_sound_jpegs() -> None:
    trailing = picture(1) + b"stray bytes after the end"
    for content in (picture(1), picture(1, mode="L"), picture(1, mode="CMYK"), picture(1, height=1, width=1), trailing):
        assert shard_jpeg(content, Encoding()) == content
        assert shard_jpeg(content, Encoding(short_side=24)) == content


def test_a_png_becomes_a_jpeg() -> None:
    assert size_and_mode(shard_jpeg(picture(1, encoding="PNG"), Encoding())) == ((32, 24), "RGB", "JPEG")


@pytest.mark.parametrize(("height", "width", "size"), [(40, 80, (20, 10)), (90, 30, (10, 30)), (41, 83, (20, 10))])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_the_short_side_is_reduced(height: int, width: int, size: tuple[int, int], mode: str) -> None:
    content = picture(1, height=height, width=width, mode=mode)
    assert size_and_mode(shard_jpeg(content, Encoding(short_side=10))) == (size, "RGB", "JPEG")


def size_and_mode(content: bytes) -> tuple[tuple[int, int], str, str | None]:
    import io

    from PIL import Image

    image = Image.open(io.BytesIO(content))
    return image.size, image.mode, image.format


def test_a_bomb_is_refused_from_its_header() -> None:
    content = bytearray(picture(1))
    start_of_frame = content.index(b"\xff\xc0")
    content[start_of_frame + 5 : start_of_frame + 9] = b"\x3a\x98\x3a\x98"  # 15,000 x 15,000
    with pytest.raises(BadImageError, match=r"225000000|15000 x 15000"):
        shard_jpeg(bytes(content), Encoding())


def test_splits_are_merged_if_the_classes_are_the_same(source: PictureSource, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train, _ = write(source, out)
    before = contents_of(out)
    manifest, _ = write(dataclasses.replace(source, splits={"val": source.splits["train"]}), out)
    assert set(manifest.splits) == {"train", "val"}
    assert manifest.split("train") == train.split("train")
    assert {name: content for name, content in contents_of(out).items() if name.startswith("train")} == {
        name: content for name, content in before.items() if name.startswith("train")
    }
    info: dict[str, Any] = json.loads((out / "_info.json").read_text())
    assert {name: split["num_samples"] for name, split in info["splits"].items()} == {"train": 21, "val": 21}
    with pytest.raises(DataError, match="Labels would mean two things"):
        write(dataclasses.replace(source, classes=("dog", "cat")), out)
    with pytest.raises(DataError, match="seed was 0 and is 1"):
        write(source, out, seed=1)


def test_a_damaged_split_is_written_again(source: PictureSource, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(source, out)
    before = contents_of(out)
    (out / "train-000001.tar").unlink()
    write(source, out)
    assert contents_of(out) == before


def test_a_second_writer_is_turned_away(tmp_path: Path) -> None:
    with exclusive(tmp_path), pytest.raises(DataError, match="Another prepare"), exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass


def test_an_output_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(DataError, match=r"out=.* cannot be written"), exclusive(tmp_path / "out"):
        pass


images = st.lists(st.integers(1, 500_000), min_size=1, max_size=200).map(
    lambda sizes: [SourceImage(f"cat/{i}.jpg", "cat", "", 0, size) for i, size in enumerate(sizes)]
)


@given(images=images, shard_bytes=st.integers(1, 10**7))
def test_shards_cover_everything_evenly(images: list[SourceImage], shard_bytes: int) -> None:
    shards = plan_shards(images, "val", {"cat": 0}, shard_bytes=shard_bytes, sample_bytes=None, settings={})
    assert [sample.image for shard in shards for sample in shard.samples] == images
    assert all(shard.samples for shard in shards)
    assert [shard.name for shard in shards] == [f"val-{number:06d}.tar" for number in range(len(shards))]
    largest = int(tar_bytes(np.array([image.num_bytes for image in images])).max())
    assert all(shard.expected_bytes <= shard_bytes + largest for shard in shards)
    assert len({shard.digest for shard in shards}) == len(shards)


def test_a_digest_knows_what_determines_the_bytes() -> None:
    image = SourceImage("cat/1.jpg", "cat", "", 0, 100, 5)

    def digest(image: SourceImage = image, label: int = 0, **settings: int) -> str:
        shards: list[PlannedShard] = plan_shards(
            [image], "val", {image.class_name: label}, shard_bytes=1000, sample_bytes=None, settings=settings
        )
        return shards[0].digest

    changed = [
        digest(label=1),
        digest(short_side=3),
        *(
            digest(dataclasses.replace(image, **change))
            for change in ({"name": "cat/2.jpg"}, {"num_bytes": 99}, {"mtime_ns": 6})
        ),
    ]
    assert len({digest(), *changed}) == 6
    assert digest() == digest(dataclasses.replace(image, path="/moved/elsewhere.jpg"))


@given(name=st.text(min_size=1).filter(lambda text: "/" not in text))
def test_a_key_is_safe_for_every_reader(name: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", key_stem(SourceImage(f"cat/{name}", "cat", "", 0, 0)))


def test_a_key_does_not_repeat_the_class() -> None:
    assert key_stem(SourceImage("n01440764/n01440764_10026.JPEG", "n01440764", "", 0, 0)) == "n01440764_10026"
    assert key_stem(SourceImage("airplane/0001.jpg", "airplane", "", 0, 0)) == "airplane_0001"


ENDS = Encoding(check="ends")


def test_with_check_ends_a_whole_jpeg_is_kept_and_one_cut_short_refused() -> None:
    content = picture(3)
    assert shard_jpeg(content, ENDS) == content
    assert shard_jpeg(content + b"stray", ENDS) == content + b"stray"  # without an end mark at the end it is decoded
    for bad in (content[:-2], content[: len(content) // 2], b"\xff\xd8" + content[-2:], b""):
        with pytest.raises(BadImageError):
            shard_jpeg(bad, ENDS)


def test_with_check_ends_a_picture_is_shrunk_and_a_png_encoded_as_otherwise() -> None:
    for content in (picture(3), picture(4, encoding="PNG")):
        shrunk = dataclasses.replace(ENDS, short_side=8)
        assert shard_jpeg(content, shrunk) == shard_jpeg(content, Encoding(short_side=8)) != content


@pytest.mark.parametrize(
    ("request_", "is_checked"), [({}, True), ({"check": "pixels"}, True), ({"check": "ends"}, False), (None, False)]
)
def test_the_manifest_tells_whether_every_picture_was_decoded(request_: dict | None, is_checked: bool) -> None:
    extra: dict[str, object] = {} if request_ is None else {"request": request_}
    assert Split((), extra).is_checked is is_checked


def test_readers_learn_from_the_manifest_what_was_checked(tmp_path: Path) -> None:
    source = open_folders(write_files(tmp_path / "source", pictures(COUNTS)), Asked("source=animals"))
    manifest, _ = write(source, tmp_path / "out")
    assert ShardIndex.open(tmp_path / "out", "train").is_checked
    manifest.splits["train"].extra["request"] = {"check": "ends"}
    manifest.save(tmp_path / "out")
    assert not ShardIndex.open(tmp_path / "out", "train").is_checked
    (tmp_path / "out" / "manifest.json").unlink()
    assert not ShardIndex.open(tmp_path / "out", "train").is_checked  # foreign shards, as far as one can tell
