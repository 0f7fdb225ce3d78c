"""Whether a training fits: the judgement, and what a cgroup leaves."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.run.memory import Available, available_memory, cgroup_available, refusal


@given(st.integers(1, 10**12), st.integers(1, 64), st.integers(0, 10**14))
def test_ranks_of_a_machine_share_its_memory(needed: int, num_ranks: int, available: int) -> None:
    reason = refusal(needed, num_ranks, Available(available, "MemAvailable"))
    assert bool(reason) == (needed * num_ranks > available)


def test_a_gpu_belongs_to_one_rank() -> None:
    gpu = Available(10**9, "the GPU with least free memory", per_rank=True)
    assert refusal(10**9, 8, gpu) == ""
    assert "A rank needs at least 1.00 GB" in refusal(10**9 + 1, 8, gpu)


def test_the_reason_has_both_sizes_who_says_so_and_the_remedy() -> None:
    reason = refusal(5 * 10**9, 2, Available(8 * 10**9, "the cgroup's limit"))
    for part in ("The 2 ranks", "10.00 GB", "8.00 GB", "the cgroup's limit", "batch.max_per_rank", "not started"):
        assert part in reason


def test_where_nothing_is_known_nothing_is_refused() -> None:
    assert refusal(10**15, 8, None) == ""


def test_this_machine_tells() -> None:
    found = available_memory("cpu")
    assert found is not None and found.num_bytes > 0 and not found.per_rank


def group(directory: Path, **files: str | int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("outer", "left"),
    [({"memory__max": "max"}, 600), ({"memory__max": 1000, "memory__current": 950}, 50)],
    ids=["the inner limit", "an ancestor's limit"],
)
def test_the_tightest_limit_counts_and_cached_files_are_free(tmp_path: Path, outer: dict[str, Any], left: int) -> None:
    group(tmp_path / "a", **outer, memory__stat="anon 1\ninactive_file 0")
    inner = {"memory__max": 800, "memory__current": 500, "memory__stat": "anon 200\ninactive_file 300"}
    group(tmp_path / "a/b", **inner)
    (tmp_path / "self").write_text("0::/a/b\n")
    found = cgroup_available(tmp_path, tmp_path / "self")
    assert found is not None and found.num_bytes == left


def test_version_one(tmp_path: Path) -> None:
    files = {"memory__limit_in_bytes": 800, "memory__usage_in_bytes": 500, "memory__stat": "total_inactive_file 100"}
    group(tmp_path / "memory/job", **files)
    unlimited = {"memory__limit_in_bytes": 2**63 - 4096, "memory__usage_in_bytes": 5, "memory__stat": "cache 0"}
    group(tmp_path / "memory", **unlimited)
    (tmp_path / "self").write_text("4:memory:/job\n3:cpu,cpuacct:/job\n")
    found = cgroup_available(tmp_path, tmp_path / "self")
    assert found is not None and found.num_bytes == 400


def test_without_cgroups_there_is_no_limit(tmp_path: Path) -> None:
    assert cgroup_available(tmp_path, tmp_path / "nowhere") is None
