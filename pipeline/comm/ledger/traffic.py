"""Calls priced: from what was issued, and where the ranks sit, to bytes sent and bytes that leave each server."""

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import starmap

from pipeline.comm.collectives import Call
from pipeline.comm.wire import gloo, nccl
from pipeline.core.missing import Missing

BYTES_PER_GIGABYTE = 10**9
BYTES_PER_MEGABYTE = 10**6
WARNED_EXCESS = 1.05
"""A placement is warned of when the busiest server sends so many times what it could; less is an uneven tail."""
SHOWN_RANKS = 8


@dataclass(frozen=True, slots=True)
class Placement:
    """Which server each rank sits on."""

    server_of_rank: tuple[int, ...]
    """Index of each rank's server, from 0."""
    measured: bool
    """False: each rank is taken as a server of its own, because the hosts are not known."""

    @classmethod
    def assumed(cls, world_size: int) -> "Placement":
        """Return a placement in which each rank is a server of its own."""
        return cls(tuple(range(world_size)), measured=False)

    @classmethod
    def of_hosts(cls, hosts: Sequence[str]) -> "Placement":
        """Return the placement by the host name of every rank; servers are numbered in order of appearance."""
        numbers: dict[str, int] = {}
        return cls(tuple(numbers.setdefault(host, len(numbers)) for host in hosts), measured=True)

    def contiguous(self) -> "Placement":
        """Return a placement with as many ranks on each server as here, numbered consecutively."""
        return Placement(tuple(sorted(self.server_of_rank)), self.measured)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.server_of_rank)

    @property
    def num_servers(self) -> int:
        """Number of servers."""
        return max(self.server_of_rank) + 1


@dataclass(frozen=True, slots=True)
class Sent:
    """Bytes that the ranks hand to TCP, and what of them leaves each server."""

    bytes_per_rank: tuple[int, ...]
    egress_per_server: tuple[int, ...]
    """Bytes that leave each server for another one."""

    @classmethod
    def nothing(cls, placement: Placement) -> "Sent":
        """Return zero for every rank and server."""
        return cls((0,) * placement.world_size, (0,) * placement.num_servers)

    def __add__(self, other: "Sent") -> "Sent":
        return self._with(other, operator.add)

    def __sub__(self, other: "Sent") -> "Sent":
        return self._with(other, operator.sub)

    def _with(self, other: "Sent", combine: Callable[[int, int], int]) -> "Sent":
        ranks = zip(self.bytes_per_rank, other.bytes_per_rank, strict=True)
        servers = zip(self.egress_per_server, other.egress_per_server, strict=True)
        return Sent(tuple(starmap(combine, ranks)), tuple(starmap(combine, servers)))


@dataclass(frozen=True, slots=True)
class Traffic:
    """Calls of several collectives, priced."""

    payload_bytes: int
    """Rank 0's input to all of them."""
    sent: Sent | Missing
    """Missing where one of them has no exact formula."""


def price(calls: Counter[Call], placement: Placement, backend: str, pinned: tuple[str, str] | None = None) -> Traffic:
    """Add up the wire bytes of `calls`, each multiplied by how often it was issued.

    Args:
        calls: Collectives and how often each was issued.
        placement: The servers of the ranks.
        backend: Of the process group.
        pinned: NCCL's (algorithm, protocol) where the configuration holds it to one, and so to one channel.
    """
    num_ranks = placement.world_size
    payload_bytes, reason = 0, None
    per_rank, per_server = [0] * num_ranks, [0] * placement.num_servers
    for call, count in calls.items():
        payload_bytes += count * call.payload_bytes
        if pinned is not None:
            links = nccl.links(*call[2:], placement.server_of_rank, *pinned)
        else:
            links = gloo.links(*call[2:], num_ranks, backend)
        if isinstance(links, gloo.NotDerivable):
            reason = links.reason
            continue
        for rank, sent in enumerate(gloo.sent_bytes_per_rank(links, num_ranks)):
            per_rank[rank] += count * sent
        for server, sent in enumerate(gloo.egress_bytes_per_server(links, placement.server_of_rank)):
            per_server[server] += count * sent
    return Traffic(payload_bytes, Sent(tuple(per_rank), tuple(per_server)) if reason is None else Missing(reason))


def placement_warning(gradient_bytes: int, placement: Placement, backend: str) -> str | None:
    """Return a sentence with the remedy if the order of the ranks makes servers send more than ranks in order would.

    Args:
        gradient_bytes: Of one step, taken as one all-reduce of 4-byte elements.
        placement: The servers of the ranks.
        backend: Of the process group.

    Returns:
        None where the order costs nothing, or where no formula tells: NCCL joins the ranks of each server itself
        (wire/nccl.py).
    """
    step = Counter({Call("train", "gradients", "all_reduce", gradient_bytes, 4, -1): 1})
    given = price(step, placement, backend).sent
    ordered = price(step, placement.contiguous(), backend).sent
    if isinstance(given, Missing) or isinstance(ordered, Missing):
        return None
    most, least = max(given.egress_per_server), max(ordered.egress_per_server)
    if most <= WARNED_EXCESS * least:
        return None
    shown = ", ".join(map(str, placement.server_of_rank[:SHOWN_RANKS]))
    more = ", ..." if placement.world_size > SHOWN_RANKS else ""
    return (
        f"Ranks 0, 1, 2, ... sit on servers {shown}{more}: the busiest server sends "
        f"{most / BYTES_PER_MEGABYTE:,.2f} MB a step to the others, and would send "
        f"{least / BYTES_PER_MEGABYTE:,.2f} MB if the ranks of each server had consecutive numbers. "
        "Start them with `srun --distribution=block`, or with torchrun, which numbers them so."
    )


@dataclass(frozen=True, slots=True)
class StepTraffic:
    """One optimiser step's traffic: gradients, buffers, metrics and Lightning's own; no validation, no checkpoint.

    Bytes sent are predicted, exactly for gloo; None where no exact formula exists. All is None if the meter is off.
    """

    gradient_bytes: int | None
    """Bytes that DDP's buckets held, before compression."""
    payload_bytes: int | None
    """Bytes of rank 0's input to all collectives."""
    transport_bytes_per_rank: tuple[int, ...] | None
    """Bytes that each rank hands to TCP."""
    server_egress_bytes: tuple[int, ...] | None
    """Bytes that leave each server for another one."""
    total_egress_bytes: int | None
    """Bytes that left servers, over all servers and all committed steps up to this one."""
    residual_bytes: int | None = None
    """What the kernel counted on this rank's connections to other ranks, less what was predicted for it, also in steps
    before of which this was not known; None where either is unknown, and while a collective may be under way."""

    def metrics(self) -> dict[str, float]:
        """Return the values by their public names; those that are unknown are left out.

        Transport is the mean over ranks, egress that of the busiest server, the total the sum over servers.
        """
        transport, egress, total = self.transport_bytes_per_rank, self.server_egress_bytes, self.total_egress_bytes
        values = {
            "comm/gradient_bytes": self.gradient_bytes,
            "comm/payload_bytes": self.payload_bytes,
            "comm/transport_bytes": None if transport is None else sum(transport) / len(transport),
            "comm/server_egress_bytes": None if egress is None else max(egress),
            "comm/total_gigabytes": None if total is None else total / BYTES_PER_GIGABYTE,
            "comm/residual_bytes": self.residual_bytes,
        }
        return {name: value for name, value in values.items() if value is not None}
