"""A rank of the lab that is none: two ranks train on two servers, and a third server is a stranger's.

    pipeline.lab servers=3 -- python stranger.py PLACE -- OVERRIDES

Ranks 0 and 1 train as started by hand, without a secret in their environment, and leave the ports that are listened at
on their server in PLACE. The stranger makes its attempts before they begin (`early`), while they meet (`meeting`) and
while they train (`late`), and notes each in `PLACE/attempts`. Its pickles would make `PLACE/canary`.
"""

import contextlib
import os
import pickle
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MASTER = ("10.77.0.1", 29500)
LISTENS = "0A"  # TCP_LISTEN, <net/tcp_states.h>
SETTLED_SECONDS = 3.0


def listening() -> list[int]:
    """Ports at which anybody listens in this network namespace, those of the loopback left out."""
    found = set()
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(path).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, port = local.split(":")
            if state == LISTENS and not address.endswith("0100007F"):
                found.add(int(port, 16))
    return sorted(found)


def train(place: Path, overrides: list[str]) -> int:
    """Be a rank; tell the stranger the ports."""
    rank = os.environ["RANK"]
    for name in ("SQUEEZEWIRE_SECRET", "SQUEEZEWIRE_LAB"):
        del os.environ[name]
    wait_for(place / "early")
    training = subprocess.Popen(
        [sys.executable, str(HERE / "train_recorded.py"), *overrides],
        env={**os.environ, "WORLD_SIZE": "2", "FED_TO": str(place)},
    )
    while training.poll() is None:
        (place / f"new.{rank}").write_text(" ".join(map(str, listening())))
        (place / f"new.{rank}").rename(place / f"ports.{rank}")
        time.sleep(0.1)
    return training.returncode


def wait_for(path: Path) -> None:
    """Until it is there, or the training is over without it."""
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


class _Canary:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


class Stranger:
    """Knows the addresses and the ports, the code, and no secret."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.held: list[socket.socket] = []

    def attempt(self, when: str, what: str, work: Callable[[], object]) -> None:
        """Do it, and note it."""
        try:
            outcome = repr(work())
        except Exception as error:
            outcome = type(error).__name__
        with (self.place / "attempts").open("a") as file:
            file.write(f"{when} {what}: {outcome}\n")

    def everywhere(self, what: bytes, *, hold: bool = False) -> int:
        """Connect to every port of both servers and say something. Returns to how many."""
        num = 0
        for rank in (0, 1):
            path = self.place / f"ports.{rank}"
            for port in map(int, path.read_text().split()) if path.exists() else ():
                with contextlib.suppress(OSError):
                    connection = socket.create_connection((f"10.77.0.{rank + 1}", port), timeout=2)
                    connection.sendall(what)
                    num += 1
                    if hold:
                        self.held.append(connection)
                    else:
                        connection.close()
        return num

    def as_store_client(self) -> object:
        """As one who deletes what it finds."""
        import torch.distributed as dist

        patience = timedelta(seconds=2)
        store = dist.TCPStore(*MASTER, 2, False, patience, wait_for_workers=False)  # pyright: ignore[reportPrivateImportUsage]
        return [store.delete_key(key) for key in store.list_keys()]

    def as_rank_1(self) -> object:
        """As torch itself would join."""
        import torch.distributed as dist

        dist.init_process_group("gloo", f"tcp://{MASTER[0]}:{MASTER[1]}", timedelta(seconds=2), 2, 1)
        words: list[Any] = [None, None]
        dist.all_gather_object(words, _Canary(self.place / "canary"))
        return words

    def with_other_secret(self) -> object:
        """As a rank of another job."""
        from pipeline.training.store import RankStore

        return RankStore(MASTER, "another job's secret", 2.0)

    def crowd(self) -> int:
        """More silent connections to the store than it hears at a time. Returns how many."""
        self.held += [socket.create_connection(MASTER, 2) for _ in range(200)]
        return len(self.held)

    def round(self, when: str) -> None:
        """Everything once."""
        canary = pickle.dumps(_Canary(self.place / "canary"))
        self.attempt(when, "client of the store", self.as_store_client)
        self.attempt(when, "rank 1", self.as_rank_1)
        self.attempt(when, "another secret", self.with_other_secret)
        self.attempt(when, "silent everywhere", lambda: self.everywhere(b"", hold=True))
        self.attempt(when, "pickles everywhere", lambda: self.everywhere(canary, hold=True))
        self.attempt(when, "garbage everywhere", lambda: self.everywhere(random.Random(when).randbytes(4096)))
        self.attempt(when, "crowd", self.crowd)


def be_stranger(place: Path) -> None:
    """Make all attempts."""
    import torch.distributed  # noqa: F401  # before the ranks begin

    stranger = Stranger(place)
    stranger.round("early")
    (place / "early").touch()
    wait_for(place / "ports.0")
    deadline = time.monotonic() + 60
    while "29500" not in (place / "ports.0").read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    stranger.round("meeting")
    wait_for(place / "fired")  # rank 0 trains, and waits for `late`
    stranger.round("late")
    (place / "late").touch()


if __name__ == "__main__":
    directory, overrides = Path(sys.argv[1]), sys.argv[3:]
    if os.environ["RANK"] == "2":
        be_stranger(directory)
    else:
        sys.exit(train(directory, overrides))
