"""What NCCL's ring and tree collectives put on the wire, as links: pure functions, for a pinned algorithm and protocol.

NCCL picks algorithm and protocol at run time, per collective and size. Pinned (`environment`), or read from its log
(`read_choices`), its bytes can be computed. Sources named below are files of NCCL 2.30.7 (commit 5067397). Nothing here
was measured: the formulas follow the source, and need ranks on GPUs to be checked.

Where ranks sit hardly matters, unlike with gloo: NCCL finds the ranks of each server and joins them first, so that one
edge of a ring leaves each server whatever their numbers (graph/connect.cc, `ncclTopoPreset` and `connectRings`). Trees
are chains inside servers and a double binary tree over servers (`connectTrees`, graph/trees.cc).

Bytes are what the network transport is handed: data, and the flags of the protocol within it (transport/net.cc,
`sendProxyProgress`). Headers of the transport below and its control messages are not in them.

    protocol  on the wire                         source
    LL        16 bytes per line of 8              device/prims_ll.h, `LLGenericOp`; include/device.h, `ncclLLFifoLine`
    LL128     2048 bytes per slice of up to 1920  device/prims_ll128.h, `GenericOp`, `DataEltPerSlice`
    Simple    the data                            device/prims_simple.h, `waitPeer`

Exact, given algorithm and protocol: the totals over all ranks for Simple, and which pairs of servers talk for rings.
Idealised:
- channels. Here a ring is one channel and a double tree two, half the data each. NCCL cuts the data over more channels
  in cells of some KiB, and gives a small payload to few of them, down to a single tree (enqueue.cc,
  `scheduleCollTasksToPlan`). Each channel ends with a part-filled chunk of its own: up to n chunks are 16 bytes (LL128:
  one slice) longer, per channel and link.
- the order of ranks inside a server, which follows the topology of the machine: here ascending. It decides which rank
  of a server sends out, not how much leaves the server. For trees the first rank of each server talks to the others;
  on some machines NCCL gives children to the second (connect.cc, NCCL_TOPO_PATTERN_BALANCED_TREE).
- defaults of NCCL_BUFFSIZE and its LL kin; no tuner plugin, no registered user buffers, no SHARP, NVLS or PAT.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.comm.wire.gloo import Links, NotDerivable, ceil_div, data_links, ranks_by_server, round_up

BARRIER_BYTES = 4  # torch's barrier on NCCL all-reduces one float (ProcessGroupNCCL.cpp, `barrier`)
CHUNK_ALIGNMENT_BYTES = 16  # device/all_reduce.h, `runRing`: 16 / sizeof(T) elements


@dataclass(frozen=True, slots=True)
class Protocol:
    """How data becomes bytes on the wire."""

    nccl_name: str
    unit_data_bytes: int
    """Data is sent in whole units, the last one part-filled ..."""
    unit_wire_bytes: int
    """... of so many bytes on the wire."""
    ring_chunk_bytes: int
    """Data of a full chunk of a ring's all-reduce, by the default buffers (init.cc; enqueue.cc, `calcCollChunking`)."""

    def wire_bytes(self, data_bytes: int) -> int:
        """Return the bytes on the wire of one send, or of a pipeline of them, as full chunks are made of full units."""
        return ceil_div(data_bytes, self.unit_data_bytes) * self.unit_wire_bytes


PROTOCOLS = {
    "ll": Protocol("LL", 8, 16, 32 * 1024),
    "ll128": Protocol("LL128", 1920, 2048, 576_000),
    "simple": Protocol("Simple", 1, 1, 2 * 1024 * 1024),
}
ALGORITHMS = ("ring", "tree")


def links(
    op: str,
    payload_bytes: int,
    itemsize: int,
    root: int,
    server_of_rank: Sequence[int],
    algorithm: str,
    protocol: str,
) -> Links | NotDerivable:
    """Return the links of one collective, without preambles, or why they cannot be told.

    Only an all-reduce has a tree; under `tree` other operations use the ring, as `environment` pins them.

    Args:
        op: Operation, as the meter names it.
        payload_bytes: Bytes of one rank's input.
        itemsize: Bytes per element.
        root: Root rank; -1 where the operation has none.
        server_of_rank: Index of each rank's server, from 0.
        algorithm: `ring` or `tree`, in any case.
        protocol: `LL`, `LL128` or `Simple`, in any case.
    """
    num_ranks = len(server_of_rank)
    if algorithm.lower() not in ALGORITHMS:
        return NotDerivable(f"The bytes of NCCL's algorithm {algorithm} are not known here; ring and tree are.")
    if protocol.lower() not in PROTOCOLS:
        return NotDerivable(f"NCCL has no protocol {protocol}; its protocols are LL, LL128 and Simple.")
    if num_ranks == 1:
        return data_links({})
    wire_protocol = PROTOCOLS[protocol.lower()]
    ring = [rank for ranks in ranks_by_server(server_of_rank) for rank in ranks]
    if op == "barrier":
        op, payload_bytes, itemsize = "all_reduce", BARRIER_BYTES, BARRIER_BYTES
    match op:
        case "all_reduce" if algorithm.lower() == "tree":
            return tree_all_reduce(payload_bytes, itemsize, server_of_rank, wire_protocol)
        case "all_reduce":
            return ring_all_reduce(payload_bytes, ring, wire_protocol)
        case "broadcast":
            return _chain(payload_bytes, _rotated(ring, root), wire_protocol)
        case "reduce":
            ends_at_root = _rotated(ring, root)
            return _chain(payload_bytes, [*ends_at_root[1:], root], wire_protocol)
        case "all_gather":
            return _circle(payload_bytes, ring, wire_protocol)
        case "reduce_scatter":
            return _circle(ceil_div(payload_bytes, num_ranks), ring, wire_protocol)
        case _:
            return NotDerivable(
                f"torch makes {op} of NCCL's sends and receives, for which no algorithm or protocol can be pinned."
            )


# --- rings -------------------------------------------------------------------------------------------------------


def ring_all_reduce(payload_bytes: int, ring: Sequence[int], protocol: Protocol) -> Links:
    """Reduce-scatter, then all-gather, round the ring (device/all_reduce.h, `runRing`).

    Each loop moves n chunks; the last loop's are shorter, aligned to 16 bytes, and its last ones may be empty. The rank
    at position p sends every chunk twice but chunk p and chunk p + 1, which it sends once: 2(n-1)/n of the payload.
    """
    num_ranks = len(ring)
    num_loops, rest = divmod(payload_bytes, num_ranks * protocol.ring_chunk_bytes)
    last_chunk = round_up(ceil_div(rest, num_ranks), CHUNK_ALIGNMENT_BYTES)
    chunks = [
        num_loops * protocol.wire_bytes(protocol.ring_chunk_bytes)
        + protocol.wire_bytes(max(0, min(last_chunk, rest - position * last_chunk)))
        for position in range(num_ranks)
    ]
    return data_links(
        {
            (rank, ring[(position + 1) % num_ranks]): 2 * sum(chunks)
            - chunks[position]
            - chunks[(position + 1) % num_ranks]
            for position, rank in enumerate(ring)
        }
    )


def _circle(share_bytes: int, ring: Sequence[int], protocol: Protocol) -> Links:
    """Each rank passes n - 1 shares on (device/all_gather.h and reduce_scatter.h, `runRing`)."""
    passed = (len(ring) - 1) * protocol.wire_bytes(share_bytes)
    return data_links({(rank, ring[(position + 1) % len(ring)]): passed for position, rank in enumerate(ring)})


def _chain(payload_bytes: int, chain: Sequence[int], protocol: Protocol) -> Links:
    """Each rank but the last passes everything on (device/broadcast.h and reduce.h, `runRing`)."""
    return data_links(dict.fromkeys(itertools.pairwise(chain), protocol.wire_bytes(payload_bytes)))


def _rotated(ring: Sequence[int], first: int) -> list[int]:
    start = ring.index(first)
    return [*ring[start:], *ring[:start]]


# --- trees -------------------------------------------------------------------------------------------------------


def tree_all_reduce(payload_bytes: int, itemsize: int, server_of_rank: Sequence[int], protocol: Protocol) -> Links:
    """Two trees, each takes half the payload up to its root and down again (device/all_reduce.h, `runTreeSplit`)."""
    second_bytes = payload_bytes // itemsize // 2 * itemsize
    sent: dict[tuple[int, int], int] = {}
    halves = (payload_bytes - second_bytes, second_bytes)
    for parents, half_bytes in zip(double_tree(ranks_by_server(server_of_rank)), halves, strict=True):
        for child, parent in parents.items():
            for pair in ((child, parent), (parent, child)):
                sent[pair] = sent.get(pair, 0) + protocol.wire_bytes(half_bytes)
    return data_links(sent)


def double_tree(servers: Sequence[Sequence[int]]) -> tuple[dict[int, int], dict[int, int]]:
    """Return the parent of every rank but the root, in both trees. `servers` holds the ranks of each.

    Inside a server the ranks are a chain, each below the one before it. The second tree over servers is the first one
    mirrored if their number is even, and shifted by one if it is odd, so that inner nodes of one are mostly leaves of
    the other (graph/trees.cc, `ncclGetDtree`).
    """
    chains = {below: above for ranks in servers for above, below in itertools.pairwise(ranks)}
    num_servers = len(servers)
    trees = (dict(chains), dict(chains))
    for server in range(1, num_servers):
        parent = _binary_tree_parent(server, num_servers)
        trees[0][servers[server][0]] = servers[parent][0]
        if num_servers % 2 == 0:
            trees[1][servers[num_servers - 1 - server][0]] = servers[num_servers - 1 - parent][0]
        else:
            trees[1][servers[(server + 1) % num_servers][0]] = servers[(parent + 1) % num_servers][0]
    return trees


def _binary_tree_parent(node: int, num_nodes: int) -> int:
    """Return the parent of a node above 0, in a tree with root 0 where odd nodes are leaves.

    Source: graph/trees.cc, `ncclGetBtree`.
    """
    lowest_bit = node & -node
    parent = node ^ lowest_bit | lowest_bit << 1
    return parent if parent < num_nodes else node ^ lowest_bit


# --- pinning and reading NCCL's choice ---------------------------------------------------------------------------


def environment(algorithm: str, protocol: str) -> dict[str, str]:
    """Return the variables that hold NCCL to one algorithm and protocol, for the environment of every rank.

    Only an all-reduce has a tree, so other operations stay with the ring (graph/tuning.cc, `parseList`). NCCL itself
    takes LL128 only where the hardware supports it; pinned, it is taken anywhere, and NVIDIA's manual warns that
    data may then be corrupted.
    """
    assert algorithm.lower() in ALGORITHMS, algorithm
    nccl_algorithms = {"ring": "Ring", "tree": "Ring;AllReduce:Tree"}
    return {"NCCL_ALGO": nccl_algorithms[algorithm.lower()], "NCCL_PROTO": PROTOCOLS[protocol.lower()].nccl_name}


@dataclass(frozen=True, slots=True)
class Choice:
    """What NCCL's log says of one collective."""

    op: str
    """Operation, as the meter names it."""
    count_bytes: int
    """As NCCL counts: one rank's input, for reduce_scatter one rank's output."""
    algorithm: str
    protocol: str
    num_channels: int


_LOG_LINE = re.compile(
    r"NCCL INFO (?P<op>\w+): *(?P<bytes>\d+) Bytes -> Algo (?P<algorithm>\w+) +proto (?P<protocol>\w+) +"
    r"channel\{Lo\.\.Hi\}=\{(?P<low>\d+)\.\.(?P<high>\d+)\}"
)
_LOGGED_OPS = {
    "AllReduce": "all_reduce",
    "Broadcast": "broadcast",
    "AllGather": "all_gather",
    "Reduce": "reduce",
    "ReduceScatter": "reduce_scatter",
}


def read_choices(log: str) -> Iterator[Choice]:
    """Yield every collective in the log of rank 0 under NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=TUNING, in order.

    Other lines are ignored (enqueue.cc, `scheduleCollTasksToPlan`, writes those that are read here).
    """
    for line in log.splitlines():
        found = _LOG_LINE.search(line)
        if found is None or found["op"] not in _LOGGED_OPS:
            continue
        yield Choice(
            _LOGGED_OPS[found["op"]],
            int(found["bytes"]),
            found["algorithm"].lower(),
            found["protocol"].lower(),
            int(found["high"]) - int(found["low"]) + 1,
        )
