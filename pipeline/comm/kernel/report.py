"""What a rank reports of its connections and its network card, to be compared with what the other ranks report."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

Endpoint = tuple[str, int]
"""(address, port)."""


def label_of(phase: str, committed: bool) -> str:
    """Name what sent bytes belong to: a phase of the run, or its part that no step has committed so far."""
    return phase if committed else f"open {phase}"


@dataclass(frozen=True, slots=True)
class ConnectionReport:
    """One TCP connection of a rank."""

    local: Endpoint
    remote: Endpoint
    store: bool
    """Whether it belongs to the ranks' store."""
    by_label: Mapping[str, int]
    """Bytes handed to TCP, each once, by `label_of`."""
    retransmitted_bytes: int
    """Bytes that TCP sent again."""
    on_wire_bytes: int
    """Data bytes that have left through the card since it was first read, retransmissions included."""
    segment_header_bytes: int
    """Bytes of Ethernet, IP and TCP headers of a segment, without selective acknowledgements."""
    again_on_wire_bytes: int = 0
    """Of `on_wire_bytes`, those sent again."""
    is_disturbed: bool = False
    """Whether anything was sent again, or arrived twice or out of order."""


@dataclass(frozen=True, slots=True)
class InterfaceReport:
    """The network card that carries a rank's connections, counted since it was first read."""

    name: str
    tx_bytes: int
    """Bytes sent."""
    tx_packets: int
    """Packets sent."""
    segmentation_offload: bool | None
    """Whether the kernel leaves cutting into segments to the card; None where it does not say."""


@dataclass(frozen=True, slots=True)
class RankReport:
    """All that a rank reports."""

    connections: tuple[ConnectionReport, ...]
    interface: InterfaceReport | None
    """None where no card could be read."""

    def encode(self) -> str:
        """Return the report as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> "RankReport":
        """Read what `encode` made."""
        value: Any = json.loads(text)
        for connection in value["connections"]:
            for end in ("local", "remote"):
                connection[end] = tuple(connection[end])
        connections = tuple(ConnectionReport(**connection) for connection in value["connections"])
        return cls(connections, None if value["interface"] is None else InterfaceReport(**value["interface"]))
