"""Where ranks meet before there is a process group: what each found is told to all, and an error of one is everyone's.

Without it a rank that cannot go on leaves the others waiting in torch for as long as a collective may take.
"""

import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import HashStore, Store  # pyright: ignore[reportPrivateImportUsage]

from pipeline.core.errors import ConfigError, ExitCode, PeerLost, UserError
from pipeline.core.exits import VARIABLE, ended_ranks
from pipeline.run.launch import network
from pipeline.run.launch.ranks import RankInfo
from pipeline.run.launch.secret import SECRET_VARIABLE, SecretFile, given_secret
from pipeline.run.launch.variables import AGENT_STORE
from pipeline.training.store import RankStore
from pipeline.training.store_server import StoreServer

LAST_WORDS_SECONDS = 20.0
"""How long a rank that has failed waits for others to tell them."""
LOOPBACK_ADDRESS = "127.0.0.1"
NUM_PORTS = 16
"""Of which rank 0 takes the first free one, behind that of torchrun's agent."""
SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.01, 0.5
TALK_AFTER_SECONDS = 15.0
MOST_NAMED = 8
# What no waiting mends; other answers of the resolver may be of a network that is still coming up.
_NO_SUCH_NAME = (socket.EAI_NONAME, socket.EAI_NODATA, socket.EAI_FAIL, socket.EAI_FAMILY)


class _Elsewhere(UserError):
    """A user error that another rank ran into."""


def same_error(rank: int, exit_code: int, message: str) -> UserError:
    """Return the error that another rank ran into, for this one to raise."""
    error = _Elsewhere(f"{message} (seen by rank {rank})")
    error.exit_code = ExitCode(exit_code)
    return error


class Meeting:
    """The ranks around one store, which the first of them holds; it becomes the process group's.

    Args:
        ranks: The place of this process among all.
        timeout_seconds: How long to wait for the others.
        directory: On a file system of all ranks, for the secret of ranks that were given none; None: they must be.
    """

    def __init__(self, ranks: RankInfo, timeout_seconds: float, directory: Path | None = None) -> None:
        self.timeout_seconds = timeout_seconds
        self.places: list[network.Place] = []
        """Where the ranks are, once that is known; for NCCL it stays empty."""
        self._ranks = ranks
        self._deadline = time.monotonic() + timeout_seconds
        self._talk_at = time.monotonic() + TALK_AFTER_SECONDS
        self._store: Store | None = None
        self._file = None if directory is None else SecretFile(directory, ranks)
        self.port = ranks.master_port
        """Of the store."""

    @property
    def store(self) -> Store:
        """The store, for the process group; there is one once the ranks have agreed on something."""
        assert self._store is not None
        return self._store

    @property
    def is_local(self) -> bool:
        """Whether all ranks are on one machine."""
        return self._ranks.num_nodes == 1

    @property
    def left_seconds(self) -> float:
        """What is left of this rank's patience."""
        return max(0.0, self._deadline - time.monotonic())

    def agree(self, topic: str, work: Callable[[], Any]) -> list[Any]:
        """Do `work` on every rank and return what all found, in their order; if it fails on one, all raise that.

        Args:
            topic: Name of what is agreed on, used once.
            work: Returns plain data.

        Raises:
            UserError: This rank's own or that of another one.
            PeerLost: A rank did not come in time, or has ended.
        """
        error: Exception | None = None
        word: dict[str, Any] = {}
        try:
            word["value"] = work()
        except Exception as raised:
            error = raised
            code = raised.exit_code if isinstance(raised, UserError) else ExitCode.INTERNAL
            word["error"] = [int(code), str(raised) if isinstance(raised, UserError) else repr(raised)]
            self._deadline = min(self._deadline, time.monotonic() + LAST_WORDS_SECONDS)
        try:
            words = self._exchange(topic, word)
        except UserError:
            if error is not None:
                raise error from None
            raise
        for rank, found in enumerate(words):
            if "error" in found:
                self._leave_together(topic)
                raise error or same_error(rank, *found["error"])
        return [found["value"] for found in words]

    def require_peers(self) -> None:
        """Raise PeerLost where Slurm's script knows of a rank that has ended."""
        ended = [rank for rank in ended_ranks(os.environ.get(VARIABLE)) if rank != self._ranks.rank]
        if ended:
            raise PeerLost(
                f"{_named(ended)} ended before the ranks had met: the cause is in what it said, here or in its own log."
            )

    def _exchange(self, topic: str, word: dict[str, Any]) -> list[dict[str, Any]]:
        """Return what every rank says on a topic; of ranks that have not come, once one has failed, nothing."""
        try:
            if self._store is None:
                self._store = self._open()
                if isinstance(self._store, RankStore):
                    self._store.leave_will(gone_key(self._ranks.rank))
            self._store.set(f"{topic}/{self._ranks.rank}", json.dumps(word))
            everyone = range(self._ranks.world_size)
            try:
                self._wait_for(topic, list(everyone))
            except PeerLost:
                words = [json.loads(self._store.get(f"{topic}/{rank}")) if self._has(topic, rank) else {}
                         for rank in everyone]  # fmt: skip
                if any("error" in found for found in words):
                    return words
                raise
            return [json.loads(self._store.get(f"{topic}/{rank}")) for rank in everyone]
        except dist.DistError as error:
            reason = str(error).partition("\n")[0][:200]
            raise PeerLost(f"Rank {self._ranks.rank} lost the others at {self.place} ({reason}).") from error
        finally:
            if self._ranks.is_first and self._file is not None:
                self._file.remove()

    def _wait_for(self, topic: str, ranks: list[int]) -> None:
        """Wait until these ranks have said something on a topic."""
        assert self._store is not None
        pause = SHORTEST_PAUSE_SECONDS
        while not self._store.check([f"{topic}/{rank}" for rank in ranks]):
            self._pause(pause, lambda: _named([rank for rank in ranks if not self._has(topic, rank)]))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _has(self, topic: str, rank: int) -> bool:
        assert self._store is not None
        return self._store.check([f"{topic}/{rank}"])

    def _leave_together(self, topic: str) -> None:
        """Say that the error was heard; the first rank, whose end is the store's, waits until all have."""
        assert self._store is not None
        self._deadline = min(self._deadline, time.monotonic() + LAST_WORDS_SECONDS)
        try:
            self._store.set(f"{topic}/heard/{self._ranks.rank}", "")
            if self._ranks.is_first:
                self._wait_for(f"{topic}/heard", list(range(self._ranks.world_size)))
        except (UserError, dist.DistError):
            pass  # who has not heard it by now loses the connection instead

    def _pause(self, seconds: float, missing: Callable[[], str], reason: str = "") -> None:
        """Wait a little.

        Args:
            seconds: How long.
            missing: Says what is waited for.
            reason: Why it is not there, where that is known.

        Raises:
            PeerLost: It is too late, or a rank has ended.
        """
        self.require_peers()
        if self.left_seconds == 0:
            because = f" ({reason})" if reason else ""
            raise PeerLost(
                f"Rank {self._ranks.rank} of {self._ranks.world_size} did not find the others at {self.place} in"
                f" {self.timeout_seconds:g} s: {missing()} did not come{because}. {self._remedy()}"
            )
        if time.monotonic() > self._talk_at and self._ranks.local_rank == 0:
            self._talk_at = math.inf
            print(f"rank {self._ranks.rank} waits for {missing()} at {self.place}, for up to"
                  f" {self.timeout_seconds:g} s (cluster.timeout_seconds)", file=sys.stderr, flush=True)  # fmt: skip
        time.sleep(min(seconds, self.left_seconds))

    def _remedy(self) -> str:
        if self._ranks.source == "slurm" and self._ranks.num_nodes == 1:
            return (
                "In a shell of `srun --pty` there is one of the step's ranks alone: start the command itself with"
                f" `srun --ntasks={self._ranks.world_size}`, or `unset SLURM_PROCID` and set cluster.devices."
            )
        return (
            "Are all ranks started, is that port open between the nodes, and is MASTER_ADDR an address of rank 0 that"
            " they reach? Where they start more slowly, raise cluster.timeout_seconds."
        )

    @property
    def place(self) -> str:
        """Address and port of the store."""
        address = self._address
        return f"{f'[{address}]' if ':' in address else address}:{self.port}"

    @property
    def _address(self) -> str:
        # Ranks of one machine need no other to find them, whatever its name stands for.
        return LOOPBACK_ADDRESS if self.is_local else self._ranks.master_addr

    def _open(self) -> Store:
        if self._ranks.world_size == 1:
            return HashStore()
        given = given_secret(os.environ)
        if given is None and self._file is None:
            raise ConfigError(
                f"The ranks were given no secret: set {SECRET_VARIABLE}, on every rank, to the same text."
            )
        if self._ranks.is_first:
            return self._host(given)
        while True:
            secret, reason = given, ""
            if secret is None and self._file is not None:
                secret = self._file.read()  # each time: that of an earlier start may have lain there
                reason = f"no {self._file.path} here, in which rank 0 leaves a secret"
            for port in self._ports:
                self.port = port
                store, reason = self._connect(secret, reason)
                if store is not None:
                    return store
            self._pause(LONGEST_PAUSE_SECONDS, lambda: "rank 0", reason)

    @property
    def _ports(self) -> Sequence[int]:
        """Where rank 0 may listen. torchrun's agent has a store of its own at the place that it names."""
        port = self._ranks.master_port
        is_guest = os.environ.get(AGENT_STORE) == "True" and self._ranks.source == "torchrun"
        return range(port + 1, min(port + 1 + NUM_PORTS, 2**16)) if is_guest else (port,)

    def _host(self, given: str | None) -> Store:
        """Listen, as rank 0: for ranks of one machine on no address that another one reaches."""
        listener, reason = None, None
        for port in self._ports:
            self.port = port
            try:
                if self.is_local:
                    listener = socket.create_server((LOOPBACK_ADDRESS, port))
                elif socket.has_dualstack_ipv6():
                    listener = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
                else:
                    listener = socket.create_server(("", port))
                break
            except OSError as error:
                reason = error
        if listener is None:
            raise ConfigError(
                f"Port {self._ports[0]} of {self._ranks.master_addr}, where the ranks are to meet, is another"
                " program's: set MASTER_PORT to a free one, or unset it, and one is chosen."
            ) from reason
        if given is None:
            assert self._file is not None
            given = self._file.make()
        secret = self._of_attempt(given)
        StoreServer(listener, secret)
        return RankStore((LOOPBACK_ADDRESS, self.port), secret, self.timeout_seconds)

    def _connect(self, secret: str | None, reason: str) -> tuple[Store | None, str]:
        """(The store, if rank 0 keeps one there; why there is none)."""
        place = (self._address, self.port)
        try:
            if secret is None:
                socket.getaddrinfo(*place)
                return None, reason
            return RankStore(place, self._of_attempt(secret), self.timeout_seconds), ""
        except socket.gaierror as error:
            if error.errno in _NO_SUCH_NAME:
                raise ConfigError(
                    f"MASTER_ADDR={self._address}, where rank 0 is, is no name that {socket.gethostname()}"
                    " knows: set MASTER_ADDR, on every rank, to an address of rank 0's machine."
                ) from error
            return None, error.strerror or "no answer to its name"
        except OSError as error:
            return None, error.strerror or str(error)

    @staticmethod
    def _of_attempt(secret: str) -> str:
        """So that a rank of torchrun's next attempt does not meet one of the last."""
        return f"{secret} {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def settle_places(meeting: Meeting, own: network.Place | None, found: Mapping[str, Sequence[str]]) -> None:
    """Settle where each rank is reached, and tell gloo; NCCL finds its way itself, on one machine over its loopback.

    Args:
        meeting: Of the ranks.
        own: Where this rank is, as far as it can tell alone; None, on every rank: NCCL is used.
        found: Interfaces of this machine and their addresses.

    Raises:
        ConfigError: A rank cannot be reached by others.
    """
    if own is None:
        if meeting.is_local:
            os.environ.setdefault(network.NCCL_VARIABLE, network.LOOPBACK)
        return
    alone = [network.Place(**place) for place in meeting.agree("alone", own.to_json)]
    settled = meeting.agree("place", lambda: network.settle(own, alone, found).to_json())
    places = [network.Place(**place) for place in settled]
    network.check_apart(places)
    network.use(places[own.rank])
    meeting.places = places


def gone_key(rank: int) -> str:
    """Return the key that is in the store once a rank's connection to it has ended."""
    return f"gone/{rank}"


def _named(ranks: list[int]) -> str:
    more = f" and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:MOST_NAMED]))}{more}"
