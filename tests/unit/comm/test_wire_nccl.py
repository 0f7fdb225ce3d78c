"""NCCL's rings and trees: the shapes drawn in its source, the inflation of its protocols, and sums that always hold.

No test here runs NCCL: there is no GPU. They hold the formulas to its source and to the textbook.
"""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comm.wire import gloo, nccl

OPERATIONS = ("all_reduce", "broadcast", "reduce", "all_gather", "reduce_scatter", "barrier")
SQUEEZENET_BUCKETS = (2_048_000, 2_893_984)

LOGGED_OPS = {
    "AllReduce": "all_reduce",
    "Broadcast": "broadcast",
    "Reduce": "reduce",
    "AllGather": "all_gather",
    "ReduceScatter": "reduce_scatter",
}

operations = st.sampled_from(OPERATIONS)
algorithms = st.sampled_from(nccl.ALGORITHMS)
protocols = st.sampled_from(["LL", "LL128", "Simple"])
element_counts = st.one_of(st.integers(1, 300), st.integers(300, 30_000_000))
placements = st.lists(st.integers(0, 3), min_size=2, max_size=17)


def links_of(
    op: str, payload_bytes: int, server_of_rank: list[int], algorithm: str = "ring", protocol: str = "Simple"
) -> gloo.Links:
    found = nccl.links(op, payload_bytes, 4, 0, server_of_rank, algorithm, protocol)
    assert not isinstance(found, gloo.NotDerivable), found
    return found


def total(links: gloo.Links) -> int:
    return sum(link.data_bytes for link in links.values())


# --- totals ---


@given(algorithms, element_counts, placements)
def test_an_all_reduce_crosses_2n_minus_2_links(algorithm: str, elements: int, server_of_rank: list[int]) -> None:
    """Each element on its way to the sum and back, ring or tree; Simple adds nothing."""
    links = links_of("all_reduce", 4 * elements, server_of_rank, algorithm)
    assert total(links) == 2 * (len(server_of_rank) - 1) * 4 * elements


@given(st.integers(1, 1000), st.integers(2, 17), st.sampled_from([4, 1000]))
def test_ring_is_even_when_chunks_are(chunk_elements: int, num_ranks: int, scale: int) -> None:
    """Whole 16 bytes to each rank: the textbook's 2(n-1)/n of the payload."""
    payload_bytes = 16 * num_ranks * chunk_elements * scale
    sent = gloo.sent_bytes_per_rank(links_of("all_reduce", payload_bytes, [0] * num_ranks), num_ranks)
    assert sent == [2 * (num_ranks - 1) * payload_bytes // num_ranks] * num_ranks


@given(st.integers(1, 5000), st.integers(2, 9))
def test_uneven_chunks_step_by_step(elements: int, num_ranks: int) -> None:
    """The rank at position p passes chunks p - 1, p - 2, ..., p + 1 towards the sum, then p, p - 1, ..., p + 2 back."""
    chunk_bytes = 16 * -(-4 * elements // num_ranks // 16)
    chunks = [max(0, min(chunk_bytes, 4 * elements - position * chunk_bytes)) for position in range(num_ranks)]
    links = links_of("all_reduce", 4 * elements, [0] * num_ranks)
    for position in range(num_ranks):
        passed = [position - 1 - step for step in range(num_ranks - 1)] + [
            position - step for step in range(num_ranks - 1)
        ]
        link = links.get((position, (position + 1) % num_ranks), gloo.Link(0, 0))
        assert link.data_bytes == sum(chunks[chunk % num_ranks] for chunk in passed)


@given(element_counts, placements)
def test_other_operations_move_what_they_must(elements: int, server_of_rank: list[int]) -> None:
    num_ranks, payload_bytes = len(server_of_rank), 4 * elements
    assert total(links_of("broadcast", payload_bytes, server_of_rank)) == (num_ranks - 1) * payload_bytes
    assert total(links_of("reduce", payload_bytes, server_of_rank)) == (num_ranks - 1) * payload_bytes
    assert total(links_of("all_gather", payload_bytes, server_of_rank)) == num_ranks * (num_ranks - 1) * payload_bytes
    scattered = links_of("reduce_scatter", num_ranks * payload_bytes, server_of_rank)
    assert total(scattered) == num_ranks * (num_ranks - 1) * payload_bytes


@given(operations, algorithms, st.integers(0, 5000), st.integers(0, 5000), protocols, placements)
def test_more_payload_is_never_less_traffic(
    op: str, algorithm: str, few: int, more: int, protocol: str, server_of_rank: list[int]
) -> None:
    sizes = [
        total(links_of(op, 4 * len(server_of_rank) * count, server_of_rank, algorithm, protocol))
        for count in sorted((few, more))
    ]
    assert sizes[0] <= sizes[1]


# --- protocols ---


@given(operations, algorithms, element_counts, placements)
def test_protocols_inflate(op: str, algorithm: str, elements: int, server_of_rank: list[int]) -> None:
    """LL doubles, but for a last line; LL128 adds a fifteenth, but for a last slice of each chunk."""
    num_ranks = len(server_of_rank)
    payload_bytes = 4 * num_ranks * elements
    simple, ll, ll128 = (
        links_of(op, payload_bytes, server_of_rank, algorithm, name) for name in ("Simple", "LL", "LL128")
    )
    for pair, link in simple.items():
        assert 2 * link.data_bytes <= ll[pair].data_bytes <= 2 * link.data_bytes + 2 * num_ranks * 16
        assert 15 * ll128[pair].data_bytes >= 16 * link.data_bytes


def test_squeezenet_under_each_protocol() -> None:
    """Two ranks on two servers, both buckets: a small model's traffic may double."""
    sent = {
        protocol: [
            sum(part)
            for part in zip(
                *(
                    gloo.sent_bytes_per_rank(links_of("all_reduce", size, [0, 1], "ring", protocol), 2)
                    for size in SQUEEZENET_BUCKETS
                ),
                strict=True,
            )
        ]
        for protocol in ("Simple", "LL", "LL128")
    }
    assert sent["Simple"] == [4_941_984] * 2
    assert sent["LL"] == [2 * 4_941_984] * 2
    assert all(16 / 15 * 4_941_984 <= size < 1.07 * 4_941_984 for size in sent["LL128"])


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
    """A flat ring sends 2(n-1)/n of the payload out of each server, a tree over servers 2(m-1)/m."""
    server_of_rank, payload_bytes = [0] * 8 + [1] * 8, 16 * 1_000_000
    ring, tree = (
        gloo.egress_bytes_per_server(links_of("all_reduce", payload_bytes, server_of_rank, algorithm), server_of_rank)
        for algorithm in ("ring", "tree")
    )
    assert ring == [1.875 * payload_bytes] * 2
    assert tree == [1.0 * payload_bytes] * 2


@given(st.integers(2, 40), element_counts)
def test_trees_over_servers_are_fair_on_average(num_servers: int, elements: int) -> None:
    """The average server sends 2(m-1)/m of the payload, and none more than two of it."""
    server_of_rank = [server for server in range(num_servers) for _ in range(2)]
    links = links_of("all_reduce", 8 * elements, server_of_rank, "tree")
    egress = gloo.egress_bytes_per_server(links, server_of_rank)
    assert sum(egress) == 2 * (num_servers - 1) * 8 * elements
    assert max(egress) <= 2 * 8 * elements


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


# --- what is not known, pinning, the log ---


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
    assert total(links_of("barrier", 0, [0, 1, 2])) == 4 * 4


def test_only_all_reduce_is_pinned_to_the_tree() -> None:
    assert nccl.environment("ring", "ll128") == {"NCCL_ALGO": "Ring", "NCCL_PROTO": "LL128"}
    assert nccl.environment("tree", "Simple") == {"NCCL_ALGO": "Ring;AllReduce:Tree", "NCCL_PROTO": "Simple"}
    assert links_of("broadcast", 400, [0, 1, 1], "tree") == links_of("broadcast", 400, [0, 1, 1], "ring")


def log_line(op: str, size: int, algorithm: str, protocol: str, low: int, high: int) -> str:
    """What rank 0 logs of a collective (enqueue.cc, `scheduleCollTasksToPlan`), by its format: no NCCL has run here."""
    return f"NCCL INFO {op}: {size} Bytes -> Algo {algorithm} proto {protocol} channel{{Lo..Hi}}={{{low}..{high}}}"


@given(
    st.sampled_from(sorted(LOGGED_OPS)),
    st.integers(1, 2**40),
    algorithms,
    protocols,
    st.tuples(st.integers(0, 31), st.integers(0, 31)).map(sorted),
)
def test_a_choice_is_read_back_from_its_line(
    op: str, size: int, algorithm: str, protocol: str, channels: list[int]
) -> None:
    low, high = channels
    line = log_line(op, size, algorithm.upper(), protocol.upper(), low, high)
    expected = nccl.Choice(LOGGED_OPS[op], size, algorithm, protocol.lower(), high - low + 1)
    for written in (line, f"node3:417:431 [0] {line}", f"{line} cgaClusterSize 0"):
        assert list(nccl.read_choices(written)) == [expected]


def test_choices_are_read_in_order_among_other_lines() -> None:
    lines = (
        "node3:417:417 [0] NCCL INFO NCCL_ALGO set by environment to Ring",
        log_line("AllReduce", 60, "RING", "LL", 0, 0),
        log_line("SendRecv", 60, "RING", "LL", 0, 0),
        log_line("Broadcast", 90, "RING", "SIMPLE", 1, 2),
    )
    choices = list(nccl.read_choices("\n".join(lines)))
    assert [(choice.op, choice.count_bytes) for choice in choices] == [("all_reduce", 60), ("broadcast", 90)]
    for choice in choices:
        assert links_of(choice.op, choice.count_bytes, [0, 1], choice.algorithm, choice.protocol)
