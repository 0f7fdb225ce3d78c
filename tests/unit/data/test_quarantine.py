"""Bad samples are named once over all ranks and attempts, and their number is bounded over all of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core.errors import DataError, ExitCode
from pipeline.data.index import ShardIndex
from pipeline.data.quarantine import BadSample, Quarantine
from tests.making.shards import write_shards

NUM_SAMPLES = 100


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return ShardIndex.open(write_shards(tmp_path_factory.mktemp("q") / "shards", train=(60, 40)), "train")


def bad(index: ShardIndex, *sample_ids: int) -> list[BadSample]:
    return [BadSample.of(index, number, ValueError("neither JPEG nor PNG but WebP")) for number in sample_ids]


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_is_noted_once_with_all_that_names_it(index: ShardIndex, tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(index, 0.05, path)
    assert quarantine.add([]) == [] and not path.exists()
    seven, sixty = bad(index, 7, 60)
    assert quarantine.add([seven, seven]) == [seven]
    assert quarantine.add([seven, sixty]) == [sixty]
    assert lines(path) == [
        {"sample_id": 7, "shard": "train-000000.tar", "key": "000000007", "cause": "neither JPEG nor PNG but WebP"},
        {"sample_id": 60, "shard": "train-000001.tar", "key": "000000060", "cause": "neither JPEG nor PNG but WebP"},
    ]
    assert seven.reason == "sample '000000007' of shard train-000000.tar: neither JPEG nor PNG but WebP"


@pytest.mark.parametrize("has_file", [False, True])
def test_one_more_than_the_budget_stops_the_run(index: ShardIndex, tmp_path: Path, has_file: bool) -> None:
    path = tmp_path / "quarantine.jsonl" if has_file else None
    quarantine = Quarantine(index, 0.02, path)
    quarantine.add(bad(index, 1, 2, 1))
    with pytest.raises(DataError, match=r"3 of 100 .*max_bad_fraction=0\.02 allows 2.*'000000003' of shard") as caught:
        quarantine.add(bad(index, 3))
    assert caught.value.exit_code == ExitCode.DATA
    if path:
        assert str(path) in str(caught.value) and [line["sample_id"] for line in lines(path)] == [1, 2, 3]


@pytest.mark.parametrize(("fraction", "allowed"), [(0.29, 29), (0.57, 57), (0.07, 7), (0.019, 1), (1e-05, 0)])
def test_the_budget_is_of_the_number_as_it_is_written(index: ShardIndex, fraction: float, allowed: int) -> None:
    """0.29 * 100 is 28.999999999999996."""
    quarantine = Quarantine(index, fraction)
    quarantine.add(bad(index, *range(allowed)))
    with pytest.raises(DataError, match=rf"{allowed + 1} of 100 .*max_bad_fraction={fraction} allows {allowed}:"):
        quarantine.add(bad(index, 99))


def test_without_a_budget_the_first_stops_the_run(index: ShardIndex) -> None:
    with pytest.raises(DataError, match="1 of 100"):
        Quarantine(index, 0.0).add(bad(index, 5))


def test_the_budget_is_of_all_ranks_together(index: ShardIndex, tmp_path: Path) -> None:
    first, second = (Quarantine(index, 0.03, tmp_path / "q") for _ in range(2))
    first.add(bad(index, 1, 2))
    assert second.add(bad(index, 2, 3)) == bad(index, 3)
    assert first.refresh() == 3
    with pytest.raises(DataError, match="4 of 100"):
        first.add(bad(index, 4))


def test_a_later_attempt_knows_what_earlier_ones_met(index: ShardIndex, tmp_path: Path) -> None:
    Quarantine(index, 0.02, tmp_path / "q").add(bad(index, 1, 2))
    later = Quarantine(index, 0.02, tmp_path / "q")
    assert later.add(bad(index, 2)) == []
    with pytest.raises(DataError, match="3 of 100"):
        later.add(bad(index, 3))


def test_what_was_noted_of_other_shards_does_not_count(index: ShardIndex, tmp_path: Path) -> None:
    path = tmp_path / "q"
    other = write_shards(tmp_path / "other", train=(30, 40))
    Quarantine(ShardIndex.open(other, "train"), 0.5, path).add(bad(ShardIndex.open(other, "train"), 3, 40))
    quarantine = Quarantine(index, 0.5, path)
    assert quarantine.refresh() == 1  # sample 3 has the same key in the same shard; 40 lay in the second
    assert quarantine.add(bad(index, 40)) == bad(index, 40)


@pytest.mark.parametrize(
    "torn",
    [
        b'{"sample_id": 9, "sha',
        b"\xff\xfe",
        b"{}",
        b"[1]",
        b"3",
        b'{"sample_id": "x", "shard": 1, "key": 2, "cause": 3}',
    ],
)
def test_a_line_cut_short_by_a_crash_spoils_no_other(index: ShardIndex, tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "q"
    Quarantine(index, 0.5, path).add(bad(index, 1))
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    quarantine = Quarantine(index, 0.5, path)
    quarantine.add(bad(index, 2))
    assert Quarantine(index, 0.5, path).refresh() == 2
    assert path.read_bytes().startswith(whole + torn + b"\n")


def test_a_list_that_cannot_be_written_is_a_sentence(index: ShardIndex, tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    with pytest.raises(DataError, match="cannot be written"):
        Quarantine(index, 0.5, tmp_path / "q").add(bad(index, 1))


RANK = """
import sys, time
from pathlib import Path
from pipeline.data.quarantine import BadSample, Quarantine
from pipeline.data.index import ShardIndex

root, path, *met = sys.argv[1:]
index = ShardIndex.open(root, "train")
quarantine = Quarantine(index, 0.9, Path(path))
print("ready", flush=True)
sys.stdin.readline()
for number in map(int, met):
    quarantine.add([BadSample.of(index, number, ValueError("cut short"))])
"""


@pytest.mark.not_quick
def test_ranks_that_write_at_the_same_moment_lose_and_double_nothing(index: ShardIndex, tmp_path: Path) -> None:
    met = [list(range(60)), list(range(59, 20, -1)), list(range(10, 80, 2))]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(index.root), str(tmp_path / "q"), *map(str, sample_ids)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for sample_ids in met
    ]
    try:
        for rank in ranks:
            assert rank.stdout is not None and rank.stdout.readline() == "ready\n"
        for rank in ranks:
            assert rank.stdin is not None
            print("go", file=rank.stdin, flush=True)
        assert [rank.wait(120) for rank in ranks] == [0, 0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    noted = [int(str(line["sample_id"])) for line in lines(tmp_path / "q")]
    assert sorted(noted) == sorted(set().union(*met))
