"""The lab's arithmetic: rates, and who sits where."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.lab import MAX_SERVERS, PLACEMENTS, LabConfig
from pipeline.core.cli import compose, split_arguments
from pipeline.core.errors import ConfigError
from pipeline.core.units import bits_per_second
from pipeline.run.lab.cluster import Layout, address_of
from pipeline.run.launch.ranks import find_ranks, lab_conditions

LAYOUTS = st.builds(
    Layout,
    servers=st.integers(1, 9),
    ranks_per_server=st.integers(1, 9),
    placement=st.sampled_from(PLACEMENTS),
    bandwidth_bits_per_second=st.none() | st.integers(1, 10**12),
)


@pytest.mark.parametrize(
    ("rate", "bits"),
    [
        ("1gbit", 10**9),
        ("100mbit", 10**8),
        ("2.5Gbit", 2_500_000_000),
        ("56kbit", 56_000),
        ("1mibit", 2**20),
        ("9600", 9600),
        ("10bit", 10),
    ],
)
def test_rates_as_tc_reads_them(rate: str, bits: int) -> None:
    assert bits_per_second(rate) == bits


@pytest.mark.parametrize("rate", ["", "fast", "-1gbit", "0", "0mbit", "1 gigabit", "1e9", "nan", "1gb", "gbit"])
def test_other_rates_are_refused(rate: str) -> None:
    with pytest.raises(ConfigError, match="1gbit"):
        bits_per_second(rate)


def test_a_rate_in_bytes_is_taken_for_a_mistake() -> None:
    with pytest.raises(ConfigError, match="bytes per second"):
        bits_per_second("100mbps")


@given(LAYOUTS)
def test_each_place_is_taken_once(layout: Layout) -> None:
    places = [layout.place(rank) for rank in range(layout.world_size)]
    servers, local_ranks = range(layout.servers), range(layout.ranks_per_server)
    assert sorted(places) == [(server, local_rank) for server in servers for local_rank in local_ranks]
    assert places[0] == (0, 0)
    assert layout.server_of_rank == [server for server, _ in places]


def test_placements() -> None:
    assert Layout(servers=2, ranks_per_server=2).server_of_rank == [0, 0, 1, 1]
    assert Layout(servers=2, ranks_per_server=2, placement="interleaved").server_of_rank == [0, 1, 0, 1]


@given(LAYOUTS)
def test_a_rank_reads_its_place_from_the_variables(layout: Layout) -> None:
    for rank in range(layout.world_size):
        variables = layout.variables(rank)
        ranks = find_ranks(1, variables)
        assert ranks is not None
        assert (ranks.node_rank, ranks.local_rank) == layout.place(rank)
        assert (ranks.rank, ranks.world_size) == (rank, layout.world_size)
        assert (ranks.num_nodes, ranks.local_world_size) == (layout.servers, layout.ranks_per_server)
        assert ranks.master_addr == address_of(0)
        promised = lab_conditions(variables)
        assert promised == json.loads(json.dumps(layout.promise()))
        assert promised is not None and promised["server_of_rank"][rank] == ranks.node_rank


def test_outside_of_a_lab_nothing_is_promised() -> None:
    assert lab_conditions({"RANK": "0"}) is None


@given(st.integers(0, MAX_SERVERS - 1))
def test_addresses_belong_to_the_subnet(server: int) -> None:
    last = int(address_of(server).rpartition(".")[2])
    assert 1 <= last <= 254


def test_the_command_begins_after_the_first_dashes() -> None:
    assert split_arguments(["servers=2", "--", "make", "--", "x=1"]) == (["servers=2"], ["make", "--", "x=1"])
    assert split_arguments(["--help"]) == (["--help"], [])


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["servers=0"], "servers=0"),
        ([f"servers={MAX_SERVERS + 1}"], str(MAX_SERVERS)),
        (["ranks_per_server=0"], "ranks_per_server=0"),
        (["placement=interleafed"], "interleaved"),
        (["bandwidth=100mbps"], "bandwidth=100mbps"),
        (["num_threads=0"], "num_threads=0"),
        (["server=2"], "servers"),
    ],
)
def test_impossible_labs_are_refused(overrides: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        compose("lab", LabConfig, overrides)
