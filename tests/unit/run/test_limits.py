"""What a machine takes is known before anything starts, and said; three ranks on two cores stay legal."""

import re

import pytest

from pipeline.config.training import ClusterConfig
from pipeline.core.errors import ConfigError
from pipeline.run.launch import limits
from pipeline.run.launch.limits import check_count, check_pictures, check_processes, most_processes
from pipeline.run.launch.ranks import RankInfo
from pipeline.run.launch.supervisor import as_ranks
from pipeline.run.memory import Available

GIGABYTE = 10**9


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight cores and 4 GB."""
    monkeypatch.setattr(limits.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(limits, "available_memory", lambda _: Available(4 * GIGABYTE, "a test"))


def refused(**keys: int | None) -> str:
    num_workers = keys.pop("num_workers", None)
    cluster = ClusterConfig(**keys)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as raised:
        check_processes(cluster, num_workers, None)
    return str(raised.value)


def test_what_is_asked_for_is_bounded_by_the_machine() -> None:
    assert "set cluster.devices to 32 or less" in refused(devices=100_000)
    assert "set cluster.num_threads to 32 or less" in refused(num_threads=33)
    assert "set data.num_workers to 10 or less" in refused(devices=3, num_workers=11)


def test_memory_bounds_processes_and_16_always_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "available_memory", lambda _: Available(2 * GIGABYTE, "a test"))
    assert (most_processes(), most_processes(in_memory=True)) == (32, 20)
    monkeypatch.setattr(limits, "available_memory", lambda _: Available(0, "a test"))
    assert most_processes(in_memory=True) == 16


def test_ranks_may_share_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.os, "cpu_count", lambda: 1)
    for devices in (1, 2, 3, 16):
        check_processes(ClusterConfig(devices=devices, num_threads=4), 1, None)
    check_count("num_workers", None)


def test_ranks_that_a_launcher_has_started_are_no_question() -> None:
    ranks = RankInfo(0, 1000, 0, 1000, 0, 1, "127.0.0.1", 29500, "slurm")
    check_processes(ClusterConfig(devices=1000), 8, ranks)
    with pytest.raises(ConfigError, match=r"data\.num_workers=33 is more"):
        check_processes(ClusterConfig(), 33, ranks)


@pytest.mark.parametrize("num_workers", [None, 10**6])
def test_nothing_is_started_before_it_is_known(num_workers: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    cluster = ClusterConfig(devices=1 if num_workers else 100_000)
    with pytest.raises(ConfigError, match="is more than this machine takes"):
        as_ranks("train", cluster, lambda _: pytest.fail("it started"), num_workers=num_workers)


def test_pictures_that_fit_into_no_memory_are_refused_with_a_number_that_does() -> None:
    check_pictures("batch.max_per_rank", 256, 224, num_ranks=2)
    with pytest.raises(ConfigError, match=re.escape("set batch.max_per_rank to 166 or less")):
        check_pictures("batch.max_per_rank", 256, 1000, num_ranks=2)
    check_pictures("batch.max_per_rank", 166, 1000, num_ranks=2)
    with pytest.raises(ConfigError, match=r"batch_per_rank=1 pictures of 100000 x 100000 .* lower data\.size"):
        check_pictures("batch_per_rank", 1, 100_000, num_ranks=1)
