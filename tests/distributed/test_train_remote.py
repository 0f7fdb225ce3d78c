"""A training over shards from elsewhere is the training over the same shards on a disk, whatever the servers do."""

import base64
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.remote.cache import Cache, CacheSettings
from pipeline.data.remote.transfer import FetchBudget
from pipeline.data.shards.manifest import Manifest
from pipeline.run.launch.ports import free_port
from tests.commands import Ended, assert_holds_no, rows, sentences, train, train_recorded
from tests.comparing import differences, fed, global_batches, load
from tests.distributed.test_train_refusals import SHORT
from tests.making.pairs import PAIR_OPTIONS, Pair
from tests.making.shards import add_index, write_shards
from tests.s3_server import BUCKET, KEY_ID, SECRET, credentials, serving_s3, upload
from tests.shard_server import Rule, ShardServer, serving

PASSWORD = "correct-horse-battery"
FAULTS = (
    Rule("status", path=r"train-\d+\.tar$", status=503, times=2),
    Rule("reset", path=r"train-000000\.tar$", times=1, after_bytes=20_000),
    Rule("short", path=r"train-000001\.tar$", times=1, after_bytes=20_000),
    Rule("wrong", path=r"train-000001\.tar$", times=1),
    Rule("stall", path=r"val-000000\.tar$", times=1, after_bytes=20_000),
    Rule("status", path="manifest.json", status=429, retry_after="1", times=1),
)


def remote(cache: Path, *more: str) -> list[str]:
    return [f"data.cache_dir={cache}", "data.fetch_timeout_seconds=12", *more]


@pytest.fixture(scope="module")
def indexed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small shards, as `prepare` leaves them now."""
    root = tmp_path_factory.mktemp("indexed")
    for path in shards.iterdir():
        if path.is_file():
            (root / path.name).write_bytes(path.read_bytes())
    return add_index(root, "train", "val")


@pytest.fixture
def server(indexed: Path, tmp_path: Path) -> Any:
    with serving(indexed, tmp_path / "requests.jsonl") as server:
        yield server


def assert_same(one: Pair, root: Path, name: str) -> None:
    """The run `name` in `root` saw the same, recorded the same and ended with the same state as the unbroken one."""
    assert rows(one.unbroken) == rows(root / name)
    ours, theirs = fed(one.root, "unbroken", one.devices), fed(root, name, one.devices)
    assert ours == theirs and all(len(things) == 1 for things in theirs.values())
    unbroken, other = load(one.unbroken), load(root / name)
    for part in ("state_dict", "optimizer_states", "global_step", "epoch"):
        assert not differences(unbroken[part], other[part], part)


def whole_split_bytes(root: Path, *splits: str) -> int:
    manifest = Manifest.load(root)
    return sum(manifest.split(split).num_bytes for split in splits or ("train", "val"))


@pytest.mark.parametrize("kill_at", ["", pytest.param("1 7 1 supervisor", marks=pytest.mark.slow)])
def test_over_http_with_faults(
    kill_at: str, two_ranks: Pair, indexed: Path, server: ShardServer, tmp_path: Path
) -> None:
    """Everything at once: every kind of fault, a login, perhaps a SIGKILL at step 7 and the same command again."""
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login me password {PASSWORD}\n")
    environment = {"NETRC": str(tmp_path / "netrc"), **credentials("http://127.0.0.1:9", tmp_path)}
    options = remote(tmp_path / "cache", *PAIR_OPTIONS)
    root = tmp_path / "runs"
    server.set_rules(*FAULTS)
    first = train_recorded(root, server.url, "remote", 2, *options, kill_at=kill_at, environment=environment)
    assert "Traceback" not in first.output, first.output
    fired = [request.fault for request in server.requests() if request.fault]
    assert sorted(fired) == sorted(rule.fault for rule in FAULTS for _ in range(rule.times or 0))
    sent = server.sent_bytes()
    if kill_at:
        ended = train_recorded(root, server.url, "remote", 2, *options, environment=environment)
        assert "resumed from" in ended.output and "Traceback" not in ended.output
    assert server.sent_bytes() == sent  # the second attempt found everything in the cache
    assert_same(two_ranks, root, "remote")
    # Each shard came once for both ranks, but for what the faults threw away.
    whole = [r for r in server.requests(r"\.tar$") if r.fault is None]
    assert sorted(r.path for r in whole) == ["/train-000000.tar", "/train-000001.tar", "/val-000000.tar"]
    lost = sum(request.sent_bytes for request in server.requests(r"\.tar$") if request.fault == "wrong")
    assert whole_split_bytes(indexed) <= sent - lost <= whole_split_bytes(indexed) + 60_000
    assert {request.authorization is not None for request in server.requests()} == {True}
    token = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
    assert_holds_no(root, first.output, PASSWORD, token, SECRET, KEY_ID)
    assert not list((tmp_path / "cache" / "squeezewire").glob("*.part"))


@pytest.mark.slow
def test_over_s3_with_faults(two_ranks: Pair, indexed: Path, tmp_path: Path) -> None:
    with (
        serving_s3(tmp_path / "moto.log") as endpoint,
        serving(indexed, tmp_path / "requests.jsonl", upstream=endpoint) as server,
    ):
        upload(endpoint, indexed, "shards/small")
        server.set_rules(*FAULTS)
        url, options = f"s3://{BUCKET}/shards/small", remote(tmp_path / "cache", *PAIR_OPTIONS)
        root = tmp_path / "runs"
        ended = train_recorded(root, url, "remote", 2, *options, environment=credentials(server.url, tmp_path))
        assert f"GB, from {url}; a server keeps up to 200 GB in {tmp_path / 'cache' / 'squeezewire'}" in ended.output
        assert "HTTP 503 SlowDown" in ended.output or "HTTP 503" in ended.output
        fired = [request.fault for request in server.requests() if request.fault]
        assert sorted(fired) == sorted(rule.fault for rule in FAULTS for _ in range(rule.times or 0))
        whole = [r.path for r in server.requests(r"\.tar$") if r.fault is None]
        assert len(whole) == len(set(whole)) == 3
        assert_same(two_ranks, root, "remote")
        assert_holds_no(root, ended.output, SECRET, KEY_ID, "X-Amz", "Signature")


# --- what cannot go well ---


def test_missing_shards_are_named_before_any_rank_starts(indexed: Path, server: ShardServer, tmp_path: Path) -> None:
    server.set_rules(
        Rule("status", path=r"train-000001\.tar$", status=404, method="HEAD"),
        Rule("status", path=r"train-000000\.tar$", status=404, method="HEAD"),
    )
    ended = train(tmp_path / "runs", server.url, "refused", 2, *remote(tmp_path / "cache"), expect=3)
    (sentence,) = sentences(ended.output)
    assert "2 of 2 shards of split 'train' are missing" in sentence
    assert "train-000000.tar, train-000001.tar" in sentence
    assert not (tmp_path / "runs").exists() and not server.requests(r"\.tar$")


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_server_that_stays_away_in_the_middle_of_a_run(num_workers: int, server: ShardServer, tmp_path: Path) -> None:
    server.set_rules(Rule("status", path=r"train-000001\.tar$"))
    options = remote(tmp_path / "cache", *SHORT, f"data.num_workers={num_workers}", "data.fetch_timeout_seconds=3")
    ended = train(tmp_path / "runs", server.url, "stopped", 2, *options, expect=3)
    said = sentences(ended.output)
    assert said and all("train-000001.tar of http" in sentence and "HTTP 503 (" in sentence for sentence in said)
    # What a rank that ended at once left half is nobody's, and whoever comes next sweeps it.
    Cache(CacheSettings(tmp_path / "cache" / "squeezewire", 10**9, FetchBudget(1.0)), server.url).prepare()
    assert not list((tmp_path / "cache" / "squeezewire").glob("*.part"))
    assert "data.fetch_timeout_seconds=3" in said[0] and "run the same command again" in said[0]


def test_a_cache_that_cannot_be_used(server: ShardServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file", Path("/proc/nowhere")):
        ended = train(tmp_path / "runs", server.url, "refused", 2, *remote(cache), expect=3)
        (sentence,) = sentences(ended.output)
        assert f"The cache {cache}/squeezewire cannot be used" in sentence and "data.cache_dir" in sentence
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "root",
    [
        f"https://me:{PASSWORD}@host/shards",
        f"s3://{PASSWORD}@bucket/x",
        f"https://host/shards?token={PASSWORD}",
        f"https://me:%2F{PASSWORD}/@host/x",
    ],
)
@pytest.mark.parametrize("flag", [[], ["--cfg=job"]])
def test_a_password_in_an_address_is_refused_and_not_repeated(root: str, flag: list[str], tmp_path: Path) -> None:
    ended = train(tmp_path / "runs", root, "refused", 2, *flag, expect=2)
    assert "data.root" in ended.output and "~/.netrc" in ended.output
    assert_holds_no(tmp_path, ended.output, PASSWORD)


# --- a cluster ---


def cluster(root: Path, server: ShardServer, name: str, *options: str) -> list[Ended]:
    """Two servers of one rank each: their caches lie apart, and the shards' server tells them by the address used."""
    port = free_port()

    def one(rank: int) -> Ended:
        variables = {
            "RANK": rank,
            "WORLD_SIZE": 2,
            "LOCAL_RANK": 0,
            "LOCAL_WORLD_SIZE": 1,
            "GROUP_RANK": rank,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        where = server.url_at(f"127.0.0.{rank + 1}")
        return train_recorded(
            root,
            where,
            name,
            1,
            *remote(root / f"cache-{rank}", *options),
            environment={name: str(value) for name, value in variables.items()},
        )

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, range(2)))


@pytest.mark.slow
def test_each_server_fetches_the_shards_of_its_groups_alone(tmp_path: Path) -> None:
    shards = add_index(write_shards(tmp_path / "shards", train=(8,) * 8, val=(25,)), "train")
    options = (
        *("data.shuffle_block=1", "data.shuffle_groups=2", "batch.global_size=8", "batch.max_per_rank=2"),
        *("trainer.max_steps=8", "trainer.validate_every_steps=0", "trainer.checkpoint_every_steps=0"),
    )
    with serving(shards, tmp_path / "requests.jsonl") as server:
        cluster(tmp_path, server, "two", *options)
        of_server = [
            {r.path for r in server.requests(r"\.tar$") if r.host.startswith(f"127.0.0.{rank + 1}:")}
            for rank in range(2)
        ]
        assert [len(paths) for paths in of_server] == [4, 4] and len(of_server[0] | of_server[1]) == 8
        assert server.sent_bytes() == whole_split_bytes(shards, "train")
    # Ranks do not enter the order: one rank on a disk is fed the same batches.
    train_recorded(tmp_path, shards, "one", 1, *options)
    two, one = (global_batches(tmp_path / f"{name}.fed", n, by_rank=True) for name, n in (("two", 2), ("one", 1)))
    assert two == one and list(one) == list(range(8))
    assert [row["trainer/step"] for row in rows(tmp_path / "two")] == list(range(1, 9))


@pytest.mark.slow
def test_ranks_that_see_different_shards_do_not_train(indexed: Path, tmp_path: Path) -> None:
    other = add_index(write_shards(tmp_path / "other", labels={3: "0"}), "train", "val")
    port = free_port()
    variables = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}

    def one(rank: int) -> Ended:
        place = {"RANK": str(rank), "GROUP_RANK": str(rank), "MASTER_PORT": str(port), **variables}
        return train(tmp_path / "runs", (indexed, other)[rank], "split", 1, *SHORT, expect=3, environment=place)

    with ThreadPoolExecutor(2) as pool:
        for ended in pool.map(one, range(2)):
            assert "The ranks see different shards at data.root=" in ended.output
    assert not (tmp_path / "runs").exists()
