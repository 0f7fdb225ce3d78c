"""Servers by host, and what is worth knowing of ranks before they begin."""

import pytest

from pipeline.comm.ledger.traffic import Placement
from pipeline.metering.hosts import Hello, place
from pipeline.run.launch.ranks import LAB_VARIABLE


def said(host: str, *, launcher: str = "0", script: str = "train.py a1", torch: str = "2.14.1") -> Hello:
    return {"host": host, "hostname": f"name of {host}", "launcher": launcher, "script": script, "torch": torch}


@pytest.fixture(autouse=True)
def under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LAB_VARIABLE, raising=False)
    monkeypatch.setenv("GROUP_RANK", "0")


def test_two_launchers_on_one_host_are_one_server_and_it_says_so() -> None:
    placement, notes = place([said("a"), said("a", launcher="1")], "host")
    assert placement == Placement((0, 0), measured=True)
    assert len(notes) == 1 and "one server, though 2 launchers started them" in notes[0]


def test_hosts_are_servers_whatever_the_launcher_says() -> None:
    placement, notes = place([said("a"), said("b"), said("a"), said("b")], "host")
    assert placement == Placement((0, 1, 0, 1), measured=True)
    assert notes == []


def test_each_rank_is_a_server_where_that_is_asked_for() -> None:
    assert place([said("a"), said("a")], "rank") == (Placement.assumed(2), [])


def test_ranks_that_say_nothing_or_other_things_are_named() -> None:
    placement, notes = place([said("a"), None, said("a", script="other.py b2"), said("a", torch="2.15")], "host")
    assert placement == Placement.assumed(4)
    assert "rank 1 of 4 ranks did not report" in notes[0]
    assert "different programs (ranks 0, 3: train.py a1; rank 2: other.py b2)" in notes[1]
    assert "different versions of torch (ranks 0, 2: 2.14.1; rank 3: 2.15)" in notes[2]
