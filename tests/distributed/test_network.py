"""Networks as people have them, in namespaces of their own: names that lead nowhere, interfaces that are not there."""

import sys
from pathlib import Path

import pytest

from tests.commands import HERE, SMALL, TRAIN_RECORDED, fired, run, train
from tests.comparing import differences, load
from tests.distributed.test_lab import PATH, PRIVATE, REPOSITORY, possible
from tests.making.pairs import PAIR_OPTIONS, Pair

pytestmark = pytest.mark.usefixtures("possible")
__all__ = ["possible"]

AS_DEBIAN = """
printf '127.0.0.1 localhost\\n127.0.1.1 n%s\\n' "$RANK" > "$0.$RANK"
hostname "n$RANK" && mount --bind "$0.$RANK" /etc/hosts && unset GLOO_SOCKET_IFNAME && exec "$@"
"""
"""Before a rank of the lab: its machine's own name stands for 127.0.1.1, as Debian and Ubuntu install it."""


def test_machines_whose_names_stand_for_themselves_find_one_another(shards: Path, tmp_path: Path) -> None:
    where = [f"run_root={tmp_path}/runs", f"data.root={shards}", "name=a", "cluster.timeout_seconds=60", *SMALL]
    machine = ["unshare", "--mount", "--uts", "sh", "-c", AS_DEBIAN, f"{tmp_path}/hosts"]
    lab = ["-m", "pipeline.lab", f"run_root={tmp_path}", "servers=2", "num_threads=1", "--", *machine]
    ready = [sys.executable, "-m", "pipeline.ready", *where]
    output = run([*lab, *ready], cwd=REPOSITORY, environment={"PATH": PATH}).output
    assert "2 on n0, n1, gloo" in output and output.count("bit/s, ") == 2 and "\nReady.\n" in output, output


def test_an_interface_that_is_not_there_is_a_sentence_on_every_rank(shards: Path, tmp_path: Path) -> None:
    variables = {"GLOO_SOCKET_IFNAME": "ib0"}
    output = train(tmp_path, shards, "a", 2, expect=2, environment=variables).output
    assert output.count("error: GLOO_SOCKET_IFNAME=ib0: ") == 2 and "[rank 1] error: " in output, output
    assert "Traceback" not in output and "frame #" not in output


def test_a_network_namespace_without_a_loopback_is_a_sentence(shards: Path, tmp_path: Path) -> None:
    where = [f"run_root={tmp_path}/runs", f"data.root={shards}", "name=a", "cluster.devices=2", *SMALL]
    output = run(["-m", "pipeline.train", *where], expect=2, prefix=[*PRIVATE, "--net"]).output
    assert output.count("The loopback interface of ") == 1 and "`ip link set lo up`" in output, output
    assert "Traceback" not in output and "frame #" not in output


def test_a_run_on_one_machine_listens_on_its_loopback_alone(shards: Path, tmp_path: Path) -> None:
    """The kernel's list of listening sockets amid a step, in a namespace with an interface that others reach."""
    reached = "ip link set lo up && ip link add out type veth peer name in && ip address add 10.9.9.1/24 dev out"
    own = [*PRIVATE, "--net", "sh", "-c", f'{reached} && ip link set out up && exec "$@"', "sh"]
    listening = tmp_path / "listening"
    environment = {
        "PATH": PATH,
        "FED_TO": str(tmp_path),
        "KILL_AT": "1 5 backward shell",
        "DO": f"cat /proc/net/tcp /proc/net/tcp6 > {listening}; ip address > {tmp_path}/addresses",
    }
    where = [f"run_root={tmp_path}", f"data.root={shards}", "name=a", "cluster.devices=2", *SMALL]
    run([str(TRAIN_RECORDED), *where, "tracking=disabled"], environment=environment, prefix=own)
    assert [what for _, what in fired(tmp_path)] == ["1 5 backward shell"]
    assert "10.9.9.1" in (tmp_path / "addresses").read_text()
    sockets = [line.split() for line in listening.read_text().splitlines()]
    at = [local for _, local, _, state, *_ in sockets if state == "0A"]  # TCP_LISTEN
    assert len(at) >= 3  # the store, and gloo's of each rank
    assert all(address.partition(":")[0].endswith("0100007F") for address in at), at  # 127.0.0.1, also as IPv6 has it


def test_a_stranger_on_a_third_server_is_no_rank_and_hurts_nobody(
    two_ranks: Pair, shards: Path, tmp_path: Path
) -> None:
    """21 attempts before, while and after two ranks meet that were given no secret, but share a file system."""
    where = [f"run_root={tmp_path}", f"data.root={shards}", "name=run", *SMALL, *PAIR_OPTIONS]
    lab = ["-m", "pipeline.lab", f"run_root={tmp_path}", "servers=3", "num_threads=1", "--"]
    place = tmp_path / "run.fed"
    place.mkdir()
    environment = {
        "PATH": PATH,
        "KILL_AT": "0 5 0 shell",
        "DO": f"for i in $(seq 600); do [ -e {place}/late ] && exit 0; sleep 0.1; done",
    }
    stranger = [sys.executable, str(HERE / "distributed/stranger.py"), str(place), "--", *where]
    output = run([*lab, *stranger], cwd=REPOSITORY, environment=environment).output
    attempts = (place / "attempts").read_text().splitlines()
    assert len(attempts) == 21 and not (place / "canary").exists(), attempts
    reached = [int(line.rpartition(" ")[2]) for line in attempts if "everywhere" in line]
    assert reached[:3] == [0, 0, 0] and all(num >= 1 for num in reached[3:6]) and all(num >= 3 for num in reached[6:])
    assert [what for _, what in fired(place)] == ["0 5 0 shell"]
    assert "Traceback" not in output and not list(tmp_path.glob(".meeting-*"))
    assert not differences(load(two_ranks.unbroken)["state_dict"], load(tmp_path / "run")["state_dict"])
