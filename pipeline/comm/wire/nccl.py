"""What NCCL's ring and tree collectives put on the wire, as links: pure functions, for a pinned algorithm and protocol.

NCCL picks algorithm, protocol and channels at run time, per collective and size. Pinned (`environment`), or read from
its log (nccl_log.py), its bytes can be computed, to the byte, for its socket transport: data, the flags of the protocol
within it, and the header of every send (nccl_sends.py). Other transports have no such headers. The formulas follow the
source of NCCL 2.28.9 and 2.30.7, whose files are named below; benchmarks/nccl_probe.py compares them with the kernel's
counts where there is a GPU.

Where ranks sit hardly matters, unlike with gloo: NCCL finds the ranks of each server and joins them first, so that one
edge of a ring leaves each server whatever their numbers (graph/connect.cc, `ncclTopoPreset` and `connectRings`). Trees
are chains inside servers and a double binary tree over servers (`connectTrees`, graph/trees.cc): the first tree on
channels 0, 2, ..., the second on channels 1, 3, ... where a server has one card, as `ncclTopoPostset` doubles them.

Exact, given the `Condition`, for one rank per server. Idealised:
- the order of ranks inside a server, which follows the topology of the machine: here ascending. It decides which rank
  of a server sends out, not how much leaves the server. For trees the first rank of each server talks to the others;
  on some machines NCCL gives children to the second (connect.cc, NCCL_TOPO_PATTERN_BALANCED_TREE).
- ranks of one server, which have sockets between them only where P2P and shared memory are switched off.
- every collective is taken as issued alone: in a group NCCL deals out channels for all of it.
- defaults of NCCL_BUFFSIZE and its LL kin; no tuner plugin, no registered user buffers, no SHARP, NVLS or PAT.
"""

import itertools
from collections.abc import Iterator, Sequence

from pipeline.comm.wire.gloo import Links, NotDerivable, data_links, ranks_by_server
from pipeline.comm.wire.nccl_sends import (
    FIRST_VERSION,
    LAST_VERSION,
    PROTOCOLS,
    Condition,
    Protocol,
    Sends,
    channel_parts,
    ring_all_reduce_sends,
    ring_pass_sends,
    step_sends,
    tree_chunk_bytes,
)

BARRIER_BYTES = 4  # torch's barrier on NCCL all-reduces one float (ProcessGroupNCCL.cpp, `barrier`)
ALGORITHMS = ("ring", "tree")
ONE_CHANNEL = Condition()
"""What `environment` pins unless told otherwise."""


def links(
    op: str,
    payload_bytes: int,
    itemsize: int,
    root: int,
    server_of_rank: Sequence[int],
    algorithm: str,
    protocol: str,
    condition: Condition = ONE_CHANNEL,
) -> Links | NotDerivable:
    """Return the links of one collective in bytes handed to TCP, headers included, or why they cannot be told.

    Only an all-reduce has a tree; under `tree` other operations use the ring, as `environment` pins them.

    Args:
        op: Operation, as the meter names it.
        payload_bytes: Bytes of one rank's input.
        itemsize: Bytes per element; it changes nothing, as NCCL's types divide its alignment.
        root: Root rank; -1 where the operation has none.
        server_of_rank: Index of each rank's server, from 0.
        algorithm: `ring` or `tree`, in any case.
        protocol: `LL`, `LL128` or `Simple`, in any case.
        condition: Channels and NCCL's version.
    """
    del itemsize
    num_ranks = len(server_of_rank)
    if algorithm.lower() not in ALGORITHMS:
        return NotDerivable(f"The bytes of NCCL's algorithm {algorithm} are not known here; ring and tree are.")
    if protocol.lower() not in PROTOCOLS:
        return NotDerivable(f"NCCL has no protocol {protocol}; its protocols are LL, LL128 and Simple.")
    if not FIRST_VERSION <= condition.version <= LAST_VERSION:
        named, first, last = (
            ".".join(map(str, version)) for version in (condition.version, FIRST_VERSION, LAST_VERSION)
        )
        return NotDerivable(f"The bytes of NCCL {named} are not known here; those of {first} to {last} are.")
    if op not in _OPERATIONS:
        return NotDerivable(
            f"torch makes {op} of NCCL's sends and receives, for which no algorithm or protocol can be pinned."
        )
    if op == "barrier":
        op, payload_bytes = "all_reduce", BARRIER_BYTES
    if num_ranks == 1 or payload_bytes == 0:
        return data_links({})
    algorithm = algorithm.lower() if op == "all_reduce" else "ring"
    wire_protocol = PROTOCOLS[protocol.lower()]
    share_bytes = payload_bytes // num_ranks if op == "reduce_scatter" else payload_bytes
    sent: dict[tuple[int, int], int] = {}
    for channel, part_bytes in channel_parts(op, share_bytes, num_ranks, algorithm, wire_protocol, condition):
        if algorithm == "tree":
            on_channel = _tree(part_bytes, channel, server_of_rank, wire_protocol)
        else:
            on_channel = _ring(op, part_bytes, root, server_of_rank, wire_protocol)
        for pair, sends in on_channel:
            sent[pair] = sent.get(pair, 0) + sends.tcp_bytes
    return data_links(sent)


_OPERATIONS = ("all_reduce", "broadcast", "reduce", "all_gather", "reduce_scatter", "barrier")


def _ring(
    op: str, part_bytes: int, root: int, server_of_rank: Sequence[int], protocol: Protocol
) -> Iterator[tuple[tuple[int, int], Sends]]:
    """Yield what each link of the ring carries; of a chain, from or to the root, all links but one."""
    ring = [rank for ranks in ranks_by_server(server_of_rank) for rank in ranks]
    num_ranks = len(ring)
    for position, rank in enumerate(ring):
        after = ring[(position + 1) % num_ranks]
        match op:
            case "all_reduce":
                yield (rank, after), ring_all_reduce_sends(part_bytes, num_ranks, position, protocol)
            case "broadcast" if after != root:
                yield (rank, after), step_sends(part_bytes, protocol)
            case "reduce" if rank != root:
                yield (rank, after), step_sends(part_bytes, protocol)
            case "all_gather" | "reduce_scatter":
                yield (rank, after), ring_pass_sends(part_bytes, num_ranks, protocol)
            case _:
                pass


# --- trees -------------------------------------------------------------------------------------------------------


def _tree(
    part_bytes: int, channel: int, server_of_rank: Sequence[int], protocol: Protocol
) -> Iterator[tuple[tuple[int, int], Sends]]:
    """Everything goes up to the channel's root and down again (device/all_reduce.h, `runTreeSplit`)."""
    servers = ranks_by_server(server_of_rank)
    chunk_bytes = tree_chunk_bytes(part_bytes, len(server_of_rank), len(servers), protocol)
    sends = step_sends(part_bytes, protocol, chunk_bytes)
    for child, parent in double_tree(servers)[channel % 2].items():
        yield (child, parent), sends
        yield (parent, child), sends


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


# --- pinning -----------------------------------------------------------------------------------------------------


def environment(algorithm: str, protocol: str, num_channels: int = 1) -> dict[str, str]:
    """Return the variables that hold NCCL to one way, for the environment of every rank.

    Only an all-reduce has a tree, so other operations stay with the ring (graph/tuning.cc, `parseList`). NCCL itself
    takes LL128 only where the hardware supports it; pinned, it is taken anywhere, and NVIDIA's manual warns that
    data may then be corrupted.

    Args:
        algorithm: `ring` or `tree`, in any case.
        protocol: `LL`, `LL128` or `Simple`, in any case.
        num_channels: Channels of every communicator; a short payload still uses fewer.
    """
    assert algorithm.lower() in ALGORITHMS, algorithm
    nccl_algorithms = {"ring": "Ring", "tree": "Ring;AllReduce:Tree"}
    return {
        "NCCL_ALGO": nccl_algorithms[algorithm.lower()],
        "NCCL_PROTO": PROTOCOLS[protocol.lower()].nccl_name,
        "NCCL_MIN_CTAS": str(num_channels),
        "NCCL_MAX_CTAS": str(num_channels),
    }
