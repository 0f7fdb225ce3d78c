"""Shards behind a URL are those of a local disk, to the hash of the index; what is wrong with them is said at once."""

import json
import pickle
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.data import DataConfig
from pipeline.config.model import InputConfig
from pipeline.config.training import BatchSplit
from pipeline.core.errors import DataError
from pipeline.core.files import sha256_of_file
from pipeline.data.batches import TrainBatches
from pipeline.data.fit import misfit_sentence, origin_sentence
from pipeline.data.index import ShardIndex
from pipeline.data.loader import Reader, evaluation_loader, training_loader
from pipeline.data.order import BatchOrder
from pipeline.data.prefetch import Prefetcher
from pipeline.data.remote.cache import CacheSettings
from pipeline.data.remote.shards import RemoteFiles, check_remote
from pipeline.data.remote.transfer import FetchBudget
from pipeline.data.shards.manifest import Manifest
from pipeline.data.shards.table import INDEX_KEY, index_name
from tests.making.shards import CLASSES, add_index, samples_of, write_manifest, write_shards, write_tar
from tests.s3_server import BUCKET, client_of, credentials, serving_s3, upload
from tests.shard_server import Rule, ShardServer, serving
from tests.waiting import wait_until

pytestmark = pytest.mark.not_quick

DEADLINE_SECONDS = 60.0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = write_shards(tmp_path / "shards", train=(4, 5, 3), val=(3,))
    return add_index(root, "train", "val")


@pytest.fixture
def server(root: Path, tmp_path: Path) -> Iterator[ShardServer]:
    with serving(root, tmp_path / "requests.jsonl") as server:
        yield server


def settings(tmp_path: Path, *, cache: str = "cache", bound: int = 10**9, seconds: float = 10.0) -> CacheSettings:
    return CacheSettings(tmp_path / cache, bound, FetchBudget(seconds))


def opened(server: ShardServer, tmp_path: Path, split: str = "train", verify: str = "size", **more: Any) -> ShardIndex:
    return ShardIndex.open(server.url, split, verify=verify, cache=settings(tmp_path, **more))


def refused(server: ShardServer, tmp_path: Path, split: str = "train", **more: Any) -> str:
    with pytest.raises(DataError) as caught:
        opened(server, tmp_path, split, **more)
    return str(caught.value)


def tars_of(server: ShardServer) -> list[str]:
    return sorted(request.path.lstrip("/") for request in server.requests(r"\.tar$"))


def files_of(index: ShardIndex) -> RemoteFiles:
    assert isinstance(index.files, RemoteFiles)
    return index.files


# --- the same as on a local disk ---


def test_the_index_is_the_local_one_and_nothing_else_is_fetched_for_it(
    server: ShardServer, root: Path, tmp_path: Path
) -> None:
    index, local = opened(server, tmp_path), ShardIndex.open(root, "train")
    assert index.index_hash == local.index_hash
    assert (index.classes, index.num_classes, index.num_samples) == (CLASSES, 4, 12)
    assert not server.requests(r"\.tar$")
    assert {request.path for request in server.requests(method="HEAD")} == {
        "/manifest.json",
        *(f"/train-{number:06d}.tar" for number in range(3)),
    }
    for sample_id in (7, 8, 4):
        assert index.read(sample_id) == local.read(sample_id)
    assert tars_of(server) == ["train-000001.tar"]


def test_a_copy_in_another_process_fetches_nothing_again(server: ShardServer, root: Path, tmp_path: Path) -> None:
    index = opened(server, tmp_path)
    content = index.read(0)
    program = (
        "import pickle, sys; index = pickle.load(sys.stdin.buffer); sys.stdout.buffer.write(index.read(0));"
        " index.close(); assert index.read(11)"
    )
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, input=pickle.dumps(index), capture_output=True, timeout=DEADLINE_SECONDS)
    assert (ended.returncode, ended.stdout) == (0, content), ended.stderr
    assert tars_of(server) == ["train-000000.tar", "train-000002.tar"]


def test_processes_that_start_together_ask_once_for_what_they_all_need(server: ShardServer, tmp_path: Path) -> None:
    opened(server, tmp_path)
    before = len(server.requests()) + len(server.requests(method="HEAD"))
    for _ in range(3):
        opened(server, tmp_path)
    assert len(server.requests()) + len(server.requests(method="HEAD")) == before


@pytest.mark.parametrize("split", ["train", "train-{000000..000002}.tar"])
def test_shards_without_an_index_are_fetched_once_and_indexed_here(
    split: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in root.glob("*.npz"):
        path.unlink()
    if split == "train":
        manifest = Manifest.load(root)
        del manifest.split("train").extra[INDEX_KEY]
        manifest.save(root)
    else:
        (root / "manifest.json").unlink()
    with serving(root, tmp_path / "requests.jsonl") as server:
        indexes = [opened(server, tmp_path, split) for _ in range(2)]
        local = ShardIndex.open(root, split)
        assert {index.index_hash for index in indexes} == {local.index_hash}
        assert [indexes[1].read(i) for i in range(12)] == [local.read(i) for i in range(12)]
        assert tars_of(server) == [f"train-{number:06d}.tar" for number in range(3)]
    assert capsys.readouterr().err.count("has no index of split") == 1


def test_foreign_shards_below_the_root(root: Path, tmp_path: Path) -> None:
    (root / "deep" / "er").mkdir(parents=True)
    for number in range(2):
        write_tar(root / "deep" / "er" / f"x {number}.tar", samples_of(number, 1))
    with serving(root, tmp_path / "requests.jsonl") as server:
        index = opened(server, tmp_path, "deep/er/x {0..1}.tar")
        assert [index.read(i) for i in range(2)] == [samples_of(i, 1)[0]["jpg"] for i in range(2)]


def with_info(root: Path, counts: dict[str, int], name: str = "_info.json") -> Path:
    """Foreign shards, and what timm's file says of them, in that order."""
    root.mkdir()
    for number, name_of_shard in enumerate(sorted(counts)):
        write_tar(root / name_of_shard, samples_of(10 * number, number + 2))
    split = {"filenames": list(counts), "shard_lengths": list(counts.values()), "num_samples": sum(counts.values())}
    (root / name).write_text(json.dumps({"splits": {"train": split}}))
    return root


@pytest.mark.parametrize("split", ["train", "{b,a}.tar"])
@pytest.mark.parametrize("name", ["_info.json", "info.json"])
def test_timms_info_tells_the_shards_and_their_order_as_on_a_disk(split: str, name: str, tmp_path: Path) -> None:
    root = with_info(tmp_path / "timm", {"b.tar": 3, "a.tar": 2}, name)
    with serving(root, tmp_path / "requests.jsonl") as server:
        index, local = opened(server, tmp_path, split), ShardIndex.open(root, split)
        assert [shard.name for shard in index.shards] == ["b.tar", "a.tar"]
        assert index.index_hash == local.index_hash
        assert [index.read(i) for i in range(5)] == [local.read(i) for i in range(5)]
        assert len(server.requests(rf"/{name}$")) == 1


@pytest.mark.parametrize("split", ["train", "{b,a}.tar"])
def test_timms_info_must_be_right_about_the_shards(split: str, tmp_path: Path) -> None:
    root = with_info(tmp_path / "timm", {"b.tar": 3, "a.tar": 4})
    with serving(root, tmp_path / "requests.jsonl") as server:
        sentence = refused(server, tmp_path, split)
        assert sentence.startswith(
            f"{server.url}/_info.json contradicts 1 of the shards: a.tar holds 2 samples and not 4"
        )
        assert "Copy these again" in sentence


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "_info.json cannot be read"),
        ('{"splits": 3}', "has no splits"),
        ('{"splits": {"train": {}}}', "as many shard_lengths"),
        ('{"splits": {"val": {}}}', "knows the splits val"),
        ('{"splits": {"train": {"filenames": ["../x.tar"], "shard_lengths": [1], "num_samples": 1}}}', "does not stay"),
        ('{"splits": {"train": {"filenames": ["c.tar"], "shard_lengths": [1], "num_samples": 1}}}', "1 of 1 shards"),
    ],
)
def test_an_info_at_a_url_that_cannot_be_so_is_refused(content: str, complaint: str, tmp_path: Path) -> None:
    root = with_info(tmp_path / "timm", {"b.tar": 3, "a.tar": 2})
    (root / "_info.json").write_text(content)
    with serving(root, tmp_path / "requests.jsonl") as server:
        assert complaint in refused(server, tmp_path)
        assert not server.requests(r"\.tar$")


def test_a_server_that_refuses_what_is_not_there_is_no_obstacle(root: Path, tmp_path: Path) -> None:
    """As a public bucket does that may not be listed."""
    (root / "manifest.json").unlink()
    with serving(root, tmp_path / "requests.jsonl") as server:
        server.set_rules(Rule("status", status=403, path=r"info\.json$", method="HEAD"))
        assert opened(server, tmp_path, "train-{000000..000002}.tar").num_samples == 12
        assert [request.status for request in server.requests(r"info\.json$", method="HEAD")] == [403, 403]


def test_a_cache_that_was_damaged_is_noticed_when_asked_to_look(
    server: ShardServer, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = opened(server, tmp_path)
    index.read(0)
    path = tmp_path / "cache" / str(index.shards[0].sha256)
    path.chmod(0o600)
    path.write_bytes(bytes(path.stat().st_size))
    again = opened(server, tmp_path, verify="sha256")
    assert "was damaged in" in capsys.readouterr().err
    assert again.read(0) == ShardIndex.open(root, "train").read(0)
    assert tars_of(server) == ["train-000000.tar"] * 2


# --- what is wrong is said ---


def test_missing_shards_are_all_named_before_anything_is_fetched(
    server: ShardServer, root: Path, tmp_path: Path
) -> None:
    for number in (0, 2):
        (root / f"train-{number:06d}.tar").unlink()
    sentence = refused(server, tmp_path)
    assert f"2 of 3 shards of split 'train' are missing at {server.url}: train-000000.tar, train-000002.tar" in sentence
    assert not server.requests(r"\.(tar|npz)$")
    with pytest.raises(DataError, match="2 of 3 shards"):
        check_remote(server.url, "train", settings(tmp_path))


def test_a_shard_of_another_size(server: ShardServer, root: Path, tmp_path: Path) -> None:
    with (root / "train-000001.tar").open("ab") as file:
        file.write(b"more")
    size = (root / "train-000001.tar").stat().st_size
    assert f"has {size} bytes, and the manifest says {size - 4}" in refused(server, tmp_path)


def test_a_shard_of_another_content(server: ShardServer, root: Path, tmp_path: Path) -> None:
    index = opened(server, tmp_path)
    path = root / "train-000001.tar"
    path.write_bytes(path.read_bytes()[::-1])  # in the middle of a run
    with pytest.raises(DataError, match=r"train-000001\.tar at .* came 3 times with the wrong content"):
        index.read(4)
    assert index.read(0)


def test_a_foreign_shard_that_changes_in_the_middle_of_a_run(root: Path, tmp_path: Path) -> None:
    (root / "manifest.json").unlink()
    with serving(root, tmp_path / "requests.jsonl") as server:
        index = opened(server, tmp_path, "train-{000000..000002}.tar")
        (tmp_path / "cache" / files_of(index).entry(1).key).unlink()  # evicted
        path = root / "train-000001.tar"
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
        with pytest.raises(DataError, match=r"train-000001\.tar at .* is no longer the one it was when the run began"):
            index.read(4)


def test_a_shard_that_vanishes_in_the_middle_of_a_run(server: ShardServer, root: Path, tmp_path: Path) -> None:
    index = opened(server, tmp_path)
    (root / "train-000002.tar").unlink()
    with pytest.raises(DataError, match=r"train-000002\.tar is missing at"):
        index.read(11)


def test_an_index_that_is_not_of_the_shards(root: Path, tmp_path: Path) -> None:
    """The hash of the index is right, and so is each shard's: they only do not belong together."""
    other = write_shards(tmp_path / "other", train=(4, 5, 3), val=(3,))
    write_tar(other / "train-000000.tar", [{**sample, "cls": "3"} for sample in samples_of(0, 4)])
    write_manifest(other, {"train": {f"train-{number:06d}.tar": count for number, count in enumerate((4, 5, 3))}})
    add_index(other, "train")
    index = json.loads((other / "manifest.json").read_text())["splits"]["train"][INDEX_KEY]
    manifest = Manifest.load(root)
    manifest.split("train").extra[INDEX_KEY] = index
    manifest.save(root)
    (root / index_name("train")).write_bytes((other / index_name("train")).read_bytes())
    with serving(root, tmp_path / "requests.jsonl") as server:
        opened_index = opened(server, tmp_path)
        with pytest.raises(DataError, match=r"train-000000\.tar at .* does not hold the samples that the index lists"):
            opened_index.read(0)
        assert opened_index.read(11) == ShardIndex.open(root, "train").read(11)


@pytest.mark.parametrize("what", ["garbage", "objects", "outside", "counts", "types", "huge"])
def test_an_index_is_not_trusted(what: str, root: Path, tmp_path: Path) -> None:
    path = root / index_name("train")
    with np.load(path) as archive:
        arrays = dict(archive)
    if what == "garbage":
        path.write_bytes(b"PK\3\4 no zip")
    else:
        match what:
            case "objects":
                arrays["key"] = arrays["key"].astype(object)
            case "outside":
                arrays["offset"][3] = 2**62
            case "counts":
                arrays["shard"][0] = 1
            case "types":
                arrays["label"] = arrays["label"].astype(np.float64)
            case "huge":
                arrays["more"] = np.zeros(10**8, np.int8)
        np.savez_compressed(path, allow_pickle=True, **arrays)
    manifest = Manifest.load(root)
    described = {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
    manifest.split("train").extra[INDEX_KEY] = described
    manifest.save(root)
    with serving(root, tmp_path / "requests.jsonl") as server:
        assert "The index of the shards is not of these shards" in refused(server, tmp_path)


@pytest.mark.parametrize("where", ["shard", "index"])
def test_a_hash_in_a_manifest_is_no_path(where: str, root: Path, tmp_path: Path) -> None:
    value = json.loads((root / "manifest.json").read_text())
    split = value["splits"]["train"]
    (split["shards"][1] if where == "shard" else split[INDEX_KEY])["sha256"] = "../../outside"
    (root / "manifest.json").write_text(json.dumps(value))
    with serving(root, tmp_path / "requests.jsonl") as server:
        said = refused(server, tmp_path)
    assert "../../outside" in said and "SHA-256" in said
    assert not (tmp_path.parent / "outside").exists()


@pytest.mark.parametrize("split", ["../x-{0..1}.tar", "/etc/{a,b}.tar", "http://else/{a,b}.tar"])
def test_names_of_foreign_shards_stay_below_the_root(split: str, server: ShardServer, tmp_path: Path) -> None:
    assert "does not stay inside data.root" in refused(server, tmp_path, split)


def test_a_web_server_without_a_manifest_needs_names(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with serving(tmp_path / "empty", tmp_path / "requests.jsonl") as server:
        assert "does not list its files: give the shards' names with braces" in refused(server, tmp_path)


def test_a_split_that_is_not_there(server: ShardServer, tmp_path: Path) -> None:
    assert "There is no split 'test' in these shards (there is: train, val)" in refused(server, tmp_path, "test")


def test_a_tar_as_the_root(server: ShardServer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a tar: give what stands before its name as data"):
        ShardIndex.open(f"{server.url}/train-000000.tar", "train", cache=settings(tmp_path))


def test_a_foreign_shard_that_is_damaged_is_named_by_its_name(root: Path, tmp_path: Path) -> None:
    (root / "manifest.json").unlink()
    path = root / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with serving(root, tmp_path / "requests.jsonl") as server:
        sentence = refused(server, tmp_path, "train-{000000..000002}.tar")
        assert f"Shard train-000001.tar at {server.url} is cut short" in sentence


# --- fetching ahead ---


def small_order(index: ShardIndex, start_step: int = 0, **more: Any) -> TrainBatches:
    order = BatchOrder(
        num_samples=index.num_samples,
        global_batch=4,
        seed=0,
        index_hash=index.index_hash,
        shard_of_sample=index.table.shard,
        **more,
    )
    num_steps = (order.epoch_of(start_step) + 1) * order.steps_per_epoch
    return TrainBatches(order, rank=0, world_size=1, num_micro_batches=1, start_step=start_step, num_steps=num_steps)


@pytest.fixture
def many(tmp_path: Path) -> Iterator[ShardServer]:
    root = add_index(write_shards(tmp_path / "many", train=(2,) * 12), "train")
    with serving(root, tmp_path / "requests.jsonl") as server:
        yield server


def test_what_the_order_needs_is_fetched_before_it_is_asked_for(many: ShardServer, tmp_path: Path) -> None:
    index = opened(many, tmp_path)
    with Prefetcher(files_of(index), index.table.shard, small_order(index), range(1)):
        wait_until(lambda: all(files_of(index).has(shard) for shard in range(12)))
    assert [index.read(i) for i in range(24)] == [samples_of(i, 1)[0]["jpg"] for i in range(24)]
    assert tars_of(many) == [f"train-{number:06d}.tar" for number in range(12)]


@pytest.mark.parametrize("start_step", [0, 6, 8])
def test_it_looks_ahead_only_as_far_as_the_cache_has_room(start_step: int, many: ShardServer, tmp_path: Path) -> None:
    """From wherever the run goes on: at the turn of an epoch or in the middle of one."""
    size = opened(many, tmp_path, cache="other").shards[0].bytes
    index = opened(many, tmp_path, bound=int(6.5 * size))
    batches = small_order(index, start_step, block=2)
    steps = range(start_step, batches.num_steps)
    samples = [batches.order.batch_samples(step).tolist() for step in steps]
    ahead = [(place, ids.tolist()) for place, ids in batches.samples_ahead(range(1))]
    assert ahead == list(zip(steps, samples, strict=True))
    in_order = list(dict.fromkeys(index.shard_name(i) for ids in samples for i in ids))
    with Prefetcher(files_of(index), index.table.shard, batches, range(1)):
        taken = iter(batches)
        for is_begun in (False, True):  # what the first step needs is not left behind when it is asked for
            if is_begun:
                next(taken)
            wait_until(lambda: len(tars_of(many)) >= 4)
            time.sleep(0.5)
            assert set(tars_of(many)) == set(in_order[:4])  # of 5.2 that 0.8 of the cache hold: whole batches
        for ids in samples:  # read as it is handed out
            for sample_id in ids:
                assert index.read(sample_id) == samples_of(sample_id, 1)[0]["jpg"]
            next(taken, None)
    assert tars_of(many) == sorted(in_order)  # nothing twice


def test_leaving_stops_a_transfer_and_leaves_nothing_half(many: ShardServer, tmp_path: Path) -> None:
    many.set_rules(Rule("slow", bytes_per_second=20_000))
    index = opened(many, tmp_path)
    with Prefetcher(files_of(index), index.table.shard, small_order(index), range(1)):
        wait_until(lambda: list((tmp_path / "cache").glob("*.part")))
    assert not list((tmp_path / "cache").glob("*.part"))


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_loader_over_http_gives_what_a_local_one_gives(
    server: ShardServer, root: Path, tmp_path: Path, num_workers: int
) -> None:
    server.set_rules(Rule("status", times=1), Rule("short", times=1))
    batches = []
    for index in (ShardIndex.open(root, "train"), opened(server, tmp_path)):
        data = DataConfig(shuffle_block=1, shuffle_groups=2)
        reader, config = Reader(num_workers=num_workers), InputConfig(size=16, resize_side=20)
        loader = training_loader(index, data, config, reader, BatchSplit(4, 4, 1), seed=1, start_step=0, num_steps=6)
        batches.append(list(loader))
    assert len(batches[0]) == len(batches[1]) == 6
    for local, remote in zip(*batches, strict=True):
        assert all((mine == other).all() for mine, other in zip(local[:3], remote[:3], strict=True))
    assert sorted(set(tars_of(server))) == [f"train-{number:06d}.tar" for number in range(3)]


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_sentence_comes_out_of_a_worker_as_it_went_in(
    server: ShardServer, root: Path, tmp_path: Path, num_workers: int
) -> None:
    index = opened(server, tmp_path, "val")
    (root / "val-000000.tar").unlink()
    loader = evaluation_loader(
        index, InputConfig(size=16, resize_side=20), Reader(num_workers=num_workers), batch_size=2
    )
    with pytest.raises(DataError, match=r"^val-000000\.tar is missing at"):
        list(loader)


def test_a_server_fetches_its_part_of_a_validation_and_no_more(many: ShardServer, tmp_path: Path) -> None:
    for rank in range(4):  # each with a cache of its own, as a server has
        index = opened(many, tmp_path, cache=f"server{rank}")
        before = tars_of(many)
        loader = evaluation_loader(
            index, InputConfig(size=16, resize_side=20), Reader(rank=rank, world_size=4), batch_size=2
        )
        assert sum(len(batch.labels_B) for batch in loader) == 6
        fetched = Counter(tars_of(many)) - Counter(before)
        assert sorted(fetched.elements()) == [f"train-{number:06d}.tar" for number in range(3 * rank, 3 * rank + 3)]


# --- does it fit ---


def test_a_cache_that_is_too_small_is_said_with_what_would_do(many: ShardServer, tmp_path: Path) -> None:
    size = opened(many, tmp_path, cache="other").shards[0].bytes
    for bound, block, batch, words in (
        (100 * size, 0, 2, None),
        (int(6.3 * size), 1, 2, None),
        (int(6.3 * size), 0, 2, ["holds 52% of the 12 training shards", "from all of them", "data.shuffle_block=1,"]),
        (int(6.3 * size), 3, 2, ["reads from 3 at a time", "data.shuffle_block=1,"]),
        (int(6.3 * size), 1, 8, ["To avoid it set data.cache_bytes="]),  # a batch of four shards
        (size, 0, 2, ["To avoid it set data.cache_bytes="]),
    ):
        index = opened(many, tmp_path, bound=bound)
        data = DataConfig(cache_bytes=bound, shuffle_block=block)
        sentence = misfit_sentence(index, data, global_batch=batch, local_world_size=1, world_size=1)
        assert sentence is None if words is None else sentence and all(word in sentence for word in words), sentence
    assert origin_sentence(index) is not None
    local = ShardIndex.open(tmp_path / "many", "train")
    assert (
        origin_sentence(local)
        is misfit_sentence(local, DataConfig(), global_batch=2, local_world_size=1, world_size=1)
        is None
    )


# --- S3 ---


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving_s3(tmp_path_factory.mktemp("moto") / "log") as endpoint:
        yield endpoint


@pytest.fixture
def s3(moto: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ShardServer, Any]]:
    """The shards in a bucket, behind a server that can be told to fail; and a client that goes past it."""
    with serving(root, tmp_path / "requests.jsonl", upstream=moto) as server:
        upload(moto, root, "pre/fix")
        for name, value in credentials(server.url, tmp_path).items():
            monkeypatch.setenv(name, value)
        yield server, client_of(moto)


def test_a_bucket_gives_what_a_disk_gives(
    s3: tuple[ShardServer, Any], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = s3
    server.set_rules(
        Rule("status", status=503, times=1),
        Rule("short", times=1, after_bytes=1000),
        Rule("reset", times=1, after_bytes=1000),
        Rule("wrong", times=1),
    )
    url, local = f"s3://{BUCKET}/pre/fix", ShardIndex.open(root, "train")
    index = ShardIndex.open(url, "train", cache=settings(tmp_path))
    assert index.index_hash == local.index_hash
    assert [index.read(i) for i in range(12)] == [local.read(i) for i in range(12)]
    faults = [request.fault for request in server.requests(r"\.tar$")]
    assert faults == ["status", "short", "reset", "wrong", None, None, None]
    assert any(request.asked_range for request in server.requests(r"\.tar$"))
    # The same shards from elsewhere: the cache knows them by their content.
    with serving(root, tmp_path / "web.jsonl") as web:
        assert ShardIndex.open(web.url, "train", cache=settings(tmp_path)).read(0) == local.read(0)
        assert not web.requests(r"\.tar$")
    # Foreign shards are listed, and public buckets need no credentials.
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    client.put_bucket_acl(Bucket=BUCKET, ACL="public-read")
    for number in range(3):
        client.put_object_acl(Bucket=BUCKET, Key=f"pre/fix/train-{number:06d}.tar", ACL="public-read")
    client.delete_object(Bucket=BUCKET, Key="pre/fix/manifest.json")
    foreign = ShardIndex.open(url, "train", cache=settings(tmp_path, cache="foreign"))
    (root / "manifest.json").unlink()
    assert foreign.index_hash == ShardIndex.open(root, "train").index_hash
    assert foreign.read(11) == local.read(11)
    # timm's file tells more than the listing, and what it does not know must not lie there.
    info = {"filenames": ["train-000002.tar", "train-000000.tar"], "shard_lengths": [3, 4], "num_samples": 7}
    client.put_object(
        Bucket=BUCKET, Key="pre/fix/_info.json", Body=json.dumps({"splits": {"train": info}}), ACL="public-read"
    )
    with pytest.raises(DataError, match=r"_info\.json lists 2 shards .*train-000001\.tar lies there too"):
        ShardIndex.open(url, "train", cache=settings(tmp_path, cache="told"))


def test_what_a_bucket_refuses_is_said_without_its_secrets(
    s3: tuple[ShardServer, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sentence(url: str, split: str = "train", seconds: float = 1.0) -> str:
        with pytest.raises(DataError) as caught:
            ShardIndex.open(url, split, cache=settings(tmp_path, seconds=seconds))
        return str(caught.value)

    server, client = s3
    server.set_rules(Rule("status", status=503, path="", method="HEAD"))
    said = [sentence(f"s3://{BUCKET}/pre/fix")]
    assert "HTTP 503" in said[0]
    server.set_rules(Rule("status", status=403, path="", method="HEAD"))
    said.append(sentence(f"s3://{BUCKET}/pre/fix"))
    assert "is refused: HTTP 403" in said[1] and "~/.aws" in said[1]
    server.set_rules()
    said += [sentence(f"s3://{BUCKET}/nothing/here"), sentence("s3://no-such-bucket/x"), sentence("s3://no!bucket/x")]
    assert "no shards train-*.tar" in said[2] and "does not exist" in said[3] and "is refused" in said[4]
    client.delete_object(Bucket=BUCKET, Key="pre/fix/train-000001.tar")
    said.append(sentence(f"s3://{BUCKET}/pre/fix"))
    assert "1 of 3 shards of split 'train' are missing at s3://bucket/pre/fix: train-000001.tar" in said[5]
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    said.append(sentence(f"s3://{BUCKET}/pre/other"))
    assert "no connection" in said[6]
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    said.append(sentence(f"s3://{BUCKET}/pre/another"))
    assert "AWS variables" in said[7] or "credentials" in said[7]
    for value in credentials("", tmp_path).values():
        assert not any(len(value) > 15 and value in text for text in said)
