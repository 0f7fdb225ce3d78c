"""How ranks tell one another what they counted and what they are: through torch's store, not through collectives.

A collective would change what is being compared, and texts need no pickle, which a stranger could send.
"""

from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

HEARD = "/heard"


class StoreExchange:
    """Texts from all ranks to rank 0 and back, through the process group's store. All calls are collective."""

    def __init__(self, rank: int, world_size: int, *, name: str = "ledger", store: Store | None = None) -> None:
        """Exchange as `rank` of `world_size`.

        Args:
            rank: Rank of this process.
            world_size: How many ranks there are.
            name: Tells apart exchanges that share a store.
            store: The ranks' store; None: that of the default process group.
        """
        self.rank, self.world_size, self._name = rank, world_size, name
        self._store = store or dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]
        self._round = 0

    def wait_at_most(self, seconds: float) -> None:
        """From here on this rank waits so long for another one's text."""
        self._store.set_timeout(timedelta(seconds=seconds))

    def gather(self, text: str) -> list[str] | None:
        """Return every rank's text on rank 0, and None elsewhere."""
        self._round += 1
        if self.rank != 0:
            self._store.set(self._key(self.rank), text)
            return None
        return [text, *(self._take(self._key(rank)) for rank in range(1, self.world_size))]

    def share(self, text: str | None) -> str:
        """Return rank 0's text on every rank; the others give None.

        Rank 0 returns when all have it: should that rank end now, the store may end with it.
        """
        self._round += 1
        if self.rank != 0:
            told = self._take(self._key(self.rank))
            self._store.set(self._key(self.rank) + HEARD, "")
            return told
        assert text is not None
        for rank in range(1, self.world_size):
            self._store.set(self._key(rank), text)
        for rank in range(1, self.world_size):
            self._take(self._key(rank) + HEARD)
        return text

    def barrier(self) -> None:
        """Wait until every rank is here."""
        is_first = self.gather("null") is not None
        self.share("null" if is_first else None)

    def _key(self, rank: int) -> str:
        return f"squeezewire/{self._name}/{self._round}/{rank}"

    def _take(self, key: str) -> str:
        text = self._store.get(key).decode()  # waits until it is there
        self._store.delete_key(key)
        return text
