"""environment.json: what the code was, also where there is no git."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from pipeline.run.launch.ranks import RankInfo
from pipeline.run.provenance import describe, describe_cpu, describe_git

RANKS = RankInfo(0, 1, 0, 1, 0, 1, "127.0.0.1", 29500, "single")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "code"
    root.mkdir()
    (root / "train.py").write_text("print(1)\n")
    identity = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", root, *arguments], check=True, capture_output=True)
    return root


def test_description_is_json_and_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "b9f1c0ffee")
    described = describe(RANKS, hosts=["a", "b"])
    text = json.dumps(described, allow_nan=False)
    assert "b9f1c0ffee" not in text
    assert described["hosts"] == ["a", "b"]
    assert described["packages"]["torch"] and described["cpu"]["num_cores"] == len(os.sched_getaffinity(0))


def test_cpu_flags_are_the_kernels(tmp_path: Path) -> None:
    words = Path("/proc/cpuinfo").read_text().split()
    assert all(flag in words for flag in describe_cpu()["flags"])


def test_clean_checkout(checkout: Path) -> None:
    git = describe_git(checkout)
    assert git["commit"] is not None and len(git["commit"]) == 40
    assert (git["dirty"], git["diff_sha256"]) == (False, None)


def test_every_difference_changes_the_hash(checkout: Path) -> None:
    hashes = []
    (checkout / "train.py").write_text("print(2)\n")
    hashes.append(describe_git(checkout)["diff_sha256"])
    assert describe_git(checkout)["diff_sha256"] == hashes[0]
    (checkout / "new.py").write_text("a\n")
    hashes.append(describe_git(checkout)["diff_sha256"])
    (checkout / "new.py").write_text("b\n")
    hashes.append(describe_git(checkout)["diff_sha256"])
    assert len(set(hashes)) == 3 and None not in hashes


def test_outside_git_the_reason_is_given(tmp_path: Path) -> None:
    git = describe_git(tmp_path)
    assert git["commit"] is None and git["reason"] is not None and "not a git repository" in git["reason"]


def test_a_checkout_around_the_code_is_not_its_own(checkout: Path) -> None:
    inner = checkout / "site-packages"
    inner.mkdir()
    assert describe_git(inner)["commit"] is None


def test_without_git_the_reason_is_given(checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_git(checkout)["reason"] == "git is not installed"
