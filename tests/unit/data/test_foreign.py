"""Shards without a manifest: which files a split is, what timm's `_info.json` says of them, what is never followed."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.data import DataConfig
from pipeline.core.errors import DataError, ExitCode
from pipeline.data.index import ShardIndex
from pipeline.data.local import CACHE_DIRECTORY
from pipeline.data.root import check_root
from pipeline.data.shards.foreign import MAX_SHARDS, expand, find_all
from tests.making.shards import samples_of, write_shards, write_tar

SIZES = {"imagenet-train-0000.tar": 4, "imagenet-train-0001.tar": 5, "imagenet-validation-00.tar": 3}


def write_info(root: Path, name: str = "_info.json", **changed: Any) -> None:
    """As timm writes it; `changed` replaces fields of the split train."""
    splits: dict[str, dict[str, Any]] = {}
    for split in ("train", "validation"):
        names = [name for name in SIZES if split in name]
        lengths = [SIZES[name] for name in names]
        splits[split] = {"name": split, "num_samples": sum(lengths), "filenames": names, "shard_lengths": lengths}
    splits["train"] |= changed
    (root / name).write_text(json.dumps({"splits": splits}))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """As public sets come: shards and `_info.json`."""
    directory, first = tmp_path / "public", 0
    directory.mkdir()
    for name, size in SIZES.items():
        write_tar(directory / name, samples_of(first, size))
        first += size
    write_info(directory)
    return directory


def refused(root: Path, split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        ShardIndex.open(root, split)
    assert caught.value.exit_code == ExitCode.DATA
    return str(caught.value)


# _info.json


def test_the_splits_of_info_are_found_by_their_names(root: Path) -> None:
    assert ShardIndex.open(root, "train").num_samples == 9
    validation = ShardIndex.open(root, "validation")
    assert validation.num_samples == 3 and validation.shard_name(0) == "imagenet-validation-00.tar"


def test_the_same_shards_are_the_same_index_with_and_without_info(root: Path) -> None:
    told = ShardIndex.open(root, "train").index_hash
    by_braces = ShardIndex.open(root, "imagenet-train-{0000..0001}.tar").index_hash
    (root / "_info.json").unlink()
    assert ShardIndex.open(root, "imagenet-train").index_hash == by_braces == told


@pytest.mark.parametrize("split", ["train", "imagenet-train-{0000..0001}.tar"])
@pytest.mark.parametrize("is_cached", [False, True])
def test_other_counts_than_info_says_are_named(root: Path, split: str, is_cached: bool) -> None:
    if is_cached:
        ShardIndex.open(root, split)
    write_info(root, num_samples=10, shard_lengths=[4, 6])
    message = refused(root, split)
    assert "_info.json contradicts 1" in message and "imagenet-train-0001.tar holds 5 samples and not 6" in message


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"num_samples": 10}, "says 10 samples, and its 2 shard_lengths sum to 9"),
        ({"shard_lengths": [9]}, "as many shard_lengths"),
        ({"shard_lengths": [4, "5"]}, "as many shard_lengths"),
        ({"shard_lengths": [10, -1]}, "as many shard_lengths"),
        ({"shard_lengths": None}, "as many shard_lengths"),
        ({"filenames": ["imagenet-train-0000.tar"] * 2}, "as many shard_lengths"),
        ({"filenames": ["imagenet-train-0000.tar", "imagenet-train-0007.tar"]}, "1 of 2 shards are missing"),
        ({"filenames": ["imagenet-train-0000.tar", "../imagenet-train-0001.tar"]}, "does not stay inside"),
        ({"filenames": ["imagenet-train-0000.tar", "pipe:touch harmed"]}, "does not stay inside"),
        ({"alt_label": "class_12k"}, "'class_12k'"),
    ],
)
def test_an_info_that_cannot_be_so_is_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_info(root, **changed)
    assert complaint in refused(root)
    assert not list(tmp_path.rglob("harmed"))


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"splits": 3}', "\x00", "[" * 100_000])
def test_an_info_that_is_none_is_refused_rather_than_ignored(root: Path, content: str) -> None:
    (root / "_info.json").write_text(content)
    assert "_info.json" in refused(root, "imagenet-train")


def test_the_other_name_of_info(root: Path) -> None:
    (root / "_info.json").rename(root / "info.json")
    assert ShardIndex.open(root, "train").num_samples == 9
    (root / "info.json").write_text('{"made_by": "something else"}')  # a common name: not everyone's means this
    assert ShardIndex.open(root, "imagenet-train").num_samples == 9


def test_the_cached_index_of_another_set_is_not_used(tmp_path: Path) -> None:
    """Names and sizes are the same; what a copied cache knows beside them are the times of the files it was made of."""
    ours, other = tmp_path / "ours", tmp_path / "other"
    for directory, first in ((ours, 0), (other, 50)):
        directory.mkdir()
        write_tar(directory / "train-0.tar", samples_of(first, 3))
    assert (ours / "train-0.tar").stat().st_size == (other / "train-0.tar").stat().st_size
    expected = ShardIndex.open(ours, "train").index_hash
    assert ShardIndex.open(other, "train").index_hash != expected
    shutil.rmtree(ours / CACHE_DIRECTORY)
    shutil.copytree(other / CACHE_DIRECTORY, ours / CACHE_DIRECTORY)
    index = ShardIndex.open(ours, "train")
    assert index.index_hash == expected and index.sample_key(0) == "000000000"


def test_a_shard_that_info_does_not_list_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0000.tar", samples_of(0, 2))
    write_tar(tmp_path / "train-0001.tar", samples_of(2, 2))
    split = {"name": "train", "num_samples": 2, "filenames": ["train-0000.tar"], "shard_lengths": [2]}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    assert "train-0001.tar lies there too" in refused(tmp_path)


def test_a_split_that_is_not_there_names_those_that_are(root: Path) -> None:
    message = refused(root, "val")
    assert "train, validation" in message and "imagenet-train-0000.tar .. imagenet-validation-00.tar" in message


def test_every_tar_belongs_to_a_split(root: Path) -> None:
    write_tar(root / "extra-0.tar", samples_of(0, 1))
    write_tar(root / "odd.tar", samples_of(0, 1))
    assert {name: len(split.names) for name, split in find_all(root).items()} == {
        "train": 2,
        "validation": 1,
        "extra": 1,
        "odd": 1,
    }


# Before the ranks


def checked(root: Path, split: str) -> None:
    check_root(DataConfig(root=str(root)), split)


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (("train/0.tar", "train/1.tar"), "train/{0..1}.tar"),
        (("00000.tar", "00001.tar"), "{00000..00001}.tar"),
        (("00000.tar",), "00000.tar"),
        (("train_0.tar",), "train_0.tar"),
        (("train-0.tar",), "train"),
    ],
)
def test_the_check_before_the_ranks_takes_what_they_take(tmp_path: Path, names: tuple[str, ...], split: str) -> None:
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / name, samples_of(2 * number, 2))
    checked(tmp_path, split)
    assert ShardIndex.open(tmp_path, split).num_samples == 2 * len(names)


@pytest.mark.parametrize("split", ["train", "train-{0..2}.tar", "val", "train/0.tar", "{0..1.tar", "http://x/0.tar"])
def test_the_check_before_the_ranks_refuses_what_they_refuse(tmp_path: Path, split: str) -> None:
    write_tar(tmp_path / "train-0.tar", samples_of(0, 2))
    os.mkfifo(tmp_path / "train-1.tar")
    with pytest.raises(DataError) as caught:
        checked(tmp_path, split)
    assert str(caught.value) == refused(tmp_path, split)


def test_a_manifest_is_held_to_its_shards_before_the_ranks(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "shards", train=(4, 5), val=(3,))
    checked(root, "train")
    (root / "train-000001.tar").unlink()
    with pytest.raises(DataError, match="1 of 2 shards of split 'train' are missing"):
        checked(root, "train")


def test_shards_in_folders_are_named(tmp_path: Path) -> None:
    for name in ("train/0.tar", "train/1.tar", "test/0.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / name, samples_of(0, 2))
    assert "its folders test, train do" in refused(tmp_path) and 'data.train_split="test/0.tar"' in refused(tmp_path)
    assert {name: split.names for name, split in find_all(tmp_path).items()} == {
        "test": ("test/0.tar",),
        "train": ("train/0.tar", "train/1.tar"),
    }


# Names


@given(first=st.integers(0, 200), count=st.integers(1, 50), digits=st.integers(3, 6))
def test_braces_stand_for_every_name_between(first: int, count: int, digits: int) -> None:
    names = expand(f"set-train-{{{first:0{digits}d}..{first + count - 1:0{digits}d}}}.tar")
    assert names == tuple(f"set-train-{number:0{digits}d}.tar" for number in range(first, first + count))


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [
        ("a-{0..9999999999}.tar", f"more than {MAX_SHARDS:,} shards"),
        ("a-{9999999999..-3}.tar", "more than"),
        ("a-{0..999}-{0..999}.tar", "more than"),
        ("{a,b}" * 40 + ".tar", "more than"),
        ("a-{0..3.tar", "without its partner"),
        ("a-0..3}.tar", "without its partner"),
        ("a-{1,1}.tar", "twice"),
        ("/etc/a-{0..1}.tar", "does not stay inside"),
        ("../a-{0..1}.tar", "does not stay inside"),
        ("{.,..}/a.tar", "does not stay inside"),
    ],
)
def test_patterns_that_lead_elsewhere_or_nowhere_are_refused(tmp_path: Path, pattern: str, complaint: str) -> None:
    assert complaint in refused(tmp_path, pattern)


@pytest.mark.parametrize(
    "split", ["pipe:touch {marker}; cat x.tar", "pipe:touch {marker} #.tar", "http://x/{{0..1}}.tar"]
)
def test_a_url_is_no_split_and_nothing_is_run(root: Path, tmp_path: Path, split: str) -> None:
    marker = tmp_path / "marker"
    assert "begins like a URL" in refused(root, split.format(marker=marker))
    assert not marker.exists()
