"""Reconciles what the ranks counted: which connections are the job's, what went where, what nothing explains."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.comm.kernel.counter import SocketCounter
from pipeline.comm.kernel.report import ConnectionReport, Endpoint, RankReport, label_of
from pipeline.comm.ledger.exchange import StoreExchange
from pipeline.comm.ledger.measured import InterfaceRow, Measured, Row
from pipeline.comm.ledger.traffic import Placement, Sent, Traffic
from pipeline.core.errors import LedgerError
from pipeline.core.missing import Missing

Reports = Sequence[RankReport]
"""What each rank reported, by rank."""
Peers = Mapping[tuple[int, int], int]
"""(rank, position in its list of connections) -> rank at the other end, for connections between two ranks."""

ROWS = (("startup", True), ("train", True), ("train", False), ("validation", True), ("checkpoint", True))
"""(phase, committed) of the rows, in the order of the table. Training that no step has committed is not committed."""

LONGEST_SACK_BYTES = 28
"""TCP's header holds 40 bytes of options, of which the time stamp takes 12."""


# --- matching ---


def match(reports: Reports) -> Peers:
    """Pair the ends of connections: those whose two ends are sockets of two ranks are the job's."""
    ends: dict[tuple[Endpoint, Endpoint], int] = {}
    for rank, report in enumerate(reports):
        for connection in report.connections:
            ends[connection.local, connection.remote] = rank
    return {
        (rank, position): ends[mirrored]
        for rank, report in enumerate(reports)
        for position, connection in enumerate(report.connections)
        if not connection.store and (mirrored := (connection.remote, connection.local)) in ends
    }


def job_endpoints(reports: Reports) -> list[list[Endpoint]]:
    """Return the local endpoints of each rank's connections to other ranks."""
    peers = match(reports)
    return [
        [connection.local for position, connection in enumerate(report.connections) if (rank, position) in peers]
        for rank, report in enumerate(reports)
    ]


def reconcile(
    reports: Reports, predicted: Mapping[tuple[str, bool], Traffic], placement: Placement, num_steps: int
) -> Measured:
    """Add the ranks' reports up, each beside what was predicted. Rows of nothing sent and nothing owed are left out.

    Args:
        reports: What each rank reported.
        predicted: Traffic by (phase, committed), for each of `ROWS`.
        placement: The servers of the ranks.
        num_steps: Committed steps of the run so far.
    """
    peers = match(reports)
    rows = [_row(phase, committed, reports, peers, predicted[phase, committed], placement) for phase, committed in ROWS]
    retransmitted, of_store = [0] * len(reports), [0] * len(reports)
    for rank, report in enumerate(reports):
        for position, connection in enumerate(report.connections):
            if (rank, position) in peers:
                retransmitted[rank] += connection.retransmitted_bytes
            elif connection.store:
                of_store[rank] += sum(connection.by_label.values())
    return Measured(
        num_steps,
        tuple(row for row in rows if any(row.measured.bytes_per_rank) or _is_owed(row)),
        tuple(retransmitted),
        tuple(of_store),
        tuple(_interfaces(reports, peers, placement)),
    )


def _is_owed(row: Row) -> bool:
    """Tell whether something was, or may have been, to be sent."""
    return row.predicted is None or any(row.predicted.bytes_per_rank)


def _row(phase: str, committed: bool, reports: Reports, peers: Peers, predicted: Traffic, placement: Placement) -> Row:
    label = label_of(phase, committed)
    per_rank, per_server = [0] * placement.world_size, [0] * placement.num_servers
    for (rank, position), peer in peers.items():
        sent = reports[rank].connections[position].by_label.get(label, 0)
        per_rank[rank] += sent
        here, there = placement.server_of_rank[rank], placement.server_of_rank[peer]
        if here != there:
            per_server[here] += sent
    expected = None if isinstance(predicted.sent, Missing) else predicted.sent
    return Row(phase, committed, expected, Sent(tuple(per_rank), tuple(per_server)))


def _interfaces(reports: Reports, peers: Peers, placement: Placement) -> list[InterfaceRow]:
    """Return a row for each server whose first rank could read a card."""
    rows: list[InterfaceRow] = []
    is_disturbed = any(connection.is_disturbed for report in reports for connection in report.connections)
    for server in range(placement.num_servers):
        ranks = [rank for rank, at in enumerate(placement.server_of_rank) if at == server]
        card = reports[ranks[0]].interface
        if card is None or card.name == "lo":
            continue
        outward = [connection for rank in ranks for connection in _outward(rank, reports[rank], peers)]
        rows.append(
            InterfaceRow(
                server=server,
                interface=card.name,
                segmentation_offload=card.segmentation_offload,
                interface_bytes=card.tx_bytes,
                tcp_bytes=sum(connection.on_wire_bytes for connection in outward),
                header_bytes=card.tx_packets * max((one.segment_header_bytes for one in outward), default=0),
                retransmitted_bytes=sum(connection.again_on_wire_bytes for connection in outward),
                sack_bytes_at_most=card.tx_packets * LONGEST_SACK_BYTES * is_disturbed,
            )
        )
    return rows


def _outward(rank: int, report: RankReport, peers: Peers) -> list[ConnectionReport]:
    """Return the connections of the job and of the store that leave the rank's server."""
    return [
        connection
        for position, connection in enumerate(report.connections)
        if connection.local[0] != connection.remote[0] and (connection.store or (rank, position) in peers)
    ]


# --- together ---


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came out when the ranks compared their counts; the same on every rank."""

    unexplained: str | None
    """Table of the bytes that no recorded collective explains; None if there are none."""
    strict: bool
    """Whether such bytes are an error."""

    def refuse(self) -> None:
        """Refuse what nothing explains, on every rank.

        Raises:
            LedgerError: there is something, and the run is strict.
        """
        if self.unexplained and self.strict:
            raise LedgerError(
                "The ledger does not close: the ranks' connections carried other bytes than the recorded"
                f" collectives explain.\n{self.unexplained}\nA collective outside the meter's sight (a group of its"
                " own, another library) or a wrong formula does this. comm.strict=false goes on and keeps the residual"
                " in ledger.json."
            )


@dataclass(frozen=True, slots=True)
class _Conclusion:
    """What rank 0 tells the others."""

    job: list[list[Endpoint]]
    """`job_endpoints`."""
    unexplained: str | None

    def encode(self) -> str:
        return json.dumps([self.job, self.unexplained])

    @classmethod
    def decode(cls, text: str) -> "_Conclusion":
        job, unexplained = json.loads(text)
        return cls(_endpoints(job), unexplained)


def _endpoints(value: Any) -> list[list[Endpoint]]:
    return [[(str(address), int(port)) for address, port in of_rank] for of_rank in value]


class Reconciler:
    """Lets the ranks compare, at the start, at every checkpoint and at the end. Its methods are collective.

    Only `commit` is this rank's own affair.
    """

    def __init__(self, counter: SocketCounter, rank: int, placement: Placement, *, strict: bool) -> None:
        """Compare what `counter` counts with the other ranks'.

        Args:
            counter: Counts of this rank.
            rank: Rank of this process.
            placement: The servers of the ranks.
            strict: Whether a residual that is not zero is an error.
        """
        self._counter, self._placement, self._strict = counter, placement, strict
        self._exchange = StoreExchange(rank, placement.world_size)

    def start(self) -> None:
        """Find the job's connections and remember the cards' counters. Nothing may be under way on any rank."""
        self._exchange.barrier()
        self._counter.start_interface()
        reports = self._gather()
        job = None if reports is None else json.dumps(job_endpoints(reports))
        self._set_job(_endpoints(json.loads(self._exchange.share(job))))

    def commit(self) -> int:
        """End a step of this rank and return the bytes that it sent to other ranks."""
        return self._counter.commit()

    def compare(
        self, phase: str, predict: Callable[[], Mapping[tuple[str, bool], Traffic]], num_steps: int
    ) -> tuple[Measured | None, Verdict]:
        """Reconcile the counts of all ranks, at the end of a piece of `phase`.

        Args:
            phase: Phase of the run, which owns what was sent since the last count.
            predict: Returns rank 0's predictions by (phase, committed), as of now.
            num_steps: Committed steps of the run so far.

        Returns:
            What was measured, on rank 0; and the verdict, on every rank.
        """
        self._counter.end_phase(phase)
        self._exchange.barrier()  # all bytes have left every buffer: their receivers are here too
        reports = self._gather()
        measured, told = None, None
        if reports is not None:
            measured = reconcile(reports, predict(), self._placement, num_steps)
            told = _Conclusion(job_endpoints(reports), measured.unexplained_table()).encode()
        conclusion = _Conclusion.decode(self._exchange.share(told))
        self._set_job(conclusion.job)
        return measured, Verdict(conclusion.unexplained, self._strict)

    def _gather(self) -> list[RankReport] | None:
        """Return every rank's report, on rank 0."""
        texts = self._exchange.gather(self._counter.report().encode())
        return None if texts is None else [RankReport.decode(text) for text in texts]

    def _set_job(self, job: list[list[Endpoint]]) -> None:
        self._counter.set_job(job[self._exchange.rank])
