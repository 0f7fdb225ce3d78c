"""What was sent, by the kernel's own counts: this rank's connections to the other ranks, by phase of the run.

A connection belongs to the job when its two ends are sockets of two ranks; that is found by comparing the ranks' lists
(`comm.ledger.reconcile`). So data that is loaded over the network, uploads and anything else on the same card stay
out. The connections of the ranks' store, known by its port, are a row of their own.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeline.comm.collectives import MeterObserver
from pipeline.comm.kernel.interface import (
    InterfaceCounts,
    interface_of_address,
    read_interface,
    segmentation_offload,
)
from pipeline.comm.kernel.report import ConnectionReport, Endpoint, InterfaceReport, RankReport, label_of
from pipeline.comm.kernel.sockets import Connection, TcpCounts, own_connections

MANY_TIMEOUTS = 3
"""In a row: at first TCP waits 0.2 s and more, then each time twice as long."""
_TRAIN, _OPEN_TRAIN = label_of("train", True), label_of("train", False)


@dataclass
class _Watched:
    """A connection, what it has counted, and what that belongs to."""

    connection: Connection
    last: TcpCounts
    first: TcpCounts
    by_label: Counter[str] = field(default_factory=Counter[str])
    is_unanswered: bool = False


class SocketCounter(MeterObserver):
    """Bytes that each of this rank's connections has sent, by `label_of` what they belong to.

    Life: made right after the process group, when all ranks are still silent; `end_phase` whenever a phase ends;
    `commit` when a step is committed; `report` when the ranks compare. Call it from the main thread, when no collective
    of this rank is under way: then a rank's count is exact, because gloo finishes an operation only after its last byte
    was handed to TCP.
    """

    def __init__(self, *store_ports: int) -> None:
        """Count from now on; `store_ports` are the ports of the ranks' stores."""
        self.store_ports = set(store_ports)
        """A store that is made later is added here, before the ranks compare."""
        self._watched: dict[int, _Watched] = {}
        self._job: set[int] | None = None
        self.available = True
        """False where the kernel does not count."""
        self._rescan(baseline_now=True)
        self._interface_name: str | None = None
        self._interface_start: InterfaceCounts | None = None

    # --- counting ---

    def end_phase(self, phase: str) -> None:
        """Give all bytes since the last count to `phase`, which ends; connections opened since then are found.

        Of training they are open until `commit` says that a step owns them.
        """
        self._rescan(baseline_now=False)
        self._count(label_of(phase, committed=phase != "train"))

    def adopt_new(self) -> None:
        """Count connections that were just opened, and are silent, from now on: their making is no collective."""
        self._rescan(baseline_now=True)

    def find_new(self) -> None:
        """Find connections that were opened by a collective, which sent over them since."""
        self._rescan(baseline_now=False)

    def phase_changes(self, old: str, new: str) -> None:
        """What was sent in `old` is counted for it."""
        del new
        self.end_phase(old)

    def commit(self) -> int:
        """End a step, so that a committed step owns what it sent. Returns the bytes that it sent to other ranks.

        Before the ranks have compared their lists, every connection but the store's is taken for the job's.
        """
        self._count(_OPEN_TRAIN)
        total = 0
        for inode, watched in self._watched.items():
            step_bytes = watched.by_label.pop(_OPEN_TRAIN, 0)
            watched.by_label[_TRAIN] += step_bytes
            if self._is_job(inode, watched):
                total += step_bytes
        return total

    def _is_job(self, inode: int, watched: _Watched) -> bool:
        return inode in self._job if self._job is not None else not self._is_store(watched.connection)

    def _is_store(self, connection: Connection) -> bool:
        return not self.store_ports.isdisjoint((connection.local[1], connection.remote[1]))

    def _count(self, label: str) -> None:
        for watched in self._watched.values():
            counts = watched.connection.counts()
            if counts is None:  # closed: what it sent after the last look is not known
                continue
            watched.by_label[label] += counts.sent_bytes - watched.last.sent_bytes
            watched.last = counts

    def _rescan(self, *, baseline_now: bool) -> None:
        for connection in own_connections():
            if connection.inode in self._watched:
                continue
            counts = connection.counts()
            if counts is None:
                self.available = False
                continue
            start = counts if baseline_now else TcpCounts(0, 0, 0, 0, counts.has_timestamps)
            self._watched[connection.inode] = _Watched(connection, last=start, first=start)

    # --- the network card ---

    def start_interface(self) -> None:
        """Remember the card's counters: `report` counts from here. The ranks must be silent."""
        for watched in self._watched.values():
            if not self._is_store(watched.connection):
                self._interface_name = interface_of_address(watched.connection.local[0])
                break
        if self._interface_name is not None:
            self._interface_start = read_interface(self._interface_name)
        for watched in self._watched.values():
            watched.first = watched.connection.counts() or watched.first

    # --- for the comparison ---

    def report(self) -> RankReport:
        """Return what this rank tells the others. Nothing of this rank may be under way.

        TCP may have sent something again since the last count, so connections and card are read together.
        """
        return RankReport(tuple(map(self._connection_report, self._watched.values())), self._interface_report())

    def _connection_report(self, watched: _Watched) -> ConnectionReport:
        first, now = watched.first, watched.connection.counts() or watched.last
        return ConnectionReport(
            local=watched.connection.local,
            remote=watched.connection.remote,
            store=self._is_store(watched.connection),
            by_label=dict(watched.by_label),
            retransmitted_bytes=now.retransmitted_bytes,
            on_wire_bytes=max(0, now.on_wire_bytes - first.on_wire_bytes),
            again_on_wire_bytes=max(0, now.retransmitted_bytes - first.retransmitted_bytes),
            segment_header_bytes=66 if now.has_timestamps else 54,
            is_disturbed=now.is_disturbed,
        )

    def unanswered(self) -> list[str]:
        """Return the addresses of those who did not acknowledge what was sent, though it was sent again.

        Of a connection that is closed by now: by the last call. From any thread.
        """
        every = list(self._watched.values())
        for watched in every:
            if (now := watched.connection.counts()) is not None:
                watched.is_unanswered = now.num_timeouts >= MANY_TIMEOUTS
        return sorted({watched.connection.remote[0] for watched in every if watched.is_unanswered})

    def _interface_report(self) -> InterfaceReport | None:
        name, start = self._interface_name, self._interface_start
        now = None if name is None else read_interface(name)
        if name is None or start is None or now is None:
            return None
        sent_bytes, sent_packets = now.tx_bytes - start.tx_bytes, now.tx_packets - start.tx_packets
        return InterfaceReport(name, sent_bytes, sent_packets, segmentation_offload(name))

    def set_job(self, endpoints: Iterable[Endpoint]) -> None:
        """Take the connections from these local endpoints for those to other ranks; the rest is not the job's."""
        wanted = set(endpoints)
        self._job = {
            inode
            for inode, watched in self._watched.items()
            if watched.connection.local in wanted and not self._is_store(watched.connection)
        }
