"""What all ranks counted, beside what was predicted: rows by phase, and the servers' network cards."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.comm.ledger.traffic import Sent
from pipeline.core.schemas.ledger import InterfaceJson, MeasuredJson, MeasuredRowJson


@dataclass(frozen=True, slots=True)
class Row:
    """One phase of one attempt: predicted and measured bytes, per rank and per server."""

    phase: str
    committed: bool
    """False: training that belongs to no committed step."""
    predicted: Sent | None
    """None where a collective of the phase has no exact formula."""
    measured: Sent

    @property
    def residual_bytes_per_rank(self) -> list[int] | None:
        """Measured minus predicted bytes of each rank; None where nothing could be predicted."""
        return None if self.predicted is None else [*(self.measured - self.predicted).bytes_per_rank]

    def to_json(self) -> MeasuredRowJson:
        """Return the row as in ledger.json, the residual included."""
        return {
            "phase": self.phase,
            "committed": self.committed,
            "predicted_bytes_per_rank": None if self.predicted is None else [*self.predicted.bytes_per_rank],
            "measured_bytes_per_rank": [*self.measured.bytes_per_rank],
            "predicted_egress_bytes": None if self.predicted is None else [*self.predicted.egress_per_server],
            "measured_egress_bytes": [*self.measured.egress_per_server],
            "residual_bytes_per_rank": self.residual_bytes_per_rank,
        }

    @classmethod
    def from_json(cls, value: MeasuredRowJson) -> "Row":
        """Read what `to_json` made."""
        per_rank, per_server = value["predicted_bytes_per_rank"], value["predicted_egress_bytes"]
        return cls(
            value["phase"],
            value["committed"],
            None if per_rank is None or per_server is None else Sent(tuple(per_rank), tuple(per_server)),
            Sent(tuple(value["measured_bytes_per_rank"]), tuple(value["measured_egress_bytes"])),
        )


@dataclass(frozen=True, slots=True)
class InterfaceRow:
    """A server's network card against the connections that use it, since training was set up."""

    server: int
    """Index of the server, from 0."""
    interface: str
    """Name of the network interface."""
    segmentation_offload: bool | None
    """Whether the kernel leaves cutting into segments to the card; None where it does not say."""
    interface_bytes: int
    """Bytes that the card sent, whoever asked for it."""
    tcp_bytes: int
    """Data of the job's connections and the store's that leave the server, retransmissions included."""
    header_bytes: int
    """Ethernet, IP and TCP headers: bytes per segment times packets of the card, which sends acknowledgements too."""
    retransmitted_bytes: int = 0
    """Of `tcp_bytes`, those that TCP sent again."""
    sack_bytes_at_most: int = 0
    """Selective acknowledgements in TCP's headers beyond `header_bytes`, which nothing counts: so many at most."""

    @property
    def residual_fraction(self) -> float | None:
        """Fraction of the card's bytes that the connections do not explain: other traffic, other headers."""
        if self.interface_bytes == 0:
            return None
        return (self.interface_bytes - self.tcp_bytes - self.header_bytes) / self.interface_bytes

    def to_json(self) -> InterfaceJson:
        """Return the row as in ledger.json, the residual included."""
        return {
            "server": self.server,
            "interface": self.interface,
            "segmentation_offload": self.segmentation_offload,
            "interface_bytes": self.interface_bytes,
            "tcp_bytes": self.tcp_bytes,
            "header_bytes": self.header_bytes,
            "retransmitted_bytes": self.retransmitted_bytes,
            "sack_bytes_at_most": self.sack_bytes_at_most,
            "residual_fraction": self.residual_fraction,
        }

    @classmethod
    def from_json(cls, value: InterfaceJson) -> "InterfaceRow":
        """Read what `to_json` made."""
        return cls(
            value["server"],
            value["interface"],
            value["segmentation_offload"],
            value["interface_bytes"],
            value["tcp_bytes"],
            value["header_bytes"],
            value.get("retransmitted_bytes", 0),  # not told before 0.1.1
            value.get("sack_bytes_at_most", 0),
        )


@dataclass(frozen=True, slots=True)
class Measured:
    """What all ranks counted, reconciled with what was predicted. Only rank 0 has it."""

    num_steps: int
    """Committed steps of the run at that time."""
    rows: tuple[Row, ...]
    """One row for each phase in which something was sent or owed."""
    retransmitted_bytes_per_rank: tuple[int, ...]
    """Bytes that each rank's TCP sent again, in all phases."""
    store_bytes_per_rank: tuple[int, ...]
    """Bytes that each rank sent over the ranks' store, in all phases."""
    interfaces: tuple[InterfaceRow, ...] = ()
    """One row for each server whose card could be read."""

    @property
    def unexplained(self) -> list[Row]:
        """Rows whose residual is not zero on every rank."""
        return [row for row in self.rows if any(row.residual_bytes_per_rank or ())]

    @property
    def closed(self) -> bool | None:
        """Whether every residual is zero; None if a prediction is missing."""
        if any(row.predicted is None for row in self.rows):
            return None
        return not self.unexplained

    @property
    def is_explained_in_sum(self) -> bool:
        """Whether all phases together agree on every rank: what one of them has too much another one lacks."""
        residuals = [row.residual_bytes_per_rank for row in self.rows]
        return not any(map(sum, zip(*filter(None, residuals), strict=True))) and None not in residuals

    def row(self, phase: str, committed: bool) -> Row | None:
        """Return the row of a phase, if anything was sent in it."""
        return next((row for row in self.rows if (row.phase, row.committed) == (phase, committed)), None)

    def with_committed(self, kept: Row | None) -> "Measured":
        """Return the same counts, but of the training only `kept` was committed and the rest was lost."""
        trained = [row for row in self.rows if row.phase == "train"]
        if not trained:
            return self
        lost = _difference(trained, kept)
        others = [row for row in self.rows if row.phase != "train"]
        rows = (*others, *([kept] if kept else []), *([lost] if any(lost.measured.bytes_per_rank) else []))
        return replace(self, rows=rows)

    def unexplained_table(self) -> str | None:
        """Return a line for each phase and rank of `unexplained`, for people; None if everything is explained."""
        if not self.unexplained:
            return None
        lines = [f"  {'phase':<22}{'rank':>5}{'predicted bytes':>20}{'measured bytes':>20}{'residual':>16}"]
        for row in self.unexplained:
            assert row.predicted is not None
            name = row.phase if row.committed else f"{row.phase} (uncommitted)"
            pairs = zip(row.predicted.bytes_per_rank, row.measured.bytes_per_rank, strict=True)
            for rank, (predicted, measured) in enumerate(pairs):
                lines.append(f"  {name:<22}{rank:>5}{predicted:>20,}{measured:>20,}{measured - predicted:>+16,}")
        return "\n".join(lines)

    def to_json(self) -> MeasuredJson:
        """Return plain types, for ledger.json and for checkpoints."""
        return {
            "num_steps": self.num_steps,
            "rows": [row.to_json() for row in self.rows],
            "retransmitted_bytes_per_rank": [*self.retransmitted_bytes_per_rank],
            "store_bytes_per_rank": [*self.store_bytes_per_rank],
            "interfaces": [row.to_json() for row in self.interfaces],
        }

    @classmethod
    def from_json(cls, value: MeasuredJson) -> "Measured":
        """Read what `to_json` made."""
        return cls(
            value["num_steps"],
            tuple(map(Row.from_json, value["rows"])),
            tuple(value["retransmitted_bytes_per_rank"]),
            tuple(value["store_bytes_per_rank"]),
            tuple(map(InterfaceRow.from_json, value["interfaces"])),
        )


def _difference(rows: Sequence[Row], kept: Row | None) -> Row:
    """Add `rows` up without `kept`: training that no committed step owns. There must be a row."""
    predicted, measured = rows[0].predicted, rows[0].measured
    for row in rows[1:]:
        predicted = None if predicted is None or row.predicted is None else predicted + row.predicted
        measured = measured + row.measured
    if kept is not None:
        measured = measured - kept.measured
        predicted = predicted if predicted is None or kept.predicted is None else predicted - kept.predicted
    return Row("train", False, predicted, measured)
