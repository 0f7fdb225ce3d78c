"""Lightning's view of `RankInfo`."""

import os

from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from typing_extensions import override

from pipeline.core.errors import ConfigError
from pipeline.run.launch.ranks import RankInfo


class RankEnvironment(ClusterEnvironment):
    """One environment for every way ranks are started, so that Lightning guesses nothing.

    Lightning starts no process: each rank exists already and knows its place.
    """

    def __init__(self, ranks: RankInfo) -> None:
        super().__init__()
        self._ranks = ranks

    @property
    @override
    def creates_processes_externally(self) -> bool:
        return True

    @property
    @override
    def main_address(self) -> str:
        return self._ranks.master_addr

    @property
    @override
    def main_port(self) -> int:
        return self._ranks.master_port

    @staticmethod
    @override
    def detect() -> bool:
        """Never chosen by detection: it is always passed explicitly."""
        return False

    @override
    def world_size(self) -> int:
        return self._ranks.world_size

    @override
    def set_world_size(self, size: int) -> None:
        """Lightning tells the size it derived from devices and nodes. It must be the true one."""
        if size != self._ranks.world_size:
            raise ConfigError(
                f"Lightning derives world size {size}, but this process was started as one of {self._ranks.world_size}"
                f" (host {os.uname().nodename}): start the same number of ranks on every node."
            )

    @override
    def global_rank(self) -> int:
        return self._ranks.rank

    @override
    def set_global_rank(self, rank: int) -> None:
        """Lightning tells the rank it derived from node and local rank. The one this process was started as stands.

        The derivation takes ranks for contiguous. Where they are dealt out to the nodes in turn (Slurm's
        `--distribution=cyclic`) it is another process's rank. Nothing in Lightning 2.6 depends on it: strategies and
        samplers ask `global_rank`.
        """

    @override
    def local_rank(self) -> int:
        return self._ranks.local_rank

    @override
    def node_rank(self) -> int:
        return self._ranks.node_rank
