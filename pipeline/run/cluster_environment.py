"""Lightning's view of `RankInfo`."""

import os
from typing import NoReturn

from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from typing_extensions import override

from pipeline.errors import ConfigError
from pipeline.run.ranks import RankInfo


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
            self._refuse("world size", size, self._ranks.world_size)

    @override
    def global_rank(self) -> int:
        return self._ranks.rank

    @override
    def set_global_rank(self, rank: int) -> None:
        """Lightning tells the rank it derived from node and local rank. It must be the true one."""
        if rank != self._ranks.rank:
            self._refuse("rank", rank, self._ranks.rank)

    @override
    def local_rank(self) -> int:
        return self._ranks.local_rank

    @override
    def node_rank(self) -> int:
        return self._ranks.node_rank

    def _refuse(self, what: str, derived: int, told: int) -> NoReturn:
        raise ConfigError(
            f"Lightning derives {what} {derived}, but this process was started as {told}"
            f" (host {os.uname().nodename}): start the same number of ranks on every node."
        )
