"""What `lab` may be told."""

from dataclasses import dataclass

from pipeline.core.typed import PathText, one_of, require
from pipeline.core.units import bits_per_second

MAX_SERVERS = 200  # addresses of the lab's subnet
PLACEMENTS = ("contiguous", "interleaved")


@dataclass(frozen=True, kw_only=True)
class LabCluster:
    """Cluster of network namespaces, whether `lab` runs a command on it or others their trainings."""

    servers: int | None
    ranks_per_server: int = 1
    bandwidth: str | None = None
    """Rate of each server's link, in each direction: 1gbit, 100mbit, 2.5gbit. Null: as fast as the machine."""
    placement: str = "contiguous"
    """How ranks are dealt to servers. Of 4 ranks on 2 servers: `contiguous` 0,1 and 2,3; `interleaved` 0,2 and 1,3."""
    offloads: bool = False
    """True leaves TSO, GSO and GRO on: faster, but interfaces then count packets before segmentation, with one header
    for many frames."""


@dataclass(frozen=True, kw_only=True)
class TrainingsLab(LabCluster):
    """Whether each training of a command that starts several runs on such a cluster."""

    servers: int | None = None
    """Null: no; cluster.devices ranks of this machine. Else how many, and cluster.devices is not used."""


@dataclass(frozen=True, kw_only=True)
class _LabRecord:
    """Where lab.json lies; a base of its own, so that these keys stand first in `--help`."""

    name: str = "lab"
    """The directory of lab.json under run_root. It may be that of the training."""
    run_root: PathText = "runs"


@dataclass(frozen=True, kw_only=True)
class LabConfig(LabCluster, _LabRecord):
    """Run the command that follows `--` on every rank of a cluster made of network namespaces.

    Needs iproute2 and ethtool, and root or a kernel that lets ordinary users make user namespaces. The ranks reach one
    another and nothing else; processors, memory and disks are the machine's own, shared by all.
    """

    servers: int = 2
    num_threads: int | None = None
    """Compute threads per rank. Null: OMP_NUM_THREADS, else the cores divided by all ranks."""

    def __post_init__(self) -> None:
        one_of("placement", self.placement, PLACEMENTS)
        require(
            1 <= self.servers <= MAX_SERVERS,
            f"servers={self.servers} must be from 1 to {MAX_SERVERS}.",
        )
        require(self.ranks_per_server >= 1, f"ranks_per_server={self.ranks_per_server} must be at least 1.")
        require(self.num_threads is None or self.num_threads >= 1, f"num_threads={self.num_threads} must be positive.")
        if self.bandwidth is not None:
            bits_per_second(self.bandwidth)

    @property
    def bandwidth_bits_per_second(self) -> int | None:
        """Rate of each server's link, in each direction; None: not limited."""
        return None if self.bandwidth is None else bits_per_second(self.bandwidth)
