"""What a collective puts on the wire: pure functions from (operation, bytes, ranks) to bytes sent.

Every operation is first written down as *links*: how many messages, with how many data bytes, go from which rank to
which. Bytes per rank and bytes leaving each server are sums over the same links, so they cannot disagree.

Gloo over TCP. A message of D bytes from rank a to rank b costs

    a -> b   96 + D   NOTIFY_SEND_READY (48) and SEND (48), then the data
    b -> a   48       NOTIFY_RECV_READY

because each carries a preamble of six 8-byte words (gloo/transport/tcp/pair.h, `struct Op`; pair.cc, `sendNotify*` and
`sendUnboundBuffer`). These are the bytes handed to TCP: headers of TCP, IP and Ethernet and retransmissions are not in
them. Sources named below are files of gloo at commit 70dc360; that the gloo inside torch 2.14 behaves so is measured by
tests/distributed/test_meter_transport.py against the kernel's own counters.

torch's object collectives (`all_gather_object`, `broadcast_object_list`, ...) are short sequences of these operations,
sizes first, and need no formula of their own. NCCL is in nccl.py and its neighbours, other ways to reduce are in
algorithms.py. The modules of this folder import the standard library and one another, nothing else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

PREAMBLE_BYTES = 48
SEND_OVERHEAD_BYTES = 2 * PREAMBLE_BYTES
RECEIVE_OVERHEAD_BYTES = PREAMBLE_BYTES
MAX_SEGMENT_BYTES = 1024 * 1024  # gloo/allreduce.h, kMaxSegmentSize


@dataclass(frozen=True, slots=True)
class Link:
    """What one rank sends to another in one direction, without gloo's preambles."""

    num_messages: int
    """Messages that carry gloo's preambles; 0 in links of anything else."""
    data_bytes: int


Links = Mapping[tuple[int, int], Link]
"""(source rank, destination rank) -> Link."""


@dataclass(frozen=True, slots=True)
class NotDerivable:
    """The bytes of this operation cannot be computed; `reason` says why, as a sentence."""

    reason: str


def links(op: str, payload_bytes: int, itemsize: int, root: int, num_ranks: int, backend: str) -> Links | NotDerivable:
    """Return the links of one collective, or why they cannot be told.

    Args:
        op: Operation, as the meter names it.
        payload_bytes: Bytes of one rank's input, of the root's whole list for scatter.
        itemsize: Bytes per element, of which a complex number is two.
        root: Root rank; -1 where the operation has none.
        num_ranks: Number of ranks.
        backend: Backend of the process group.
    """
    if num_ranks == 1:
        return _NO_LINKS
    if backend != "gloo":
        return NotDerivable(
            f"The bytes a {backend} collective sends depend on the algorithm and protocol it picks at run time."
        )
    match op:
        case "all_reduce":
            return gloo_ring_all_reduce(payload_bytes, itemsize, num_ranks)
        case "broadcast":
            return gloo_broadcast(payload_bytes, num_ranks, root)
        case "all_gather":
            return gloo_ring_all_gather(payload_bytes, num_ranks)
        case "reduce":
            return gloo_ring_reduce(payload_bytes, itemsize, num_ranks, root)
        case "gather":
            return gloo_gather(payload_bytes, num_ranks, root)
        case "barrier":
            return gloo_barrier(num_ranks)
        case "reduce_scatter":
            return gloo_reduce_scatter(payload_bytes, itemsize, num_ranks)
        case "scatter":
            return gloo_scatter(payload_bytes, num_ranks, root)
        case "all_to_all":
            return gloo_all_to_all(((payload_bytes // num_ranks,) * num_ranks,) * num_ranks)
        case _:
            return NotDerivable(_GLOO_REASONS.get(op, f"No exact formula is known here for gloo's {op}."))


_GLOO_REASONS = {
    "send": "A gloo send concerns two ranks, so that one rank's record does not tell what the others sent.",
    "recv": "A gloo recv concerns two ranks, so that one rank's record does not tell what the others sent.",
    "all_to_all_single": "torch's hook does not tell how gloo's all_to_all_single splits its tensor.",
    "monitored_barrier": "torch's hook is not told of a monitored_barrier, nor of what it sends.",
    "sparse_all_reduce": "A sparse all-reduce of gloo sends every rank's non-zero values, and their numbers differ.",
}


def sent_bytes_per_rank(links: Links, num_ranks: int) -> list[int]:
    """Add up the bytes each rank hands to TCP, preambles included: data outward, readiness notices backward."""
    sent = [0] * num_ranks
    for (source, destination), link in links.items():
        sent[source] += link.data_bytes + SEND_OVERHEAD_BYTES * link.num_messages
        sent[destination] += RECEIVE_OVERHEAD_BYTES * link.num_messages
    return sent


def egress_bytes_per_server(links: Links, server_of_rank: Sequence[int]) -> list[int]:
    """Add up the bytes that leave each server for another one, preambles included.

    `server_of_rank` holds the index of each rank's server, from 0. Traffic inside a server is not in the result.
    """
    egress = [0] * (max(server_of_rank) + 1)
    for (source, destination), link in links.items():
        here, there = server_of_rank[source], server_of_rank[destination]
        if here != there:
            egress[here] += link.data_bytes + SEND_OVERHEAD_BYTES * link.num_messages
            egress[there] += RECEIVE_OVERHEAD_BYTES * link.num_messages
    return egress


# --- gloo's algorithms -------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def gloo_ring_all_reduce(payload_bytes: int, itemsize: int, num_ranks: int) -> Links:
    """Chunked ring: reduce-scatter, then all-gather; data travels from rank r to r - 1 (gloo/allreduce.cc, `ring`).

    PyTorch leaves the algorithm unspecified and gloo then takes the ring. The vector is cut into at least two segments
    per rank, each at most 1 MiB; the last ones may be short or empty, and empty ones are not sent, which is why ranks
    may differ by a few bytes. When none is empty, each rank sends 2(n-1)/n of the payload up to the uneven tail.
    """
    if num_ranks == 1:
        return _NO_LINKS
    num_segments, segment_bytes = _all_reduce_segments(payload_bytes, itemsize, num_ranks)
    per_rank = num_segments // num_ranks
    return _frozen(
        {
            (rank, (rank - 1) % num_ranks): _ring_walk(
                payload_bytes,
                segment_bytes,
                num_segments,
                firsts=((rank + 1) * per_rank, rank * per_rank),  # reduce-scatter, all-gather
                num_steps=num_segments - per_rank,
            )
            for rank in range(num_ranks)
        }
    )


@lru_cache(maxsize=1024)
def gloo_broadcast(payload_bytes: int, num_ranks: int, root: int) -> Links:
    """Binomial tree from the root (gloo/broadcast.cc): in round i the 2^i holders each send one whole copy."""
    messages: dict[tuple[int, int], Link] = {}
    distance = 1
    while distance < num_ranks:
        for holder in range(min(distance, num_ranks - distance)):
            source, destination = (holder + root) % num_ranks, (holder + distance + root) % num_ranks
            messages[source, destination] = Link(1, payload_bytes)
        distance *= 2
    return _frozen(messages)


@lru_cache(maxsize=1024)
def gloo_ring_all_gather(payload_bytes: int, num_ranks: int) -> Links:
    """Ring from rank r to r + 1 (gloo/allgather.cc): every contribution in two halves, n - 1 hops, even when empty."""
    if num_ranks == 1 or payload_bytes == 0:
        return _NO_LINKS
    link = Link(num_messages=2 * (num_ranks - 1), data_bytes=payload_bytes * (num_ranks - 1))
    return _frozen({(rank, (rank + 1) % num_ranks): link for rank in range(num_ranks)})


@lru_cache(maxsize=1024)
def gloo_ring_reduce(payload_bytes: int, itemsize: int, num_ranks: int, root: int) -> Links:
    """Ring reduce-scatter as in all-reduce, then every rank sends its chunk to the root (gloo/reduce.cc).

    The ring stops two segments before all were sent, not one rank's share before: beyond 2 MiB a rank, where a share is
    more than two segments, gloo sends more than the sum needs, and a reduce more than an all-reduce.
    """
    if num_ranks == 1 or payload_bytes == 0:
        return _NO_LINKS
    max_segment_bytes = itemsize * (MAX_SEGMENT_BYTES // itemsize)
    segment_bytes = round_up(min(ceil_div(payload_bytes, 2 * num_ranks), max_segment_bytes), itemsize)
    num_segments = round_up(max(ceil_div(payload_bytes, segment_bytes), 2 * num_ranks), num_ranks)
    per_rank = num_segments // num_ranks
    messages: dict[tuple[int, int], Link] = {}
    for rank in range(num_ranks):
        walk = _ring_walk(payload_bytes, segment_bytes, num_segments, ((rank + 1) * per_rank,), num_segments - 2)
        messages[rank, (rank - 1) % num_ranks] = walk
    for rank in range(num_ranks):
        chunk_bytes = min(per_rank * segment_bytes, payload_bytes - rank * per_rank * segment_bytes)
        if rank != root and chunk_bytes > 0:
            before = messages.get((rank, root), Link(0, 0))
            messages[rank, root] = Link(before.num_messages + 1, before.data_bytes + chunk_bytes)
    return _frozen(messages)


@lru_cache(maxsize=1024)
def gloo_gather(payload_bytes: int, num_ranks: int, root: int) -> Links:
    """Every rank sends its whole input straight to the root (gloo/gather.cc)."""
    return _frozen({(rank, root): Link(1, payload_bytes) for rank in range(num_ranks) if rank != root})


@lru_cache(maxsize=64)
def gloo_barrier(num_ranks: int) -> Links:
    """Dissemination barrier (gloo/barrier.cc): an empty message to rank r + 2^i for every 2^i below n."""
    messages: dict[tuple[int, int], Link] = {}
    distance = 1
    while distance < num_ranks:
        for rank in range(num_ranks):
            messages[rank, (rank + distance) % num_ranks] = Link(1, 0)
        distance *= 2
    return _frozen(messages)


@lru_cache(maxsize=1024)
def gloo_reduce_scatter(payload_bytes: int, itemsize: int, num_ranks: int) -> Links:
    """A whole all-reduce, of which each rank keeps its part: twice what a reduce-scatter needs.

    ProcessGroupGloo.cpp, `reduce_scatter_single_coalesced`. Its list form all-reduces every tensor of the list on its
    own; the meter records each as one operation.
    """
    return gloo_ring_all_reduce(payload_bytes, itemsize, num_ranks)


@lru_cache(maxsize=1024)
def gloo_scatter(payload_bytes: int, num_ranks: int, root: int) -> Links:
    """The root sends each other rank its n-th part of the list (gloo/scatter.cc)."""
    return _frozen({(root, rank): Link(1, payload_bytes // num_ranks) for rank in range(num_ranks) if rank != root})


@lru_cache(maxsize=1024)
def gloo_all_to_all(split_bytes: tuple[tuple[int, ...], ...]) -> Links:
    """Each rank sends each other one a message, also an empty one (gloo/alltoall.cc, alltoallv.cc).

    `split_bytes[r][d]` is the number of bytes from rank r to rank d; what a rank keeps for itself is not sent. gloo's
    list form takes even parts only.
    """
    num_ranks = len(split_bytes)
    return _frozen(
        {
            (source, destination): Link(1, split_bytes[source][destination])
            for source in range(num_ranks)
            for destination in range(num_ranks)
            if source != destination
        }
    )


# --- arithmetic --------------------------------------------------------------------------------------------------


def _all_reduce_segments(payload_bytes: int, itemsize: int, num_ranks: int) -> tuple[int, int]:
    """Return (number of segments, bytes of a full segment) of gloo's ring all-reduce."""
    max_segment_bytes = itemsize * max(1, MAX_SEGMENT_BYTES // itemsize)
    num_segments = round_up(max(ceil_div(payload_bytes, max_segment_bytes), 2 * num_ranks), num_ranks)
    return num_segments, round_up(ceil_div(payload_bytes, num_segments), itemsize)


def _ring_walk(
    payload_bytes: int, segment_bytes: int, num_segments: int, firsts: Sequence[int], num_steps: int
) -> Link:
    """Return the link of a rank that sends `num_steps` consecutive segments (modulo all) from each of `firsts` on.

    Empty segments are no messages.
    """
    num_filled = ceil_div(payload_bytes, segment_bytes) if payload_bytes else 0
    num_messages = data_bytes = 0
    for first in firsts:
        # A walk that passes the last segment goes on at the first one: at most two stretches.
        start, end = first % num_segments, first % num_segments + num_steps
        for low, high in ((start, min(end, num_segments)), (0, end - num_segments)):
            if high > low:
                num_messages += min(high, num_filled) - min(low, num_filled)
                data_bytes += min(high * segment_bytes, payload_bytes) - min(low * segment_bytes, payload_bytes)
    return Link(num_messages, data_bytes)


def _frozen(messages: dict[tuple[int, int], Link]) -> Links:
    """Make links read-only, for results live in a cache; pairs that exchange nothing are left out."""
    return MappingProxyType({pair: link for pair, link in messages.items() if link.num_messages})


def data_links(data_bytes: Mapping[tuple[int, int], int]) -> Links:
    """Make links without preambles from the bytes between each pair; pairs that exchange nothing are left out."""
    return MappingProxyType({pair: Link(0, size) for pair, size in data_bytes.items() if size})


def ranks_by_server(server_of_rank: Sequence[int]) -> list[list[int]]:
    """Return the ranks of each server, ascending; servers in order of their first rank."""
    ranks: dict[int, list[int]] = {}
    for rank, server in enumerate(server_of_rank):
        ranks.setdefault(server, []).append(rank)
    return list(ranks.values())


def ceil_div(numerator: int, denominator: int) -> int:
    """Divide and round up."""
    return -(-numerator // denominator)


def round_up(value: int, multiple: int) -> int:
    """Return the next multiple, or the value itself where it is one."""
    return ceil_div(value, multiple) * multiple


_NO_LINKS: Links = MappingProxyType({})
