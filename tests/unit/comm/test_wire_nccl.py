"""NCCL's rings and trees: the shapes drawn in its source, and sums that always hold.

No test here runs NCCL: there is no GPU. They hold the formulas to its source and to the textbook; every byte of them is
compared with NCCL's loops in test_wire_nccl_walk.py.
"""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comm.wire import gloo, nccl
from pipeline.comm.wire.gloo import ceil_div
from pipeline.comm.wire.nccl_sends import Condition

OPERATIONS = ("all_reduce", "broadcast", "reduce", "all_gather", "reduce_scatter", "barrier")
HEADER_BYTES = 4
STEP_BYTES = 512 * 1024  # of Simple: a send of a tree or a chain; a ring's chunk is four, in two sends

operations = st.sampled_from(OPERATIONS)
algorithms = st.sampled_from(nccl.ALGORITHMS)
protocols = st.sampled_from(["LL", "LL128", "Simple"])
element_counts = st.one_of(st.integers(1, 300), st.integers(300, 30_000_000))
placements = st.lists(st.integers(0, 3), min_size=2, max_size=17)


def links_of(
    op: str,
    payload_bytes: int,
    server_of_rank: list[int],
    algorithm: str = "ring",
    protocol: str = "Simple",
    num_channels: int = 1,
) -> gloo.Links:
    found = nccl.links(op, payload_bytes, 4, 0, server_of_rank, algorithm, protocol, Condition(num_channels))
    assert not isinstance(found, gloo.NotDerivable), found
    return found


def total(links: gloo.Links) -> int:
    return sum(link.data_bytes for link in links.values())


# --- totals ---


@given(algorithms, element_counts, placements)
def test_an_all_reduce_crosses_2n_minus_2_links(algorithm: str, elements: int, server_of_rank: list[int]) -> None:
    """Each element on its way to the sum and back, ring or tree; Simple adds the headers."""
    num_ranks, payload_bytes = len(server_of_rank), 4 * elements
    num_sends = ceil_div(payload_bytes, STEP_BYTES)
    if algorithm == "ring":
        num_sends = 2 * num_ranks * ceil_div(payload_bytes, 4 * num_ranks * STEP_BYTES)
    links = links_of("all_reduce", payload_bytes, server_of_rank, algorithm)
    assert total(links) == 2 * (num_ranks - 1) * (payload_bytes + HEADER_BYTES * num_sends)


@given(st.integers(1, 1000), st.integers(2, 17), st.sampled_from([4, 1000]))
def test_ring_is_even_when_chunks_are(chunk_elements: int, num_ranks: int, scale: int) -> None:
    """Whole 16 bytes to each rank: the textbook's 2(n-1)/n of the payload, and two sends for each chunk of 2 MiB."""
    share_bytes = 16 * chunk_elements * scale
    sent = gloo.sent_bytes_per_rank(links_of("all_reduce", num_ranks * share_bytes, [0] * num_ranks), num_ranks)
    num_sends = 2 * ceil_div(share_bytes, 4 * STEP_BYTES)
    assert sent == [2 * (num_ranks - 1) * (share_bytes + HEADER_BYTES * num_sends)] * num_ranks


@given(element_counts, placements)
def test_other_operations_move_what_they_must(elements: int, server_of_rank: list[int]) -> None:
    num_ranks, payload_bytes = len(server_of_rank), 4 * elements
    along = payload_bytes + HEADER_BYTES * ceil_div(payload_bytes, STEP_BYTES)
    around = payload_bytes + HEADER_BYTES * 2 * ceil_div(payload_bytes, 4 * STEP_BYTES)
    assert total(links_of("broadcast", payload_bytes, server_of_rank)) == (num_ranks - 1) * along
    assert total(links_of("reduce", payload_bytes, server_of_rank)) == (num_ranks - 1) * along
    assert total(links_of("all_gather", payload_bytes, server_of_rank)) == num_ranks * (num_ranks - 1) * around
    scattered = links_of("reduce_scatter", num_ranks * payload_bytes, server_of_rank)
    assert total(scattered) == num_ranks * (num_ranks - 1) * around


@given(operations, algorithms, protocols, placements)
def test_nothing_is_sent_for_nothing(op: str, algorithm: str, protocol: str, server_of_rank: list[int]) -> None:
    """NCCL discards an empty collective (enqueue.cc, `taskAppend`); a barrier is not empty."""
    assert (links_of(op, 0, server_of_rank, algorithm, protocol) == {}) == (op != "barrier")


@given(operations, algorithms, st.integers(0, 5000), st.integers(0, 5000), protocols, placements)
def test_more_payload_is_never_less_traffic(
    op: str, algorithm: str, few: int, more: int, protocol: str, server_of_rank: list[int]
) -> None:
    sizes = [
        total(links_of(op, 4 * len(server_of_rank) * count, server_of_rank, algorithm, protocol))
        for count in sorted((few, more))
    ]
    assert sizes[0] <= sizes[1]


# --- servers ---


@given(operations, algorithms, element_counts, protocols, placements, st.permutations(range(4)))
def test_servers_are_only_names(
    op: str, algorithm: str, elements: int, protocol: str, server_of_rank: list[int], names: list[int]
) -> None:
    renamed = [names[server] for server in server_of_rank]
    assert links_of(op, 4 * elements, renamed, algorithm, protocol) == links_of(
        op, 4 * elements, server_of_rank, algorithm, protocol
    )


@given(operations, algorithms, element_counts, protocols, placements)
def test_egress_is_part_of_what_ranks_send(
    op: str, algorithm: str, elements: int, protocol: str, server_of_rank: list[int]
) -> None:
    links = links_of(op, 4 * elements, server_of_rank, algorithm, protocol)
    sent = gloo.sent_bytes_per_rank(links, len(server_of_rank))
    egress = gloo.egress_bytes_per_server(links, server_of_rank)
    for server, size in enumerate(egress):
        assert size <= sum(sent[rank] for rank, its in enumerate(server_of_rank) if its == server)
    if len(set(server_of_rank)) == 1:
        assert not any(egress)


@given(element_counts, st.integers(2, 4), st.integers(1, 8), st.data())
def test_a_ring_leaves_each_server_once(
    elements: int, num_servers: int, ranks_per_server: int, data: st.DataObject
) -> None:
    """However the ranks are spread: NCCL joins those of one server first."""
    contiguous = [server for server in range(num_servers) for _ in range(ranks_per_server)]
    spread = data.draw(st.permutations(contiguous))
    for server_of_rank in (contiguous, spread):
        links = links_of("all_reduce", 4 * elements, server_of_rank)
        leaving = Counter(
            server_of_rank[a]
            for a, b in itertools.product(range(len(spread)), repeat=2)
            if (a, b) in links and server_of_rank[a] != server_of_rank[b]
        )
        assert all(count <= 1 for count in leaving.values())


def test_two_servers_of_eight() -> None:
    """A flat ring sends 2(n-1)/n of the payload out of each server, a tree over servers 2(m-1)/m, each with headers."""
    server_of_rank, payload_bytes = [0] * 8 + [1] * 8, 16 * 1_000_000
    ring, tree = (
        gloo.egress_bytes_per_server(links_of("all_reduce", payload_bytes, server_of_rank, algorithm), server_of_rank)
        for algorithm in ("ring", "tree")
    )
    assert ring == [1.875 * payload_bytes + HEADER_BYTES * 2 * 30] * 2
    assert tree == [payload_bytes + HEADER_BYTES * ceil_div(payload_bytes, STEP_BYTES)] * 2


@given(st.integers(2, 40), st.integers(1_000_000, 30_000_000))
def test_two_trees_over_servers_are_fair_on_average(num_servers: int, elements: int) -> None:
    """On two channels the average server sends 2(m-1)/m of the payload, and none more than two of it, within 2 %.

    The channels are no exact halves; headers are a few in 512 KiB.
    """
    server_of_rank = [server for server in range(num_servers) for _ in range(2)]
    links = links_of("all_reduce", 8 * elements, server_of_rank, "tree", num_channels=2)
    egress = gloo.egress_bytes_per_server(links, server_of_rank)
    assert sum(egress) == pytest.approx(2 * (num_servers - 1) * 8 * elements, rel=1e-4)
    assert max(egress) <= 2.02 * 8 * elements


def test_one_channel_has_the_first_tree_alone() -> None:
    """Rank 2 of three is between the others; on two channels rank 1's place in the second tree is another one."""
    payload_bytes = 4_000_000
    assert set(links_of("all_reduce", payload_bytes, [0, 1, 2], "tree")) == {(1, 2), (2, 1), (2, 0), (0, 2)}
    assert len(links_of("all_reduce", payload_bytes, [0, 1, 2], "tree", num_channels=2)) == 6


# --- trees ---


@pytest.mark.parametrize(
    ("num_servers", "first", "second"),
    [  # as drawn in graph/trees.cc
        (
            12,
            {8: 0, 4: 8, 10: 8, 2: 4, 6: 4, 1: 2, 3: 2, 5: 6, 7: 6, 9: 10, 11: 10},
            {3: 11, 1: 3, 7: 3, 5: 7, 9: 7, 0: 1, 2: 1, 4: 5, 6: 5, 8: 9, 10: 9},
        ),
        (
            13,
            {8: 0, 4: 8, 12: 8, 2: 4, 6: 4, 10: 12, 1: 2, 3: 2, 5: 6, 7: 6, 9: 10, 11: 10},
            {9: 1, 5: 9, 0: 9, 3: 5, 7: 5, 11: 0, 2: 3, 4: 3, 6: 7, 8: 7, 10: 11, 12: 11},
        ),
    ],
)
def test_double_trees_are_those_drawn(num_servers: int, first: dict[int, int], second: dict[int, int]) -> None:
    assert nccl.double_tree([[server] for server in range(num_servers)]) == (first, second)


@given(placements)
def test_trees_reach_everybody(server_of_rank: list[int]) -> None:
    for parents in nccl.double_tree(gloo.ranks_by_server(server_of_rank)):
        (root,) = set(range(len(server_of_rank))) - set(parents)
        for rank in parents:
            path = [rank]
            while path[-1] != root:
                path.append(parents[path[-1]])
                assert len(path) <= len(server_of_rank)
        children = Counter(parents.values())
        assert all(count <= 3 for count in children.values())  # include/device.h, NCCL_MAX_TREE_ARITY


# --- what is not known, pinning ---


@pytest.mark.parametrize(
    ("op", "algorithm", "protocol", "named"),
    [
        ("all_reduce", "NVLS", "Simple", "NVLS"),
        ("all_reduce", "ring", "LL256", "LL256"),
        ("all_to_all", "ring", "Simple", "all_to_all"),
    ],
)
def test_what_is_unknown_says_why(op: str, algorithm: str, protocol: str, named: str) -> None:
    found = nccl.links(op, 400, 4, -1, [0, 1], algorithm, protocol)
    assert isinstance(found, gloo.NotDerivable)
    assert named in found.reason


def test_a_lone_rank_sends_nothing() -> None:
    assert links_of("all_reduce", 400, [0], "tree", "LL") == {}


def test_a_barrier_reduces_one_float() -> None:
    assert total(links_of("barrier", 0, [0, 1, 2])) == 4 * 4 + HEADER_BYTES * 3 * 2 * 4


@pytest.mark.parametrize(("version", "known"), [((2, 27), False), ((2, 28), True), ((2, 30), True), ((2, 31), False)])
def test_versions_whose_source_was_read(version: tuple[int, int], known: bool) -> None:
    found = nccl.links("all_reduce", 400, 4, -1, [0, 1], "ring", "LL", Condition(version=version))
    assert isinstance(found, gloo.NotDerivable) != known
    if isinstance(found, gloo.NotDerivable):
        assert f"NCCL 2.{version[1]} " in found.reason


def test_only_all_reduce_is_pinned_to_the_tree() -> None:
    one, four = ({"NCCL_MIN_CTAS": channels, "NCCL_MAX_CTAS": channels} for channels in "14")
    assert nccl.environment("ring", "ll128") == {"NCCL_ALGO": "Ring", "NCCL_PROTO": "LL128", **one}
    assert nccl.environment("tree", "Simple", 4) == {
        "NCCL_ALGO": "Ring;AllReduce:Tree",
        "NCCL_PROTO": "Simple",
        **four,
    }
    assert links_of("broadcast", 400, [0, 1, 1], "tree") == links_of("broadcast", 400, [0, 1, 1], "ring")
