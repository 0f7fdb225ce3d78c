"""What the ranks tell rank 0, through the store they met at. Nobody waits but rank 0, once at the begin and at the end.

A collective would change what is counted, and texts need no pickle.
"""

import json
import time
from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store

POLL_SECONDS = 0.02


class Posts:
    """Values by tag, one from each rank.

    Args:
        store: The store of the default process group.
        rank: Rank of this process.
        world_size: How many ranks there are.
        number: Of this meeting among those of a process, which may share a store.
    """

    def __init__(self, store: Store, rank: int, world_size: int, number: int) -> None:
        self._store = PrefixStore(f"squeezewire/meter/{number}", store)
        self._rank, self._world_size = rank, world_size
        self._own: dict[str, Any] = {}

    def post(self, tag: str, value: Any) -> None:
        """Leave a value for rank 0, and go on."""
        if self._rank == 0:
            self._own = {tag: value}
        else:
            self._store.set(f"{tag}/{self._rank}", json.dumps(value))

    def has_all(self, tag: str) -> bool:
        """Tell, on rank 0, whether every rank has posted; asks once and does not wait."""
        return self._store.check([f"{tag}/{rank}" for rank in range(1, self._world_size)])

    def collect(self, tag: str, patience_seconds: float) -> list[Any]:
        """Return, on rank 0, the value of every rank; None for one that has posted nothing in time."""
        values: list[Any] = [self._own.get(tag)]
        deadline = time.monotonic() + patience_seconds
        for rank in range(1, self._world_size):
            key = f"{tag}/{rank}"
            left = timedelta(seconds=max(POLL_SECONDS, deadline - time.monotonic()))
            try:
                self._store.wait([key], left)
                values.append(json.loads(self._store.get(key)))
                self._store.delete_key(key)
            except RuntimeError:  # DistStoreError: it is not there
                values.append(None)
        return values


def port_of(store: Any) -> int:
    """Return the TCP port of a store; -1 where it has none."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return int(getattr(store, "port", -1))
