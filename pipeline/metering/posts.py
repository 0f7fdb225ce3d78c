"""What the ranks tell rank 0, through a store of their own. They wait for one another at the begin and at the end only.

A collective would change what is counted, and texts need no pickle. The program's store tells only where ours is: it
dies when the program says so, and a finished program's port is free again.
"""

import json
import os
import socket
import time
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from pipeline.core.errors import ConfigError

BEGIN_SECONDS = 10.0
"""How long the ranks wait for one another when a group was made; they have just met."""
PLACE_SECONDS = 30.0
"""How long the others wait for rank 0, which may be ending an earlier record."""
POLL_SECONDS = 0.02


class RefusedError(Exception):
    """Rank 0 cannot write the run, and has said why."""


class Posts:
    """Values by tag, one from each rank.

    Args:
        store: The store of the default process group; it is not kept.
        rank: Rank of this process.
        world_size: How many ranks there are.
        number: Of this meeting among those of a process, which may share a store.

    Raises:
        RefusedError: Rank 0 does not write the run down.
        ConfigError: Rank 0 said nothing.
    """

    def __init__(self, store: Store, rank: int, world_size: int, number: int) -> None:
        self._rank, self._world_size = rank, world_size
        self._own: dict[str, Any] = {}
        self._store: TCPStore | None = None
        if world_size == 1:
            return
        patience = timedelta(seconds=BEGIN_SECONDS)
        if rank == 0:
            host = reachable_host(store)
            self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience)
            _announced(store, number).set("place", json.dumps([host, self._store.port]))
            return
        text = _take(_announced(store, number), "place", time.monotonic() + PLACE_SECONDS)
        if text is None:
            raise ConfigError("rank 0 did not report: start all ranks under pipeline.meter.")
        place = json.loads(text)
        if place is None:
            raise RefusedError
        self._store = TCPStore(place[0], place[1], is_master=False, timeout=patience)

    @staticmethod
    def refuse(store: Store, number: int) -> None:
        """Tell the others, on rank 0, that there is nothing to meet for."""
        _announced(store, number).set("place", json.dumps(None))

    @property
    def port(self) -> int:
        """TCP port of the store; -1 where there is none."""
        return -1 if self._store is None else self._store.port

    def post(self, tag: str, value: Any) -> None:
        """Leave a value for rank 0, and go on."""
        if self._rank == 0 or self._store is None:
            self._own = {tag: value}
        else:
            self._store.set(f"{tag}/{self._rank}", json.dumps(value))

    def let_go(self, patience_seconds: float) -> None:
        """Let rank 0 go first: called by all when they leave; the others wait for it, but not for long."""
        if self._store is None:
            return
        if self._rank == 0:
            self._store.set("gone", "")
        else:
            _take(self._store, "gone", time.monotonic() + patience_seconds)

    def has_all(self, tag: str) -> bool:
        """Tell, on rank 0, whether every rank has posted; asks once and does not wait."""
        return self._store is None or self._store.check([f"{tag}/{rank}" for rank in range(1, self._world_size)])

    def collect(self, tag: str, patience_seconds: float) -> list[Any]:
        """Return, on rank 0, the value of every rank; None for one that has posted nothing in time."""
        values: list[Any] = [self._own.get(tag)]
        deadline = time.monotonic() + patience_seconds
        for rank in range(1, self._world_size):
            assert self._store is not None
            text = _take(self._store, f"{tag}/{rank}", deadline)
            values.append(None if text is None else json.loads(text))
            if text is not None:
                self._store.delete_key(f"{tag}/{rank}")
        return values


def _announced(store: Store, number: int) -> PrefixStore:
    return PrefixStore(f"{__name__}/{number}", store)


def _take(store: Store, key: str, deadline: float) -> bytes | None:
    """Return a value as soon as it is there; None after the deadline. Waiting inside the store would log its end."""
    while not store.check([key]):
        if time.monotonic() >= deadline:
            return None
        time.sleep(POLL_SECONDS)
    return store.get(key)


def base_of(store: Any) -> Any:
    """Return the store that others are views of."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return store


def port_of(store: Any) -> int:
    """Return the TCP port of a store; -1 where it has none."""
    return int(getattr(base_of(store), "port", -1))


def may_host(store: Any) -> bool:
    """Tell whether rank 0 may hold the program's TCP store: not where torchrun's agent does."""
    return port_of(store) >= 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def reachable_host(store: Any) -> str:
    """Return where the other ranks reach this process: as they reach the store if that is here, else towards it."""
    host = getattr(base_of(store), "host", None) or socket.gethostname()
    try:
        family, *_, address = socket.getaddrinfo(host, max(1, port_of(store)), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as towards:  # sends nothing
            towards.connect(address)
            own = towards.getsockname()[0]
        return host if own == address[0] else own
    except OSError:
        return "localhost"
