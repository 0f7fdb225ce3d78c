"""Calls priced: from what was issued, and where the ranks sit, to bytes sent and bytes that leave each server."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.comm.collectives import Call
from pipeline.comm.wire import gloo, nccl

BYTES_PER_GIGABYTE = 10**9
BYTES_PER_MEGABYTE = 10**6
WARNED_EXCESS = 1.05
"""A placement is warned of when the busiest server sends so many times what it could; less is an uneven tail."""
SHOWN_RANKS = 8


@dataclass(frozen=True, slots=True)
class Placement:
    """Which server each rank sits on: `server_of_rank[r]`, counted from 0."""

    server_of_rank: tuple[int, ...]
    measured: bool
    """False: nobody looked, each rank is taken as a server of its own."""

    @classmethod
    def assumed(cls, world_size: int) -> "Placement":
        """Each rank a server."""
        return cls(tuple(range(world_size)), measured=False)

    @classmethod
    def of_hosts(cls, hosts: Sequence[str]) -> "Placement":
        """From the host name of every rank; servers are numbered in order of appearance."""
        numbers: dict[str, int] = {}
        return cls(tuple(numbers.setdefault(host, len(numbers)) for host in hosts), measured=True)

    def contiguous(self) -> "Placement":
        """As many ranks on each server as here, with consecutive numbers."""
        return Placement(tuple(sorted(self.server_of_rank)), self.measured)

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return len(self.server_of_rank)

    @property
    def num_servers(self) -> int:
        """How many servers there are."""
        return max(self.server_of_rank) + 1


@dataclass(frozen=True, slots=True)
class Traffic:
    """Calls of several collectives, priced. None, and a reason, where one of them has no exact formula."""

    payload_bytes: int
    bytes_per_rank: tuple[int, ...] | None
    egress_per_server: tuple[int, ...] | None
    reason: str | None

    @property
    def total_egress_bytes(self) -> int | None:
        """Over all servers."""
        return None if self.egress_per_server is None else sum(self.egress_per_server)


def price(calls: Counter[Call], placement: Placement, backend: str, pinned: tuple[str, str] | None = None) -> Traffic:
    """Sum of the wire bytes of `calls`, each multiplied by how often it was issued.

    pinned: NCCL's (algorithm, protocol) where the configuration holds it to one.
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
    if reason is not None:
        return Traffic(payload_bytes, None, None, reason)
    return Traffic(payload_bytes, tuple(per_rank), tuple(per_server), None)


def placement_warning(step: Counter[Call] | int, placement: Placement, backend: str) -> str | None:
    """A sentence if the order of the ranks makes servers send more than the same ranks in order would, with the remedy.

    step: the calls of one step, or the bytes of its gradients, taken as one all-reduce of 4-byte elements. None where
    the order costs nothing, or where no formula tells: NCCL joins the ranks of each server itself (wire_nccl.py).
    """
    if isinstance(step, int):
        step = Counter({Call("train", "gradients", "all_reduce", step, 4, -1): 1})
    given = price(step, placement, backend).egress_per_server
    ordered = price(step, placement.contiguous(), backend).egress_per_server
    if given is None or ordered is None or max(given) <= WARNED_EXCESS * max(ordered):
        return None
    shown = ", ".join(map(str, placement.server_of_rank[:SHOWN_RANKS]))
    more = ", ..." if placement.world_size > SHOWN_RANKS else ""
    return (
        f"Ranks 0, 1, 2, ... sit on servers {shown}{more}: the busiest server sends "
        f"{max(given) / BYTES_PER_MEGABYTE:,.2f} MB a step to the others, and would send "
        f"{max(ordered) / BYTES_PER_MEGABYTE:,.2f} MB if the ranks of each server had consecutive numbers. "
        "Start them with `srun --distribution=block`, or with torchrun, which numbers them so."
    )


@dataclass(frozen=True, slots=True)
class StepTraffic:
    """One optimiser step's traffic: gradients, buffers, metrics and Lightning's own; no validation, no checkpoint.

    Bytes sent are predicted, exactly for gloo; None where no exact formula exists. All is None if the meter is off.
    """

    gradient_bytes: int | None
    """What DDP's buckets held, before compression."""
    payload_bytes: int | None
    """Rank 0's input to all collectives."""
    transport_bytes_per_rank: tuple[int, ...] | None
    server_egress_bytes: tuple[int, ...] | None
    total_egress_bytes: int | None
    """Over all servers and all committed steps up to this one."""
    residual_bytes: int | None = None
    """What the kernel counted on this rank's connections to other ranks, less what was predicted for it; None where
    either is unknown."""

    def metrics(self) -> dict[str, float]:
        """Under their public names; what is unknown is left out.

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
