"""The ways to all-reduce compared: textbook volumes, who pays where, and sums that always hold."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comm.wire import algorithms, gloo

plans = st.sampled_from(algorithms.PLANS)
element_counts = st.one_of(st.integers(0, 300), st.integers(300, 10**8))
servers_and_ranks = st.tuples(st.integers(1, 5), st.integers(1, 5))


def contiguous(num_servers: int, ranks_per_server: int) -> list[int]:
    return [server for server in range(num_servers) for _ in range(ranks_per_server)]


def links_of(plan: str, payload_bytes: int, server_of_rank: list[int]) -> gloo.Links:
    found = algorithms.links(plan, payload_bytes, 4, server_of_rank)
    assert not isinstance(found, gloo.NotDerivable), found
    return found


def egress(plan: str, payload_bytes: int, server_of_rank: list[int]) -> list[int]:
    found = algorithms.egress_bytes_per_server(plan, payload_bytes, 4, server_of_rank)
    assert not isinstance(found, gloo.NotDerivable), found
    return found


def total(links: gloo.Links) -> int:
    return sum(link.data_bytes for link in links.values())


# --- volumes ---


@given(st.sampled_from(["ring", "tree", "hierarchical", "halving_doubling"]), element_counts, st.integers(0, 4))
def test_every_element_crosses_2n_minus_2_links(plan: str, elements: int, log2_ranks: int) -> None:
    """No way without extra servers moves more or less, over all ranks; they differ in who sends."""
    num_ranks = 2**log2_ranks
    links = links_of(plan, 4 * elements, contiguous(2 if num_ranks > 1 else 1, max(1, num_ranks // 2)))
    assert total(links) == 2 * (num_ranks - 1) * 4 * elements


@given(st.integers(0, 300), st.integers(2, 9))
def test_ring_step_by_step(elements: int, num_ranks: int) -> None:
    """Rank r passes parts r - 1, r - 2, ..., r + 1 towards the sum, then r, r - 1, ..., r + 2 back."""
    parts = algorithms.even_parts(4 * elements, 4, num_ranks)
    sent = gloo.sent_bytes_per_rank(links_of("ring", 4 * elements, [0] * num_ranks), num_ranks)
    for rank in range(num_ranks):
        passed = [rank - 1 - step for step in range(num_ranks - 1)] + [rank - step for step in range(num_ranks - 1)]
        assert sent[rank] == sum(parts[part % num_ranks] for part in passed)


@given(st.integers(0, 300), st.integers(1, 5))
def test_one_server_is_a_hierarchy_of_its_ring(elements: int, ranks_per_server: int) -> None:
    server_of_rank = [0] * ranks_per_server
    assert links_of("hierarchical", 4 * elements, server_of_rank) == links_of("ring", 4 * elements, server_of_rank)


@given(st.integers(0, 300), st.integers(1, 4))
def test_halving_doubling_step_by_step(elements: int, log2_ranks: int) -> None:
    """Partners at distance d hold the same parts and split them; each part ends summed with one rank."""
    num_ranks = 2**log2_ranks
    parts = algorithms.even_parts(4 * elements, 4, num_ranks)
    held = [set(range(num_ranks)) for _ in range(num_ranks)]
    sent = dict.fromkeys([(rank, rank ^ 2**step) for rank in range(num_ranks) for step in range(log2_ranks)], 0)
    history = []
    for step in range(log2_ranks):
        for rank in range(num_ranks):
            partner = rank ^ 2**step
            if rank < partner:
                assert held[rank] == held[partner]
                ordered = sorted(held[rank])
                held[rank], held[partner] = set(ordered[: len(ordered) // 2]), set(ordered[len(ordered) // 2 :])
                history.append((rank, partner, held[rank], held[partner]))
    assert sorted(part for its in held for part in its) == list(range(num_ranks))
    for rank, partner, kept, given_away in history:
        whole = sum(parts[part] for part in kept | given_away)
        sent[rank, partner] = sent[partner, rank] = whole  # one half on the way out, the other on the way back
    found = links_of("halving_doubling", 4 * elements, [0] * num_ranks)
    assert {pair: link.data_bytes for pair, link in found.items()} == {
        pair: size for pair, size in sent.items() if size
    }


@given(element_counts, st.integers(1, 12), st.integers(1, 5))
def test_a_parameter_server_carries_everybody_in_and_out(elements: int, num_ranks: int, num_servers: int) -> None:
    """FireCaffe's argument: n payloads in and n out, over k servers."""
    payload_bytes = 4 * num_servers * elements
    parameter_servers = range(num_ranks, num_ranks + num_servers)
    links = algorithms.parameter_server(payload_bytes, 4, range(num_ranks), parameter_servers)
    for node in range(num_ranks + num_servers):
        sent = sum(link.data_bytes for (source, _), link in links.items() if source == node)
        received = sum(link.data_bytes for (_, destination), link in links.items() if destination == node)
        expected = payload_bytes if node < num_ranks else num_ranks * payload_bytes // num_servers
        assert sent == received == expected


@given(element_counts, st.integers(2, 12))
def test_parameter_servers_on_every_rank_cost_a_ring(elements: int, num_ranks: int) -> None:
    """Sharded over the workers themselves, each rank sends 2(n-1)/n of the payload."""
    payload_bytes = 4 * num_ranks * elements
    links = algorithms.parameter_server(payload_bytes, 4, range(num_ranks), range(num_ranks))
    sent = gloo.sent_bytes_per_rank(links, num_ranks)
    assert sent == [2 * (num_ranks - 1) * payload_bytes // num_ranks] * num_ranks


@given(element_counts, st.integers(1, 4))
def test_ring_and_halving_doubling_are_even(elements: int, log2_ranks: int) -> None:
    num_ranks = 2**log2_ranks
    payload_bytes = 4 * num_ranks * elements
    expected = [2 * (num_ranks - 1) * payload_bytes // num_ranks] * num_ranks
    for plan in ("ring", "halving_doubling"):
        assert gloo.sent_bytes_per_rank(links_of(plan, payload_bytes, [0] * num_ranks), num_ranks) == expected


@given(element_counts, st.integers(2, 20))
def test_in_a_tree_nobody_sends_more_than_three_payloads(elements: int, num_ranks: int) -> None:
    sent = gloo.sent_bytes_per_rank(links_of("tree", 4 * elements, [0] * num_ranks), num_ranks)
    assert max(sent) <= 3 * 4 * elements
    assert sent[-1] == 4 * elements  # a leaf


# --- servers ---


def test_two_servers_of_eight() -> None:
    """What a flat ring wastes between servers: 1.875 payloads against 1."""
    payload_bytes, server_of_rank = 16 * 1_000_000, contiguous(2, 8)
    assert egress("ring", payload_bytes, server_of_rank) == [1.875 * payload_bytes] * 2
    assert egress("hierarchical", payload_bytes, server_of_rank) == [1.0 * payload_bytes] * 2
    assert egress("halving_doubling", payload_bytes, server_of_rank) == [1.0 * payload_bytes] * 2
    assert egress("parameter_server", payload_bytes, server_of_rank) == [8 * payload_bytes] * 2 + [16 * payload_bytes]


@given(element_counts, servers_and_ranks)
def test_egress_by_formula(elements: int, servers_and_ranks: tuple[int, int]) -> None:
    num_servers, ranks_per_server = servers_and_ranks
    num_ranks = num_servers * ranks_per_server
    payload_bytes, server_of_rank = 4 * num_ranks * elements, contiguous(num_servers, ranks_per_server)
    outward = num_servers > 1
    assert (
        egress("ring", payload_bytes, server_of_rank)
        == [outward * 2 * (num_ranks - 1) * payload_bytes // num_ranks] * num_servers
    )
    assert (
        egress("hierarchical", payload_bytes, server_of_rank)
        == [2 * (num_servers - 1) * payload_bytes // num_servers] * num_servers
    )
    assert egress("parameter_server", payload_bytes, server_of_rank) == [
        ranks_per_server * payload_bytes
    ] * num_servers + [num_ranks * payload_bytes]


@given(element_counts, servers_and_ranks, st.data())
def test_consecutive_ranks_are_best_for_a_ring(
    elements: int, servers_and_ranks: tuple[int, int], data: st.DataObject
) -> None:
    best = contiguous(*servers_and_ranks)
    spread = data.draw(st.permutations(best))
    payload_bytes = 4 * len(best) * elements
    for least, found in zip(egress("ring", payload_bytes, best), egress("ring", payload_bytes, spread), strict=True):
        assert least <= found


@given(element_counts, servers_and_ranks, st.data())
def test_a_hierarchy_does_not_care_where_ranks_sit(
    elements: int, servers_and_ranks: tuple[int, int], data: st.DataObject
) -> None:
    best = contiguous(*servers_and_ranks)
    spread = data.draw(st.permutations(best))
    assert egress("hierarchical", 4 * len(best) * elements, best) == egress(
        "hierarchical", 4 * len(best) * elements, spread
    )


@given(plans, element_counts, servers_and_ranks, st.data())
def test_sums(plan: str, elements: int, servers_and_ranks: tuple[int, int], data: st.DataObject) -> None:
    """Egress is part of what is sent; renaming servers renames the result; more payload is never less traffic."""
    num_servers, ranks_per_server = servers_and_ranks
    if plan == "halving_doubling":
        ranks_per_server = 2 ** math.ceil(math.log2(ranks_per_server))
        num_servers = 2 ** math.ceil(math.log2(num_servers))
    server_of_rank = contiguous(num_servers, ranks_per_server)
    found = egress(plan, 4 * elements, server_of_rank)
    links = links_of(plan, 4 * elements, server_of_rank)
    assert sum(found) <= total(links)
    assert total(links) <= total(links_of(plan, 4 * elements + 4, server_of_rank))
    names = data.draw(st.permutations(range(num_servers)))
    renamed = egress(plan, 4 * elements, [names[server] for server in server_of_rank])
    assert sorted(renamed) == sorted(found)
    if num_servers == 1 and plan != "parameter_server":
        assert found == [0]


# --- what cannot be done ---


@pytest.mark.parametrize(
    ("plan", "server_of_rank", "named"),
    [("hierarchical", [0, 0, 1], "each server"), ("halving_doubling", [0] * 6, "power")],
)
def test_what_cannot_be_done_says_why(plan: str, server_of_rank: list[int], named: str) -> None:
    for found in (
        algorithms.links(plan, 400, 4, server_of_rank),
        algorithms.egress_bytes_per_server(plan, 400, 4, server_of_rank),
    ):
        assert isinstance(found, gloo.NotDerivable)
        assert named in found.reason
