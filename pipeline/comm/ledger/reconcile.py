"""The ranks lay their counts side by side: which connections are the job's, what went where, what nobody can explain.

The lists travel through torch's store, not through collectives, which would change what is being compared.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch.distributed as dist

from pipeline.comm.kernel.counter import OPEN_TRAIN, SocketCounter
from pipeline.comm.kernel.interface import segmentation_offload
from pipeline.comm.ledger.traffic import Placement, Traffic
from pipeline.core.errors import LedgerError

LABELS = (("startup", True), ("train", True), ("train", False), ("validation", True), ("checkpoint", True))
"""(phase, committed) of the rows, in the order of the table. Training that no step has committed is not committed."""


class StoreExchange:
    """Plain values from all ranks to rank 0 and back, through the process group's store. All calls are collective."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._store = dist.distributed_c10d._get_default_store()
        self._round = 0

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value, on rank 0; None elsewhere."""
        self._round += 1
        if self.rank != 0:
            self._store.set(self._key(self.rank), json.dumps(value))
            return None
        others = [self._take(self._key(rank)) for rank in range(1, self.world_size)]
        return [value, *others]

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        self._round += 1
        if self.rank == 0:
            for rank in range(1, self.world_size):
                self._store.set(self._key(rank), json.dumps(value))
            return value
        return self._take(self._key(self.rank))

    def barrier(self) -> None:
        """Until every rank is here."""
        self.gather(None)
        self.share(None)

    def _key(self, rank: int) -> str:
        return f"squeezewire/{self._round}/{rank}"

    def _take(self, key: str) -> Any:
        value = json.loads(self._store.get(key))  # waits until it is there
        self._store.delete_key(key)
        return value


@dataclass(frozen=True)
class Row:
    """One phase of one attempt: predicted and measured bytes, per rank and per server."""

    phase: str
    committed: bool
    predicted_bytes_per_rank: list[int] | None
    measured_bytes_per_rank: list[int]
    predicted_egress_bytes: list[int] | None
    measured_egress_bytes: list[int]

    @property
    def residual_bytes_per_rank(self) -> list[int] | None:
        """Measured minus predicted; None where nothing could be predicted."""
        if self.predicted_bytes_per_rank is None:
            return None
        pairs = zip(self.measured_bytes_per_rank, self.predicted_bytes_per_rank, strict=True)
        return [measured - predicted for measured, predicted in pairs]

    def to_json(self) -> dict[str, Any]:
        """Plain types, the residual included."""
        return {**asdict(self), "residual_bytes_per_rank": self.residual_bytes_per_rank}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Row":
        """What `to_json` made; other keys are ignored."""
        return cls(**{name: value[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class InterfaceRow:
    """A server's network card against the connections that use it, since training was set up."""

    server: int
    interface: str
    segmentation_offload: bool | None
    interface_bytes: int
    tcp_bytes: int
    """Data of the job's connections and the store's that leave the server, retransmissions included."""
    header_bytes: int
    """Ethernet, IP and TCP headers: bytes per segment times packets of the card, which sends acknowledgements too."""

    @property
    def residual_fraction(self) -> float | None:
        """Share of the card's bytes that the connections do not explain: other traffic, other headers."""
        if self.interface_bytes == 0:
            return None
        return (self.interface_bytes - self.tcp_bytes - self.header_bytes) / self.interface_bytes

    def to_json(self) -> dict[str, Any]:
        """Plain types, the residual included."""
        return {**asdict(self), "residual_fraction": self.residual_fraction}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "InterfaceRow":
        """What `to_json` made; other keys are ignored."""
        return cls(**{name: value[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Measured:
    """What all ranks counted, laid side by side. Only rank 0 has it."""

    num_steps: int
    rows: list[Row]
    retransmitted_bytes_per_rank: list[int]
    store_bytes_per_rank: list[int]
    """Of torch's TCPStore, in all phases."""
    interfaces: list[InterfaceRow] = field(default_factory=list)

    @property
    def unexplained(self) -> list[Row]:
        """Rows whose residual is not zero on every rank."""
        return [row for row in self.rows if any(row.residual_bytes_per_rank or ())]

    @property
    def closed(self) -> bool | None:
        """Whether every residual is zero; None if a prediction is missing."""
        if any(row.predicted_bytes_per_rank is None for row in self.rows):
            return None
        return not self.unexplained

    def row(self, phase: str, committed: bool) -> Row | None:
        """The row of a phase, if anything was sent in it."""
        return next((row for row in self.rows if (row.phase, row.committed) == (phase, committed)), None)

    def with_committed(self, kept: Row | None) -> "Measured":
        """The same, but of its training only `kept` was committed and the rest was lost."""
        trained = [row for row in self.rows if row.phase == "train"]
        if not trained:
            return self
        lost = _difference(trained, kept)
        others = [row for row in self.rows if row.phase != "train"]
        rows = [*others, *([kept] if kept else []), *([lost] if any(lost.measured_bytes_per_rank) else [])]
        return replace(self, rows=rows)

    def to_json(self) -> dict[str, Any]:
        """Plain types; for the ledger and for checkpoints."""
        return {
            "num_steps": self.num_steps,
            "rows": [row.to_json() for row in self.rows],
            "retransmitted_bytes_per_rank": self.retransmitted_bytes_per_rank,
            "store_bytes_per_rank": self.store_bytes_per_rank,
            "interfaces": [row.to_json() for row in self.interfaces],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Measured":
        """What `to_json` made."""
        return cls(
            num_steps=value["num_steps"],
            rows=[Row.from_json(row) for row in value["rows"]],
            retransmitted_bytes_per_rank=value["retransmitted_bytes_per_rank"],
            store_bytes_per_rank=value["store_bytes_per_rank"],
            interfaces=[InterfaceRow.from_json(row) for row in value["interfaces"]],
        )


def _difference(rows: Sequence[Row], kept: Row | None) -> Row:
    """All of `rows` together without `kept`: training that no committed step owns."""

    def without(name: str) -> list[int] | None:
        values = [getattr(row, name) for row in rows]
        if None in values:
            return None
        total = [sum(column) for column in zip(*values, strict=True)]
        minus = None if kept is None else getattr(kept, name)
        return total if minus is None else [a - b for a, b in zip(total, minus, strict=True)]

    names = ("predicted_bytes_per_rank", "measured_bytes_per_rank", "predicted_egress_bytes", "measured_egress_bytes")
    return Row("train", False, **{name: without(name) for name in names})  # pyright: ignore[reportArgumentType]


Reports = Sequence[dict[str, Any]]


def match(reports: Reports) -> dict[tuple[int, int], int]:
    """(rank, position in its list of connections) -> rank at the other end, for connections between two ranks."""
    ends: dict[tuple[Any, ...], int] = {}
    for rank, report in enumerate(reports):
        for connection in report["connections"]:
            ends[(*connection["local"], *connection["remote"])] = rank
    return {
        (rank, position): ends[mirrored]
        for rank, report in enumerate(reports)
        for position, connection in enumerate(report["connections"])
        if not connection["store"] and (mirrored := (*connection["remote"], *connection["local"])) in ends
    }


def job_endpoints(reports: Reports) -> list[list[tuple[str, int]]]:
    """Of each rank: the local (address, port) of its connections to other ranks."""
    peers = match(reports)
    return [
        [tuple(c["local"]) for position, c in enumerate(report["connections"]) if (rank, position) in peers]
        for rank, report in enumerate(reports)
    ]


def lay_side_by_side(
    reports: Reports, predicted: dict[tuple[str, bool], Traffic], placement: Placement, num_steps: int
) -> Measured:
    """Add the ranks' reports up, each beside what was predicted. Rows of nothing sent and nothing owed are left out."""
    peers = match(reports)
    rows = [_row(label, reports, peers, predicted[label], placement) for label in LABELS]
    retransmitted, of_store = [0] * len(reports), [0] * len(reports)
    for rank, report in enumerate(reports):
        for position, connection in enumerate(report["connections"]):
            if (rank, position) in peers:
                retransmitted[rank] += connection["retransmitted_bytes"]
            elif connection["store"]:
                of_store[rank] += sum(connection["by_label"].values())
    return Measured(
        num_steps,
        [row for row in rows if any(row.measured_bytes_per_rank) or any(row.predicted_bytes_per_rank or (1,))],
        retransmitted,
        of_store,
        _interfaces(reports, peers, placement),
    )


def _row(
    label: tuple[str, bool],
    reports: Reports,
    peers: dict[tuple[int, int], int],
    predicted: Traffic,
    placement: Placement,
) -> Row:
    phase, committed = label
    counted_as = phase if committed else OPEN_TRAIN
    per_rank, per_server = [0] * placement.world_size, [0] * placement.num_servers
    for (rank, position), peer in peers.items():
        sent = reports[rank]["connections"][position]["by_label"].get(counted_as, 0)
        per_rank[rank] += sent
        here, there = placement.server_of_rank[rank], placement.server_of_rank[peer]
        if here != there:
            per_server[here] += sent
    return Row(
        phase,
        committed,
        None if predicted.bytes_per_rank is None else list(predicted.bytes_per_rank),
        per_rank,
        None if predicted.egress_per_server is None else list(predicted.egress_per_server),
        per_server,
    )


def _interfaces(reports: Reports, peers: dict[tuple[int, int], int], placement: Placement) -> list[InterfaceRow]:
    """Of each server whose first rank could read a card."""
    rows = []
    for server in range(placement.num_servers):
        ranks = [rank for rank, at in enumerate(placement.server_of_rank) if at == server]
        card = reports[ranks[0]]["interface"]
        if card is None or card["name"] == "lo":
            continue
        tcp_bytes, header_bytes = 0, 0
        for rank in ranks:
            for position, connection in enumerate(reports[rank]["connections"]):
                leaves = connection["local"][0] != connection["remote"][0]
                if leaves and (connection["store"] or (rank, position) in peers):
                    tcp_bytes += connection["on_wire_bytes"]
                    header_bytes = max(header_bytes, connection["segment_header_bytes"])
        rows.append(
            InterfaceRow(
                server, card["name"], card["segmentation_offload"], card["tx_bytes"], tcp_bytes,
                header_bytes * card["tx_packets"],
            )
        )  # fmt: skip
    return rows


class Reconciler:
    """Lets the ranks compare, at the start, at every checkpoint and at the end. Its methods are collective.

    strict: a residual that is not zero is an error.
    """

    def __init__(self, counter: SocketCounter, rank: int, placement: Placement, *, strict: bool) -> None:
        self.counter, self.placement, self.strict = counter, placement, strict
        self._exchange = StoreExchange(rank, placement.world_size)

    def start(self) -> None:
        """Find the job's connections and remember the cards' counters. Nothing may be under way on any rank."""
        self._exchange.barrier()
        self.counter.start_interface()
        reports = self._exchange.gather(self._report())
        self._set_job(self._exchange.share(None if reports is None else job_endpoints(reports)))

    def compare(self, phase: str, predict: Any, num_steps: int) -> tuple[Measured | None, str | None]:
        """Lay everything side by side, at the end of a piece of `phase`.

        predict: gives rank 0's predictions by (phase, committed), as of now. num_steps: committed so far.
        Returns (everything, on rank 0; the sentence about bytes nobody can explain, on every rank, or None).
        """
        self.counter.end_phase(phase)
        self._exchange.barrier()  # all bytes have left every buffer: their receivers are here too
        reports = self._exchange.gather(self._report())
        measured, told = None, None
        if reports is not None:
            measured = lay_side_by_side(reports, predict(), self.placement, num_steps)
            told = [job_endpoints(reports), unexplained_table(measured.unexplained)]
        shared = self._exchange.share(told)
        self._set_job(shared[0])
        return measured, shared[1]

    def _report(self) -> dict[str, Any]:
        report = self.counter.report()
        if report["interface"] is not None:
            report["interface"]["segmentation_offload"] = segmentation_offload(report["interface"]["name"])
        return report

    def _set_job(self, endpoints: list[list[list[Any]]]) -> None:
        mine = endpoints[self._exchange.rank]
        self.counter.set_job([(str(address), int(port)) for address, port in mine])

    def refuse(self, unexplained: str | None) -> None:
        """Raise LedgerError on every rank if there is something to refuse."""
        if unexplained and self.strict:
            raise LedgerError(
                "The ledger does not close: the ranks' connections carried other bytes than the recorded"
                f" collectives explain.\n{unexplained}\nA collective outside the meter's sight (a group of its own,"
                " another library) or a wrong formula does this. comm.strict=false goes on and keeps the residual in"
                " ledger.json."
            )


def unexplained_table(rows: Sequence[Row]) -> str | None:
    """A line for each phase and rank, or None if there is no row."""
    if not rows:
        return None
    lines = [f"  {'phase':<22}{'rank':>5}{'predicted bytes':>20}{'measured bytes':>20}{'residual':>16}"]
    for row in rows:
        assert row.predicted_bytes_per_rank is not None and row.residual_bytes_per_rank is not None
        name = row.phase if row.committed else f"{row.phase} (uncommitted)"
        for rank, residual in enumerate(row.residual_bytes_per_rank):
            predicted, measured = row.predicted_bytes_per_rank[rank], row.measured_bytes_per_rank[rank]
            lines.append(f"  {name:<22}{rank:>5}{predicted:>20,}{measured:>20,}{residual:>+16,}")
    return "\n".join(lines)
