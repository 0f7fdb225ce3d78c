"""Which interface a rank is reached at, and what variables may name: pure, and on this machine's own network."""

import dataclasses
import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import ConfigError
from pipeline.run.launch import network
from pipeline.run.launch.network import Place, check_apart, check_loopback, check_variable, find_place, settle, tell
from pipeline.run.launch.ranks import RankInfo

FOUND = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.7", "fe80::1"], "docker0": ["172.17.0.1"]}
ALONE = RankInfo(0, 1, 0, 1, 0, 1, "127.0.0.1", 29500, "single")


def refused(backend: str, value: str) -> str:
    variable = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
    with pytest.raises(ConfigError) as raised:
        check_variable(backend, {variable: value}, FOUND)
    assert f"{variable}={value}: " in str(raised.value)
    assert "It has lo (127.0.0.1), eth0 (10.0.0.7), docker0 (172.17.0.1): set " in str(raised.value)
    return str(raised.value)


def test_an_interface_that_is_not_there_is_named_with_those_that_are() -> None:
    assert "no interface 'ib0' that is up" in refused("gloo", "ib0")
    assert "no interface 'ib0'" in refused("gloo", "eth0,ib0")
    assert "^ in front is NCCL's way" in refused("gloo", "^lo,docker0")
    assert "that is the address of lo" in refused("gloo", "127.0.0.1")
    assert "no interface ' eth0'" in refused("gloo", "lo, eth0")  # gloo keeps the blank, too
    assert "no interface 'ib,mlx'" in refused("nccl", "ib,mlx")
    assert "no interface 'eth'" in refused("nccl", "=eth")
    refused("nccl", "^lo,eth,docker")


@pytest.mark.parametrize(
    ("backend", "value"),
    [("gloo", ""), ("gloo", "eth0"), ("gloo", "lo,eth0"), ("nccl", ""), ("nccl", "eth"), ("nccl", "=eth0"),
     ("nccl", "^docker,lo"), ("nccl", "ib,eth"), ("nccl", "^"), ("nccl", "eth0:5000"), ("nccl", "^=eth")],
)  # fmt: skip
def test_what_names_an_interface_is_taken(backend: str, value: str) -> None:
    variable = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
    other = "GLOO_SOCKET_IFNAME" if backend == "nccl" else "NCCL_SOCKET_IFNAME"
    check_variable(backend, {variable: value, other: "is not asked"}, FOUND)
    check_variable(backend, {}, FOUND)


def test_ranks_that_meet_on_a_machine_need_its_loopback() -> None:
    elsewhere = dataclasses.replace(ALONE, rank=1, world_size=2, node_rank=1, num_nodes=2)
    for found in ({}, {"eth0": ["10.0.0.7"]}):
        for ranks in (ALONE, None):
            with pytest.raises(ConfigError, match="ip link set lo up"):
                check_loopback(ranks, found)
        check_loopback(elsewhere, found)
    check_loopback(ALONE, FOUND)


def test_this_machine_is_found() -> None:
    found = network.interfaces()
    assert "127.0.0.1" in found["lo"]
    place = find_place(ALONE, {"GLOO_SOCKET_IFNAME": "lo"}, found)
    assert (place.host, place.address, place.interface, place.is_chosen) == (
        socket.gethostname(), found["lo"][0], "lo", True,
    )  # fmt: skip
    assert settle(place, [place], found) == place


@pytest.mark.parametrize("of_name", [None, "127.0.1.1", "fe80::1", "10.0.0.7"])
def test_ranks_of_one_machine_are_reached_by_no_other_whatever_its_name_stands_for(
    of_name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Debian's /etc/hosts and a machine without a name have it. Between machines: distributed/test_network.py."""
    monkeypatch.setattr(network, "_address_of_name", lambda _: of_name)
    place = find_place(ALONE, {}, FOUND)
    assert place.address == of_name
    settled = settle(place, [place], FOUND)
    assert (settled.address, settled.interface) == ("127.0.0.1", "lo")


def test_a_place_on_its_own_machine_is_refused_where_others_are_elsewhere() -> None:
    chosen = Place(0, "N0", "a", "127.0.0.1", "lo", is_chosen=True)
    other = Place(1, "n1", "b", "10.0.0.8", "eth0")
    with pytest.raises(ConfigError) as raised:
        settle(chosen, [chosen, other], FOUND)
    assert str(raised.value) == (
        "Rank 0 on N0 at 127.0.0.1 (lo) is reached from its own machine alone, but rank 1 is on n1: set"
        " GLOO_SOCKET_IFNAME to the interface between the machines (eth0 (10.0.0.7), docker0 (172.17.0.1))."
    )
    assert settle(chosen, [chosen, dataclasses.replace(other, machine="a")], FOUND) == chosen


def test_machines_with_one_address_are_refused() -> None:
    places = [Place(rank, f"n{rank}", f"m{rank}", "172.17.0.1", "docker0") for rank in (0, 1)]
    with pytest.raises(ConfigError, match=r"Rank 0 on n0 at 172\.17\.0\.1 \(docker0\) and rank 1 on n1 .* one address"):
        check_apart(places)
    check_apart([dataclasses.replace(place, machine="m") for place in places])


def test_the_variable_of_the_user_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(0, "n0", "a", "10.0.0.7", "eth0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that it is taken back, whatever `use` makes of it
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    network.use(dataclasses.replace(place, interface=None))
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    network.use(place)
    network.use(dataclasses.replace(place, interface="eth1"))
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth0"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")


PLACES = st.builds(
    Place,
    st.integers(0, 3),
    st.just("host"),
    st.sampled_from(["a", "b", "c"]),
    st.none() | st.ip_addresses().map(str),
    st.none() | st.sampled_from(["eth0", "lo"]),
    is_chosen=st.just(True),
)


@given(st.lists(PLACES, min_size=1, max_size=20))
def test_what_is_settled_is_reachable_or_refused(places: list[Place]) -> None:
    assert [Place(**place.to_json()) for place in places] == places
    assert tell(places).count("rank ") == min(len(places), 8)
    several = len({place.machine for place in places}) > 1
    for place in places:
        try:
            settled = settle(place, places, FOUND)
        except ConfigError:
            assert several and not place.is_reachable
        else:
            assert settled.address is not None and (settled.is_reachable or not several)
