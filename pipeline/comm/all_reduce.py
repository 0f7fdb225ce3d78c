"""One all-reduce on a cluster: what it asks of cards, of the links inside a server and of the switches, and how long.

Bytes come from wire/gloo.py (ring) and wire/algorithms.py (the others); frame headers are added to what crosses a card.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from pipeline.comm.wire import algorithms, gloo
from pipeline.comm.wire.gloo import Links, NotDerivable

FRAME_HEADER_BYTES = 66  # Ethernet 14, IPv4 20, TCP with timestamps 32
SEGMENT_BYTES = 1448  # data in a frame of 1,500 bytes
HEADER_SHARE = FRAME_HEADER_BYTES / SEGMENT_BYTES
ALGORITHMS = algorithms.PLANS
ROUND_SECONDS = 1e-4
"""Of one round of a small gloo all-reduce between hosts that do nothing else (python -m benchmarks.forecast)."""


@dataclass(frozen=True, slots=True)
class Network:
    """Every server's link to a switch, what joins the ranks inside a server, and what joins the switches."""

    bandwidth_bits_per_second: float | None
    """In each direction; None: never the limit."""
    latency_seconds: float = 0.0
    """One way, on top of what the measured run had."""
    local_bits_per_second: float | None = None
    """Of a rank's link to the others of its server, in each direction; None: never the limit."""
    servers_per_rack: int | None = None
    """Servers, by consecutive numbers, that share a switch; None: all do."""
    oversubscription: float = 1.0
    """What the links of a rack's servers carry together over what its switch's link to the others carries."""

    def seconds(self, num_bytes: float) -> float:
        """Return the seconds that `num_bytes` handed to TCP take through one card in one direction, frames included."""
        if self.bandwidth_bits_per_second is None:
            return 0.0
        return 8 * num_bytes * (1 + HEADER_SHARE) / self.bandwidth_bits_per_second

    def local_seconds(self, num_bytes: float) -> float:
        """Return the seconds of `num_bytes` between ranks of one server, in one direction; there are no frames."""
        return 0.0 if self.local_bits_per_second is None else 8 * num_bytes / self.local_bits_per_second

    def uplink_seconds(self, num_bytes: float) -> float:
        """Return the seconds of `num_bytes` through the link of one rack's switch, in one direction."""
        if self.servers_per_rack is None:
            return 0.0
        return self.seconds(num_bytes) * self.oversubscription / self.servers_per_rack


@dataclass(frozen=True, slots=True)
class Host:
    """What an all-reduce costs beyond its bytes on the link."""

    seconds_per_byte: float = 0.0
    """Seconds per byte that the busiest rank hands on while it also computes."""
    seconds_per_round: float = 0.0
    """Seconds of a message so small that only its way through two hosts counts."""


@dataclass(frozen=True, slots=True)
class AllReduce:
    """What one all-reduce, or another collective, asks of cards and hosts."""

    card_bytes: int
    """Bytes through the busiest card in one direction, one phase after the other."""
    egress_bytes: int
    """Bytes out of the busiest server."""
    uplink_bytes: int
    """Bytes through the busiest rack's link to the others in one direction, one phase after the other."""
    local_bytes: int
    """Bytes through the busiest rank's link to others of its server in one direction, one phase after the other."""
    is_pipelined: bool
    """Whether bytes travel inside servers while others travel between them: round a ring, not stage by stage."""
    payload_bytes: int
    num_rounds: int
    """Number of rounds between servers that follow one another."""
    num_messages: int
    """Number of rounds, those inside servers included."""
    num_ranks: int

    @property
    def host_bytes(self) -> float:
        """Bytes that the busiest rank hands on: those across its card, no less than a ring's share of the payload."""
        return max(self.card_bytes, 2 * (self.num_ranks - 1) / self.num_ranks * self.payload_bytes)

    def seconds(self, network: Network, host: Host) -> float:
        """Return the seconds from the first byte to the last, on hosts that do nothing else."""
        between = max(network.seconds(self.card_bytes), network.uplink_seconds(self.uplink_bytes))
        inside = network.local_seconds(self.local_bytes)
        return (
            (max(between, inside) if self.is_pipelined else between + inside)
            + self.num_rounds * network.latency_seconds
            + self.num_messages * host.seconds_per_round
        )


@lru_cache(maxsize=4096)
def all_reduce(
    algorithm: str,
    payload_bytes: int,
    itemsize: int,
    server_of_rank: tuple[int, ...],
    servers_per_rack: int | None = None,
) -> AllReduce | NotDerivable:
    """Return what one all-reduce asks of cards and hosts, or why it cannot be done that way.

    Args:
        algorithm: One of ALGORITHMS.
        payload_bytes: Bytes of one rank's input.
        itemsize: Bytes per element.
        server_of_rank: Index of each rank's server, from 0.
        servers_per_rack: Servers that share a switch; None: all do.
    """
    num_ranks = len(server_of_rank)
    num_servers = len(set(server_of_rank))
    if num_ranks == 1:
        return AllReduce(0, 0, 0, 0, True, payload_bytes, 0, 0, 1)
    if algorithm == "ring":
        found: Links | NotDerivable = gloo.gloo_ring_all_reduce(payload_bytes, itemsize, num_ranks)
    else:
        found = algorithms.links(algorithm, payload_bytes, itemsize, server_of_rank)
    if isinstance(found, NotDerivable):
        return found
    placed = algorithms.placed(algorithm, server_of_rank)
    egress = max(gloo.egress_bytes_per_server(found, placed))
    match algorithm:
        case "ring":
            card = egress
            rounds = messages = 2 * (num_ranks - 1)
        case "hierarchical":
            card, rounds = egress, 2 * (num_servers - 1)
            messages = rounds + 2 * (num_ranks // num_servers - 1)
        case "halving_doubling":
            card, rounds, messages = egress, 2 * depth(num_servers), 2 * depth(num_ranks)
        case "tree":
            levels = tree_levels(server_of_rank)
            card, rounds, messages = 2 * payload_bytes * sum(levels), 2 * len(levels), 2 * depth(num_ranks)
        case _:  # a parameter server: all in, then all out
            card = 2 * egress
            rounds = messages = 2
    racks = [server // (servers_per_rack or len(placed)) for server in placed]
    local = _local_bytes(found, placed)
    if algorithm == "tree":  # a level when the one below is done, inside servers as between them
        local = 2 * payload_bytes * sum(tree_levels(server_of_rank, are_inside=True))
    # The tree and a parameter server go up, then down: what leaves a rack in one phase enters it in the other.
    uplink = max(gloo.egress_bytes_per_server(found, racks)) * (2 if algorithm in ("tree", "parameter_server") else 1)
    return AllReduce(
        card_bytes=card,
        egress_bytes=egress,
        uplink_bytes=uplink,
        local_bytes=local,
        is_pipelined=algorithm == "ring",
        payload_bytes=payload_bytes,
        num_rounds=rounds if num_servers > 1 else 0,
        num_messages=messages,
        num_ranks=num_ranks,
    )


def exchange(
    op: str, payload_bytes: int, itemsize: int, server_of_rank: Sequence[int], servers_per_rack: int | None = None
) -> AllReduce | NotDerivable:
    """Return what another collective of gloo's asks of cards and hosts, or why it is not known.

    Args:
        op: `all_to_all`, whose messages do not wait for one another, or `all_gather`, round a ring.
        payload_bytes: Bytes of one rank's input.
        itemsize: Bytes per element.
        server_of_rank: Index of each rank's server, from 0.
        servers_per_rack: Servers that share a switch; None: all do.
    """
    num_ranks = len(server_of_rank)
    racks = [server // (servers_per_rack or num_ranks) for server in server_of_rank]
    if op == "all_to_all":
        # All pairs are alike, and of a thousand ranks there are a million.
        pair = gloo.links(op, payload_bytes // num_ranks * 2, itemsize, -1, 2, "gloo")
        assert not isinstance(pair, NotDerivable)
        crossing = gloo.egress_bytes_per_server(pair, (0, 1))[0]
        egress, uplink = (
            crossing * max(n * (num_ranks - n) for n in Counter(of).values()) for of in (server_of_rank, racks)
        )
        local = pair[0, 1].data_bytes * (max(Counter(server_of_rank).values()) - 1)
    else:
        found = gloo.links(op, payload_bytes, itemsize, -1, num_ranks, "gloo")
        if isinstance(found, NotDerivable):
            return found
        egress, uplink = (max(gloo.egress_bytes_per_server(found, of)) for of in (server_of_rank, racks))
        local = _local_bytes(found, server_of_rank)
    num_rounds = 1 if op == "all_to_all" else num_ranks - 1
    return AllReduce(
        card_bytes=egress,
        egress_bytes=egress,
        uplink_bytes=uplink,
        local_bytes=local,
        is_pipelined=True,
        payload_bytes=payload_bytes,
        num_rounds=num_rounds if len(set(server_of_rank)) > 1 else 0,
        num_messages=num_rounds,
        num_ranks=num_ranks,
    )


def through_workers(found: AllReduce, server_of_rank: Sequence[int]) -> AllReduce:
    """Return what a parameter server's all-reduce asks of the card of the server with most workers.

    Each pushes the payload and pulls it. Messages to several parameter servers do not wait for one another: no rounds.
    """
    num_workers = max(Counter(server_of_rank).values())
    size = num_workers * found.payload_bytes
    return replace(found, card_bytes=2 * size, egress_bytes=size, uplink_bytes=0, num_rounds=0, num_messages=0)


def _local_bytes(links: Links, server_of_rank: Sequence[int]) -> int:
    """Return what the busiest rank sends to others of its server."""
    sent = [0] * len(server_of_rank)
    for (source, destination), link in links.items():
        if server_of_rank[source] == server_of_rank[destination]:
            sent[source] += link.data_bytes
    return max(sent)


def tree_levels(server_of_rank: Sequence[int], *, are_inside: bool = False) -> list[int]:
    """Count the payloads through the busiest link at each level of the tree that has any, from the leaves up.

    Rank r's parent is (r - 1) // 2; level k holds ranks 2^k - 1 to 2^(k+1) - 2.

    Args:
        server_of_rank: Index of each rank's server, from 0.
        are_inside: Count those between ranks of one server, through each rank's link to the others there; else those
            between servers, through their cards.
    """
    levels: list[int] = []
    num_ranks, first = len(server_of_rank), 1
    while first < num_ranks:
        received, sent = Counter[int](), Counter[int]()
        for rank in range(first, min(2 * first + 1, num_ranks)):
            parent = (rank - 1) // 2
            here, there = server_of_rank[rank], server_of_rank[parent]
            if (here == there) is are_inside:
                sent[rank if are_inside else here] += 1
                received[parent if are_inside else there] += 1
        levels.append(max([*sent.values(), *received.values()], default=0))
        first = 2 * first + 1
    return [level for level in reversed(levels) if level]


def depth(num_ranks: int) -> int:
    """Return the depth of a binary tree over so many ranks: ceil(log2(num_ranks))."""
    return (num_ranks - 1).bit_length()
