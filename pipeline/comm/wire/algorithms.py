"""Ways to all-reduce a payload, compared: what each would make ranks and servers send. For forecasts.

Nothing here describes a library: these are the algorithms of the literature, in payload bytes alone, without preambles,
headers or protocol. A payload is cut into whole elements as evenly as possible, the first parts one element longer.

    ring                 reduce-scatter and all-gather round all ranks, by their numbers: 2(n-1)/n of the payload each.
                         Patarasu and Yuan, "Bandwidth optimal all-reduce algorithms", 2009
    hierarchical         reduce-scatter inside each server, rings between servers over each part, all-gather inside:
                         a server sends 2(m-1)/m of the payload, m servers. Horovod, docs/timeline.rst, names the stages
    tree                 binary tree over ranks, the whole payload up and down: FireCaffe's reduction tree
                         (arXiv 1511.00175)
    halving_doubling     halves exchanged with the neighbour, quarters at distance 2, ..., and back: big parts stay
                         inside a server. gloo, docs/algorithms.md, `allreduce_halving_doubling`; Rabenseifner 2004
    parameter_server     every rank sends its whole payload to k servers, each of a k-th part, and gets it back: a lone
                         server's card carries n payloads in and n out. FireCaffe's comparison; BytePS,
                         docs/rationale.md

n is the number of ranks.
"""

from collections.abc import Sequence
from itertools import accumulate

from pipeline.comm.wire import gloo
from pipeline.comm.wire.gloo import Links, NotDerivable, data_links, ranks_by_server

PLANS = ("ring", "hierarchical", "tree", "halving_doubling", "parameter_server")


def links(plan: str, payload_bytes: int, itemsize: int, server_of_rank: Sequence[int]) -> Links | NotDerivable:
    """Return the links of one all-reduce, or why it cannot be done that way.

    A parameter server is no rank: it is node n, alone on a server of its own (`placed`).

    Args:
        plan: One of PLANS.
        payload_bytes: Bytes of one rank's input.
        itemsize: Bytes per element.
        server_of_rank: Index of each rank's server, from 0.
    """
    num_ranks = len(server_of_rank)
    assert payload_bytes % itemsize == 0, (payload_bytes, itemsize)
    match plan:
        case "ring":
            return ring(payload_bytes, itemsize, range(num_ranks))
        case "hierarchical":
            return hierarchical(payload_bytes, itemsize, server_of_rank)
        case "tree":
            return tree(payload_bytes, num_ranks)
        case "halving_doubling":
            return halving_doubling(payload_bytes, itemsize, num_ranks)
        case "parameter_server":
            return parameter_server(payload_bytes, itemsize, range(num_ranks), [num_ranks])
        case _:
            raise AssertionError(plan)


def placed(plan: str, server_of_rank: Sequence[int]) -> tuple[int, ...]:
    """Return `server_of_rank` with the server of the parameter server, if the plan adds one, at its end."""
    if plan != "parameter_server":
        return tuple(server_of_rank)
    return (*server_of_rank, max(server_of_rank) + 1)


def egress_bytes_per_server(
    plan: str, payload_bytes: int, itemsize: int, server_of_rank: Sequence[int]
) -> list[int] | NotDerivable:
    """Add up the payload bytes that leave each server for another one; the one that the plan adds is the last.

    Args:
        plan: One of PLANS.
        payload_bytes: Bytes of one rank's input.
        itemsize: Bytes per element.
        server_of_rank: Index of each rank's server, from 0.
    """
    found = links(plan, payload_bytes, itemsize, server_of_rank)
    if isinstance(found, NotDerivable):
        return found
    return gloo.egress_bytes_per_server(found, placed(plan, server_of_rank))


# --- the plans ---------------------------------------------------------------------------------------------------


def ring(payload_bytes: int, itemsize: int, members: Sequence[int]) -> Links:
    """Each member passes every part twice but its own and the next one's, which it passes once."""
    parts = even_parts(payload_bytes, itemsize, len(members))
    return data_links(
        {
            pair: 2 * payload_bytes - parts[position] - parts[(position + 1) % len(members)]
            for position, pair in enumerate(_circle(members))
        }
    )


def hierarchical(payload_bytes: int, itemsize: int, server_of_rank: Sequence[int]) -> Links | NotDerivable:
    """Rank i of each server ends the first stage with part i and reduces it with the ranks i of the other servers."""
    servers = ranks_by_server(server_of_rank)
    num_local = len(servers[0])
    if any(len(ranks) != num_local for ranks in servers):
        return NotDerivable("A hierarchical all-reduce needs as many ranks on each server as on the others.")
    parts = even_parts(payload_bytes, itemsize, num_local)
    sent: dict[tuple[int, int], int] = {}
    for ranks in servers:
        # The ring of one server, whose first half leaves part i with rank i and whose second half starts there.
        for local, pair in enumerate(_circle(ranks)):
            sent[pair] = 2 * payload_bytes - parts[local] - parts[(local + 1) % num_local]
    for local, part in enumerate(parts):
        for pair, link in ring(part, itemsize, [ranks[local] for ranks in servers]).items():
            sent[pair] = sent.get(pair, 0) + link.data_bytes
    return data_links(sent)


def tree(payload_bytes: int, num_ranks: int) -> Links:
    """Rank r's parent is (r - 1) // 2; a rank sends to its parent once and to each child once."""
    edges = [(rank, (rank - 1) // 2) for rank in range(1, num_ranks)]
    return data_links({pair: payload_bytes for child, parent in edges for pair in ((child, parent), (parent, child))})


def halving_doubling(payload_bytes: int, itemsize: int, num_ranks: int) -> Links | NotDerivable:
    """At distance 1, 2, 4, ... partners split what they share: each sends the half that the other keeps.

    The way back is the same in reverse order, where each sends the half that it kept.
    """
    if num_ranks & (num_ranks - 1):
        return NotDerivable("Recursive halving and doubling needs a power of two of ranks.")
    ends = [0, *accumulate(even_parts(payload_bytes, itemsize, num_ranks))]
    sent: dict[tuple[int, int], int] = {}
    for rank in range(num_ranks):
        low, high = 0, num_ranks  # the parts this rank still works on
        distance = 1
        while distance < num_ranks:
            # One half on the way out and the other, which it keeps, on the way back: together all it holds.
            sent[rank, rank ^ distance] = ends[high] - ends[low]
            middle = (low + high) // 2
            low, high = (middle, high) if rank & distance else (low, middle)
            distance *= 2
    return data_links(sent)


def parameter_server(payload_bytes: int, itemsize: int, workers: Sequence[int], servers: Sequence[int]) -> Links:
    """Every worker sends each server its part and gets it back. A node may be both; it sends itself nothing."""
    parts = even_parts(payload_bytes, itemsize, len(servers))
    sent: dict[tuple[int, int], int] = {}
    for server, part in zip(servers, parts, strict=True):
        for worker in workers:
            if worker != server:
                for pair in ((worker, server), (server, worker)):
                    sent[pair] = sent.get(pair, 0) + part
    return data_links(sent)


# --- arithmetic --------------------------------------------------------------------------------------------------


def even_parts(payload_bytes: int, itemsize: int, num_parts: int) -> list[int]:
    """Return the bytes of each of `num_parts` parts of whole elements."""
    each, longer = divmod(payload_bytes // itemsize, num_parts)
    return [(each + (part < longer)) * itemsize for part in range(num_parts)]


def _circle(members: Sequence[int]) -> list[tuple[int, int]]:
    """Return (member, the one after it), once around; nothing for a lone member."""
    if len(members) == 1:
        return []
    return [(member, members[(position + 1) % len(members)]) for position, member in enumerate(members)]
