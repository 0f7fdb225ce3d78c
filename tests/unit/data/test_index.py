"""The index finds every sample, refuses every damaged shard by name, and its hash says what was indexed."""

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from pipeline.config.data import DataConfig
from pipeline.core.errors import DataError, ExitCode
from pipeline.core.files import sha256_of_file
from pipeline.core.schemas.manifest import IndexJson
from pipeline.data import local
from pipeline.data.index import MAX_FOREIGN_CLASSES, ShardIndex, open_split
from pipeline.data.local import CACHE_DIRECTORY
from pipeline.data.shards.manifest import Manifest
from pipeline.data.shards.table import ARRAYS, INDEX_KEY, SampleTable, index_name
from tests.making.pictures import picture
from tests.making.shards import CLASSES, add_index, samples_of, write_manifest, write_shards, write_tar

BLOCK = 512


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards", train=(4, 5), val=(3,))


def refused(root: Path, split: str = "train", verify: str = "size") -> str:
    with pytest.raises(DataError) as caught:
        ShardIndex.open(root, split, verify=verify)
    return str(caught.value)


def num_open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


# What is indexed


def test_every_sample_is_found_with_its_bytes(root: Path) -> None:
    index = ShardIndex.open(root, "train")
    assert (index.num_samples, len(index), index.num_classes, index.classes) == (9, 9, 4, CLASSES)
    for sample_id, sample in enumerate(samples_of(0, 9)):
        assert index.read(sample_id) == sample["jpg"]
        assert index.label(sample_id) == sample_id % 4
        assert index.sample_key(sample_id) == sample["__key__"]
        assert index.shard_name(sample_id) == f"train-{int(sample_id >= 4):06d}.tar"
    assert ShardIndex.open(root, "val").num_samples == 3


def test_the_hash_is_of_the_content_wherever_it_lies(root: Path, tmp_path: Path) -> None:
    index = ShardIndex.open(root, "train")
    moved = write_shards(tmp_path / "elsewhere", train=(4, 5))
    os.utime(moved / "train-000000.tar", (1, 1))
    assert ShardIndex.open(moved, "train").index_hash == index.index_hash
    assert ShardIndex.open(write_shards(tmp_path / "other", train=(5, 4)), "train").index_hash != index.index_hash
    assert ShardIndex.open(root, "val").index_hash != index.index_hash


def test_an_index_works_in_another_process_and_again_after_closing(root: Path) -> None:
    index = ShardIndex.open(root, "train")
    index.read(0)
    copy = pickle.loads(pickle.dumps(index))
    assert copy.index_hash == index.index_hash and copy.read(8) == index.read(8)
    index.close()
    assert index.read(0) == copy.read(0)


def test_open_files_are_bounded_and_closed_with_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "MAX_OPEN_SHARDS", 2)
    index = ShardIndex.open(write_shards(tmp_path / "shards", train=(1,) * 6), "train")
    before = num_open_files()
    for sample_id in [0, 1, 2, 3, 4, 5, 0, 5]:
        assert index.read(sample_id) == samples_of(sample_id, 1)[0]["jpg"]
    assert num_open_files() == before + 2
    del index
    assert num_open_files() == before


def test_a_shard_that_shrinks_or_goes_during_a_run_is_an_error_that_names_it(root: Path) -> None:
    index = ShardIndex.open(root, "train")
    with (root / "train-000000.tar").open("r+b") as file:
        file.truncate(700)
    with pytest.raises(DataError, match=r"'000000000' .*/train-000000\.tar .*bytes could be read"):
        index.read(0)
    (root / "train-000001.tar").unlink()
    with pytest.raises(DataError, match=rf"'000000008' .*{root}/train-000001\.tar .*No such file"):
        index.read(8)


def test_a_read_that_fails_in_passing_is_tried_again(root: Path) -> None:
    """As a stale handle does, which the server that restarted no longer knows: what is opened anew can be read."""
    index = ShardIndex.open(root, "train")
    index.read(0)
    (descriptor,) = (
        int(link.name) for link in Path("/proc/self/fd").iterdir() if link.resolve() == root / "train-000000.tar"
    )
    elsewhere = os.open(root, os.O_RDONLY)
    os.dup2(elsewhere, descriptor)
    os.close(elsewhere)
    with pytest.raises(IsADirectoryError):
        os.pread(descriptor, 1, 0)
    assert index.read(0) == samples_of(0, 1)[0]["jpg"]


def test_foreign_shards_by_prefix_or_by_braces(root: Path) -> None:
    (root / "manifest.json").unlink()
    by_prefix = ShardIndex.open(root, "train")
    by_braces = ShardIndex.open(root, "train-{000000..000001}.tar")
    assert by_prefix.num_samples == by_braces.num_samples == 9
    assert by_prefix.index_hash == by_braces.index_hash
    assert ShardIndex.open(root, "train-000001.tar").num_samples == 5
    assert "train-000002.tar" in refused(root, "train-{000000..000002}.tar")


# The cache


def test_the_second_opening_reads_no_tar(root: Path) -> None:
    first = ShardIndex.open(root, "train")
    times = [(root / shard.name).stat().st_mtime_ns for shard in first.shards]
    for shard, time in zip(first.shards, times, strict=True):
        (root / shard.name).write_bytes(bytes(shard.bytes))  # nothing is left to scan
        os.utime(root / shard.name, ns=(time, time))
    second = ShardIndex.open(root, "train")
    assert second.index_hash == first.index_hash


@pytest.mark.parametrize("damage", [lambda c: c[: len(c) // 2], lambda c: b"", lambda c: c.replace(b"known", b"knuwn")])
def test_a_damaged_cache_is_made_anew(root: Path, damage: Callable[[bytes], bytes]) -> None:
    expected = ShardIndex.open(root, "train").index_hash
    (cache,) = (root / CACHE_DIRECTORY).iterdir()
    cache.write_bytes(damage(cache.read_bytes()))
    assert ShardIndex.open(root, "train").index_hash == expected
    with np.load(cache, allow_pickle=False) as archive:
        assert str(archive["index_hash"]) == expected


def test_a_cache_of_other_shards_is_not_believed(root: Path) -> None:
    ShardIndex.open(root, "train")
    write_tar(root / "train-000001.tar", samples_of(100, 6))
    write_manifest(root, {"train": {"train-000000.tar": 4, "train-000001.tar": 6}})
    index = ShardIndex.open(root, "train")
    assert index.num_samples == 10 and index.read(9) == samples_of(105, 1)[0]["jpg"]


def make_unwritable(root: Path) -> None:
    """For root, whom permissions do not bind, too."""
    (root / CACHE_DIRECTORY).write_bytes(b"a file where the directory should be")


def test_a_root_that_cannot_be_written_is_indexed_all_the_same_and_told(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_unwritable(root)
    assert ShardIndex.open(root, "train").num_samples == 9
    (line,) = capsys.readouterr().err.splitlines()
    assert f"'train' cannot be kept in {root / CACHE_DIRECTORY} (Not a directory" in line or "(File exists)" in line
    assert "start once as somebody who may write there" in line
    assert ShardIndex.open(root, "train", is_local_leader=False).num_samples == 9
    assert not capsys.readouterr().err  # eight ranks would say it eight times


# The index beside the shards


def test_with_the_index_of_prepare_no_tar_is_read_and_nothing_written(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = ShardIndex.open(root, "train").index_hash
    shutil.rmtree(root / CACHE_DIRECTORY)
    make_unwritable(add_index(root, "train"))
    for path in root.glob("train-*.tar"):
        path.write_bytes(bytes(path.stat().st_size))  # nothing is left to scan
    assert ShardIndex.open(root, "train").index_hash == expected
    assert not capsys.readouterr().err


def test_with_the_index_of_prepare_sizes_are_compared_all_the_same(root: Path) -> None:
    os.truncate(add_index(root, "train") / "train-000001.tar", 600)
    assert "train-000001.tar" in refused(root)


@pytest.mark.parametrize("damage", ["gone", "flipped", "of other shards", "described wrongly", "described as damaged"])
def test_an_index_beside_the_shards_that_is_not_the_manifests_means_a_scan(
    root: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = ShardIndex.open(root, "train").index_hash
    shutil.rmtree(root / CACHE_DIRECTORY)
    path = add_index(root, "train") / index_name("train")
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        manifest = Manifest.load(root)
        described = cast(IndexJson, manifest.split("train").extra[INDEX_KEY])
        if damage == "described as damaged":
            content[60:90] = bytes(range(30))  # amid what is compressed: zlib's own error
            path.write_bytes(content)
            described["sha256"] = sha256_of_file(path)
        elif damage == "described wrongly":
            manifest.split("train").extra[INDEX_KEY] = [described]
        else:
            other = add_index(write_shards(tmp_path / "other", train=(7,)), "train") / index_name("train")
            path.write_bytes(other.read_bytes())
            described["sha256"] = sha256_of_file(other)
        manifest.save(root)
    assert ShardIndex.open(root, "train").index_hash == expected
    assert list((root / CACHE_DIRECTORY).iterdir())
    is_warned = "is not believed: their headers are read instead" in capsys.readouterr().err
    assert is_warned == (damage not in ("gone", "described wrongly"))


@pytest.mark.parametrize("is_shared", [False, True])
def test_an_index_that_the_manifest_names_is_held_to_the_shards_where_they_are_hashed(
    is_shared: bool, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels in range, and a hash that fits: what only the shards themselves can tell."""
    expected = ShardIndex.open(root, "train").index_hash
    shutil.rmtree(root / CACHE_DIRECTORY)
    path = add_index(root, "train") / index_name("train")
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in ARRAYS}
    np.savez_compressed(path, allow_pickle=False, **arrays | {"label": arrays["label"][::-1].copy()})
    manifest = Manifest.load(root)
    cast(IndexJson, manifest.split("train").extra[INDEX_KEY])["sha256"] = sha256_of_file(path)
    manifest.save(root)
    if is_shared:
        monkeypatch.setattr(local, "SHARED_BYTES", 0)
    assert ShardIndex.open(root, "train").index_hash != expected
    assert ShardIndex.open(root, "train", verify="sha256").index_hash == expected
    assert "is not believed" in capsys.readouterr().err


# A large index is shared by the processes of a machine


@pytest.fixture(params=["the headers", "the index of prepare"])
def shared(request: pytest.FixtureRequest, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shards whose index counts as large, wherever it comes from."""
    monkeypatch.setattr(local, "SHARED_BYTES", 0)
    return add_index(root, "train") if request.param == "the index of prepare" else root


def test_a_shared_index_is_the_same_and_is_sent_by_name(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = ShardIndex.open(shared, "train")
    again = pickle.loads(pickle.dumps(index))
    for one in (index, again):
        assert one.table.mapped_from and not one.table.label.flags.writeable
        assert [one.read(i) for i in range(9)] == [sample["jpg"] for sample in samples_of(0, 9)]
    monkeypatch.setattr(local, "SHARED_BYTES", 2**30)
    shutil.rmtree(shared / CACHE_DIRECTORY)
    own = ShardIndex.open(shared, "train")
    assert own.table.mapped_from is None and own.index_hash == index.index_hash


def test_a_shared_index_that_was_damaged_is_made_anew(shared: Path) -> None:
    expected = ShardIndex.open(shared, "train").index_hash
    (cache,) = (shared / CACHE_DIRECTORY).iterdir()
    content = bytearray(cache.read_bytes())
    content[content.index(b"label.npy") + 160] ^= 1
    cache.write_bytes(content)
    again = ShardIndex.open(shared, "train")
    assert again.index_hash == expected and again.table.mapped_from


@pytest.mark.parametrize(
    "change",
    [{"length": np.full(9, 2**30, "<i4")}, {"label": np.zeros((9, 1), "<i4")}, {"key": np.zeros(2**21, "S64")}],
)
def test_a_shared_index_of_what_cannot_be_is_not_read(shared: Path, change: dict[str, Any]) -> None:
    expected = ShardIndex.open(shared, "train").index_hash
    (cache,) = (shared / CACHE_DIRECTORY).iterdir()
    with np.load(cache, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files} | change
    table = SampleTable(**{name: arrays[name] for name in ARRAYS})
    arrays["index_hash"] = np.array(table.hash_with(local.shards_there(shared, "train")[2]))
    np.savez(cache, **arrays)
    assert ShardIndex.open(shared, "train").index_hash == expected


def test_a_worker_that_is_sent_an_index_replaced_meanwhile_refuses_it(shared: Path) -> None:
    index = ShardIndex.open(shared, "train")
    sent = pickle.dumps(index)
    (cache,) = (shared / CACHE_DIRECTORY).iterdir()
    shutil.copy(cache, other := cache.with_name("other"))
    other.replace(cache)  # as a server does that started at the same time
    assert pickle.loads(sent).index_hash == index.index_hash
    assert pickle.loads(sent).table.label.tolist() == index.table.label.tolist()
    with np.load(cache) as archive:
        np.savez(other.with_suffix(".npz"), allow_pickle=False, **{**archive, "index_hash": np.array("of others")})
    other.with_suffix(".npz").replace(cache)
    with pytest.raises(DataError, match=r"was replaced while it was in use: run the same command again"):
        pickle.loads(sent)


def test_what_another_server_has_left_meanwhile_stays(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ranks may have mapped the file, and on a network file system a replaced file's pages are gone."""
    savez, left = np.savez, list[int]()

    def slowly(*arguments: Any, **arrays: Any) -> None:
        monkeypatch.setattr(np, "savez", savez)
        ShardIndex.open(shared, "train")  # the other server
        left.extend(path.stat().st_ino for path in (shared / CACHE_DIRECTORY).glob("*.npz"))
        savez(*arguments, **arrays)

    monkeypatch.setattr(np, "savez", slowly)
    index = ShardIndex.open(shared, "train")
    assert index.table.mapped_from
    assert [path.stat().st_ino for path in (shared / CACHE_DIRECTORY).iterdir()] == left


@pytest.mark.not_quick
def test_a_worker_holds_no_copy_of_a_large_index(tmp_path: Path) -> None:
    num_samples = 1_000_000
    kinds = zip(ARRAYS, ("i4", "i8", "i4", "i4"), strict=False)  # the keys are made below
    arrays = {name: np.arange(num_samples, dtype=kind) for name, kind in kinds}
    np.savez(
        tmp_path / "large.npz",
        allow_pickle=False,
        **arrays,
        key=np.full(num_samples, b"key-of-a-sample-as-long-as-this"),
        index_hash=np.array("of these"),
    )
    table = SampleTable.map(tmp_path / "large.npz")
    sent = pickle.dumps(table)
    assert table.num_bytes > 50e6 and len(sent) < 1000
    (tmp_path / "sent").write_bytes(sent)
    program = """if True:
        import pickle, re, sys
        import pipeline.data.shards.table
        def own():
            with open("/proc/self/smaps_rollup") as rollup:
                return 1024 * int(re.search(r"Anonymous: +(\\d+)", rollup.read())[1])
        before = own()
        with open(sys.argv[1], "rb") as file:
            table = pickle.load(file)
        total = sum(int(array.view("u1").max()) for array in table.arrays().values())
        print(own() - before)
    """
    command = [sys.executable, "-c", program, str(tmp_path / "sent")]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert int(printed) < 5e6


# What is refused


def test_all_missing_shards_are_named(root: Path) -> None:
    for number in range(2):
        (root / f"train-{number:06d}.tar").unlink()
    message = refused(root)
    assert "2 of 2" in message and "train-000000.tar" in message and "train-000001.tar" in message


@pytest.mark.parametrize(
    ("cut", "found"),
    [
        pytest.param(lambda size: 0, "0 bytes", id="empty"),
        pytest.param(lambda size: 300, "300 bytes", id="inside a header"),
        pytest.param(lambda size: 600, "600 bytes", id="inside data"),
        pytest.param(lambda size: 3 * BLOCK, "1536 bytes", id="between picture and label"),
        pytest.param(lambda size: size - 10240, "bytes", id="at the end of a member or without end mark"),
    ],
)
def test_a_shard_cut_short_contradicts_its_manifest(root: Path, cut: Callable[[int], int], found: str) -> None:
    path = root / "train-000001.tar"
    size = path.stat().st_size
    os.truncate(path, cut(size))
    message = refused(root)
    assert "train-000001.tar" in message and found in message and str(size) in message


@pytest.mark.parametrize("is_foreign", [False, True])
def test_no_allowance_lets_a_run_begin_with_a_shard_cut_short(root: Path, is_foreign: bool) -> None:
    os.truncate(root / "train-000001.tar", 3000)
    if is_foreign:
        (root / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar .*3000") as caught:
        open_split(DataConfig(root=str(root), max_bad_fraction=0.99), "train")
    assert caught.value.exit_code == ExitCode.DATA


@pytest.mark.parametrize("sizes", [(), (0,), (0, 0)])
def test_a_split_without_samples_is_refused(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    assert "holds no sample" in refused(write_shards(tmp_path / "shards", train=sizes))


def test_an_empty_shard_among_others_is_no_harm(tmp_path: Path) -> None:
    index = ShardIndex.open(write_shards(tmp_path / "shards", train=(2, 0, 3)), "train")
    assert [index.shard_name(i) for i in range(5)] == ["train-000000.tar"] * 2 + ["train-000002.tar"] * 3


def test_a_wrong_number_of_samples_is_noticed(root: Path) -> None:
    write_manifest(root, {"train": {"train-000000.tar": 4, "train-000001.tar": 6}})
    message = refused(root)
    assert "train-000001.tar" in message and "holds 5 samples" in message and "says 6" in message


def test_a_flipped_byte_is_found_by_its_hash(root: Path) -> None:
    path = root / "train-000001.tar"
    content = bytearray(path.read_bytes())
    content[BLOCK + 200] ^= 1  # inside the first picture
    path.write_bytes(content)
    ShardIndex.open(root, "train")  # the size alone cannot tell
    message = refused(root, verify="sha256")
    expected = Manifest.load(root).splits["train"].shards[1].sha256
    assert "train-000001.tar" in message and expected in message


def test_sound_shards_pass_the_hash(root: Path) -> None:
    assert ShardIndex.open(root, "train", verify="sha256").num_samples == 9


@pytest.mark.parametrize("label", ["", "cat", "1.5", "9" * 40, "99999999999999999999", "-1", "4", "4294967296", "0x1"])
def test_a_bad_label_is_named_with_key_and_shard(root: Path, label: str) -> None:
    name = "train-000001.tar"
    write_tar(root / name, [*samples_of(4, 2), {"__key__": "the-bad-one", "jpg": picture(0), "cls": label}])
    write_manifest(root, {"train": {"train-000000.tar": 4, name: 3}})
    message = refused(root)
    assert "the-bad-one" in message and name in message


@pytest.mark.parametrize(("label", "is_refused"), [(MAX_FOREIGN_CLASSES - 1, False), (MAX_FOREIGN_CLASSES, True)])
def test_a_label_of_foreign_shards_that_no_set_of_classes_has_is_named(
    tmp_path: Path, label: int, is_refused: bool
) -> None:
    """Nothing says how many classes there are, and the classifier would be made as large as the label asks."""
    tmp_path.joinpath("shards").mkdir()
    odd = {"__key__": "the-odd-one", "jpg": picture(0), "cls": str(label)}
    write_tar(tmp_path / "shards" / "train-000000.tar", [*samples_of(0, 2), odd])
    if not is_refused:
        assert ShardIndex.open(tmp_path / "shards", "train").num_classes == label + 1
        return
    message = refused(tmp_path / "shards")
    assert f"'the-odd-one' of shard train-000000.tar has label {label}" in message and "at most 1,000,000" in message


def test_what_is_not_there_is_said(root: Path, tmp_path: Path) -> None:
    assert "is not a directory" in refused(tmp_path / "nowhere")
    assert "train, val" in refused(root, "test")
    (tmp_path / "empty").mkdir()
    assert "no tar at all" in refused(tmp_path / "empty")
    (root / "manifest.json").unlink()
    assert "train-000000.tar .. val-000000.tar" in refused(root, "test")


def test_shards_that_prepare_has_not_finished_are_not_taken_for_foreign_ones(root: Path) -> None:
    (root / "manifest.json").unlink()
    (root / ".prepare").mkdir()
    assert "unfinished" in refused(root)


@pytest.mark.not_quick
def test_another_process_gets_the_same_index(root: Path) -> None:
    expected = ShardIndex.open(root, "train").index_hash
    program = "import sys; from pipeline.data.index import ShardIndex; print(ShardIndex.open(*sys.argv[1:]).index_hash)"
    command = [sys.executable, "-c", program, str(root), "train"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert printed.strip() == expected
