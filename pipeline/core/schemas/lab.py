"""`lab.json`: a command run on every rank of a cluster of network namespaces, and what each interface counted."""

from typing import Literal, TypedDict


class LabInterfaceJson(TypedDict):
    """What a server's interface counted since the lab began."""

    server: int
    """Index of the server, from 0."""
    interface: str
    """Name of the network interface."""
    address: str
    """Address of the server in the lab's subnet."""
    tx_bytes: int
    """Bytes sent, headers included."""
    tx_packets: int
    """Packets sent: frames, or with `offloads` packets before segmentation."""
    rx_bytes: int
    """Bytes received, headers included."""
    rx_packets: int
    """Packets received."""


class LabJson(TypedDict):
    """`lab.json`: the cluster, the command, and what crossed the links."""

    schema: Literal[1]
    """Version of this format."""
    servers: int
    """Number of servers."""
    ranks_per_server: int
    """Ranks on each server."""
    placement: str
    """`contiguous` or `interleaved`."""
    server_of_rank: list[int]
    """Index of each rank's server, from 0."""
    bandwidth_bits_per_second: int | None
    """Bits per second of each server's link in each direction; null: as fast as the machine."""
    offloads: bool
    """Whether segmentation offloads were on."""
    command: list[str]
    """Command that every rank ran."""
    exit_code: int
    """Exit code of the ranks together."""
    seconds: float
    """Seconds that the command took."""
    interfaces: list[LabInterfaceJson]
    """Counters of each server's interface."""
